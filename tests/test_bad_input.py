"""Bad input: one line that names what is wrong, exit status 2 (or a run recorded as failed), nothing finished lost."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from qatbench.bench.fit import load, save
from support import SQUARES, TINY


def refused(answer, *fragments: str) -> str:
    """The one line on stderr of a command that was refused."""
    assert answer.status == 2, answer
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("qatbench: ")
    assert answer.out == ""
    for fragment in fragments:
        assert fragment in lines[0]
    return lines[0]


def complete(line: list[str | Path], **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qatbench", *map(str, line)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


# Names, bits and numbers

RUN = ("run", "--method", "lsq")


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ((), ()),
        (("rnu",), ("'rnu'", "'run'")),
        (("run",), ("'--method'", "qatbench run --help")),
        (("run", "--methd", "lsq"), ("--methd", "did you mean '--method'")),
        (("list", "method"), ("'method'", "'methods'")),
        ((*RUN, "--seed", "one"), ("'--seed'", "integer")),
        (("run", "--method", "lqs"), ("unknown method 'lqs'", "did you mean 'lsq'")),
        (("run", "--method", "kd+lqs"), ("unknown method 'lqs'", "did you mean 'lsq'")),
        (("run", "--method", "lsq+"), ("'lsq+'", "e.g. kd+lsq")),
        ((*RUN, "--data", "optdigit"), ("unknown data set 'optdigit'", "did you mean 'optdigits'")),
        ((*RUN, "--network", "resnet9"), ("unknown network 'resnet9'", "did you mean 'resnet")),
        (("sweep", "quikstart"), ("unknown suite 'quikstart'", "did you mean 'quickstart'")),
        ((*RUN, "--set", "epohcs=5"), ("unknown key 'epohcs'", "did you mean 'epochs'")),
        ((*RUN, "--set", "lsq.epochs=5"), ("params of lsq", "'epochs'")),
        (("run", "--method", "kd+lsq", "--set", "kd.wieght=1"), ("params of kd", "did you mean 'weight'")),
        ((*RUN, "--set", "optdigits.limt=5"), ("data_params of optdigits", "did you mean 'limit'")),
        ((*RUN, "--set", "kd.weight=1"), ("'kd' is neither a method of this run nor its data set",)),
        ((*RUN, "--set", "optdigits.limit=.nan"), ("optdigits", "limit")),
        ((*RUN, "--set", "optdigits.limit=2020-01-01"), ("optdigits", "limit")),
        ((*RUN, "--set", "optdigits.limit=2020-13-45"), ("optdigits", "limit")),
        ((*RUN, "--set", "optdigits.domains=[scaned]"), ("'scaned'", "did you mean 'scanned'")),
        ((*RUN, "--set", "params=5"), ("params", "e.g. kd.weight=0.9")),
        ((*RUN, "--set", "data_params.limit=5"), ("'data_params'",)),
        ((*RUN, "--set", "epochs"), ("expected KEY=VALUE",)),
        ((*RUN, "--set", "epochs="), ("epochs=None",)),
        ((*RUN, "--set", "lr=[1"), ("lr='[1'",)),
        ((*RUN, "--set", "lr=true"), ("lr=True", "not true or false")),
        ((*RUN, "--set", "lr=yes"), ("lr='yes'", "number")),
        ((*RUN, "--set", "lr=190:20:30"), ("lr='190:20:30'", "number")),
        ((*RUN, "--set", "seed=1_000"), ("--set seed=1_000", "1_000")),
        ((*RUN, "--set", "lr=!!bool x"), ("--set lr=!!bool x", "tag")),
        ((*RUN, "--set", "lsq.x={a: 1, a: 2}"), ("--set lsq.x=", "'a' stands twice")),
        ((*RUN, "--set", "lr=" + "[" * 2000), ("--set lr=[", "in each other")),
        ((*RUN, "--set", "plan=/dev/zero"), ("plan", "device")),
        ((*RUN, "--bits", "w4b4"), ("'w4b4'", "e.g. w4a4")),
        ((*RUN, "--bits", "w0a4"), ("'w0a4'", "weights take 1 to 8 bits")),
        ((*RUN, "--bits", "w33a4"), ("'w33a4'", "weights take 1 to 8 bits")),
        ((*RUN, "--bits", "w4a9"), ("'w4a9'", "activations take 1 to 8 bits")),
        ((*RUN, "--bits", "w1a4"), ("lsq takes 2 to 8 bits for weights",)),
        ((*RUN, "--bits", "w32a32"), ("use method fp32",)),
        ((*RUN, "--seed", "-1"), ("seed=-1", "greater than or equal to 0")),
        ((*RUN, "--set", "epochs=-1"), ("epochs=-1", "greater than or equal to 0")),
        ((*RUN, "--set", "float_epochs=-1"), ("float_epochs=-1",)),
        ((*RUN, "--set", "batch=0"), ("batch=0",)),
        ((*RUN, "--set", "lr=.nan"), ("lr=nan", "finite")),
        ((*RUN, "--set", "precision=fp16"), ("use bf16 or fp32",)),
        ((*RUN, "--set", "augment=shfit"), ("shfit", "shift")),
        ((*RUN, "--protocol", "lodo"), ("lodo",)),
        ((*RUN, "--protocol", "lodo:fnts"), ("'fnts'", "did you mean 'fonts'")),
        ((*RUN, "--device", "gpu"), ("'gpu'", "use auto, cpu, cuda or cuda:N")),
        ((*RUN, "--device", "cuda:²"), ("'cuda:²'", "use auto, cpu, cuda or cuda:N")),
        ((*RUN, "--device", "cuda:" + "9" * 5000), ("use auto, cpu, cuda or cuda:N",)),
        (("sweep", "quickstart", "--device", "cuda:²"), ("'cuda:²'", "use auto, cpu, cuda or cuda:N")),
        ((*RUN, "--device", "cuda:99"), ("'cuda:99'", "use auto or cpu")),
        ((*RUN, "--device", "tpu", "--data", "office31"), ("'tpu'", "use auto, cpu, cuda or cuda:N")),
        ((*RUN, "--set", "batch=4", "--set", "accumulate=8"), ("accumulate=8", "batch=24 or more")),
        ((*RUN, "--set", "calibration=1000000000"), ("calibration", "100000")),
        (("sweep", "quickstart", "--device", "cuda:99"), ("'cuda:99'", "use auto or cpu")),
        (("sweep", "quickstart", "--workers", "0"), ("--workers 0", "at least 1")),
        (("sweep", "quickstart", "--time-limit", "soon"), ("'soon'", "2h")),
        (("status", "quickstart"), ("'quickstart' was never launched",)),
        (("report",), ("no results", "qatbench quickstart")),
        (("report", "quickstart"), ("quickstart", "no")),
        (("dash",), ("nothing to look at", "qatbench quickstart")),
        (("probe",), ("'RUN", "qatbench probe --help")),
        (("probe", "0123"), ("there is no run '0123'",)),
        (("probe", "0123", "--images", "many"), ("'--images'", "integer")),
        (("probe", "0123", "--images", "0"), ("images=0", "greater than or equal to 1")),
        (("probe", "0123", "--directions", "-1"), ("directions=-1",)),
        (("probe", "0123", "--iterations", "0"), ("iterations=0",)),
        (("probe", "0123", "--seed", "-1"), ("seed=-1",)),
        (("probe", "0123", "--iteratons", "3"), ("--iteratons", "did you mean '--iterations'")),
        (("check", "nothing.py"), ("nothing.py", "no such file")),
        (("new", "method", "my-method"), ("'my-method'", "e.g. my_method")),
        (("new", "method", "class"), ("'class'",)),
        (("new", "method", "lsq"), ("'lsq' exists already",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_request_is_refused_in_one_line(cli, tmp_path, monkeypatch, line, fragments) -> None:
    """Without it, a typing error ends in a traceback, or in hours of training something else."""
    monkeypatch.chdir(tmp_path)
    answer = cli(*line)
    if line:
        refused(answer, *fragments)
    else:
        assert answer.status == 2
        assert "Commands:" in answer.out
    assert not list(tmp_path.glob(f"runs/{'[0-9a-f]' * 16}")), "a run was begun"


def test_a_probe_that_cannot_be_drawn_or_measured(cli, tiny, tmp_path) -> None:
    """Without it, a failed run or a folder that is not there ends in a traceback after minutes of work."""
    done = json.loads(tiny("lsq", "--json").out)["run_id"]
    failed = tiny("lsq", "--set", "lr=1e30", "--json")
    assert failed.status == 1
    where = (
        "--plugin",
        SQUARES,
        "--store",
        tmp_path / "runs",
        "--images",
        "16",
        "--directions",
        "1",
        "--iterations",
        "1",
    )
    run_id = json.loads(failed.out)["run_id"]
    refused(cli("probe", done, run_id, *where), f"run {run_id} is failed", "only a run that is done")
    refused(cli("probe", done, "--out", tmp_path / "no" / "flat.png", *where), "cannot write", "--out")
    assert not list(tmp_path.rglob("*.tmp-*"))


# Suites

SUITE = "method: [fp32, lsq]\n"


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("- fp32\n- lsq\n", ("holds a list", "e.g. `method: [fp32, lsq]`")),
        ("lsq", ("holds a str",)),
        ("", ("is empty",)),
        ("# nothing\n", ("is empty",)),
        (bytes(range(256)) * 8, ("is not text",)),
        (b"method: lsq\0\n", ("is not YAML",)),
        ("method: [fp32, lsq", ("is not YAML",)),
        ("&a [*a]: 1", ("line 1", "a key is a name")),
        (SUITE + "lr: 0.1\nepochs: 3\nlr: 0.5\n", ("line 4", "'lr' stands twice")),
        (SUITE + "description: !!timestamp x\n", ("line 2", "tag '!!timestamp'")),
        (SUITE + "params: {lqs: {}}\n", ("'lqs' is no method of it", "did you mean 'lsq'")),
        (SUITE + "seed: [0x10]\n", ("line 2", "0x10")),
        (SUITE + "seed: [true]\n", ("seed", "not true or false")),
        ("data: optdigits\n", ("'method' is missing",)),
        ("method: []\n", ("method",)),
        ("method: lqs\n", ("unknown method 'lqs'", "did you mean 'lsq'")),
        (SUITE + "epohcs: 3\n", ("unknown key 'epohcs'", "did you mean 'epochs'")),
        (SUITE + "bits: [w4a4, w4b4]\n", ("'w4b4'", "e.g. w4a4")),
        (SUITE + "epochs: -1\n", ("epochs=-1",)),
        (SUITE + "seed: [0, -1]\n", ("seed", "-1")),
        (SUITE + "seed: many\n", ("seed", "'many'")),
        (SUITE + "name: ../../x\n", ("name",)),
        (SUITE + "params: {kd: {weight: 1}}\ndata_params: 3\n", ("data_params",)),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str | bytes) else "",
)
def test_suite_is_refused_in_one_line(cli, tmp_path, content, fragments) -> None:
    """Without it, a broken suite file ends in a traceback, or starts the wrong runs."""
    file = tmp_path / "mine.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(cli("sweep", file, "--store", tmp_path / "runs", "--dry-run"), *fragments)


def test_large_missing_and_directory_suites_are_refused(cli, tmp_path) -> None:
    """Without it, a wrong path is read for minutes, or ends in a traceback."""
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(50_000_000)
    (tmp_path / "folder.yaml").mkdir()
    for name, fragment in (("large", "50 MB"), ("folder", "is a directory"), ("nowhere", "does not exist")):
        refused(cli("sweep", tmp_path / f"{name}.yaml", "--store", tmp_path / "runs"), f"{name}.yaml", fragment)


# Paths and variables

LONG = "x" * 300


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        (("new", "method", "m" * 300), ("method name", "up to 64")),
        (("new", "method", "mine", "--dir", LONG), ("folder", "too long")),
        ((*RUN, "--store", LONG), ("store", "too long", "another path")),
        (("report", "--store", LONG), ("store", "too long")),
        (("dash", "--store", f"there/{LONG}"), ("store", "too long")),
        (("report", "--store", "~nobody_of_that_name"), ("store", "no such user")),
        ((*RUN, "--data-root", LONG), ("data root", "too long")),
        ((*RUN, "--plugin", f"{LONG}.py"), ("plugin", "too long")),
        ((*RUN, "--plugin", "loop.py"), ("plugin", "symbolic links")),
        ((*RUN, "--plugin", "~nobody_of_that_name/x.py"), ("plugin", "no such user")),
        ((*RUN, "--data", f"imagefolder:/{LONG}"), ("folder", "too long")),
        ((*RUN, "--data", "imagefolder:~nobody_of_that_name/x"), ("folder", "no such user")),
        (("sweep", f"{LONG}.yaml"), ("too long",)),
        (("sweep", "loop.yaml"), ("loop.yaml", "symbolic links")),
        (("sweep", "pipe.yaml"), ("pipe.yaml", "a pipe or a device")),
        ((*RUN, "--set", f"plan={LONG}"), ("plan", "too long")),
        ((*RUN, "--set", f"plan={'y' * 5000}"), ("plan", "too long")),
        ((*RUN, "--method", "z" * 5000), ("unknown method",)),
        ((*RUN, "--data", "a\nb\x1b[31m"), ("unknown data set 'a\\nb\\x1b[31m'",)),
        ((*RUN, "--set", "a\nb=1"), ("unknown key 'a\\nb'",)),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_path_that_no_file_can_have_is_refused(cli, tmp_path, monkeypatch, line, fragments) -> None:
    """Without it, a long name, a circle of links or an unknown user is a traceback, and a pipe a wait without end."""
    monkeypatch.chdir(tmp_path)
    for name in ("loop.py", "loop.yaml"):
        (tmp_path / name).symlink_to(name)
    os.mkfifo(tmp_path / "pipe.yaml")
    assert len(refused(cli(*line), *fragments)) < 2100


def test_doctor_says_what_is_wrong_with_a_path(cli) -> None:
    """Without it, the command that should say what is wrong ends in a traceback itself."""
    answer = cli("doctor", "--store", LONG, "--data-root", LONG)
    assert (answer.status, answer.err) == (1, "")
    assert "too long" in answer.out


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("QATBENCH_DECODED_GB", value) for value in ("inf", "-inf", "nan", "-1", "1e400", "1e30", "much", "0x10")),
        *(("QATBENCH_DECODERS", value) for value in ("²", "-1", "1e3", "99999999", "inf", "many")),
        ("QATBENCH_DATA", "/nowhere/at/all"),
        ("QATBENCH_DATA", LONG),
        ("QATBENCH_STORE", LONG),
        ("QATBENCH_STORE", "/dev/null"),
    ],
)
def test_variable_that_cannot_be_is_refused(cli, tmp_path, monkeypatch, variable, value) -> None:
    """Without it, a variable set long ago is a traceback, hours after the start, or a thousand processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    refused(cli(*RUN), value if len(value) < 20 else "")


# The data root


def mnist(root: Path) -> Path:
    """A data root with MNIST's four files in the right form, but made here."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for kind in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28]) + os.urandom(20 * 784)
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 20, *(k % 10 for k in range(20))])
        (folder / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{kind}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder / "train-images-idx3-ubyte.gz"


MNIST = ("run", "--method", "ptq", "--data", "digits", "--set", "digits.domains=[mnist]")
PETS = ("run", "--method", "ptq", "--data", "imagefolder:pets", "--set", "imagefolder.size=8")


def pets(root: Path) -> Path:
    """A data root with a folder of one's own: two classes of twelve images; one of the files."""
    for k in range(24):
        path = root / "pets" / ("cat" if k % 2 else "dog") / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((9, 9), 50 + k).save(path)
    return path


@pytest.mark.parametrize(
    ("damage", "fragment"), [(None, "not the file that was published"), (Path.unlink, "is missing")]
)
def test_file_that_is_not_the_published_one_is_named(cli, tmp_path, damage, fragment) -> None:
    """Without it, another file under the official name trains, and its number stands beside those of the real one."""
    file = mnist(tmp_path / "data")
    if damage:
        damage(file)
    line = refused(cli(*MNIST, "--data-root", tmp_path / "data", "--store", tmp_path / "runs"), fragment)
    assert file.name in line


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def link_to_nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.png")


def text(file: Path) -> None:
    file.write_text("a cat")


@pytest.mark.parametrize(
    ("damage", "fragment"), [(truncated, "cut short"), (link_to_nowhere, "broken link"), (text, "not an image")]
)
def test_damaged_image_is_named(cli, tmp_path, damage, fragment) -> None:
    """Without it, a broken image trains as garbage, or ends in a traceback of a library."""
    file = pets(tmp_path / "data")
    damage(file)
    refused(cli(*PETS, "--data-root", tmp_path / "data", "--store", tmp_path / "runs"), fragment, str(file))


def test_wrong_data_root_is_named(cli, tmp_path) -> None:
    """Without it, the user looks for the mistake in the data and not in the path."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    store = ("--store", tmp_path / "runs")
    refused(cli(*MNIST, *store), "--data-root", "QATBENCH_DATA")
    refused(cli(*MNIST, *store, "--data-root", tmp_path / "nowhere"), "does not exist", "--data-root")
    refused(cli(*MNIST, *store, "--data-root", tmp_path / "file"), "is a file")
    refused(cli(*MNIST, *store, "--data-root", tmp_path / "empty"), "MNIST")
    refused(cli("sweep", "digits", *store, "--data-root", tmp_path / "nowhere"), "does not exist")


def without_privileges() -> None:
    """In a child: root, too, is held to the permission bits from the next exec on."""
    if os.geteuid() == 0:
        prctl = ctypes.CDLL(None).prctl
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


needs_linux = pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="root may read everything here")


@needs_linux
def test_unreadable_data_root_is_named(tmp_path) -> None:
    """Without it, wrong permissions on shared data end in a traceback."""
    file = pets(tmp_path / "data")
    for path in (file, tmp_path / "data"):
        mode = path.stat().st_mode
        path.chmod(0)
        line = [*PETS, "--data-root", tmp_path / "data", "--store", tmp_path / "runs"]
        ended = complete(line, preexec_fn=without_privileges)
        path.chmod(mode)
        assert (ended.returncode, ended.stdout) == (2, "")
        (line,) = ended.stderr.splitlines()
        assert str(path) in line
        assert "ermission" in line


# Plugins

METHOD = "from qatbench.methods.ptq import PTQ\nclass Mine(PTQ):\n    name = {!r}\n"


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("x = 1\nclass Mine(:\n", ("(line 2)", "SyntaxError")),
        ("import nowhere_to_be_found\n", ("(line 1)", "ModuleNotFoundError", "nowhere_to_be_found")),
        ("x = 1\nraise RuntimeError('two\\nlines')\n", ("(line 2)", "RuntimeError: two lines")),
        ("import sys\nsys.exit(0)\n", ("(line 2)", "SystemExit")),
        (METHOD.format("lsq"), ("named 'lsq' exists already", "lsq.py", "rename it")),
        (METHOD.format("mine") + METHOD.format("mine").replace("Mine", "Other"), ("two classes are named 'mine'",)),
        ("x = 1\n", ("defines no method",)),
        ("", ("defines no method",)),
        (bytes(range(256)), ("does not import",)),
        (METHOD.format("mine") + "    def training_step(self): ...\n", ("overrides training_step",)),
    ],
    ids=["syntax", "import", "raises", "exits", "known name", "twice", "nothing", "empty", "binary", "final"],
)
@pytest.mark.parametrize("verb", [("run", "--method", "lsq", "--plugin"), ("list", "methods", "--plugin"), ("check",)])
def test_broken_plugin_is_named(cli, tmp_path, monkeypatch, content, fragments, verb) -> None:
    """Without it, an author sees a traceback of the harness instead of his own mistake."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(cli(*verb, file), "mine.py", *fragments)


def test_plugin_that_is_no_file_is_named(cli, tmp_path) -> None:
    """Without it, a wrong path ends in a traceback."""
    (tmp_path / "mine.txt").write_text("x = 1")
    for path, fragment in (
        (tmp_path, "is a directory"),
        (tmp_path / "no.py", "no such file"),
        (tmp_path / "mine.txt", ".py"),
    ):
        refused(cli(*RUN, "--plugin", path, "--store", tmp_path / "runs"), fragment)


@pytest.mark.parametrize(
    ("chain", "fragments"),
    [
        ("lsq+kd", ("lsq is not a wrapper",)),
        ("lsq+pact", ("lsq is not a wrapper",)),
        ("kd", ("kd is a wrapper", "kd+lsq")),
        ("kd+kd+lsq", ("kd stands twice",)),
        ("one+two+lsq", ("one and two both alter the logits",)),
        ("three+four+lsq", ("three and four both have a training step",)),
    ],
)
def test_clashing_chain_is_refused(cli, tmp_path, chain, fragments) -> None:
    """Without it, two methods that undo each other give a number that means nothing."""
    file = tmp_path / "wrappers.py"
    file.write_text(
        "from qatbench import Wrapper\n"
        + "".join(
            f"class {n}(Wrapper):\n    name = {n.lower()!r}\n    alters = frozenset({{'logits'}})\n"
            for n in ("One", "Two")
        )
        + "".join(
            f"class {n}(Wrapper):\n    name = {n.lower()!r}\n    def step(self, run):\n        super().step(run)\n"
            for n in ("Three", "Four")
        )
    )
    refused(
        cli("run", "--method", chain, "--plugin", file, "--store", tmp_path / "runs"), chain.split("+")[0], *fragments
    )


# The store


def test_store_that_is_a_file_is_refused(cli, tiny, tmp_path) -> None:
    """Without it, a wrong --store ends in a traceback."""
    (tmp_path / "runs").touch()
    refused(tiny("ptq"), "is a file", "--store")
    for verb in ("report", "dash"):
        refused(cli(verb, "--store", tmp_path / "runs"), "is a file", "--store")


@pytest.mark.slow
@needs_linux
def test_read_only_store_is_named(tiny, tmp_path) -> None:
    """Without it, hours of training end in a traceback when they are to be written; or the report of a colleague's store fails."""
    assert tiny("ptq").status == 0
    store = tmp_path / "runs"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    for path in store.rglob("*.lock"):
        path.chmod(0o444)
    try:
        ended = complete(
            ["run", "--method", "lsq", *TINY, "--no-wandb", "--store", store], preexec_fn=without_privileges
        )
        again = complete(
            ["run", "--method", "ptq", *TINY, "--no-wandb", "--store", store], preexec_fn=without_privileges
        )
        seen = complete(["report", "--store", store, "--out", tmp_path / "page"], preexec_fn=without_privileges)
        page = complete(["report", "--store", store], preexec_fn=without_privileges)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    for refusal in (ended, page):
        assert (refusal.returncode, len(refusal.stderr.splitlines())) == (2, 1), refusal.stderr
        assert f"{store} is read-only" in refusal.stderr or f"{store}/report" in refusal.stderr
    assert (again.returncode, again.stderr) == (0, "")
    assert (seen.returncode, seen.stderr) == (0, "")
    assert "ptq" in seen.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


STRANGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "foreign": lambda text: '{"loss": 1.0}',
    "list": lambda text: "[1, 2]",
    "later": lambda text: json.dumps(json.loads(text) | {"schema": 99}),
    "binary": lambda text: "\x00\x01",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_record_is_set_aside_and_named(cli, tiny, tmp_path, kind) -> None:
    """Without it, one bad file makes a store of thousands of runs unreadable, or is overwritten unseen."""
    assert tiny("ptq").status == 0
    assert tiny("fp32").status == 0
    good, record = sorted(tmp_path.glob("runs/*/result.json"), key=lambda p: "ptq" in p.read_text())
    whole = record.read_text()
    strange = STRANGE[kind](whole)
    record.write_text(strange)
    for form in ((), ("--json",)):
        seen = cli("report", "--store", tmp_path / "runs", *form)
        assert seen.status == 0, seen.err
        assert "fp32" in seen.out
        assert record.parent.name in seen.out + seen.err, "the record that was left out is not named"
        assert record.read_text() == strange
    untouched = good.read_text()
    assert tiny("ptq").status == 0
    assert json.loads(record.read_text())["metrics"] == json.loads(whole)["metrics"]
    assert record.with_name("result.json.aside-1").read_text() == strange
    assert good.read_text() == untouched


# A full disk


@pytest.fixture
def small_disk() -> Iterator[Callable[[str], Path]]:
    """``small_disk("4m")``: a real file system of that size."""
    folder = Path(tempfile.mkdtemp())
    mounted = []

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if (
            os.geteuid() != 0
            or shutil.which("mount") is None
            or subprocess.run(command, capture_output=True).returncode
        ):
            pytest.skip("only root can mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
    folder.rmdir()


def test_full_disk_leaves_the_run_and_loses_nothing(cli, small_disk, tmp_path) -> None:
    """Without it, a full disk in the night is a traceback, half a record, or a finished run that is gone."""
    store = small_disk("2m")
    line = ("run", *TINY, "--no-wandb", "--store", store, "--method")
    assert cli(*line, "ptq").status == 0
    done = {path: path.read_bytes() for path in store.glob("*/result.json")}
    free = os.statvfs(store)
    ballast = store / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 200_000))  # a checkpoint of resnet8 needs 600 kB
    answer = cli(*line, "lsq")
    refused(answer, "no space left on the disk", str(store))
    assert done == {path: path.read_bytes() for path in store.glob("*/result.json")}, "the method has not failed"
    assert not list(store.glob("*/*.tmp*")), "what could not be written whole still takes space"
    ballast.unlink()
    assert cli(*line, "lsq").status == 0
    ballast.write_bytes(bytes(os.statvfs(store).f_bavail * free.f_bsize))
    refused(cli(*line, "dorefa"), "no space left", str(store))


def test_disk_quota_leaves_the_run(tiny, tmp_path) -> None:
    """Without it, a limit on file sizes is a traceback; this one needs no root."""
    assert tiny("ptq").status == 0
    line = ["run", "--method", "lsq", *TINY, "--no-wandb", "--store", tmp_path / "runs"]
    limit = 300_000  # less than a checkpoint, more than a record
    ended = complete(line, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert ended.returncode == 2, ended.stderr
    assert "no space left on the disk" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")]
    assert sorted(record["status"] for record in records) == ["done"]
    assert tiny("lsq").status == 0


# A checkpoint of other code


def other_code(checkpoint: Path) -> None:
    saved = load(checkpoint)
    saved["state_dict"] = {f"{name}_old": value for name, value in saved["state_dict"].items()}
    save(checkpoint, saved)


def other_layers(checkpoint: Path) -> None:
    saved = load(checkpoint)
    saved["qatbench"]["plan"] = {"layer9": [4, 4]}
    save(checkpoint, saved)


def other_format(checkpoint: Path) -> None:
    save(checkpoint, {"epoch": 3})


def no_history(checkpoint: Path) -> None:
    save(checkpoint, load(checkpoint) | {"callbacks": {}})


def pickled_code(checkpoint: Path) -> None:
    torch.save({"qatbench": Path}, checkpoint)


def sealed_code(checkpoint: Path) -> None:
    save(checkpoint, {"qatbench": Path})


def without_digest(checkpoint: Path) -> None:
    torch.save(torch.load(checkpoint, weights_only=True), checkpoint)


def garbage(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"PK\3\4 garbage")


def empty(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"")


def flipped(checkpoint: Path) -> None:
    raw = checkpoint.read_bytes()
    checkpoint.write_bytes(raw[:5000] + bytes([raw[5000] ^ 2]) + raw[5001:])


def a_folder(checkpoint: Path) -> None:
    checkpoint.unlink()
    checkpoint.mkdir()


def interrupted(tmp_path: Path) -> Path:
    """The checkpoint of the only run, whose record is taken away, as if it had been killed just before."""
    (record,) = (path for path in tmp_path.glob("runs/*/result.json") if path.parents[1].name == "runs")
    record.unlink()
    return record.parent / "last.ckpt"


@pytest.mark.parametrize("damage", [other_code, other_layers, other_format])
def test_checkpoint_of_other_code_fails_the_run(tiny, tmp_path, damage) -> None:
    """Without it, an old checkpoint is loaded in part, or its error is a page of tensor names."""
    assert tiny("lsq").status == 0
    checkpoint = interrupted(tmp_path)
    damage(checkpoint)
    answer = tiny("lsq")
    assert answer.status == 1, answer
    assert "last.ckpt" in answer.out
    assert "delete it to start over" in answer.out
    assert "Traceback" not in answer.out + answer.err
    checkpoint.unlink()
    assert tiny("lsq").status == 0


@pytest.mark.parametrize(
    "damage", [no_history, pickled_code, sealed_code, without_digest, garbage, empty, flipped, truncated, a_folder, Path.unlink]
)  # fmt: skip
def test_a_damaged_checkpoint_is_told_and_not_believed(tiny, tmp_path, damage) -> None:
    """Without it, a run goes on from weights that nobody trained, and its number is another one, without a word."""
    first = tiny("lsq", "--set", "epochs=2", "--json")
    checkpoint = interrupted(tmp_path)
    damage(checkpoint)
    again = tiny("lsq", "--set", "epochs=2", "--json")
    assert (first.status, again.status) == (0, 0), again
    one, other = json.loads(first.out), json.loads(again.out)
    assert one["metrics"] == other["metrics"]
    assert one["files"].keys() == other["files"].keys()
    (note,) = other["provenance"]["notes"]
    assert note.startswith(str(checkpoint))
    assert note.endswith("; the training starts over")
    assert "Traceback" not in again.out + again.err

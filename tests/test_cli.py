"""The commands as a user types them; most in this process, because importing torch takes seconds."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import write_classes
from qatbench.bench.disk import read_json
from support import SQUARES, TINY, read_offline

HEAVY = ("torch", "lightning", "pandas", "numpy", "rich", "wandb", "yaml", "sklearn")
VERBS = (
    "quickstart",
    "list",
    "run",
    "sweep",
    "status",
    "report",
    "probe",
    "dash",
    "check",
    "doctor",
    "new",
    "new method",
)


def qatbench(*line: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qatbench", *map(str, line)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


# Starting


@pytest.mark.parametrize("line", [["--help"], ["run", "--help"], ["--version"], ["rnu"]], ids=" ".join)
def test_help_imports_nothing_heavy(line) -> None:
    """Without it, a person who looks an option up waits for torch."""
    code = (
        f"import sys; sys.argv = {['qatbench', *line]!r}\n"
        "from qatbench.__main__ import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.stderr.splitlines()[-1] == "[]", ended.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cli, verb) -> None:
    """Without it, a verb has no help, or its line in the list of commands is cut off."""
    answer = cli(*verb.split(), "--help")
    assert answer.status == 0
    assert answer.out.startswith(f"Usage: qatbench {verb}")
    assert "..." not in answer.out.replace("[ARGS]...", "").replace("{RUN}...", "")
    (about,) = re.findall(rf"^  {verb.split()[0]} +(.*)$", cli("--help").out, re.MULTILINE)
    assert about
    assert not about.endswith("...")


def test_version(cli) -> None:
    """Without it, a bug report cannot say which version it is about."""
    from qatbench import __version__

    assert cli("--version").out == f"qatbench {__version__}\n"


# list


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("methods", {"fp32", "ptq", "lsq", "dorefa", "pact", "kd"}),
        ("datasets", {"optdigits", "digits"}),
        ("networks", {"resnet8", "resnet20", "resnet56", "resnet18"}),
        ("suites", {"quickstart", "digits"}),
    ],
)
def test_list_names_what_there_is(cli, kind, some) -> None:
    """Without it, nobody finds the name to type; or a script cannot read it."""
    rows = json.loads(cli("list", kind, "--json").out)
    assert some <= {row["name"] for row in rows}
    assert all(row["what"] and "\n" not in row["what"] for row in rows)
    assert not [row for row in rows if row.get("error")]
    shown = cli("list", kind)
    assert shown.status == 0
    assert all(re.search(rf"^{name}\b", shown.out, re.MULTILINE) for name in some)


def test_list_shows_a_plugin(cli) -> None:
    """Without it, an author cannot see whether the plugin is known."""
    (row,) = (
        r for r in json.loads(cli("list", "datasets", "--plugin", SQUARES, "--json").out) if r["name"] == "squares"
    )
    assert (row["origin"], row["error"]) == (str(SQUARES), None)


@pytest.mark.slow
def test_list_shows_what_is_unavailable_and_why(tmp_path) -> None:
    """Without it, an installed package whose import fails vanishes without a word."""
    (tmp_path / "broken_pack.py").write_text("raise RuntimeError('needs [gpu] library')\n")
    info = tmp_path / "broken_pack-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-pack\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[qatbench.methods]\nbroken = broken_pack\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = qatbench("list", "methods", env=env)
    assert shown.returncode == 0, shown.stderr
    assert "unavailable: RuntimeError: needs [gpu] library" in " ".join(shown.stdout.split())
    asked = qatbench("run", "--method", "broken", "--store", tmp_path / "runs", env=env)
    assert (asked.returncode, len(asked.stderr.splitlines())) == (2, 1)
    assert "'broken' is unavailable: RuntimeError: needs [gpu] library" in asked.stderr
    doctor = qatbench("doctor", "--store", tmp_path / "runs", env=env)
    assert doctor.returncode == 1
    assert "FAIL methods broken is unavailable" in doctor.stdout


# run, report, status


def test_run_trains_once(tiny, tmp_path) -> None:
    """Without it, a run that is done is trained again, or its record changes."""
    first = tiny("lsq")
    assert first.status == 0, first.err
    assert re.search(r"test accuracy \d+\.\d\d %  \(left \d+\.\d\d, right \d+\.\d\d\)", first.out)
    (record,) = tmp_path.glob("runs/*/result.json")
    assert f"record: {record}" in first.out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = tiny("lsq")
    assert f"done already: {record}" in second.out
    assert second.out.splitlines()[:2] == first.out.splitlines()[:2]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_json_is_the_record(tiny, tmp_path) -> None:
    """Without it, a script cannot read what a run gave."""
    answer = tiny("ptq", "--json")
    (record,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(answer.out) == read_json(record)


def test_settings_reach_the_spec(tiny) -> None:
    """Without it, --set is read and then forgotten, or 1e-3 is a text."""
    extra = ("kd.weight=0.25", "squares.domains=[left]", "lr=1e-3", "clip=1", "augment=none", "optimizer=adam")
    spec = json.loads(tiny("kd+lsq", *(word for e in extra for word in ("--set", e)), "--json").out)["spec"]
    assert spec["params"]["kd"]["weight"] == 0.25
    assert spec["data_params"]["domains"] == ["left"]
    assert (spec["lr"], spec["clip"], spec["augment"], spec["optimizer"]) == (1e-3, 1.0, "none", "adam")
    assert (spec["protocol"], spec["method"]) == ("single:left", "kd+lsq")


def test_failed_run_has_status_1_and_names_its_log(cli, tmp_path) -> None:
    """Without it, a script takes a failed run for a good one, and a person cannot find out why."""
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "from qatbench.methods.lsq import LSQ\n"
        "class Broken(LSQ):\n    name = 'broken'\n    def step(self, run):\n        raise ValueError('no [luck] today')\n"
    )
    answer = cli("run", *TINY, "--plugin", plugin, "--method", "broken", "--no-wandb", "--store", tmp_path / "runs")
    assert answer.status == 1
    assert "failed: broken.step raised ValueError: no [luck] today" in answer.out
    log = Path(answer.out.split("log: ")[1].strip())
    assert "no [luck] today" in log.read_text()
    assert str(plugin) in log.read_text()
    assert "Traceback" not in answer.out + answer.err


def test_report_from_the_store(cli, tiny, tmp_path) -> None:
    """Without it, the leaderboard is not what is in the store, or a script cannot read it."""
    store = tmp_path / "runs"
    accuracy = {m: json.loads(tiny(m, "--json").out)["metrics"]["test/acc"] for m in ("fp32", "ptq")}
    answer = cli("report", "--store", store, "--out", tmp_path / "page")
    assert answer.status == 0, answer.err
    for method, value in accuracy.items():
        (row,) = (line for line in answer.out.splitlines() if re.match(rf" *{method} ", line))
        assert f"{100 * value:.1f}" in row
    assert f"leaderboard: {tmp_path / 'page' / 'index.html'}" in answer.out
    assert {"index.html", "leaderboard.md", "leaderboard.csv", "runs.csv"} <= {
        p.name for p in (tmp_path / "page").iterdir()
    }
    (table,) = json.loads(cli("report", "--store", store, "--json").out)
    assert "squares" in json.dumps(table)
    assert {"fp32", "ptq"} <= set(re.findall(r'"method": "(\w+)"', json.dumps(table)))


def test_store_from_the_environment(cli, tmp_path, monkeypatch) -> None:
    """Without it, QATBENCH_STORE and QATBENCH_DATA do nothing."""
    monkeypatch.setenv("QATBENCH_STORE", str(tmp_path / "mine"))
    assert str(tmp_path / "mine") in cli("report").err
    monkeypatch.setenv("QATBENCH_DATA", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in cli("run", "--method", "lsq").err


# sweep and what W&B keeps of it

SUITE = (
    "name: ours\ndata: squares\nmethod: [fp32, ptq, lsq, kd+lsq]\nbits: [w4a4]\nepochs: 2\nfloat_epochs: 1\nbatch: 32\n"
)


@pytest.mark.slow
def test_sweep_status_report_dash_and_wandb(cli, tmp_path, monkeypatch) -> None:
    """Without it, a finished run has an empty or half-written W&B file, or one command does not see what another wrote."""
    from qatbench.bench.store import Store

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    suite, store = tmp_path / "mine.yaml", tmp_path / "runs"
    suite.write_text(SUITE)
    launch = ("sweep", suite, "--plugin", SQUARES, "--store", store, "--workers", "1")
    dry = cli(*launch, "--dry-run")
    assert "4 runs: 4 to run" in dry.out
    assert not list(store.glob("*/result.json"))
    swept = cli(*launch)
    assert swept.status == 0, swept.out + swept.err
    assert f"leaderboard: qatbench report ours --store {store}" in swept.out
    again = cli(*launch)
    assert "4 runs: 4 done, nothing to run" in again.out
    state = json.loads(cli("status", "ours", "--store", store, "--json").out)
    assert [entry["state"] for entry in state["entries"]] == ["done"] * 4
    assert "ours: 4 done" in cli("status", "ours", "--store", store).out
    shown = cli("report", "ours", "--store", store)
    assert shown.status == 0
    assert all(method in shown.out for method in ("fp32", "ptq", "lsq", "kd+lsq"))
    assert "4 runs tracked by W&B" in cli("dash", "--store", store).out
    records = Store(store).records()
    assert len(records) == 4
    for record in records:
        _check_wandb(record, store)


def _check_wandb(record: dict, store: Path) -> None:
    """The run's ``.wandb`` file holds its config, its epochs and its final metrics."""
    assert record["wandb"] == {"id": record["run_id"], "mode": "offline"}
    (file,) = store.glob(f"{record['run_id']}/wandb/offline-run-*/*.wandb")
    found = read_offline(file)
    assert {k: v for k, v in found["config"].items() if k != "_wandb"} == record["spec"]
    assert [row["epoch"] for row in found["history"]] == list(range(record["spec"]["epochs"]))
    assert all("val/acc" in row and "val/acc/left" in row and "lr" in row for row in found["history"])
    summary = {key: found["summary"][key] for key in record["metrics"]}
    assert summary == pytest.approx(record["metrics"])
    plan = json.loads((file.parent / "files" / found["summary"]["plan"]["path"]).read_text())
    assert {row[0]: row[1:3] for row in plan["data"]} == record["cost"]["plan"]
    about = (found["run"]["run_id"], found["run"]["run_group"], found["run"]["job_type"])
    assert about == (record["run_id"], "ours", record["spec"]["method"])
    assert found["exit"]["exit_code"] == 0


def test_no_wandb_leaves_no_wandb(tiny, tmp_path) -> None:
    """Without it, --no-wandb writes W&B files all the same, or loses metrics.csv with them."""
    record = json.loads(tiny("lsq", "--json").out)
    folder = tmp_path / "runs" / record["run_id"]
    assert record["wandb"]["mode"] == "disabled"
    assert not (folder / "wandb").exists()
    assert (folder / "metrics.csv").read_text().startswith("epoch,")


# doctor


def test_doctor_finds_what_is_wrong(cli, tmp_path) -> None:
    """Without it, a user with a broken set-up is told that all is well."""
    good = cli("doctor", "--store", tmp_path)
    assert good.status == 0, good.out
    assert "FAIL" not in good.out
    for word in ("Python", "torch", "wandb", "store", "W&B", "methods"):
        assert re.search(rf"^ok   .*{word}", good.out, re.MULTILINE)
    bad = cli("doctor", "--store", tmp_path, "--data-root", tmp_path / "nowhere")
    assert bad.status == 1
    assert re.search(r"^FAIL data root .*nowhere is not a folder", bad.out, re.MULTILINE)
    (tmp_path / "file").touch()
    bad = cli("doctor", "--store", tmp_path / "file")
    assert bad.status == 1
    assert re.search(r"^FAIL store .*file is a file", bad.out, re.MULTILINE)


# The terminal


def typed(line: list[str | Path], columns: int = 80, seconds: float = 90, until: bytes | None = None, **env: str):
    """A command in a terminal of its own, and Ctrl-C once it shows the pattern `until`: its exit status, and the screen."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **env}
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in env else None
    command = [sys.executable, "-m", "qatbench", *map(str, line)]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    )
    os.close(slave)
    screen, end, stopped = b"", time.monotonic() + seconds, until is None
    try:
        while time.monotonic() < end:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    screen += os.read(master, 65536)
                except OSError:  # the other end is closed
                    break
            elif process.poll() is not None:
                break
            if until and not stopped and re.search(until, screen):
                os.killpg(process.pid, signal.SIGINT)
                stopped = True
        return process.wait(20), screen.decode()
    finally:
        process.kill()
        os.close(master)


def test_ctrl_c_says_how_to_go_on(tmp_path) -> None:
    """Without it, Ctrl-C is a traceback, or the status of a failure, and the user does not know what is lost."""
    line = ["run", "--method", "fp32", *TINY, "--set", "float_epochs=2000", "--no-wandb", "--store", tmp_path / "runs"]
    status, screen = typed(line, until=rb"float \d+/2000 val")
    assert status == 130, screen[-500:]
    assert "Traceback" not in screen
    assert screen.endswith("\x1b[2Kqatbench: interrupted; the same command goes on from the last finished epoch\r\n")
    assert list(tmp_path.glob("runs/float/*/last.ckpt"))
    assert not list(tmp_path.glob("runs/*/result.json"))


@pytest.mark.parametrize("columns", [40, 200])
def test_narrow_and_wide_terminals(cli, tiny, tmp_path, monkeypatch, columns) -> None:
    """Without it, a table is cut off or breaks its lines; or colours come where the user asked for none."""
    tiny("ptq")
    for line in (["list", "methods"], ["report", "--store", tmp_path / "runs"]):
        status, screen = typed(line, columns=columns, NO_COLOR="1")
        assert status == 0, screen
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", screen), "a colour"
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
        table = [text for text in plain.splitlines() if not text.startswith("leaderboard:")]
        assert max(map(len, table)) <= columns
        assert "ptq" in screen


@pytest.mark.parametrize("line", [["list", "methods", "--json"], ["--help"]], ids=" ".join)
def test_reader_that_goes_away(line) -> None:
    """Without it, `qatbench list ... | head` ends in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        command = [sys.executable, "-m", "qatbench", *line]
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def complete(code: str, *, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **(env or {})},
        **options,
    )


ALL = """
import sys
from qatbench.__main__ import main
for line in {lines!r}:
    sys.argv = ["qatbench", *line]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
"""


def test_every_command_in_a_terminal_without_unicode(tiny, tmp_path) -> None:
    """Without it, a table's middle dot or line ends `report` in a traceback where the locale is plain ASCII."""
    run_id = json.loads(tiny("ptq", "--json").out)["run_id"]
    store = ["--store", str(tmp_path / "runs")]
    (tmp_path / "mine.yaml").write_text("data: squares\nmethod: ptq\nepochs: 1\nfloat_epochs: 1\nbatch: 32\n")
    few = ["--images", "16", "--directions", "1", "--iterations", "1"]
    suite, plugin = str(tmp_path / "mine.yaml"), ["--plugin", str(SQUARES)]
    lines = [
        ["report", *store],
        ["report", *store, "--json"],
        ["dash", *store],
        ["doctor", *store],
        ["list", "methods"],
        ["list", "datasets"],
        ["list", "suites"],
        ["data", "list", *store],
        ["run", "--method", "ptq", *TINY, "--no-wandb", *store],
        ["sweep", suite, *plugin, *store, "--dry-run"],
        ["sweep", suite, *plugin, *store, "--no-wandb"],
        ["status", "mine", *store],
        ["probe", run_id, *few, *plugin, *store],
        ["data", "show", "squares", *plugin, *store, "--out", str(tmp_path / "squares.png")],
        ["data", "prepare", "squares", *plugin, *store],
        ["data", "verify", "squares", *plugin, *store],
        ["--help"],
    ]
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = complete(ALL.format(lines=lines), env=plain, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "?" in ended.stdout


def test_output_that_goes_nowhere() -> None:
    """Without it, a closed or full output is a traceback of Python."""
    code = "from qatbench.__main__ import main; import sys; sys.argv = ['qatbench', 'list', 'suites'{}]; main()"
    for more in ("", ", '--json'"):
        closed = complete(f"import os; os.close(1)\n{code.format(more)}", stdout=subprocess.DEVNULL)
        assert "Traceback" not in closed.stderr
        none = complete(f"import sys; sys.stdout = None\n{code.format(more)}", stdout=subprocess.DEVNULL)
        assert (none.returncode, none.stderr) == (0, "")
        with open("/dev/full", "w") as full:
            ended = complete(code.format(more), stdout=full)
        assert (ended.returncode, ended.stderr) == (2, "qatbench: No space left on device\n")


# probe


def test_probe_measures_and_draws(cli, tiny, tmp_path) -> None:
    """Without it, one cannot see whether a method finds flatter minima."""
    ids = [json.loads(tiny(method, "--json").out)["run_id"] for method in ("fp32", "lsq")]
    options = ("--images", "32", "--directions", "2", "--iterations", "2")
    where = ("--plugin", SQUARES, "--store", tmp_path / "runs")
    shown = cli("probe", ids[0], ids[1][:9], ids[0], *options, *where)
    assert shown.status == 0, shown.err
    *table, last = shown.out.splitlines()
    figure = tmp_path / "runs" / "report" / "flatness.png"
    assert last == f"figure: {figure}"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [line.split()[:2] for line in table[1:3]] == [[ids[0], "fp32"], [ids[1], "lsq"]]
    figure.unlink()
    again = cli("probe", ids[1], *options, *where, "--out", tmp_path / "flat.png", "--json")
    found = json.loads(again.out)
    assert found["figure"] == str(tmp_path / "flat.png")
    assert [run["run_id"] for run in found["runs"]] == [ids[1]]
    assert found["runs"][0] == read_json(tmp_path / "runs" / ids[1] / "flatness.json")
    assert (tmp_path / "flat.png").exists()
    assert not figure.exists()


# Data


def test_data_list_says_what_is_here(cli, tmp_path: Path) -> None:
    """Without it, a user starts a sweep to find out which data sets he has."""
    answer = cli("data", "list", "--store", tmp_path, "--json")
    assert answer.status == 0, answer.err
    entries = {entry["name"]: entry for entry in json.loads(answer.out)}
    assert entries["optdigits"]["domains"] == dict.fromkeys(("scanned", "blended", "fonts"), "made")
    table = cli("data", "list", "--store", tmp_path).out
    assert all(name in table for name in entries)


def test_data_prepare_show_and_verify(cli, tmp_path: Path) -> None:
    """Without it, one cannot look at what one trains on, or check it."""
    write_classes(tmp_path / "root" / "pets", {"cat": 20, "dog": 20})
    where = ("--data-root", tmp_path / "root", "--store", tmp_path / "runs")
    prepared = cli("data", "prepare", "imagefolder:pets", "--set", "size=8", *where)
    assert prepared.status == 0, prepared.err
    assert "images: 40 images (28 train, 4 val, 8 test)" in prepared.out
    shown = cli(
        "data", "show", "imagefolder:pets", "--set", "imagefolder.size=8", "--out", tmp_path / "pets.png", *where
    )
    assert shown.status == 0, shown.err
    assert (tmp_path / "pets.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "runs" / "data").glob("imagefolder-*/meta.json"))) == 1, "one folder for one setting"
    assert cli("data", "verify", "imagefolder:pets", "--set", "size=8", *where).status == 0
    images = next((tmp_path / "runs" / "data").glob("imagefolder-*/images.images.npy"))
    images.write_bytes(images.read_bytes()[:-9] + b"123456789")
    wrong = cli("data", "verify", "imagefolder:pets", "--set", "size=8", *where)
    assert wrong.status == 1
    assert "FAIL" in wrong.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("data", "prepare", "digts"), "did you mean 'digits'"),
        (("data", "prepare", "digits", "--set", "sise=28"), "did you mean 'size'"),
        (("data", "prepare", "digits", "--set", "size"), "expected KEY=VALUE"),
        (("data", "show", "imagefolder"), "imagefolder:FOLDER"),
        (("data", "show", "digits:x"), "is written 'digits'"),
        (("data", "verify", "optdigits", "--set", "imbalance=0.5"), "imbalance=0.5"),
        (("data", "show", "optdigits", "--out", "/nowhere/x.png"), "/nowhere/x.png"),
    ],
)
def test_data_refuses_in_one_line(cli, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    """Without it, a typo ends in a traceback, or prepares something else."""
    answer = cli(*words, "--store", tmp_path)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
    assert answer.err.count("\n") == 1

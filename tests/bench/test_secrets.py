"""Secrets: which there are, what is none, and the places where text is kept or shown."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from qatbench.bench import registry
from qatbench.bench.errors import UserError
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import run
from qatbench.bench.secrets import Scrubbed, scrub, scrub_file
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from support import SQUARES

HEX = "5ec0e75ec0e75ec0e75ec0e75ec0e75ec0e75ec0"  # 40 digits, as W&B's first keys and commits have
LETTERS = "QbZkYtRwPlMnXcVsDfGh"


@pytest.mark.parametrize(
    "text",
    [
        f"401: key {HEX!r} is invalid", f"WANDB_API_KEY={HEX}", f"{HEX} is no valid API key", f"login with local-{HEX}",
        "wandb_v1_AbC-dEf_123456789", f"hf_{LETTERS}{LETTERS[:14]}", f"api_org_{LETTERS}", f"AKIA{LETTERS[:16].upper()}",
        f"AIza{LETTERS}{LETTERS[:15]}", f"ghp_{LETTERS}0123456789abcdef", f"github_pat_{LETTERS}_{LETTERS}", f"glpat-{LETTERS}",
        f"xoxb-123456-{LETTERS}", f"sk-ant-api03-{LETTERS}", f"sk_live_{LETTERS}", f"pypi-{LETTERS}", f"npm_{LETTERS}{LETTERS}",
        f"eyJ{LETTERS}.eyJ{LETTERS}.{LETTERS}", f"https://me:{LETTERS}@host/x", f"Authorization: Bearer {LETTERS}",
        f"{{'aws_secret_access_key': '{LETTERS}/+{LETTERS}'}}", f"password = {LETTERS}1", f"--token={LETTERS}",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{LETTERS}\n-----END OPENSSH PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_goes(text: str) -> None:
    """A key that a plugin or a server names in an error would be in a record that is handed on."""
    shown = scrub(f"it said {text} for seed 0")
    assert not any(part in shown.lower() for part in (HEX, LETTERS[:12].lower(), "abc-def")), shown
    assert "***" in shown
    assert shown.startswith("it said ")
    assert shown.endswith(" for seed 0")


@pytest.mark.parametrize(
    "text",
    [
        f"commit {HEX}", "run 0123456789abcdef: lsq w4a4", f"sha256 {HEX}{HEX[:24]}", f"data {HEX[:16]}, split {HEX[:16]}",
        "SyntaxError: invalid token", "tokens: 100000 keys: 12", "seed=0 lr=0.001 batch=128", "token: cannot be read",
        "KeyError: 'test/acc/mnist'", "method edt: 1+2e2b139a3f527870", "file:///home/me/runs/0123456789abcdef/log.txt",
        "https://example.org/a@b", "skip-connection of sk-learn", "task-0123456789abcdefghij",
    ],
)  # fmt: skip
def test_what_is_none_stays(text: str) -> None:
    """A run's id, a hash or an error's own words would be gone from the record."""
    assert scrub(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "next-years-form"), ("HF_TOKEN", "a b c d"), ("MY_SECRET", "tr0ub4dor"), ("PGPASSWORD", "hunter22"),
        ("deploy_key", "(a+b)*[c]?"), ("SECRETS", "zwölf Boxkämpfer"), ("X_PRIVATE_KEY", "first\nsecond"), ("DB_PASSWD", "it's me"),
    ],
)  # fmt: skip
def test_the_users_own_secrets_go_whatever_their_form(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A password of no known form would be in the log; or its characters would be taken for a pattern."""
    monkeypatch.setenv(name, value)
    for written in (value, " ".join(value.split()), repr(value)[1:-1]):
        assert scrub(f"with {written} and {written}.") == "with *** and ***."


@pytest.mark.parametrize("value", ["", "1", "false", "default", "4096", "1e-3", "en_US"])
def test_settings_are_no_secrets(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """``TOKENIZERS_PARALLELISM=false`` or ``KEY_SIZE=4096`` would make every such word, and parts of numbers, asterisks."""
    monkeypatch.setenv("TOKENIZERS_KEY_SIZE", value)
    text = f"false default 0.4096 1e-3 en_US [{value}]"
    assert scrub(text) == text


def test_a_path_to_a_key_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a log could not be copied any more."""
    monkeypatch.setenv("KEY_DIR", str(tmp_path))
    assert scrub(f"log: {tmp_path}/log.txt") == f"log: {tmp_path}/log.txt"


def test_secrets_in_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a user who logged in, and so has no variable, would be kept."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert scrub("from-netrc from-token") == "from-netrc from-token"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password from-netrc\n")
    (tmp_path / "token").write_text("from-token\n")
    assert scrub("from-netrc from-token") == "*** ***"
    (tmp_path / "netrc").write_text("machine machine\n")
    assert scrub("from-netrc from-token") == "from-netrc ***"


def test_a_log_line_its_traceback_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning, or what a C library prints, would keep the key in a log."""
    monkeypatch.setenv("SOME_TOKEN", "tr0ub4dor")
    try:
        raise ValueError("tr0ub4dor")
    except ValueError as error:
        made = logging.LogRecord(
            "a", logging.INFO, "", 1, "as %s", ("tr0ub4dor",), (type(error), error, error.__traceback__)
        )
    assert "tr0ub4dor" not in Scrubbed("%(message)s").format(made)
    file = tmp_path / "log.txt"
    file.write_bytes(b"a\xff tr0ub4dor\n")
    scrub_file(file)
    assert file.read_bytes() == b"a\xff ***\n"
    scrub_file(tmp_path / "gone.txt")
    assert list(tmp_path.iterdir()) == [file]


LEAKS = """
import logging, os, warnings
from qatbench.methods.lsq import LSQ

KEYS = os.environ["WANDB_API_KEY"] + " " + os.environ["MY_PASSWORD"] + " " + "hf_" + "Qb" * 17


class Leaks(LSQ):
    name = "leaks"

    def start(self, run, stage):
        print(KEYS, flush=True)
        os.system(f"echo {KEYS}")
        warnings.warn(KEYS)
        logging.getLogger("qatbench.mine").warning(KEYS)
        raise ValueError(KEYS)


class Skips(LSQ):
    name = "skips"

    def skip(self, task):
        return KEYS


class Returns(LSQ):
    name = "returns"

    def stages(self, epochs):
        return ["x" * 50 + KEYS]

"""
NET = """
import os, sys
from qatbench.bench.models.resnet import ResNet8


class Leaky(ResNet8):
    name = "leaky"

    def forward(self, x):
        if sys.argv[0].endswith("worker.py"):  # not where the network is looked at before anything is trained
            raise RuntimeError(os.environ["WANDB_API_KEY"] + os.environ["MY_PASSWORD"] + "hf_" + "Qb" * 17)
        return super().forward(x)
"""
SUITE = """
name: leaky
data: squares
network: [resnet8, leaky]
method: [leaks, skips, returns]
bits: w4a4
epochs: 1
float_epochs: 1
batch: 32
"""


def all_text(folder: Path) -> str:
    return "\n".join(p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_nothing_that_a_sweep_leaves_or_shows_has_a_secret(tmp_path: Path) -> None:
    """A float network, a worker, a warning or a print would put the key into a log, a record, the report or on the terminal."""
    (tmp_path / "leaks.py").write_text(LEAKS)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "leaky.yaml").write_text(SUITE)
    secrets = {"WANDB_API_KEY": HEX, "MY_PASSWORD": "tr0ub4dor", "WANDB_MODE": "offline"}
    env = {**os.environ, **secrets, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    plugins = [f for p in (SQUARES, tmp_path / "leaks.py", tmp_path / "net.py") for f in ("--plugin", str(p))]
    store = tmp_path / "runs"
    shown = ""
    for words in (
        ["sweep", str(tmp_path / "leaky.yaml"), "--workers", "1", "--no-wandb", *plugins],
        ["status", "leaky"],
        ["report", "leaky"],
    ):
        command = [sys.executable, "-m", "qatbench", *words, "--store", str(store)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
        assert done.returncode in (0, 1), done.stderr
        shown += done.stdout + done.stderr
    kept = all_text(store)
    for text in (shown, kept):
        assert "failed" in text
        assert not re.search(rf"{HEX[:12]}|tr0ub4dor|hf_Qb", text)
    assert kept.count("***") > 6


def test_an_import_and_a_word_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    """A plugin whose import fails would show the key on the terminal, as would a wrong argument."""
    monkeypatch.setenv("MY_PASSWORD", "tr0ub4dor")
    file = tmp_path / "plug.py"
    file.write_text(
        dedent("""
        import os
        raise RuntimeError(os.environ["MY_PASSWORD"])
    """)
    )
    with pytest.raises(UserError, match=r"RuntimeError: \*\*\*"):
        registry.load_file(file)
    answer = cli("run", "--method", "tr0ub4dor")
    assert answer.status == 2
    assert "tr0ub4dor" not in answer.err


def test_a_skipped_and_a_broken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of a run that never began would be kept as it is."""
    monkeypatch.setenv("MY_PASSWORD", "tr0ub4dor")
    monkeypatch.setenv("WANDB_API_KEY", HEX)
    (tmp_path / "leaks.py").write_text(LEAKS)
    before = dict(registry._files)
    try:
        for file in (SQUARES, tmp_path / "leaks.py"):
            registry.load_file(file)
        store = Store(tmp_path / "runs")
        for method in ("skips", "returns"):
            asked = {
                "method": method,
                "data": "squares",
                "epochs": 1,
                "float_epochs": 1,
                "batch": 32,
                "calibration": 32,
            }
            record = run(resolve(RunSpec(**asked), data_root=None, cache=store.cache), store, wandb=False)
            assert "***" in record["reason"] or "x" * 50 in record["reason"]
            assert "tr0ub4dor" not in record["reason"]
        assert "tr0ub4dor" not in all_text(store.root)
    finally:
        registry._files.clear()
        registry._files.update(before)

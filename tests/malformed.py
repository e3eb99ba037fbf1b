"""500 malformed requests, made by rule and by chance from fixed seeds, each run in a process that is forked for it.

`python tests/malformed.py FOLDER STEP FIRST` runs every STEP-th from FIRST and prints what each did, as JSON lines. Torch and the
rest are imported once: a request may hang, kill its process or leave anything in it, and the next one does not notice.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import support

TINY = [*support.TINY, "--no-wandb"]
SQUARES = str(support.SQUARES)
RUN = ["run", "--method", "ptq", *TINY]
PATIENCE = 60.0  # seconds of the clock after which a request hangs; it may use ten of a processor

ODD = [
    "",
    " ",
    "-1",
    "0",
    "1e309",
    "nan",
    "inf",
    "²",
    "١",
    "0x10",
    "1_000",
    "010",
    "True",
    "null",
    "[]",
    "{}",
    "[[[",
    "{a: 1, a: 2}",
    "!!bool x",
    "a" * 300,
    "b" * 10_000,
    "../../x",
    "/",
    ".",
    "..",
    "~",
    "~nobody/x",
    "\x1b[31m",
    "a\nb",
    "a\tb",
    "\udcff",
    "💥",
    "猫",
    "%s%n",
    "$(touch pwned)",
    "-",
    "*",
    "a+b",
    "+",
    "lsq+",
    "+lsq",
    "kd+kd+lsq",
    "a:b:c",
    "=",
    "==",
    "&a [*a]",
    "*a",
    "a: b",
    "2020-01-01",
    "190:20:30",
    "yes",
    "/dev/null",
    "/dev/zero",
    "99999999999999999999999999",
    "-99999999999999999999999999",
    "1" * 400,
    "0.1.2",
    "w4a4",
    "plan-00000000",
    "avg99",
    "lodo:",
    "single:x",
    "cuda:-1",
    "cuda:²",
]


@dataclass(frozen=True)
class Request:
    """One command line, the files that it finds in its folder, and its variables."""

    family: str
    line: list[str]
    make: Callable[[Path], None] = lambda folder: None
    variables: dict[str, str] = field(default_factory=dict)


def requests() -> list[Request]:
    """All of them, in a fixed order."""
    made = [
        *arguments(120),
        *settings(90),
        *suites(90),
        *plans(40),
        *folders(50),
        *labels(20),
        *plugins(55),
        *records(35),
    ]
    assert len(made) == 500
    return made


# ---- arguments, and --set


def arguments(count: int) -> Iterator[Request]:
    """Every option of every command, with a value that it cannot have, or twice, or cut."""
    rng = random.Random("arguments")
    store = ["--store", "runs"]
    lines = [
        RUN + store,
        ["sweep", "mine.yaml", "--dry-run", *store],
        ["status", "mine", *store],
        ["report", "--json", *store],
        ["dash", *store],
        ["export", "RUN", *store],
        ["probe", "RUN", "--images", "8", "--directions", "1", "--iterations", "1", "--plugin", SQUARES, *store],
        ["data", "list", *store],
        ["data", "verify", "squares", "--plugin", SQUARES, *store],
        ["data", "prepare", "squares", "--plugin", SQUARES, *store],
        ["data", "show", "squares", "--plugin", SQUARES, "--out", "runs/x.png", *store],
        ["new", "method", "mine", "--dir", "runs/new"],
        ["check", "no.py"],
        ["doctor", *store],
        ["list", "methods"],
    ]
    options = {
        "run": [
            "method",
            "data",
            "network",
            "bits",
            "seed",
            "protocol",
            "set",
            "store",
            "data-root",
            "plugin",
            "device",
        ],
        "sweep": ["workers", "time-limit", "store", "data-root", "plugin", "device"],
        "status": ["store"],
        "report": ["store", "out"],
        "dash": ["store"],
        "export": ["out", "opset", "sums", "store", "data-root", "plugin"],
        "probe": ["out", "images", "directions", "iterations", "seed", "store", "plugin"],
        "data": ["set", "store", "data-root", "plugin"],
        "new": ["dir"],
        "check": [],
        "doctor": ["store", "data-root"],
        "list": ["plugin"],
    }
    for k in range(count):
        line = list(lines[k % len(lines)])
        known = options[line[0]]
        how = rng.randrange(6)
        value = rng.choice(ODD)
        if how < 3 and known:
            option = rng.choice(known)
            line += [f"--{option}", value] if rng.random() < 0.7 or not value else [f"--{option}={value}"]
        elif how == 3:
            line[rng.randrange(1, len(line))] = value
        elif how == 4:
            line = line[: rng.randrange(1, 3)]  # whole, it would be a run of minutes
        else:
            line.insert(rng.randrange(1, len(line) + 1), value)
        if line[0] == "quickstart" or (line[:2] in (["data", "prepare"],) and "squares" not in line):
            line = ["data", "verify", value, *store]  # nothing is fetched here
        yield Request("arguments", line, common)


def settings(count: int) -> Iterator[Request]:
    """`--set` with every key and values of other types and forms."""
    rng = random.Random("settings")
    keys = [
        "epochs",
        "float_epochs",
        "batch",
        "lr",
        "float_lr",
        "optimizer",
        "momentum",
        "weight_decay",
        "schedule",
        "clip",
        "accumulate",
        "augment",
        "precision",
        "threads",
        "compile",
        "first_last",
        "plan",
        "selection",
        "calibration",
        "params",
        "data_params",
        "method",
        "data",
        "bits",
        "seed",
        "protocol",
        "network",
        "kd.weight",
        "kd.temperature",
        "lsq.x",
        "squares.limit",
        "squares.val",
        "squares.domains",
        "squares.balance",
        "squares.imbalance",
        "squares.lt_list",
        "squares.x",
        "ptq.x",
        ".x",
        "x.",
        "a.b.c",
        "",
        "=",
        "\udcff",
        "a\nb",
        "nothing",
    ]
    values = [
        *ODD,
        "[1, 2]",
        "{x: y}",
        "true",
        "false",
        "-0.5",
        "0.5",
        "[left, left]",
        "[rihgt]",
        "[[left]]",
        "{left: 1}",
        ".nan",
        "-.inf",
        "!!python/name:os.system",
    ]
    for k in range(count):
        key = keys[k % len(keys)] if k < len(keys) * 2 else rng.choice(keys)
        line = [
            "run",
            "--method",
            rng.choice(["ptq", "kd + ptq", "kd+ptq"]),
            *TINY,
            "--store",
            "runs",
            "--set",
            f"{key}={rng.choice(values)}",
        ]
        if key == "compile":
            line += ["--set", "network=nothing"]  # compiling takes longer than a request may
        yield Request("settings", line, common)


# ---- suites and plans

SUITE = """\
data: squares
method: [fp32, kd+lsq]
bits: [w4a4, w2a2]
params: {kd: {weight: 0.5}}
seed: [0, 1]
epochs: 1
also:
- {method: pact, seed: 3}
"""


def suites(count: int) -> Iterator[Request]:
    """A good suite with a line, a value or some bytes of it changed, and some that are wrong from the ground up."""
    rng = random.Random("suites")
    whole = [
        "",
        "[]",
        "3",
        "a: b: c",
        "\0",
        "method: lsq\n" * 2,
        "method: &a [*a]",
        "!!bool x",
        "[" * 5000,
        "{" * 5000,
        "- " * 5000,
        "? " * 500,
        "method: [lsq" + ", lsq" * 50_000 + "]",
        "method: lsq\nseed: [" + ", ".join(map(str, range(50_000))) + "]",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{('*' + p + ', ') * 9}]\n" for p, c in zip("abcdefghi", "bcdefghij", strict=True)),
        "method: lsq\nalso: " + "[{also: " * 15 + "[]" + "}]" * 15,
        "method: lsq\n" + "x" * 300_000,
        "#" * 300_000,
        "\ufeffmethod: lsqq",
        "%YAML 1.1\n---\nmethod: lsqq",
        "method: lsq\n---\nmethod: fp32",
        "? [a]\n: b",
        "method: lsq\ndescription: !!timestamp x",
        "'method': lsq\nmethod: fp32",
        'method: "\\ud800"',
        'method: "\\UFFFFFFFF"',
        "method: [" + "kd+" * 3000 + "lsq]",
        "method: lsq\nname: ../../x",
        "method: lsq\nname: " + "n" * 500,
        "method: lsq\nbits: ["
        + ", ".join(f"avg{k / 100}" for k in range(100, 900))
        + "]\nseed: ["
        + ", ".join(map(str, range(900)))
        + "]",
    ]
    lines = SUITE.splitlines()
    for k in range(count):
        if k < len(whole):
            text = whole[k]
        elif k % 3 == 0:
            changed = list(lines)
            at = rng.randrange(len(changed))
            changed[at] = f"{changed[at].partition(':')[0]}: {rng.choice(ODD)}"
            text = "\n".join(changed)
        elif k % 3 == 1:
            text = (
                SUITE + rng.choice(lines) + "\n"
                if rng.random() < 0.3
                else SUITE + f"{rng.choice(['lr', 'plan', 'params', 'also', 'x'])}: {rng.choice(ODD)}\n"
            )
        else:
            raw = bytearray(SUITE.encode())
            for _ in range(rng.randrange(1, 6)):
                raw[rng.randrange(len(raw))] = rng.choice(b"\0\x01\t\n :,[]{}&*!|>'\"%@`#-?09azAZ\x80\xff")
            text = raw.decode("latin-1") if rng.random() < 0.5 else raw.decode("utf-8", "surrogateescape")

        def make(folder: Path, text: str = text, k: int = k) -> None:
            path = folder / "wrong.yaml"
            if k % 29 == 28:
                os.mkfifo(path)
            elif k % 29 == 27:
                path.symlink_to("/dev/zero")
            elif k % 29 == 26:
                path.mkdir()
            else:
                path.write_bytes(text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape"))

        yield Request("suites", ["sweep", "wrong.yaml", "--dry-run", "--plugin", SQUARES, "--store", "runs"], make)


def plans(count: int) -> Iterator[Request]:
    """Plans of wrong layers, wrong bits, and files that are none."""
    rng = random.Random("plans")
    good = {"conv1": "w8a8", "stages.0.0.conv1": "w4a4", "fc": [4, 4]}
    whole = [
        "",
        "[]",
        "3",
        "a: b: c",
        "cost: 3",
        "cost: {plan: 3}",
        "cost: {plan: {}}",
        "a: [1, 2, 3]",
        "a: {w: 4}",
        "a: null",
        "a: avg3",
        "a: w9a9",
        "1: w4a4\n'1': w2a2",
        "&a a: *a",
        "{" * 3000,
    ]
    for k in range(count):
        plan = dict(good)
        plan[rng.choice(ODD)] = rng.choice([*ODD, "w4a4"])
        text = (
            whole[k]
            if k < len(whole)
            else json.dumps(plan)
            if k % 2
            else "\n".join(f"{a}: {b}" for a, b in plan.items())
        )

        def make(folder: Path, text: str = text, k: int = k) -> None:
            path = folder / "plan.yaml"
            if k % 13 == 12:
                os.mkfifo(path)
            elif k % 13 == 11:
                path.symlink_to("/dev/zero")
            else:
                path.write_bytes(text.encode("utf-8", "surrogateescape"))

        yield Request("plans", ["run", "--method", "lsq", *TINY, "--store", "runs", "--set", "plan=plan.yaml"], make)


# ---- folders of images, and their labels


def folders(count: int) -> Iterator[Request]:
    """A folder of two classes with one thing wrong, or several."""
    rng = random.Random("folders")
    for k in range(count):
        harms = [HARMS[k % len(HARMS)]] if k < len(HARMS) else rng.sample(HARMS, 2)

        def make(folder: Path, harms: list = harms) -> None:
            base = folder / "data" / "pets"
            for top in ("cat", "dog"):
                (base / top).mkdir(parents=True)
                for i in range(6):
                    (base / top / f"{i}.png").write_bytes(picture("PNG", i))
            for harm in harms:
                with contextlib.suppress(OSError):  # two harms may not be possible together
                    harm(base)

        line = [
            "data",
            rng.choice(["prepare", "prepare", "show", "verify"]),
            "imagefolder:pets",
            "--set",
            "size=8",
            "--data-root",
            "data",
            "--store",
            "runs",
        ]
        yield Request("folders", line + (["--out", "runs/x.png"] if line[1] == "show" else []), make)


def picture(kind: str, value: int = 0, size: tuple[int, int] = (9, 9), mode: str = "RGB") -> bytes:
    """A small image file."""
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(out, kind)
    return out.getvalue()


def _tree(top: str, *classes: str) -> Callable[[Path], None]:
    def harm(base: Path) -> None:
        for name in classes or ("cat", "dog"):
            (base / top / name).mkdir(parents=True, exist_ok=True)
            (base / top / name / "1.png").write_bytes(picture("PNG"))

    return harm


def _file(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda base: (base / name).write_bytes(content() if callable(content) else content) and None


def _do(action: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda base: action(base) and None


HARMS: list[Callable[[Path], None]] = [
    _file("cat/x.jfif", lambda: picture("JPEG")),
    _file("cat/x.txt", lambda: picture("JPEG")),
    _file("cat/x.png", b""),
    _file("cat/x.png", b"text"),
    _file("cat/x.png", lambda: picture("PNG")[:-20]),
    _file("cat/x.jpg", lambda: picture("JPEG")[:200]),
    _file("cat/x.gif", lambda: picture("GIF")[:15]),
    _file("x.png", lambda: picture("PNG")),
    _file("cat/x.png", lambda: picture("PNG", size=(1, 1))),
    _file("cat/x.tif", lambda: picture("TIFF", 1, mode="F")),
    _file("cat/x.webp", b"RIFF\xff\xff\xff\xffWEBPVP8 "),
    _file("cat/x.ppm", b"P6 99999999 99999999 255\n"),
    _file("cat/x.bmp", b"BM" + b"\xff" * 60),
    _file("cat/x.heic", b"\0\0\0\x18ftypheic" + bytes(16)),
    _do(lambda b: os.mkfifo(b / "cat/pipe.png")),
    _do(lambda b: os.mkfifo(b / "cat/pipe")),
    _do(lambda b: (b / "cat/loop").symlink_to("..")),
    _do(lambda b: (b / "cat/nowhere.png").symlink_to("nowhere")),
    _do(lambda b: (b / "cat/zero.png").symlink_to("/dev/zero")),
    _do(lambda b: (b / "elk").mkdir()),
    _do(lambda b: (b / "cat").rename(b / "dog/cat")),
    _do(lambda b: shutil.rmtree(b / "cat")),
    _do(lambda b: shutil.rmtree(b)),
    _do(lambda b: (b / "cat").rename(b / "c\nat")),
    _do(lambda b: os.rename(b / "cat", os.fsencode(b) + b"/c\xff")),
    _do(lambda b: (b / "cat").rename(b / ("c" * 255))),
    _do(lambda b: (b / "cat").rename(b / "猫")),
    _do(lambda b: (b / "cat").rename(b / "a|b,<b>\"'")),
    _tree("caf\u00e9"),
    _tree("Training"),
    _tree("seg_train"),
    _tree("train", "cat", "elk"),
    _tree("a/b/c/d"),
    _do(lambda b: [shutil.copytree(b / "cat", b / name) for name in ("caf\u00e9", "cafe\u0301")]),
    _do(lambda b: [os.rename(b / "cat", b / "x"), os.rename(b / "dog", b / "cat")]),
    _do(lambda b: (b / "cat/0.png").chmod(0)),
    _do(lambda b: [shutil.copytree(b, b.parent / "p"), shutil.rmtree(b), b.write_bytes(b"a file")]),
    _do(lambda b: [f.unlink() for f in b.rglob("*.png")]),
    _do(lambda b: [f.unlink() for f in b.rglob("[1-9].png")]),
    _do(lambda b: [(b / "cat" / f"{i}.png").write_bytes(picture("PNG", i, mode="I;16")) for i in range(6)]),
]


def labels(count: int) -> Iterator[Request]:
    """Parquet files of the hub with wrong columns, labels and metadata."""
    values: list[tuple[Any, str]] = [
        ([-1, 0, 1, 0], "int64"),
        ([0, None, 1, 0], "int64"),
        ([5, 900, -7, 0], "int64"),
        ([0, 0, 0, 0], "int64"),
        ([-1] * 4, "int64"),
        ([None] * 4, "int64"),
        (["a", "", None, "b"], "string"),
        (["a\nb", "\x1b[31m", "c", "c"], "string"),
        ([0.5, 1.0, 2.0, float("nan")], "float64"),
        ([True, False, True, False], "bool"),
        ([[0], [1], [0], [1]], "list"),
        ([2**62, -(2**62), 0, 1], "int64"),
    ]
    about: list[Any] = [
        {"_type": "ClassLabel", "names": ["a", "a", "b"]},
        {"_type": "ClassLabel", "names": []},
        {"_type": "ClassLabel", "names": 3},
        {"_type": "ClassLabel", "names": [1, None]},
        {"_type": "No"},
        5,
        [],
        None,
    ]
    for k in range(count):
        column, kind = values[k % len(values)] if k < len(values) else values[0]
        metadata = about[k - len(values)] if k >= len(values) else None

        def make(folder: Path, column: list = column, kind: str = kind, metadata: Any = metadata, k: int = k) -> None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            images = [{"bytes": picture("PNG", i), "path": None} for i in range(12)]
            kinds = {
                "string": pa.string(),
                "list": pa.list_(pa.int64()),
                "bool": pa.bool_(),
                "float64": pa.float64(),
                "int64": pa.int64(),
            }
            table = pa.table({"image": images, "label": pa.array(column * 3, kinds[kind])})
            features = {"image": {"_type": "Image"}, **({"label": metadata} if k >= len(values) else {})}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            (folder / "data/pets").mkdir(parents=True)
            pq.write_table(table, folder / "data/pets/train.parquet")

        yield Request(
            "labels",
            [
                "data",
                "prepare",
                "hf:me/pets",
                "--set",
                "size=8",
                "--set",
                "label=label",
                "--data-root",
                "data",
                "--store",
                "runs",
            ],
            make,
        )


# ---- plugins and records

METHOD = "from qatbench.methods.ptq import PTQ\nclass Mine(PTQ):\n    name = 'mine'\n"
DATA = """\
import torch
from qatbench import DataSet
from qatbench.bench.data import Domain
class Mine(DataSet):
    name = 'mine'
"""
NET = "import torch\nfrom torch import nn\nclass Mine(nn.Module):\n    name = 'mine'\n"
PLUGINS = [
    "",
    "x = 1",
    "import nowhere",
    "raise SystemExit(0)",
    "raise BaseException('x')",
    "raise GeneratorExit",
    "import os; os._exit(0)",
    "def f(): return f()\nf()",
    "(" * 1000,
    "\0",
    "'\\ud800'",
    "print('hello')\n" + METHOD,
    "import sys; sys.exit('a\\nb')",
    "raise GeneratorExit",
    "x = [0] * 10**12",
    "raise MemoryError",
    METHOD + "    bits = 'all'\n",
    METHOD + "    bits = None\n",
    METHOD + "    alters = 3\n",
    METHOD + "    first_last = 'nothing'\n",
    METHOD + "    version = object()\n",
    METHOD + "    fidelity = 3\n",
    METHOD + "    def __init__(self, *a): raise ValueError('a\\nb')\n",
    METHOD + "    def skip(self, task): return 3\n",
    METHOD + "    def skip(self, task): raise StopIteration\n",
    METHOD + "    Params = None\n",
    METHOD + "    Params = dict\n",
    METHOD.replace("'mine'", "'../z'"),
    METHOD.replace("'mine'", "'=1+1'"),
    METHOD.replace("'mine'", "''"),
    METHOD.replace("'mine'", "'a\\nb'"),
    METHOD.replace("'mine'", "3"),
    METHOD + "    def training_step(self): ...\n",
    METHOD + "    name = property(lambda s: 1 / 0)\n",
    METHOD + "    def __init_subclass__(cls): 1 / 0\n",
    DATA,
    DATA + "    domains = ()\n",
    DATA + "    domains = ('a',)\n",
    DATA + "    domains = ('a', 'a')\n    classes = ('x', 'y')\n    image = (1, 8, 8)\n",
    DATA + "    domains = ('a/b',)\n    classes = ('x', 'y')\n    image = (1, 8, 8)\n",
    *(
        DATA + f"    domains = ('a',)\n    classes = ('x', 'y')\n    image = (1, 8, 8)\n    def load(self): {body}\n"
        for body in (
            "return None",
            "return []",
            "return 3",
            "1 / 0",
            "raise StopIteration",
            "raise SystemExit(0)",
            "return [Domain('a', None, None)]",
            "return [Domain('a', torch.zeros(4, 1, 8, 8), torch.zeros(4))]",
            "return [Domain('a', torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 9]))]",
            "return [Domain('a', torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))]",
            "return [Domain('a', torch.zeros(4, 1, 8, 8).byte(), torch.zeros(4).long(), torch.tensor([99]))]",
        )
    ),
    NET,
    NET + "    def __init__(self, c, o): super().__init__()\n",
    NET + "    def __init__(self, c, o): 1 / 0\n",
    NET + "    def __init__(self): super().__init__()\n",
    NET + "    def __init__(self, c, o): raise SystemExit(0)\n",
    NET
    + "    def __init__(self, c, o):\n        super().__init__(); self.f = nn.Linear(3, o)\n    def forward(self, x): 0 / 0\n",
]


def plugins(count: int) -> Iterator[Request]:
    """Plugin files that do not import, or define what is none of theirs."""
    rng = random.Random("plugins")
    chosen = PLUGINS[:count] + [rng.choice(PLUGINS) for _ in range(count - len(PLUGINS))]
    for text in chosen:
        what = "data" if text.startswith(DATA) else "network" if text.startswith(NET) else "method"
        values = {"method": "ptq", "data": "squares", "network": "resnet8", what: "mine"}
        line = [
            "run",
            *(part for key, value in values.items() for part in (f"--{key}", value)),
            "--plugin",
            "mine.py",
            *TINY[:2],
            *TINY[4:],
            "--store",
            "runs",
        ]

        def make(folder: Path, text: str = text) -> None:
            (folder / "mine.py").write_text(text, encoding="utf-8", errors="surrogatepass")

        yield Request("plugins", line, make)


def records(count: int) -> Iterator[Request]:
    """A store in which a file is another one, cut, or of another type."""
    rng = random.Random("records")
    contents: list[Any] = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"\0" * 100,
        b"{" * 5000,
        b"[" * 100_000,
        b'{"status": "done"}',
        b"\xff\xfe",
        b"1e999",
        b'{"a": NaN}',
        "pipe",
        "zero",
        "folder",
        "loop",
        "cut",
        "types",
    ]
    lines = [
        ["report", "--json"],
        ["status", "mine"],
        ["dash"],
        ["run", "--method", "ptq", *TINY],
        ["sweep", "mine.yaml", "--dry-run", "--plugin", SQUARES],
        ["probe", "RUN", "--images", "8", "--directions", "1", "--iterations", "1", "--plugin", SQUARES],
    ]
    for k in range(count):
        content = contents[k % len(contents)]
        pattern = ["[0-9a-f]*/result.json", "suites/mine.json", "float/*/result.json", "data/*/meta.json"][
            k // len(contents) if k < 2 * len(contents) else rng.randrange(4)
        ]

        def make(folder: Path, content: Any = content, pattern: str = pattern, k: int = k) -> None:
            common(folder)
            for path in list((folder / "runs").glob(pattern)):
                harm_file(path, content, random.Random(k))

        yield Request("records", [*lines[k % len(lines)], "--store", "runs"], make)


def harm_file(path: Path, content: Any, rng: random.Random) -> None:
    """Put something else in the place of a file of JSON."""
    old = path.read_bytes()
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "zero":
        path.symlink_to("/dev/zero")
    elif content == "loop":
        path.symlink_to(path.name)
    elif content == "folder":
        path.mkdir()
    elif content == "cut":
        path.write_bytes(old[: rng.randrange(len(old))])
    elif content == "types":
        values = json.loads(old)
        for key in rng.sample(sorted(values), min(4, len(values))):
            values[key] = rng.choice([None, 3, "x", [], {}, [None], {"x": None}, True])
        path.write_bytes(json.dumps(values).encode())
    else:
        path.write_bytes(content)


def common(folder: Path) -> None:
    """What most requests find: a suite, and the store of a run that is done."""
    (folder / "mine.yaml").write_text(
        "data: squares\nmethod: ptq\nepochs: 1\nfloat_epochs: 1\nbatch: 32\nfirst_last: native\n"
    )
    template = folder.parent / "template" / "runs"
    if template.is_dir():
        shutil.copytree(template, folder / "runs")


# ---- how they are run


def run(request: Request, folder: Path) -> dict[str, Any]:
    """Run one request in a process of its own; what it said, did and used."""
    folder.mkdir()
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    _forked(lambda: request.make(folder), Path(os.devnull))
    known = (
        next((p.parent.name for p in (folder / "runs").glob("[0-9a-f]*/result.json")), "0123")
        if (folder / "runs").is_dir()
        else "0123"
    )
    line = [known if part == "RUN" else part for part in request.line]
    before = _snapshot(folder)
    began = time.monotonic()

    def call() -> None:
        os.chdir(folder)
        os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), **request.variables}
        sys.argv = ["qatbench", *line]
        resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
        from qatbench.__main__ import main

        main()

    status, used = _forked(call, folder / "tmp" / "said")
    out, err = ((folder / "tmp" / f"said.{k}").read_text(errors="replace") for k in (1, 2))
    for k in (1, 2):
        (folder / "tmp" / f"said.{k}").unlink()
    after = _snapshot(folder)
    names = before.keys() ^ after.keys() | {
        name for name in before.keys() & after.keys() if before[name] != after[name]
    }
    changed = sorted(name for name in names if not any(_lies_in(name, place) for place in _places(line)))
    return {
        "family": request.family,
        "line": line,
        "status": status,
        "out": out[-2000:],
        "err": err[-4000:],
        "cpu": round(used, 2),
        "wall": round(time.monotonic() - began, 2),
        "changed": changed,
    }


def _places(line: list[str]) -> Iterator[str]:
    """Where the command line itself asks for files."""
    for option, value in zip(line, [*line[1:], ""], strict=True):
        name, equals, more = option.partition("=")
        if name in ("--out", "--store", "--dir"):
            yield more if equals else value


def _lies_in(name: str, place: str) -> bool:
    place = os.fsencode(place).decode("latin-1")
    return bool(place) and (name == place or name.startswith(f"{place}/"))


def _forked(work: Callable[[], None], said: Path) -> tuple[int, float]:
    """Do something in a forked process, with its output in files; its exit status (-signal) and its processor's seconds."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if str(said) != os.devnull:
            for k in (1, 2):
                os.dup2(os.open(f"{said}.{k}", os.O_CREAT | os.O_WRONLY, 0o644), k)
        status = 99
        try:
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 98
        except BaseException:  # a traceback is what the test looks for
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + PATIENCE
    while True:
        done, raw, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(raw), usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return -signal.SIGKILL, PATIENCE
        time.sleep(0.01)


def _snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies outside of the store: name -> mode, size and time."""
    found = {}
    for path, names, files in os.walk(folder):
        if Path(path) == folder and "runs" in names:
            names.remove("runs")
        for name in [*names, *files]:
            status = os.lstat(os.path.join(path, name))
            time_ns = 0 if name in names else status.st_mtime_ns
            found[os.fsencode(os.path.relpath(os.path.join(path, name), folder)).decode("latin-1")] = (
                status.st_mode,
                status.st_size,
                time_ns,
            )
    return found


def main(folder: Path, step: int, first: int) -> None:
    """Run every `step`-th request from number `first`, and print what each did."""
    sys.dont_write_bytecode = True
    sys.setrecursionlimit(1000)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "MPLCONFIGDIR": str(folder / "mpl"),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
    }
    for name in (
        "qatbench.cli",
        "qatbench.bench.resolve",
        "qatbench.bench.runner",
        "qatbench.sweeps.local",
        "qatbench.reports.report",
        "qatbench.reports.montage",
        "qatbench.reports.flatness",
        "qatbench.bench.flatness",
        "matplotlib.backends.backend_agg",
        "datasets",
        "pyarrow.parquet",
    ):
        importlib.import_module(name)
    from qatbench.bench.registry import plugins as known

    for kind in ("methods", "datasets", "networks"):
        known(kind)
    template = run(Request("template", [*RUN, "--store", "runs"], common), folder / "template")
    assert template["status"] == 0, template
    launched = run(
        Request(
            "template",
            ["sweep", "mine.yaml", "--workers", "1", "--no-wandb", "--plugin", SQUARES, "--store", "runs"],
            common,
        ),
        folder / "launched",
    )
    assert launched["status"] == 0, launched
    shutil.rmtree(folder / "template" / "runs")
    os.rename(folder / "launched" / "runs", folder / "template" / "runs")
    for number, request in list(enumerate(requests()))[first::step]:
        place = folder / f"r{number:03}"
        told = {"number": number, **run(request, place)}
        print(json.dumps(told), flush=True)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

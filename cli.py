"""The verbs. A heavy library is imported inside the verb that needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .bench.errors import UserError, nearest
from .bench.paths import usable
from .bench.secrets import scrub


class Interrupted(Exception):
    """Ctrl-C; the message is the line for the user."""


class Verbs(TyperGroup):
    """The commands; Ctrl-C in one of them leaves it as `Interrupted`, whatever the version of typer does with it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            trains = ctx.invoked_subcommand in ("quickstart", "run", "sweep")
            hint = "; the same command goes on from the last finished epoch" if trains else ""
            raise Interrupted(f"interrupted{hint}") from None


app = typer.Typer(
    name="qatbench",
    help="Compare quantization-aware training methods under one protocol, tuning budget and bit accounting.",
    cls=Verbs,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
new_app = typer.Typer(help="Write a working plugin to start from.")
data_app = typer.Typer(help="Look at data sets, fetch them, prepare them and check them.", cls=Verbs)
app.add_typer(new_app, name="new")
app.add_typer(data_app, name="data")

StoreOption = Annotated[Path, typer.Option("--store", envvar="QATBENCH_STORE", help="Where results live.")]
DataOption = Annotated[
    Path | None, typer.Option("--data-root", envvar="QATBENCH_DATA", readable=False, help="Where your data sets are.")
]
PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="A file with a method, data set or network; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
WandbOption = Annotated[
    bool, typer.Option("--wandb/--no-wandb", help="Whether W&B listens (metrics.csv is written either way).")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", help="Worker processes (default: one a core, or one a GPU).")
]
DataName = Annotated[str, typer.Argument(metavar="NAME", help="A data set, e.g. digits or imagefolder:pets.")]
DataSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="The data set's settings, e.g. size=64; repeatable."),
]
DEFAULT_STORE = Path("runs")


class Kind(StrEnum):
    """What can be listed."""

    methods = "methods"
    datasets = "datasets"
    networks = "networks"
    suites = "suites"


@app.callback()
def start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Compare quantization-aware training methods under one protocol, tuning budget and bit accounting."""
    if version:
        from . import __version__

        print(f"qatbench {__version__}")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


@app.command(short_help="Compare nine small runs on real digits.")
def quickstart(
    store: StoreOption = DEFAULT_STORE,
    workers: WorkersOption = None,
    wandb: WandbOption = True,
    device: DeviceOption = "auto",
) -> None:
    """Train and compare nine small networks on real digits that come with the installed packages."""
    from .bench.store import Store

    status = _sweep("quickstart", Store(store), workers=workers, wandb=wandb, device=device)
    if status in (0, 1):
        _report(Store(store), "quickstart", None, _report_command("quickstart", store, None))
    raise typer.Exit(status)


@app.command("list", short_help="What there is, and what is unavailable.")
def list_(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help=", ".join(Kind))],
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """What there is, what is unavailable, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    _load(plugin)
    rows = _suites() if kind is Kind.suites else _plugins(kind.value)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("name", "what", box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(
            row["name"], f"[red]unavailable[/red]: {escape(row['error'])}" if row.get("error") else escape(row["what"])
        )
    Console().print(table)


@app.command(short_help="Train and test one method.")
def run(
    method: Annotated[str, typer.Option("--method", help="A method or a chain, e.g. lsq or kd+lsq.")],
    data: Annotated[str, typer.Option("--data", help="See: qatbench list datasets.")] = "optdigits",
    network: Annotated[str, typer.Option("--network", help="See: qatbench list networks.")] = "resnet8",
    bits: Annotated[
        str,
        typer.Option("--bits", help="wXaY: X bits for weights, Y for activations; avgB: B bits a weight on average."),
    ] = "w4a4",
    seed: Annotated[int, typer.Option("--seed", help="Draws split, weights and batches.")] = 0,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="single[:DOMAIN], mdl, lodo:DOMAIN or longtail.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="E.g. epochs=5, kd.weight=0.9, digits.limit=5000, plan=FILE; repeatable."
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
    device: DeviceOption = "auto",
    wandb: WandbOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train and test one method; a run that is done is not run again."""
    from .bench.spec import RunSpec, validated
    from .bench.store import Store

    _check_root(data_root)
    asked = {"method": method, "data": data, "network": network, "bits": bits, "seed": seed, "protocol": protocol}
    _load(plugin)
    spec = validated(RunSpec, _with_settings(asked, settings or []), "run")
    from .bench.resolve import resolve
    from .bench.runner import pick_device
    from .bench.runner import run as run_one

    where = Store(store)
    pick_device(device)  # an unknown one is refused before the data is prepared
    resolved = resolve(spec, data_root=data_root, cache=where.cache)
    known = where.read(resolved.run_id)
    with _watching(resolved.spec.label, quiet=as_json) as tell:
        record = run_one(resolved, where, data_root=data_root, device=device, wandb=wandb, progress=tell)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        _show(record, where, again=known is not None and known["status"] == "done")
    _tell_aside(where)
    raise typer.Exit(1 if record["status"] == "failed" else 0)


@app.command(short_help="Run what a suite lacks.")
def sweep(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A suite's name (see: qatbench list suites), or a YAML file.")
    ],
    workers: WorkersOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and run nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also run again what failed.")] = False,
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", help="Stop after 2h, 30m or 90s; launch again to go on.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
    device: DeviceOption = "auto",
    wandb: WandbOption = True,
) -> None:
    """Fill in what a suite lacks: skip what is done, run the rest in worker processes."""
    from .bench.store import Store

    _check_root(data_root)
    where = Store(store)
    options: dict[str, Any] = {
        "workers": workers,
        "dry_run": dry_run,
        "retry_failed": retry_failed,
        "time_limit": time_limit,
    }
    status = _sweep(suite, where, data_root=data_root, plugins=plugin or [], device=device, wandb=wandb, **options)
    if not dry_run and status in (0, 1):
        from .sweeps.suite import load_suite

        print(f"leaderboard: {_report_command(load_suite(suite).name, store, None)}")
    raise typer.Exit(status)


@app.command(short_help="Where each run of a suite stands.")
def status(
    suite: Annotated[str, typer.Argument(metavar="SUITE")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Where each run of a suite stands: done, running, failed, skipped or left."""
    from rich.console import Console

    from .bench.store import Store
    from .sweeps.progress import clock, plan_table
    from .sweeps.status import status as look

    found = look(suite, Store(store))
    if as_json:
        import dataclasses

        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    states = ("done", "running", "failed", "skipped", "left")
    counts = ", ".join(f"{found.count(state)} {state}" for state in states if found.count(state))
    to_go = f"; about {clock(found.seconds_to_go)} to go" if found.seconds_to_go else ""
    console = Console()
    console.print(plan_table(found.entries, retry_failed=False))
    floats = f"; {found.floats_at_work} float networks in training" if found.floats_at_work else ""
    console.print(f"{found.suite}: {counts}{floats}{to_go}", highlight=False)


@app.command(short_help="Regenerate tables and figures.")
def report(
    suite: Annotated[
        str | None, typer.Argument(metavar="[SUITE]", help="A suite launched on this store; none: everything in it.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the files (default: STORE/report).")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Regenerate every table and figure from the store alone."""
    from .bench.store import Store

    where = Store(store)
    if as_json:
        from .reports.leaderboard import as_dicts, leaderboard

        print(json.dumps(as_dicts(leaderboard(where, suite)), indent=1))
        _tell_aside(where)
    else:
        _report(where, suite, out, _report_command(suite, store, out))


class Sums(StrEnum):
    """What an export keeps residual sums as."""

    auto = "auto"
    int8 = "int8"
    float = "float"


@app.command("export", short_help="Integer ONNX of a finished run.")
def export_(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of it.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The ONNX file (default: model.onnx in the run's folder)."),
    ] = None,
    opset: Annotated[int, typer.Option("--opset", help="Of ONNX; from 21 on, up to 4 bits are INT4 and UINT4.")] = 20,
    sums: Annotated[
        Sums,
        typer.Option(
            "--sums", help="Biases and residual sums: int8 is fast, float exact; auto: int8 where inputs have 8 bits."
        ),
    ] = Sums.auto,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a finished run as integer ONNX, check it against the run in ONNX Runtime, and note it in the record.

    Exit status 2 if the method has no integer form: the record then says why, and no file is written.
    """
    from .bench.export import export_run
    from .bench.store import Store

    _check_root(data_root)
    _load(plugin)
    found = export_run(Store(store), run_id, data_root=data_root, out=out, opset=opset, sums=sums.value)
    if as_json:
        print(json.dumps(found, indent=1))
    elif found["status"] == "done":
        _show_export(found)
    if found["status"] == "none":
        raise UserError(f"no integer form: {found['reason']}")


@app.command("probe", short_help="How flat finished runs are.")
def probe_(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Runs' ids, or the beginnings of them.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The PNG file (default: STORE/report/flatness.png).")
    ] = None,
    images: Annotated[int, typer.Option("--images", help="Training images, from all domains alike.")] = 512,
    directions: Annotated[int, typer.Option("--directions", help="Random directions.")] = 10,
    iterations: Annotated[int, typer.Option("--iterations", help="Power iterations, for the eigenvalue.")] = 15,
    seed: Annotated[int, typer.Option("--seed", help="Draws the directions.")] = 0,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how flat the minima of finished runs are, note it beside their records, and draw them in one figure.

    The quantized network's loss on training images, along random directions that are as long, filter by filter, as the weights;
    and its Hessian's eigenvalue of the largest size, which may be negative, from differences of straight-through gradients.
    """
    from .bench.flatness import Settings, probe_run
    from .bench.spec import validated
    from .bench.store import Store, writing
    from .reports.flatness import flatness_figure

    _check_root(data_root)
    _load(plugin)
    asked = {"images": images, "directions": directions, "iterations": iterations, "seed": seed}
    settings, where = validated(Settings, asked, "probe"), Store(store)
    found = []
    for run_id in dict.fromkeys([where.find(run) for run in runs]):
        with _status(f"probing {run_id}"):
            found.append(probe_run(where, run_id, settings, data_root=data_root))
    path = out or where.root / "report" / "flatness.png"
    if out is None:
        with writing(where.root):
            path.parent.mkdir(exist_ok=True)
    _write_picture(path, flatness_figure(found))
    if as_json:
        print(json.dumps({"runs": found, "figure": str(path)}, indent=1))
    else:
        _show_probes(found)
        print(f"figure: {path}")


@app.command(short_help="Where to look: W&B and the HTML page.")
def dash(store: StoreOption = DEFAULT_STORE) -> None:
    """Where to look: W&B without a network, W&B on a server, and the HTML page."""
    from .bench.store import Store
    from .reports.dash import gather

    for line in gather(Store(store)):
        print(line)


@data_app.command("list", short_help="Which data sets are here.")
def list_data(
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """What data sets there are, and which of their files are here."""
    import dataclasses

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .bench.catalogue import catalogue
    from .bench.store import Store

    _check_root(data_root)
    _load(plugin)
    entries = catalogue(data_root, Store(store).cache)
    if as_json:
        print(json.dumps([dataclasses.asdict(e) for e in entries], indent=1))
        return
    table = Table("name", "images", "domains", box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap, table.columns[1].justify = True, "right"
    for e in entries:
        states: dict[str, list[str]] = {}
        for domain, state in (e.domains or {}).items():
            states.setdefault(state, []).append(domain)
        where = "; ".join(f"{state}: {', '.join(domains)}" for state, domains in states.items()) or e.what
        where = f"[red]unavailable[/red]: {escape(e.error)}" if e.error else escape(where)
        table.add_row(e.name, f"{e.images:,}" if e.images else "", where + (" (prepared)" if e.prepared else ""))
    Console().print(table)


@data_app.command("prepare", short_help="Fetch, check and decode a data set.")
def prepare_data(
    name: DataName,
    settings: DataSettings = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
) -> None:
    """Fetch what is missing, check it against the published hashes, decode the images once, and split them."""
    from .bench.catalogue import fetch_missing

    params, where = _data_request(name, settings, store, data_root, plugin)
    from .bench.data import find_data, hash_splits, make_splits, open_data
    from .bench.registry import find

    find("datasets", name).online = True
    for path in fetch_missing(find_data(name, params, data_root, where.cache)):
        print(f"fetched {path}")
    loaded = open_data(name, params, data_root, where.cache)
    splits = make_splits(loaded, 0)
    for domain in loaded.domains:
        s = splits[domain.name]
        parts = f"{len(s.train):,} train, {len(s.val):,} val, {len(s.test):,} test"
        print(f"{domain.name}: {len(domain.labels):,} images ({parts})")
    print(f"data {loaded.hash[:16]}, split of seed 0 {hash_splits(splits)[:16]}")


@data_app.command("verify", short_help="Hold files against their hashes.")
def verify_data(
    name: DataName,
    settings: DataSettings = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
) -> None:
    """Hold a data set's files against the published hashes, and its decoded images against their own; reads every byte."""
    from .bench.catalogue import check as check_data

    params, where = _data_request(name, settings, store, data_root, plugin)
    wrong = 0
    for right, what in check_data(name, params, data_root, where.cache):
        print(f"{ {True: 'ok  ', False: 'FAIL', None: '-   '}[right] } {what}")
        wrong += right is False
    raise typer.Exit(int(wrong > 0))


@data_app.command("show", short_help="One picture of a data set.")
def show_data(
    name: DataName,
    out: Annotated[Path | None, typer.Option("--out", help="The PNG file (default: NAME.png).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split.")] = 0,
    settings: DataSettings = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataOption = None,
    plugin: PluginOption = None,
) -> None:
    """Write one PNG: images of classes by domains, images of each class in each part, counts and split hash."""
    params, where = _data_request(name, settings, store, data_root, plugin)
    from .bench.data import make_splits, open_data
    from .reports.montage import montage

    loaded = open_data(name, params, data_root, where.cache)
    path = out or Path(f"{loaded.name.replace(':', '-').replace('/', '-')}.png")
    _write_picture(path, montage(loaded, make_splits(loaded, seed), seed))
    print(f"wrote {path}")


@new_app.command("method", short_help="A method in one file, and its test.")
def new_method(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to write it.")] = Path(),
) -> None:
    """Write NAME.py, a working method in one file, and test_NAME.py, its test."""
    from .bench.scaffold import write_method

    method, test = write_method(name, folder)
    print(f"wrote {method} and {test}; next:")
    print(f"  qatbench check {shlex.quote(str(method))}")
    print(f"  qatbench run --plugin {shlex.quote(str(method))} --method {name}")


@app.command(short_help="The contract suite, on a plugin file.")
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="A plugin file.")]) -> None:
    """Run the contract suite on every method and data set that a file defines."""
    from .bench.scaffold import check_file

    raise typer.Exit(check_file(file))


@app.command(short_help="What is here, what is missing.")
def doctor(store: StoreOption = DEFAULT_STORE, data_root: DataOption = None) -> None:
    """Versions, devices, data roots, W&B mode, what is missing and how to get it."""
    from .bench.doctor import examine

    raise typer.Exit(examine(store, data_root))


def usage_line(error: Exception) -> str | None:
    """What was wrong with the command line, in one line; None if the error is another one."""
    # Told by its methods: typer brought a command-line parser of its own, whose classes are not click's.
    if not hasattr(error, "format_message"):
        return None
    message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")  # type: ignore[attr-defined]
    ctx: Any = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and ctx is not None and option:
        known = [name for p in ctx.command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")]
        message = f"no such option {option}{nearest(option, known)}"
    command = ctx.command_path if ctx is not None else "qatbench"
    return f"{message[0].lower()}{message[1:]} (see: {command} --help)"


@contextmanager
def _watching(label: str, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """One progress line for one run, on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=1, what="")

        def tell(event: dict[str, Any]) -> None:
            accuracy = event.get("val/acc")
            epoch = "" if event["phase"] == "traces" else f" {event['epoch'] + 1}/{event['epochs']}"
            what = event["phase"] + epoch + (f" val {accuracy:.3f}" if accuracy else "")
            bar.update(task, completed=event["step"], total=event["steps"], what=what)

        yield tell


@contextmanager
def _status(what: str) -> Iterator[None]:
    """A line that says what is going on, on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _write_picture(path: Path, picture: bytes) -> None:
    """The file, whole or not at all."""
    from .bench.disk import one_line, replace_file

    with one_line(path, "give another file with --out"):
        replace_file(path, picture)


def _load(plugins: list[Path] | None) -> None:
    if plugins:
        from .bench.registry import load_file

        for path in plugins:
            load_file(usable(path, "plugin"))


def _check_root(root: Path | None) -> None:
    if root is None:
        return
    root = usable(root, "data root")
    if not os.path.exists(root):
        raise UserError(
            f"data root {root} does not exist; give the folder with your data sets (--data-root or QATBENCH_DATA)"
        )
    if not root.is_dir():
        raise UserError(f"data root {root} is a file; give the folder with your data sets")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"data root {root} may not be read; check its permissions")


def _data_request(
    name: str, settings: list[str] | None, store: Path, root: Path | None, plugin: list[Path] | None
) -> tuple[dict[str, Any], Any]:
    """The data set's settings (``size=64`` or ``office31.size=64``), and the store."""
    from .bench.store import Store

    _check_root(root)
    _load(plugin)
    params: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: expected KEY=VALUE, e.g. size=64")
        params[key.removeprefix(f"{name.partition(':')[0]}.")] = _value(text, setting)
    return params, Store(store)


def _with_settings(asked: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Sort ``--set KEY=VALUE`` into the run's keys, the methods' params and the data set's."""
    values: dict[str, Any] = {**asked, "params": {}, "data_params": {}}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: expected KEY=VALUE, e.g. epochs=5 or kd.weight=0.9")
        value = _value(text, setting)
        owner, dot, name = key.partition(".")
        if not dot and key in ("params", "data_params"):
            raise UserError(f"--set {setting}: write the owner and its key, e.g. kd.weight=0.9 or digits.limit=5000")
        if not dot:
            values[key] = value
        elif owner in (asked["data"], asked["data"].partition(":")[0]):
            values["data_params"][name] = value
        elif owner in (chain := _chain(asked["method"])):
            values["params"].setdefault(owner, {})[name] = value
        else:
            from .bench.registry import find

            find("datasets", asked["data"])  # a misspelt data set is the mistake, not the setting's owner
            known = [*chain, asked["data"].partition(":")[0]]
            raise UserError(
                f"--set {setting}: {owner!r} is neither a method of this run nor its data set{nearest(owner, known)}"
            )
    return values


def _value(text: str, setting: str) -> Any:
    """``5``, ``0.1``, ``true``, ``null``, ``[a, b]`` as in a suite's YAML; what does not follow its grammar is text."""
    from .bench.yaml import NotYaml, parse

    try:
        return parse(text, f"--set {setting[:80]}")
    except NotYaml:
        return text


def _chain(method: str) -> list[str]:
    """The names in a chain, those that a wrapper brings along too."""
    from .bench.chain import members

    return [cls.name for cls in members(method)]


def _sweep(suite: str, store: Any, **options: Any) -> int:
    from rich.console import Console

    from .sweeps.suite import load_suite

    loaded = load_suite(suite)
    _load(options.get("plugins"))
    from .sweeps.local import sweep as launch

    command = shlex.join(["qatbench", *sys.argv[1:]])
    return launch(loaded, store, command=command, console=Console(), **options).exit_status


def _report_command(suite: str | None, store: Path, out: Path | None) -> str:
    parts = ["qatbench", "report", *([suite] if suite else []), "--store", str(store)]
    return shlex.join([*parts, *(["--out", str(out)] if out else [])])


def _report(store: Any, suite: str | None, out: Path | None, command: str) -> None:
    from rich.console import Console

    from .reports.leaderboard import leaderboard
    from .reports.render import terminal_table
    from .reports.report import make_report

    paths = make_report(store, suite, out, command)
    console = Console()
    for table in leaderboard(store, suite):
        console.print(terminal_table(table, width=console.width))
    console.print(f"leaderboard: {paths.html}", soft_wrap=True, highlight=False)
    _tell_aside(store)


def _tell_aside(store: Any) -> None:
    """Name the files that are no records; they stay where they are."""
    for path, reason in dict.fromkeys(store.aside):
        print(f"{path} is set aside: {reason}", file=sys.stderr)


def _plugins(kind: str) -> list[dict[str, Any]]:
    from .bench.registry import plugins

    return [
        {
            "name": p.name,
            "what": _about(p.cls),
            "origin": p.origin,
            "error": p.error,
            "version": getattr(p.cls, "version", None),
        }
        for p in plugins(kind)
    ]


def _about(cls: Any) -> str:
    """The first line of the docstring, and a method's mark."""
    first = (cls.__doc__ or "").strip().split("\n")[0] if cls is not None else ""
    mark = getattr(cls, "fidelity", None)
    return f"{first} [{mark}]" if mark else first


def _suites() -> list[dict[str, Any]]:
    from .sweeps.suite import load_suite, suite_names

    return [
        {"name": n, "what": s.description, "runs_at_most": len(s.cells())}
        for n in suite_names()
        for s in [load_suite(n)]
    ]


def _show_export(found: dict[str, Any]) -> None:
    kinds = [" and ".join(found["types"][k]) or "float" for k in ("weights", "activations")]
    integer = found["operators"].get("QLinearConv", 0)
    print(
        f"agrees on {100 * found['agreement']:.2f} % of {found['images']:,} test images, accuracy {100 * found['acc']:.2f} %"
    )
    print(
        f"{found['latency_ratio']:.2f} x the float network's latency (ONNX Runtime, one thread, batch {found['latency_batch']})"
    )
    print(
        f"weights {kinds[0]}, activations {kinds[1]}, residual sums {found['sums']}, {integer} convolutions on integers"
    )
    print(f"{found['bytes'] / 1000:.1f} kB (float: {found['float_bytes'] / 1000:.1f} kB): {found['file']}")


def _show_probes(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .reports.flatness import eigenvalue, notes

    shown = (0.1, 0.5)
    table = Table("run", "method", "bits", box=None, pad_edge=False, header_style="bold")
    for name in ("test acc", "loss", *(f"rise {r:g}" for r in shown), "max eig"):
        table.add_column(name, justify="right")
    for column in table.columns:
        column.no_wrap = column.header != "method"
    for probe in found:
        rise = dict(zip(probe["settings"]["radii"], probe["rise"]["mean"], strict=True))
        acc = "" if probe["acc"] is None else f"{100 * probe['acc']:.2f}"
        numbers = (acc, f"{probe['loss']:.3f}", *(f"{rise[r]:.3f}" for r in shown), eigenvalue(probe))
        table.add_row(probe["run_id"], probe["method"], probe["bits"], *numbers)
    Console().print(table)
    if not all(probe["converged"] for probe in found):
        print("~: the power iteration has not converged; try more --iterations")
    for note in notes(found):
        print(note)


def _show(record: dict[str, Any], store: Any, again: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    folder = store.path(record["run_id"])
    if record["status"] != "done":
        console.print(
            f"[red]{record['status']}[/red]: {escape(scrub(str(record['reason'])))}", highlight=False, soft_wrap=True
        )
        console.print(f"log: {folder / 'log.txt'}", highlight=False, soft_wrap=True)
        return
    metrics, cost = record["metrics"], record["cost"]
    domains = {k.rpartition("/")[2]: v for k, v in metrics.items() if k.startswith("test/acc/")}
    parts = ", ".join(f"{name} {100 * value:.2f}" for name, value in domains.items())
    console.print(f"test accuracy {100 * metrics['test/acc']:.2f} %  ({parts})", highlight=False, soft_wrap=True)
    extra = {
        "many": "acc_many",
        "medium": "acc_medium",
        "few": "acc_few",
        "in distribution": "acc_id",
        "out": "acc_ood",
    }
    found = [f"{word} {100 * metrics[f'test/{k}']:.2f}" for word, k in extra.items() if f"test/{k}" in metrics]
    if found:
        console.print(", ".join(found), highlight=False, soft_wrap=True)
    size = f"{cost['size_bytes'] / 1000:.1f} kB"
    console.print(
        f"{cost['avg_bits_weight']:.2f} bits a weight, {cost['avg_bits_act']:.2f} an activation, {size}",
        highlight=False,
        soft_wrap=True,
    )
    for note in record["provenance"].get("notes", ()):
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"{'done already' if again else 'record'}: {folder / 'result.json'}", highlight=False, soft_wrap=True)

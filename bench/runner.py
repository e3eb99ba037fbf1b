"""One run: from a resolved spec to a record in the store. It may be killed at any instant; a rerun goes on from the last epoch."""

from __future__ import annotations

import datetime
import functools
import gc
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .assemble import assemble
from .chain import build
from .data import DataModule, open_data
from .disk import Damaged, clear_temporaries, file_digest, write_json
from .errors import Diverged, RunFailed, UserError, trouble
from .fit import (
    LAST,
    Best,
    Progress,
    Recorder,
    best_file,
    best_of,
    check_best,
    fit,
    load,
    one_line,
    other_code,
    read_best,
    read_checkpoint,
    save,
    selected,
    start_over,
    test,
    validate,
)
from .memory import keep_freed
from .method import Method
from .network import make_network
from .quant import Bits, audit, cost
from .registry import ROOT
from .resolve import Resolved, code_of, resolve
from .secrets import Scrubbed, scrub
from .seeds import seed_for
from .spec import RunSpec, validated
from .store import NET, RECORD, SCHEMA, BusyError, Store, check_digest, writing
from .task import combine
from .traces import Traces
from .tracking import Tracker

log = logging.getLogger("qatbench")


def run(
    resolved: Resolved,
    store: Store,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    wandb: bool = True,
    suite: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is not done yet, and record how it ended.

    Args:
        resolved: The run.
        store: Where its record and its checkpoint live.
        data_root: Where the user keeps data sets.
        device: ``auto`` (CUDA if there is any), ``cpu``, ``cuda`` or ``cuda:N``.
        wandb: Whether W&B listens.
        suite: The suite it belongs to, W&B's group.
        progress: Called at most four times a second with what is going on.

    Returns:
        The record. A run that failed has one, too; a run that is done is not run again.

    Raises:
        UserError: The request was wrong (data, store), not the run; or the machine ended it (a full disk), and it is left as it is.
    """
    old = store.read(resolved.run_id)
    if old is not None and old["status"] == "done":
        return old
    pick_device(device)  # refused before anything is written
    with _held(store, resolved.run_id, "this run"):
        old = store.read(resolved.run_id)
        if old is not None and old["status"] == "done":  # by another process, while this one waited
            return old
        folder = store.path(resolved.run_id)
        with writing(store.root):
            folder.mkdir(parents=True, exist_ok=True)
            log_file = logging.FileHandler(store.log_path(resolved.run_id))
        try:
            with _logging_to(log_file):
                record = _attempt(resolved, store, folder, data_root, device, wandb, suite, progress)
        finally:
            clear_temporaries(folder)
        store.write(record)
        return record


def _attempt(
    resolved: Resolved,
    store: Store,
    folder: Path,
    data_root: Path | None,
    device: str,
    wandb: bool,
    suite: str | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """The record of one attempt, however it ended."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    spec = resolved.spec
    record: dict[str, Any] = {
        "schema": SCHEMA, "run_id": resolved.run_id, "status": "skipped", "reason": resolved.skip and scrub(resolved.skip),
        "spec": spec.model_dump(mode="json"), "metrics": {}, "per_class": {}, "cost": {},
        "time": {"started": started.isoformat(timespec="seconds")}, "files": {}, "provenance": {}, "wandb": None,
    }  # fmt: skip
    if resolved.skip is not None:
        return record
    if resolved.broken is not None:
        return record | {"status": "failed", "reason": scrub(resolved.broken)}
    _check_code(resolved)
    notes: list[str] = []
    tracker = Tracker(
        folder, resolved.run_id, record["spec"], group=suite, job_type=spec.method,
        tags=[spec.method, spec.bits, spec.data, str(spec.protocol), spec.network, f"seed {spec.seed}"], enabled=wandb,
    )  # fmt: skip
    try:
        log.info("run %s: %s", resolved.run_id, spec.label)
        torch.set_num_threads(spec.threads)
        keep_freed()
        place = pick_device(device)
        shared: dict[str, Any] = {"data_root": data_root, "progress": progress, "notes": notes}
        train_float(resolved, store, device=device, **shared)
        session = _Session(resolved, store, place, folder, tracker=tracker, **shared)
        measured = session.measure(store.read_float(resolved.float_id))
        measured["time"] = record["time"] | measured["time"]
        record |= {"status": "done", "reason": None, **measured}
    except Exception as error:
        plain = isinstance(error, UserError | RunFailed | MemoryError | torch.OutOfMemoryError)
        if (
            not plain or error.__cause__ is not None
        ):  # e.g. a hook raised it: its line in the plugin is in the traceback
            log.error("%s", traceback.format_exc())
        if isinstance(error, UserError):
            tracker.finish(failed=True)
            raise
        if isinstance(error, Damaged):
            tracker.finish(failed=True)
            raise UserError(f"{error}, by another than this run; start it again") from error
        if (what := trouble(error)) is not None:
            tracker.finish(failed=True)
            raise UserError(f"{what} (store {store.root}); mend that, and the same command goes on") from error
        reason = one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"
        record |= {
            "status": "failed",
            "reason": reason + ("; take a smaller lr" if isinstance(error, Diverged) else ""),
        }
    record["time"] |= {"wall_s": time.perf_counter() - clock}
    record["provenance"] = {**_provenance(resolved, device), **record["provenance"], "log": str(folder / "log.txt")}
    record["provenance"] |= {"notes": notes} if notes else {}
    record["wandb"] = tracker.finish(record["metrics"], failed=record["status"] == "failed")
    log.info("%s %s", record["status"], record["reason"] or "")
    return record


@contextmanager
def _held(store: Store, lock: str, what: str) -> Iterator[None]:
    """Hold a lock; whoever has to wait for it is told so, once."""
    with ExitStack() as held:
        try:
            held.enter_context(store.lock(lock, wait=False))
        except BusyError:
            print(f"waiting for another process that trains {what}", file=sys.stderr, flush=True)
            held.enter_context(store.lock(lock))
        yield


def train_float(
    resolved: Resolved,
    store: Store,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Path:
    """Train the float network that the run starts from, or find it: one a store and float recipe.

    One whose result or weights are not as they were written is trained again.

    Args:
        resolved: The run.
        store: Where the network lies, or will.
        data_root: Where the user keeps data sets.
        device: As of `run`.
        progress: As of `run`.
        notes: Gets a line for everything that was found damaged.

    Returns:
        Its folder, with ``net.pt`` (the state dict) and ``result.json`` (its metrics, and the digest of the weights).
    """
    notes = [] if notes is None else notes
    folder = store.float_path(resolved.float_id)
    if store.has_float(resolved.float_id):
        return folder
    _check_code(resolved)
    with _held(store, f"float-{resolved.float_id}", "the float network"):
        try:
            if store.read_float(resolved.float_id) is not None:
                return folder
            if (folder / NET).exists() and not (folder / LAST).exists():
                raise Damaged(f"{folder / RECORD} is missing")
        except Damaged as bad:
            _note(notes, f"{bad}; the float network is trained again")
            start_over(folder, NET, RECORD)
        with writing(store.root):
            folder.mkdir(parents=True, exist_ok=True)
        float_run = Resolved(
            resolved.float_spec, resolved.float_id, resolved.float_id, resolved.code, resolved.data_hash, None
        )
        torch.set_num_threads(resolved.spec.threads)
        keep_freed()
        session = _Session(float_run, store, pick_device(device), folder, data_root, progress, None, notes)
        try:
            result = session.measure(None)
        except Diverged as error:
            raise RunFailed(f"{error}; take a smaller float_lr") from error
        save(folder / NET, {k: v.cpu() for k, v in session.method.net.state_dict().items()})
        result |= {"files": {NET: file_digest(folder / NET)}}
        write_json(folder / RECORD, {"schema": SCHEMA, "float_id": resolved.float_id, **result})
        (folder / LAST).unlink(missing_ok=True)
        clear_temporaries(folder)
    del session, result
    gc.collect()  # trainer and module hold each other; the network of the run itself comes next
    return folder


def _note(notes: list[str], line: str) -> None:
    """Keep a line for the record and for the user; the log has it, too."""
    notes.append(line)
    log.warning("%s", line)


def _check_code(resolved: Resolved) -> None:
    """Refuse to run other code than the run was named by.

    Raises:
        UserError: A plugin's file has changed since.
    """
    now = code_of(resolved.spec)
    other = [kind for kind, version in resolved.code.items() if now.get(kind, version) != version]
    if other:
        raise UserError(
            f"the code of {other[0]} has changed since the run was named ({resolved.code[other[0]]}, now {now[other[0]]}); "
            "start again, and do not change it meanwhile"
        )


@dataclass(frozen=True)
class Finished:
    """A finished run, rebuilt from what the store holds.

    Attributes:
        record: The run's record.
        method: In eval mode, on the CPU, with the weights that the protocol selected (of ``best_per_domain``: those of the mean).
        data: The run's data; the run has opened its test split already, so ``open_test()`` answers, once.
    """

    record: dict[str, Any]
    method: Method
    data: DataModule


def load_run(store: Store, run_id: str, *, data_root: Path | None = None) -> Finished:
    """Rebuild a finished run: its network with the trained weights, its method and its data.

    Args:
        store: Where it lies.
        run_id: Its id, or the beginning of it.
        data_root: Where the user keeps data sets.

    Raises:
        UserError: There is no such run, it is not done, or it cannot be rebuilt here.
    """
    run_id = store.find(run_id)
    record = store.read(run_id)
    if record is None:
        path, reason = store.aside[-1]
        raise UserError(f"{path} {reason}")
    if record["status"] != "done":
        raise UserError(
            f"run {run_id} is {record['status']} ({record['reason']}); only a run that is done has a network"
        )
    spec = validated(RunSpec, record["spec"], f"run {run_id}")
    resolved = resolve(spec, data_root=data_root, cache=store.cache)
    if resolved.run_id != run_id:
        raise UserError(f"run {run_id} was made by other code, settings or data than are here now; run it again")
    try:
        session = _Session(resolved, store, torch.device("cpu"), store.path(run_id), data_root, None, None)
        method = session.rebuild(record)
    except (RunFailed, Damaged) as error:
        raise UserError(f"run {run_id}: {error}; move the run's folder away and run it again") from error
    session.data.training_ended = True
    return Finished(record, method, session.data)


class _Session:
    """What one training needs: data, network, method, and where it writes."""

    def __init__(
        self,
        resolved: Resolved,
        store: Store,
        device: torch.device,
        folder: Path,
        data_root: Path | None,
        progress: Progress | None,
        tracker: Tracker | None,
        notes: list[str] | None = None,
    ) -> None:
        self.notes = [] if notes is None else notes
        self.store, self.resolved, self.spec, self.device, self.folder = store, resolved, resolved.spec, device, folder
        self.progress, self.tracker = progress, tracker
        spec = self.spec
        loaded = open_data(spec.data, spec.data_params, data_root, store.cache)
        if loaded.hash != resolved.data_hash:
            raise RunFailed(f"the images of {spec.data} have changed since the run was named; start it again")
        views = max(m.views for m in _chain_of(spec))
        self.data = DataModule(loaded, spec.protocol, spec.seed, spec.batch, spec.augment, views=views, device=device)
        self.loaded = loaded
        if untrained := [c for c, n in zip(loaded.classes, self.data.task.class_counts, strict=True) if n == 0]:
            log.warning("%d classes have no training image: %s", len(untrained), ", ".join(untrained[:20]))

    def measure(self, start: dict[str, Any] | None) -> dict[str, Any]:
        """Build, train, select, test once, and add up. `start`: the float network's result; None: this is its own training."""
        spec = self.spec
        saved = self._resumable()
        net = self._network(start)
        plan = None if saved is None else saved["qatbench"]["plan"]
        try:
            self.method = self._assembled(net, plan)
        except RunFailed as error:
            if saved is None:
                raise
            raise other_code(self.folder / LAST, error) from error
        self.method.to(self.device)
        if self.tracker is not None:
            rows = [
                [s.name, *self.method.bit_plan[s.name], s.weights, s.macs]
                for s in self.method.sites
                if s.kind == "layer"
            ]
            self.tracker.table("plan", ["layer", "weight bits", "activation bits", "weights", "MACs"], rows)
        device = _device_name(self.device)
        recorder = Recorder(self.folder, self.resolved, self.tracker, self.progress, devices=[device])
        clock = time.perf_counter()
        trains = self.method.trains and spec.epochs > 0
        if trains:
            fit(self.method, self.data, recorder, resume=saved is not None)
        if len(recorder.devices) > 1:
            _note(self.notes, f"trained on one device after the other: {', '.join(recorder.devices)}")
        train_s = time.perf_counter() - clock
        validate(self.method, self.data)
        metrics = self._select_and_test(recorder.best if trains else {})
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"diverged: {name} is {value}")
        metrics |= _float_metrics(start)
        step_ms = 1000 * statistics.median(recorder.step_s) if recorder.step_s else None
        return {
            "metrics": metrics,
            "per_class": self.per_class,
            "cost": self._cost(),
            "time": {
                "train_s": train_s,
                "step_ms": step_ms,
                "images_per_s": None
                if step_ms is None
                else 1000 * self.data.share * len(self.data.task.domains) / step_ms,
                "peak_rss_mb": peak_rss_mb(),
                **({"peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6} if self.device.type == "cuda" else {}),
            },
            "files": self._digests([LAST, *map(best_file, recorder.best)]) if trains else {},
            "provenance": {**self._data_provenance(), **self._float_provenance(start)},
        }

    def _resumable(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, if there is one that can be believed; else the training starts over, and that is noted.

        Raises:
            RunFailed: The checkpoint is whole, but of another run or of other code.
        """
        last = self.folder / LAST
        try:
            saved = read_checkpoint(last)
            if saved is None:
                if (self.folder / "metrics.csv").exists():
                    _note(self.notes, f"{last} is missing; the training starts over")
                return None
            if saved["qatbench"].get("spec") != self.spec.model_dump(mode="json"):
                raise RunFailed(f"{last} belongs to another run; delete it to start over")
            check_best(self.folder, saved)
        except Damaged as bad:
            _note(self.notes, f"{bad}; the training starts over")
            start_over(self.folder)
            return None
        return saved

    def _digests(self, names: Iterable[str]) -> dict[str, str]:
        """The digests of the files that the run can be rebuilt from."""
        return {name: file_digest(self.folder / name) for name in names}

    def _float_provenance(self, start: dict[str, Any] | None) -> dict[str, Any]:
        """Which weights the run started from: two float networks of one recipe may differ, made on other machines."""
        return {} if start is None else {"float": {"id": self.resolved.float_id, "sha256": start["files"][NET]}}

    def rebuild(self, record: dict[str, Any]) -> Method:
        """The method as it was when the run ended. One that did not train is assembled anew, from the same network and probe.

        Raises:
            Damaged: A file that the run rests on is missing, or not as it was written; the message names it.
        """
        spec, last = self.spec, self.folder / LAST
        trained = spec.epochs > 0 and build(spec.method, spec.params).trains
        start = None if trained else self._same_start(record)
        files: dict[str, Any] = {**({LAST: None} if trained else {}), **record["files"]}
        for name, digest in files.items():
            check_digest(self.folder / name, digest)
        saved = read_checkpoint(last) if trained else None
        net = self._network(start)
        plan = None if saved is None else saved["qatbench"]["plan"]
        method = self._assembled(net, plan)
        if saved is not None:
            best = best_of(saved)
            ((chosen, _),) = selected(spec.selection, best, [""]).items()
            state = saved["state_dict"] if chosen is None else read_best(self.folder, chosen, best[chosen])
            try:
                method.load_state_dict(state)
            except RuntimeError as error:
                raise other_code(last, error) from error
        return method.eval()

    def _assembled(self, net: nn.Module, plan: Mapping[str, Bits] | None) -> Method:
        probe = self.data.probe(self.spec.calibration)
        traces = Traces(self.store, self.resolved.float_id, self._tell_of_traces)
        return assemble(self.spec, net, self.data.task, probe, plan, traces)

    def _tell_of_traces(self, done: int, of: int) -> None:
        if self.progress is not None:
            where = {"phase": "traces", "run_id": self.resolved.run_id, "epoch": 0, "epochs": 1}
            self.progress({**where, "step": done, "steps": of, "val/acc": None})

    def _same_start(self, record: dict[str, Any]) -> dict[str, Any]:
        """The float network's result, if it is the network that the run started from."""
        net = self.store.float_path(self.resolved.float_id) / NET
        start = self.store.read_float(self.resolved.float_id)
        if start is None:
            raise Damaged(f"{net} is missing, the float network")
        if start["files"][NET] != record["provenance"].get("float", {}).get("sha256"):
            raise Damaged(f"{net} was made again since, with other weights")
        return start

    def _data_provenance(self) -> dict[str, Any]:
        """What the number was measured on: the split, its sizes, and the training images of each class."""
        task, splits = self.data.task, self.data.splits
        return {
            "split": self.data.split_hash,
            "split_sizes": {d: [len(s.train), len(s.val), len(s.test)] for d, s in splits.items()},
            "classes": list(task.classes),
            "class_counts": list(task.class_counts),
            "generated": sorted(self.loaded.meta.get("generated", {})),
        }

    def _network(self, start: dict[str, Any] | None) -> nn.Module:
        """The float network: initial weights from (network, data, protocol, seed), or the trained ones."""
        spec = self.spec
        torch.manual_seed(seed_for("weights", spec.network, self.loaded.name, str(spec.protocol), spec.seed))
        channels = self.loaded.domains[0].images.shape[1]
        net = make_network(spec.network, channels, self.data.task.outputs)
        if start is not None:
            folder = self.store.float_path(self.resolved.float_id)
            try:
                net.load_state_dict(load(folder / NET))
            except (RuntimeError, OSError) as error:
                raise RunFailed(
                    f"the float network in {folder} does not fit {spec.network} ({one_line(error)}); delete that folder"
                ) from error
        return net.to(self.device).to(memory_format=torch.channels_last)

    def _select_and_test(self, best: dict[str, Best]) -> dict[str, float]:
        """Metrics of the weights that the protocol selects, on validation data; the test split is opened here and nowhere else."""
        val = self._validated()
        self.data.training_ended, self.per_class = True, {}
        domains, tested = self.data.test_domains, {}
        loaders = dict(zip(domains, self.data.open_test(), strict=True))
        for chosen, names in selected(self.spec.selection, best, domains).items():
            if chosen is not None:
                self.method.load_state_dict(read_best(self.folder, chosen, best[chosen], self.device))
                validate(self.method, self.data)
                whole = self.spec.selection == "best"  # best_per_domain: every domain has weights of its own
                val |= {d: values for d, values in self._validated().items() if whole or d in names}
            tested.update(test(self.method, {name: loaders[name] for name in names}))
            self.per_class.update(self.method.per_class)
        protocol = self.data.protocol
        flat = combine({d: tested[d] for d in protocol.test}, "test")
        if protocol.also:  # held out: what was seen in training is another measure than what was not
            seen = combine({d: tested[d] for d in protocol.also}, "test")
            flat |= {k: v for k, v in seen.items() if k.count("/") == 2}
            flat |= {"test/acc_id": seen["test/acc"], "test/acc_ood": flat["test/acc"]}
        return {**flat, **combine(val, "val")}

    def _validated(self) -> dict[str, dict[str, float]]:
        """The metrics of the last validation, by domain."""
        found = self.method.metrics.items()
        return {d: {k.split("/")[1]: v for k, v in found if k.endswith(f"/{d}")} for d in self.data.val_domains}

    def _cost(self) -> dict[str, Any]:
        """Cost from the plan, and the codes that were really seen.

        Raises:
            RunFailed: A quantizer emitted more codes than its bits allow.
        """
        method = self.method
        with torch.no_grad():
            method.scope.domain, method.scope.track = method.probe.domain, False
            levels = audit(method.net, method.probe.x)
        for name, counts in levels.items():
            for count, bits in zip(counts, method.bit_plan[name], strict=True):
                if count is not None and count > 2**bits:
                    raise RunFailed(f"{name} takes {count} codes at {bits} bits: it is not a {bits}-bit layer")
        return {
            **cost(method.sites, method.bit_plan, method.net),
            "levels_max": {name: list(counts) for name, counts in levels.items()},
            "plan": {name: list(bits) for name, bits in method.bit_plan.items()},
        }


def _chain_of(spec: RunSpec) -> list[Method]:
    return build(spec.method, spec.params).members


def pick_device(text: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: There is no such device here.
    """
    if text == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (index.isascii() and index.isdecimal() and len(index) < 5)):
        raise UserError(f"device {text!r} is not known; use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise UserError(f"device {text!r} is not there: {count} CUDA devices found; use auto or cpu")
    return torch.device("cuda", int(index or 0))


def _float_metrics(start: dict[str, Any] | None) -> dict[str, float]:
    """The starting point, shown beside every result."""
    metrics = {} if start is None else start["metrics"]
    return {f"float/{k}": v for k, v in metrics.items() if k == "test/acc" or k.startswith("test/acc/")}


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@functools.cache
def _git() -> tuple[str | None, str | None]:
    """Commit of the checkout that this package runs from, and a hash of what differs from it; None outside a checkout."""

    def git(*arguments: str) -> bytes:
        # Variables such as GIT_DIR, which a hook of git sets, would show another checkout.
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=30, env=env).stdout

    try:
        top = os.fsdecode(git("rev-parse", "--show-toplevel").removesuffix(b"\n"))
        if Path(top).resolve() != ROOT.resolve():  # the package's path may be one through a link
            return None, None
        diff = git("diff", "--no-ext-diff", "HEAD")
        return git("rev-parse", "HEAD").decode().strip(), hashlib.sha256(diff).hexdigest()[:16] if diff else None
    except (OSError, subprocess.SubprocessError):
        return None, None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def _provenance(resolved: Resolved, device: str) -> dict[str, Any]:
    commit, dirty = _git()
    names = ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "qatbench")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "code": resolved.code,
        "fidelity": {m.name: m.fidelity for m in _chain_of(resolved.spec)},
        "data": resolved.data_hash,
        "git": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **versions},
        "device": _device_name(pick_device(device)),
        "selection": resolved.spec.selection,
    }


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send the log, Lightning's and the warnings to the run's own file."""
    handler.handleError = lambda record: None  # on a full disk: a traceback on the terminal helps nobody
    handler.setFormatter(Scrubbed("%(asctime)s %(levelname)s %(message)s"))
    # Lightning's two halves have handlers and levels of their own; at INFO they advertise.
    levels = {
        "qatbench": logging.INFO,
        "py.warnings": logging.INFO,
        "lightning.pytorch": logging.WARNING,
        "lightning.fabric": logging.WARNING,
    }
    loggers = [logging.getLogger(name) for name in levels]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger, level in zip(loggers, levels.values(), strict=True):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.captureWarnings(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # the ema teacher is meant to be
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
            with suppress(OSError):  # the disk is full: the run has ended for that reason
                handler.close()

"""One training: Lightning's loop, and what it leaves on disk at the end of every epoch so that it can be taken up again."""

from __future__ import annotations

import io
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from .alone import unseen
from .data import DataModule
from .errors import RunFailed
from .method import Method
from .quant import Bits
from .resolve import Resolved
from .secrets import scrub
from .tracking import Tracker, write_history

LAST = "last.ckpt"
PROGRESS_SECONDS = 0.25

Progress = Callable[[dict[str, Any]], None]


def fit(
    method: Method, data: DataModule, recorder: Recorder, resume: bool = False, callbacks: Sequence[L.Callback] = ()
) -> None:
    """Train through all stages; from the recorder's last checkpoint if ``resume``.

    Raises:
        RunFailed: Training diverged, or the checkpoint is of other code.
        KeyboardInterrupt: Somebody pressed Ctrl-C.
    """
    trainer = make_trainer(
        method.device,
        epochs=sum(stage.epochs for stage in method.stages(method.spec.epochs)),
        callbacks=[recorder, *callbacks],
    )
    last = recorder.folder / LAST
    try:
        with _ctrl_c():
            trainer.fit(method, data, ckpt_path=last if resume else None, weights_only=True)
    except (RuntimeError, KeyError) as error:
        if resume and "state_dict" in str(error):
            raise other_code(last, error) from error
        raise


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning would end the process with status 1, and leave the signal ignored."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt from None


def validate(method: Method, data: DataModule) -> dict[str, float]:
    """Metrics of the validation split, which stay in ``method.metrics``; none if nothing validates."""
    if not data.val_domains:
        return method.metrics
    with _ctrl_c():
        make_trainer(method.device).validate(method, data, verbose=False, weights_only=True)
    return method.metrics


def test(method: Method, loaders: Mapping[str, Iterable]) -> dict[str, dict[str, float]]:
    """Metrics of each of the given test domains."""
    method.test_domains = list(loaders)
    with _ctrl_c():
        make_trainer(method.device).test(method, list(loaders.values()), verbose=False, weights_only=True)
    return method.tested


@dataclass
class Recorder(L.Callback):
    """Writes an epoch's metrics, snapshots and checkpoint when the epoch ends, and tells how the run is getting on."""

    folder: Path
    resolved: Resolved
    tracker: Tracker | None
    progress: Progress | None
    rows: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # "" is the mean over domains
    step_s: list[float] = field(default_factory=list)
    _told: float = 0.0
    _clock: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What travels in the checkpoint."""
        return {"rows": self.rows, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; W&B starts a new file offline, which is made whole again."""
        self.rows, self.best = list(state_dict["rows"]), dict(state_dict["best"])
        for row in self.rows:
            self._track(row)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, and now and then say where we are."""
        now = time.perf_counter()
        self.step_s.append(now - self._clock)
        if self.progress is not None and now - self._told > PROGRESS_SECONDS:
            self._tell(trainer, batch_idx + 1)

    def _tell(self, trainer: L.Trainer, batch_idx: int) -> None:
        self._told = time.perf_counter()
        assert self.progress is not None
        assert trainer.max_epochs is not None
        steps, epoch = int(trainer.num_training_batches), trainer.current_epoch
        self.progress({
            "phase": "float" if self.tracker is None else "train",
            "run_id": self.resolved.run_id,
            "epoch": epoch,
            "epochs": trainer.max_epochs,
            "step": epoch * steps + batch_idx,
            "steps": trainer.max_epochs * steps,
            "val/acc": self.rows[-1].get("val/acc") if self.rows else None,
        })  # fmt: skip

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The epoch's row, the best weights so far, and the checkpoint: each written whole or not at all."""
        assert isinstance(module, Method)
        row = {
            "epoch": trainer.current_epoch,
            **module.epoch_losses(),
            **module.metrics,
            "lr": module.run_in_progress.opt.param_groups[0]["lr"],
        }
        self.rows.append(row)
        write_history(self.folder / "metrics.csv", self.rows)
        self._track(row)
        self._snapshot(module)
        temporary = self.folder / f"{LAST}.tmp"
        trainer.save_checkpoint(temporary)
        os.replace(temporary, self.folder / LAST)
        if self.progress is not None:
            self._tell(trainer, int(trainer.num_training_batches))

    def _track(self, row: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))

    def _snapshot(self, module: Method) -> None:
        """Keep the weights of the best epoch so far, of the mean and of each domain, as the selection rule asks."""
        rule, metric = self.resolved.spec.selection, module.data.protocol.metric
        if rule == "last":
            return
        scores = {"": module.metrics[f"val/{metric}"]}
        if rule == "best_per_domain":
            scores.update({d: module.metrics[f"val/{metric}/{d}"] for d in module.data.val_domains})
        for domain, score in scores.items():
            if score > self.best.get(domain, -1.0):  # the earliest of equals
                self.best[domain] = score
                save(self.folder / _best_file(domain), module.state_dict())


def _best_file(domain: str) -> str:
    return f"best-{domain}.pt" if domain else "best.pt"


def selected(rule: str, folder: Path, domains: Sequence[str]) -> dict[Path | None, list[str]]:
    """What the selection rule chose: weights file (None: the present weights) -> the test domains that are measured with it."""
    groups: dict[Path | None, list[str]] = {}
    for domain in domains:
        own, mean = folder / _best_file(domain), folder / _best_file("")
        choices = {"last": [], "best": [mean], "best_per_domain": [own, mean]}[
            rule
        ]  # an unseen domain has no best epoch of its own
        groups.setdefault(next((path for path in choices if path.exists()), None), []).append(domain)
    return groups


class OneProcess(LightningEnvironment):
    """The only process there is. Given to a trainer, so that it does not look for a cluster."""

    @property
    def creates_processes_externally(self) -> bool:
        """No process was started by somebody else."""
        return False

    def local_rank(self) -> int:
        """The first on this machine."""
        return 0

    def node_rank(self) -> int:
        """On the first machine."""
        return 0

    def teardown(self) -> None:
        """Leave the variables of the process as they are."""


def make_trainer(
    device: torch.device, epochs: int = 1, callbacks: list[L.Callback] | None = None, **settings: Any
) -> L.Trainer:
    """A Lightning trainer that only trains: the harness logs, saves and shows progress itself."""
    logging.getLogger("lightning.pytorch").setLevel(
        logging.WARNING
    )  # at INFO it names devices and advertises, for each trainer
    rank_zero_only.rank = 0  # type: ignore[attr-defined]  or else its warnings would be kept from us
    with unseen():
        return L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            plugins=[OneProcess()],
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **settings,
        )


def save(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save(value, buffer)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getbuffer())
    os.replace(temporary, path)


def clear(folder: Path) -> None:
    """Drop what only a run in progress needs; the last checkpoint stays."""
    for path in folder.glob("*.tmp*"):
        path.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint of a training that was interrupted; None if there is none.

    Raises:
        RunFailed: The file is broken, or no checkpoint of a run.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a different class for each way in which a file can be broken
        raise RunFailed(f"{path} cannot be read; delete it to start over ({one_line(error)[:100]})") from error
    try:
        saved["qatbench"]["plan"] = {str(name): Bits(*bits) for name, bits in saved["qatbench"]["plan"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise other_code(path, error) from error
    return saved


def other_code(checkpoint: Path, error: Exception) -> RunFailed:
    """What to say of a checkpoint that does not fit: what to do comes first, since the details may be cut."""
    return RunFailed(f"{checkpoint} was written by other code; delete it to start over ({one_line(error)[:200]})")


def one_line(error: BaseException) -> str:
    """An error's message on one line, without keys."""
    return scrub(" ".join(str(error).split()))[:400]

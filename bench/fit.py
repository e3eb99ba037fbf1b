"""One training: Lightning's loop, and what it leaves on disk at the end of every epoch so that it can be taken up again."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from .alone import unseen
from .data import DataModule
from .disk import Damaged, read_file, replace_file
from .errors import RunFailed
from .method import Method
from .quant import Bits
from .resolve import Resolved
from .secrets import scrub
from .tensors import tensors_digest
from .tracking import Tracker, write_history

LAST = "last.ckpt"
_SEAL = b"\nqatbench sha256 "
_SEAL_LENGTH = len(_SEAL) + 65
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
    best: dict[str, Best] = field(default_factory=dict)  # by domain; "" is the mean over domains
    devices: list[str] = field(default_factory=list)  # one after the other, if the run was moved
    step_s: list[float] = field(default_factory=list)
    _told: float = 0.0
    _clock: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What travels in the checkpoint."""
        best = {domain: list(best) for domain, best in self.best.items()}
        return {"rows": self.rows, "best": best, "devices": self.devices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; W&B starts a new file offline, which is made whole again."""
        self.rows, self.best = list(state_dict["rows"]), {d: Best(*best) for d, best in state_dict["best"].items()}
        self.devices = list(dict.fromkeys([*state_dict["devices"], *self.devices]))
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
        """The epoch's row, the checkpoint and the best weights so far: each written whole or not at all.

        The checkpoint comes first, for it says which weights are the best: if they are those of its own epoch, and the process
        is killed before they are written, they are taken from it.
        """
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
        improved = self._improved(module)
        trainer.save_checkpoint(self.folder / LAST)
        for domain in improved:
            save(self.folder / best_file(domain), module.state_dict())
        if self.progress is not None:
            self._tell(trainer, int(trainer.num_training_batches))

    def _track(self, row: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))

    def _improved(self, module: Method) -> list[str]:
        """What this epoch is the best of so far, the mean or a domain, as the selection rule asks."""
        rule, metric = self.resolved.spec.selection, module.data.protocol.metric
        if rule == "last":
            return []
        scores = {"": module.metrics[f"val/{metric}"]}
        if rule == "best_per_domain":
            scores.update({d: module.metrics[f"val/{metric}/{d}"] for d in module.data.val_domains})
        improved = [d for d, score in scores.items() if score > (self.best[d].score if d in self.best else -1.0)]
        digest = tensors_digest(module.state_dict()) if improved else ""
        self.best |= {d: Best(scores[d], len(self.rows) - 1, digest) for d in improved}  # the earliest of equals
        return improved


class Best(NamedTuple):
    """The best epoch so far: its score, its number, and the digest of its weights."""

    score: float
    epoch: int
    digest: str


def best_file(domain: str) -> str:
    """The name of the file of the best weights, of a domain or (``""``) of the mean."""
    return f"best-{domain}.pt" if domain else "best.pt"


def selected(rule: str, best: Mapping[str, Best], domains: Sequence[str]) -> dict[str | None, list[str]]:
    """What the selection rule chose, and the test domains that are measured with it. An unseen domain has no best epoch.

    Whose best weights: a domain's, ``""``: the mean's, None: the present weights.
    """
    groups: dict[str | None, list[str]] = {}
    for domain in domains:
        choices = {"last": [], "best": [""], "best_per_domain": [domain, ""]}[rule]
        groups.setdefault(next((choice for choice in choices if choice in best), None), []).append(domain)
    return groups


def read_best(folder: Path, domain: str, best: Best, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights of the best epoch.

    Raises:
        Damaged: They are missing, or not those that were written; the message names the file.
    """
    path = folder / best_file(domain)
    try:
        state = load(path, device)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing, the best weights so far") from None
    if tensors_digest(state) != best.digest:
        raise Damaged(f"{path} holds other weights than those of epoch {best.epoch + 1}, the best one")
    return state


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
            plugins=[OneProcess(), Checkpoints()],
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


class Checkpoints(TorchCheckpointIO):
    """How Lightning's checkpoints lie on the disk: as `save` writes, and `load` reads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it, whole or not at all."""
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it; it holds plain types and tensors."""
        return load(Path(path), map_location)


def save(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all, with the digest of the file's content at its end, which `torch.load` skips."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save(value, buffer)
    with buffer.getbuffer() as content:
        digest = hashlib.sha256(content).hexdigest()
    buffer.write(_SEAL + digest.encode() + b"\n")
    replace_file(path, buffer.getbuffer())


def load(path: Path, device: Any = "cpu") -> Any:
    """What `save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        Damaged: It is not as it was written; the message names it.
    """
    try:
        content = memoryview(read_file(path))
        rest, seal = content[:-_SEAL_LENGTH], bytes(content[-_SEAL_LENGTH:])
        if not seal.startswith(_SEAL):
            raise Damaged("is cut short, or not written by this version: no digest is at its end")
        if seal != _SEAL + hashlib.sha256(rest).hexdigest().encode() + b"\n":
            raise Damaged("has changed since it was written: its digest is another")
        try:
            return torch.load(io.BytesIO(rest), weights_only=True, map_location=device)
        except Exception as error:  # torch raises a different class for each way in which a file can be wrong
            raise Damaged(f"cannot be read ({one_line(error)[:100]})") from error
    except Damaged as bad:
        raise Damaged(f"{path} {bad}") from None


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint of a training that was interrupted; None if there is none.

    Raises:
        Damaged: It, or the best weights that it names, are not as they were written, or missing; the message names the file.
        RunFailed: It is whole, but of other code.
    """
    try:
        saved = load(path)
    except FileNotFoundError:
        return None
    try:
        saved["qatbench"]["plan"] = {str(name): Bits(*bits) for name, bits in saved["qatbench"]["plan"].items()}
        epochs = saved["epoch"] + 1
    except (AttributeError, KeyError, TypeError) as error:
        raise other_code(path, error) from error
    if len(_recorded(saved).get("rows", ())) != epochs:
        raise Damaged(f"{path} lacks the history of its {epochs} epochs")
    return saved


def best_of(saved: Mapping[str, Any]) -> dict[str, Best]:
    """The best epochs, as a checkpoint knows them."""
    return {domain: Best(*best) for domain, best in _recorded(saved).get("best", {}).items()}


def check_best(folder: Path, saved: Mapping[str, Any]) -> None:
    """Make sure that the best weights which a checkpoint names are there; those of its own epoch are taken from it if not.

    Raises:
        Damaged: They are missing, or others; the message names the file.
    """
    for domain, best in best_of(saved).items():
        try:
            read_best(folder, domain, best)
        except Damaged:
            if best.epoch != saved["epoch"]:
                raise
            save(folder / best_file(domain), saved["state_dict"])


def start_over(folder: Path, *more: str) -> None:
    """Remove what a training has left that cannot be believed: checkpoint, best weights, history, and `more`."""
    names = [LAST, "metrics.csv", *more]
    for path in (*(folder / name for name in names), *folder.glob("best*.pt")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _recorded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the `Recorder` in a checkpoint."""
    state = saved.get("callbacks", {}).get(Recorder.__qualname__)
    return state if isinstance(state, dict) else {}


def other_code(checkpoint: Path, error: Exception) -> RunFailed:
    """What to say of a checkpoint that does not fit: what to do comes first, since the details may be cut."""
    return RunFailed(f"{checkpoint} was written by other code; delete it to start over ({one_line(error)[:200]})")


def one_line(error: BaseException) -> str:
    """An error's message on one line, without keys."""
    return scrub(" ".join(str(error).split()))[:400]

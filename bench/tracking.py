"""Where a run can be watched: Weights & Biases, and ``metrics.csv``.

W&B only listens. It works offline unless the user's own W&B settings say otherwise, it never asks for a login, and
whatever goes wrong inside it costs the run one line in its log and nothing else.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .disk import replace_file
from .secrets import scrub

_log = logging.getLogger(__name__)

INIT_SECONDS = 10.0  # a server that does not answer by then is left aside, and the run is tracked offline
FINISH_SECONDS = 30.0  # what is not uploaded by then stays on disk for `wandb sync`

_SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "save_code": False,
    # The record has versions and machine; collecting them again costs 0.1 s a run, and sampling costs all along.
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    # The summary then names the table file that lies beside it, which moves with the folder; an artifact would not.
    "allow_offline_artifacts": False,
    # Seconds until `wandb leet` sees an epoch, and what a killed run can lose; 15 by default.
    "x_transaction_log_flush_interval": 1.0,
    "init_timeout": INIT_SECONDS,
    "finish_timeout": FINISH_SECONDS,
}
_YES = {"1", "true", "yes", "on"}


class Tracker:
    """One run in W&B, under the run's own id, so that a run that goes on later is still one run there.

    ``mode`` is ``"offline"`` or ``"online"``; ``"disabled"`` if the user wants no tracking; ``None`` if W&B failed, in
    which case the log has one line that says why.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        config: Mapping[str, Any],
        *,
        project: str = "qatbench",
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        name: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.id = run_id
        self.mode: str | None = "disabled"
        self._run: Any = None
        self._dir = run_dir
        if not enabled or _switched_off():
            return
        about = {
            "project": project,
            "group": group,
            "job_type": job_type,
            "tags": [tag[:64] for tag in tags],  # W&B refuses longer ones
            "name": name or _label(config) or run_id,
            "config": dict(config),
        }
        self._safely(lambda: self._start(about))

    def log(self, metrics: Mapping[str, float | None], epoch: int) -> None:
        """Adds one epoch's metrics; the epoch is the step, so that a resumed run goes on where it stopped."""
        if self._run is not None:
            row = {"epoch": epoch, **_present(metrics)}
            # Committed at once: else the last epoch is written after the final summary, over it.
            self._safely(lambda: self._run.log(row, step=epoch, commit=True))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Shows a table, such as the plan, with the run."""
        if self._run is not None:
            self._safely(lambda: self._table(name, list(columns), [list(row) for row in rows]))

    def finish(self, summary: Mapping[str, float | None] | None = None, failed: bool = False) -> dict[str, str | None]:
        """Closes the run with its final metrics; returns what the record says about tracking."""
        if self._run is not None:
            self._safely(lambda: self._close(summary or {}, failed))
        return {"id": self.id, "mode": self.mode}

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.finish(failed=kind is not None)

    def _start(self, about: dict[str, Any]) -> None:
        wandb = _wandb()
        self.mode = _mode(wandb)
        if self.mode == "disabled":
            return
        known = wandb.Settings.model_fields  # an older wandb lacks some of them
        settings = {key: value for key, value in _SETTINGS.items() if key in known}

        def begin(mode: str) -> Any:
            return wandb.init(
                dir=self._dir, id=self.id, mode=mode, resume="allow", settings=wandb.Settings(**settings), **about
            )

        try:
            self._run = begin(self.mode)
        except Exception as error:
            if self.mode == "offline":
                raise
            _log.warning(_one_line("W&B server", error) + "; tracked offline instead, publish with: wandb sync")
            wandb.teardown()  # forgets the run that did not start; its id would be taken
            self.mode = "offline"
            self._run = begin("offline")
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def _table(self, name: str, columns: list[str], data: list[list[Any]]) -> None:
        # wandb copies every table into its data folder, by default one in the user's home, and leaves it there.
        chosen = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = chosen or str(self._dir / "wandb")
        try:
            # Into the summary: a logged table would take a step of its own in the history.
            self._run.summary.update({name: _wandb().Table(columns=columns, data=data)})
        finally:
            if chosen is None:
                del os.environ["WANDB_DATA_DIR"]

    def _close(self, summary: Mapping[str, float | None], failed: bool) -> None:
        run, self._run = self._run, None
        try:
            run.summary.update(_present(summary))
        finally:
            run.finish(exit_code=int(failed))

    def _safely(self, do: Callable[[], Any]) -> None:
        """Does it; if W&B raises, tracking ends here and the run goes on."""
        try:
            do()
        except Exception as error:
            _log.warning(_one_line("W&B is off for this run", error))
            run, self._run, self.mode = self._run, None, None
            # The next run of this process starts with a fresh service: this one may be dead, or hold on to the run.
            for end in (lambda: run and run.finish(exit_code=1), lambda: _wandb().teardown()):
                with contextlib.suppress(Exception):  # has been warned of
                    end()


def write_history(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``metrics.csv`` as a whole: a column for every key, in the order in which they first appear."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def _wandb() -> Any:
    # W&B reports its own failures to its makers; with a dead server that holds the process for 20 s when it ends.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def _switched_off() -> bool:
    """Told from the environment alone, so that wandb need not be imported to find out."""
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in _YES
    return disabled or os.environ.get("WANDB_MODE", "").lower() == "disabled"


def _mode(wandb: Any) -> str:
    """What the user's W&B settings (environment, files, login) say; offline if they do not say."""
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode == "disabled":
        return "disabled"
    # "online" is also wandb's default, which without a key would stop and ask for one.
    if mode in ("offline", "dryrun") or not wandb.login(prompt=False, verify=False):
        return "offline"
    return "online"


def user_mode() -> str:
    """What a run would be tracked as now: ``offline``, ``online`` or ``disabled``."""
    return "disabled" if _switched_off() else _mode(_wandb())


def _label(config: Mapping[str, Any]) -> str:
    words = [str(config[key]) for key in ("method", "bits", "data", "network") if config.get(key)]
    return " ".join([*words, f"seed {config['seed']}"] if "seed" in config else words)


def _present(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if value is not None}


def _one_line(what: str, error: Exception) -> str:
    return scrub(" ".join(f"{what}: {type(error).__name__}: {error}".split()))[:300]

"""Where to look at runs: W&B files gathered in one folder, and the page."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..bench.errors import UserError
from ..bench.store import Store, writing


def gather(store: Store) -> list[str]:
    """Put links to every run's W&B files in ``<store>/wandb`` and say how to look at them.

    Each run keeps its own files beside its record; W&B's viewer and ``wandb sync`` want them in one folder.

    Raises:
        UserError: There is nothing to look at.
    """
    found = sorted(
        path for pattern in ("*-run-*", "run-*") for path in store.root.glob(f"*/wandb/{pattern}") if path.is_dir()
    )
    found = [path for path in dict.fromkeys(found) if path.parent.parent != store.root]
    page = store.root / "report" / "index.html"
    if not found and not page.exists():
        raise UserError(
            f"nothing to look at in store {store.root} yet; make some results with: qatbench quickstart --store {store.root}"
        )
    lines = []
    if found:
        folder, runs = store.root / "wandb", len({path.parents[1] for path in found})
        with writing(store.root):
            _link(folder, found)
        quoted = shlex.quote(str(folder))
        lines += [
            f"{runs} run{'s' * (runs != 1)} tracked by W&B in {folder}",
            f"  look at them in this terminal, offline:  wandb leet {quoted}",
            f"  publish them to a W&B server:            wandb sync {quoted}/offline-run-*",
        ]
    what = (
        f"  {page.resolve().as_uri()}"
        if page.exists()
        else f"  make it with: qatbench report --store {shlex.quote(str(store.root))}"
    )
    return [*lines, "leaderboard page:", what]


def _link(folder: Path, runs: list[Path]) -> None:
    folder.mkdir(exist_ok=True)
    wanted = {run.name: os.path.relpath(run, folder) for run in runs}
    wanted["latest-run"] = os.path.relpath(
        max(runs, key=lambda run: run.stat().st_mtime), folder
    )  # what W&B's viewer opens
    for link in folder.iterdir():
        if link.is_symlink() and (link.name not in wanted or os.readlink(link) != wanted[link.name]):
            link.unlink()
    for name, target in wanted.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target, target_is_directory=True)

"""``qatbench dash``: every run's W&B files in one folder, and the way to the page."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from qatbench.bench.errors import UserError
from qatbench.bench.store import Store
from qatbench.reports.dash import gather


def track(store: Store, run_id: str, name: str) -> Path:
    folder = store.path(run_id) / "wandb" / name
    folder.mkdir(parents=True)
    (folder / f"run-{run_id}.wandb").write_bytes(b"x")
    latest = folder.parent / "latest-run"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder)
    return folder


def test_empty_store_is_refused(tmp_path: Path) -> None:
    """Without it, the viewer is started on nothing."""
    with pytest.raises(UserError, match="nothing to look at"):
        gather(Store(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_links_lead_to_every_run(tmp_path: Path) -> None:
    """Without it, `wandb leet` and `wandb sync` miss runs, or a moved store has dead links."""
    store = Store(tmp_path / "my runs")
    folders = [track(store, "a" * 16, "offline-run-1-a"), track(store, "b" * 16, "run-2-b")]
    lines = gather(store)
    links = tmp_path / "my runs" / "wandb"
    newest = {"latest-run": folders[1].resolve()}  # what the viewer opens first
    assert {p.name: p.resolve() for p in links.iterdir()} == newest | {f.name: f.resolve() for f in folders}
    assert lines[0] == f"2 runs tracked by W&B in {links}"
    command = shlex.split(lines[1].split(":  ")[1])
    assert command == ["wandb", "leet", str(links)]
    assert "wandb sync" in lines[2]
    (tmp_path / "my runs").rename(tmp_path / "moved")
    assert all((tmp_path / "moved" / "wandb" / f.name / f"run-{f.parents[1].name}.wandb").exists() for f in folders)


def test_runs_are_counted_once(tmp_path: Path) -> None:
    """Without it, a run that was resumed, which has two parts, looks like two runs."""
    store = Store(tmp_path)
    track(store, "a" * 16, "offline-run-1-a")
    track(store, "a" * 16, "offline-run-2-a")
    assert gather(store)[0] == f"1 run tracked by W&B in {tmp_path / 'wandb'}"
    assert gather(store) == gather(store)


def test_stale_links_go_and_files_stay(tmp_path: Path) -> None:
    """Without it, the viewer shows runs that were deleted, or a user's file is."""
    store = Store(tmp_path)
    gone, kept = track(store, "a" * 16, "offline-run-1-a"), track(store, "b" * 16, "offline-run-2-b")
    gather(store)
    (tmp_path / "wandb" / "notes.txt").write_text("mine")
    gone.rename(tmp_path / "elsewhere")
    gather(store)
    assert {p.name for p in (tmp_path / "wandb").iterdir()} == {kept.name, "latest-run", "notes.txt"}


def test_page_is_named_or_the_way_to_it(tmp_path: Path) -> None:
    """Without it, nobody finds the leaderboard."""
    store = Store(tmp_path)
    track(store, "a" * 16, "offline-run-1-a")
    assert gather(store)[-1].strip() == f"make it with: qatbench report --store {tmp_path}"
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("page")
    assert gather(store)[-1].strip() == (tmp_path / "report" / "index.html").as_uri()

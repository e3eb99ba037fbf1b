"""``qatbench doctor``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from .errors import UserError
from .paths import usable
from .registry import KINDS, plugins
from .tracking import user_mode

_VERSIONS = ("qatbench", "torch", "torchvision", "lightning", "wandb", "optuna", "datasets", "pandas", "seaborn")
_EXTRAS = {"pytest": "dev", "onnxruntime": "export", "ray": "ray", "submitit": "slurm"}


def examine(store: Path, data_root: Path | None) -> int:
    """Print one line for each thing looked at; 1 if something that qatbench needs is wrong, else 0."""
    wrong = 0

    def say(good: bool | None, what: str) -> None:
        nonlocal wrong
        wrong += good is False
        print(f"{ {True: 'ok  ', False: 'FAIL', None: '-   '}[good] } {what}")

    say(True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for name in _VERSIONS:
        try:
            say(True, f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            say(False, f"{name} is not installed; pip install {name}")
    say(*_hugging_face())
    say(*_devices())
    for module, extra in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            say(None, f"{module} is not installed (optional); pip install 'qatbench[{extra}]'")
    say(*_store(store))
    root = (
        f"data root {data_root}" if data_root else "no data root (optional); give one with --data-root or QATBENCH_DATA"
    )
    say(
        None if data_root is None else os.path.isdir(data_root),
        root if data_root is None or os.path.isdir(data_root) else f"{root} is not a folder",
    )
    say(True, f"W&B {user_mode()}")
    for kind in KINDS:
        broken = [p for p in plugins(kind) if p.error]
        say(True, f"{len(plugins(kind)) - len(broken)} {kind}")
        for plugin in broken:
            say(False, f"{kind} {plugin.name} is unavailable: {plugin.error}")
    return int(wrong > 0)


def _hugging_face() -> tuple[bool, str]:
    spec = importlib.util.find_spec("datasets")
    if (
        spec is None or spec.origin is None
    ):  # a folder named datasets is a namespace: the import would succeed, and be empty
        return False, "`import datasets` is not Hugging Face's library; pip install datasets"
    return True, f"`import datasets` is {Path(spec.origin).parent}"


def _devices() -> tuple[bool, str]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, f"CUDA devices: {', '.join(names)}" if names else "no CUDA device; runs use the CPU"


def _store(store: Path) -> tuple[bool, str]:
    try:
        store = usable(store, "store")
    except UserError as error:
        return False, str(error)
    if os.path.exists(store) and not store.is_dir():
        return False, f"store {store} is a file; choose a folder with --store or QATBENCH_STORE"
    place = next(path for path in (store.absolute(), *store.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        return False, f"store {store} is read-only; choose another with --store or QATBENCH_STORE"
    return True, f"store {store}, {free:.0f} GB free"

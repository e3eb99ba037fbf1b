"""What tensors hold, in one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and every bit of the values, wherever they lie in memory or in a file."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            sha.update(f"{name} {value!r}\n".encode())
            continue
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

"""qatbench: one protocol, tuning budget and bit accounting for every quantization-aware training method.

This module is the public API. Every name is loaded when it is first used, so ``import qatbench`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "qatbench":  # e.g. pytest importing the checkout's folder: there would be two registries
    raise ImportError(f"this folder is the package 'qatbench', not {__name__!r}; install it with: pip install -e .")

__version__ = "0.1.0"

_WHERE = {
    "Method": ".bench.method",
    "Wrapper": ".bench.method",
    "Quantizer": ".bench.quant",
    "RunSpec": ".bench.spec",
    "SuiteSpec": ".bench.spec",
    "DataSet": ".bench.data",
    "Store": ".bench.store",
    "run": ".bench.runner",
    "results": ".reports.frame",
}
__all__ = ["DataSet", "Method", "Quantizer", "RunSpec", "Store", "SuiteSpec", "Wrapper", "results", "run"]

if TYPE_CHECKING:
    from .bench.data import DataSet
    from .bench.method import Method, Wrapper
    from .bench.quant import Quantizer
    from .bench.runner import run
    from .bench.spec import RunSpec, SuiteSpec
    from .bench.store import Store
    from .reports.frame import results


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qatbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

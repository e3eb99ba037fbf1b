"""Hessian traces of a float network's layers: measured once for each network, data, seed and probe, and kept beside the network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .disk import Damaged, read_json, write_json
from .errors import UserError
from .quant.sensitivity import CHUNK, Loss, hessian_trace
from .spec import content_hash
from .store import Store
from .tensors import tensors_digest

if TYPE_CHECKING:
    from .data import Batch

SCHEMA = 1
"""Of the file, and of how the traces are measured: goes up when either changes."""
LOG_SECONDS = 15.0
TELL_SECONDS = 0.25
_PLAIN = (bool, int, float, str, type(None))
log = logging.getLogger("qatbench")

Tell = Callable[[int, int], None]
"""Of the random vectors that are done, and of all."""


class Traces:
    """The traces of one float network, from its folder in a store; without a store they are measured each time.

    They depend on the network, the images, the seed and the number of random vectors, and not on the bits: all budgets share them.
    A file is believed if it was computed from the same (a digest of weights, structure, images and settings) and is whole (a digest
    of its content); otherwise it is measured again and replaced, whole or not at all.

    Args:
        store: Where the float network lies.
        float_id: Its id.
        tell: Called at most four times a second while traces are measured.
    """

    def __init__(self, store: Store | None = None, float_id: str = "", tell: Tell | None = None) -> None:
        self.store, self.float_id, self.tell = store, float_id, tell

    def of(
        self, net: nn.Module, loss: Loss, batch: Batch, params: Mapping[str, Tensor], probes: int, seed: int
    ) -> dict[str, float]:
        """See `hessian_trace`; ``net`` is the network whose loss it is, and what the parameters are of."""
        if self.store is None:
            return self._measure(loss, batch, params, probes, seed)
        source = content_hash([SCHEMA, CHUNK, _images(batch), _network(net), list(params), probes, seed])
        path = self.store.float_path(self.float_id) / f"traces-{source}.json"
        found = _read(path, source, params)
        if found is None:
            with self._alone(f"traces-{source}"):
                found = _read(path, source, params)  # measured by another process, while this one waited
                if found is None:
                    found = self._measure(loss, batch, params, probes, seed)
                    _keep(path, source, found)
                    return found
        log.info("Hessian traces of %d layers: read from %s", len(found), path)
        return found

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Two runs of a sweep do not measure the same at a time; in a store that may only be read there is no lock."""
        assert self.store is not None
        with contextlib.ExitStack() as held:
            with contextlib.suppress(UserError):
                held.enter_context(self.store.lock(name))
            yield

    def _measure(
        self, loss: Loss, batch: Batch, params: Mapping[str, Tensor], probes: int, seed: int
    ) -> dict[str, float]:
        began, told, logged = time.monotonic(), -math.inf, time.monotonic()
        log.info("Hessian traces of %d layers, %d random vectors each", len(params), probes)

        def tell(done: int, of: int) -> None:
            nonlocal told, logged
            now = time.monotonic()
            if self.tell is not None and (now - told > TELL_SECONDS or done == of):
                told = now
                self.tell(done, of)
            if now - logged > LOG_SECONDS:
                logged = now
                to_go = (now - began) / done * (of - done)
                log.info("Hessian traces: %d %%, about %d s to go", 100 * done // of, math.ceil(to_go))

        traces = hessian_trace(loss, batch, params, probes, seed, tell)
        log.info("Hessian traces: measured in %.1f s", time.monotonic() - began)
        return traces


def _read(path: Path, source: str, params: Mapping[str, Tensor]) -> dict[str, float] | None:
    """The traces in a file; None if there is none, or if it cannot be believed, which is told."""
    try:
        value = read_json(path)
        if value.get("of") == source and list(value.get("traces", ())) == list(params):
            return value["traces"]
        reason = "is of another network"
    except FileNotFoundError:
        return None
    except Damaged as bad:
        reason = str(bad)
    log.warning("%s is damaged (%s); the Hessian's traces are measured again", path, reason)
    return None


def _keep(path: Path, source: str, traces: Mapping[str, float]) -> None:
    """Write the traces; that they cannot be kept is no reason for the run to fail."""
    if not all(math.isfinite(value) for value in traces.values()):
        return
    value = {"schema": SCHEMA, "of": source, "traces": dict(traces)}
    try:
        write_json(path, value)
    except OSError as error:
        log.warning("the Hessian's traces could not be kept in %s: %s", path, error.strerror)


def _images(batch: Batch) -> str:
    return tensors_digest({"x": batch.x, "y": batch.y, "domain": batch.domain})


def _network(net: nn.Module) -> str:
    """Weights and buffers, and what its modules are: their classes and plain attributes, e.g. a stride or a scale."""
    modules = [
        [name, f"{type(m).__module__}.{type(m).__qualname__}", {k: v for k, v in vars(m).items() if _plain(k, v)}]
        for name, m in net.named_modules()
    ]
    structure = hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()
    return structure + tensors_digest(net.state_dict(keep_vars=True))


def _plain(name: str, value: Any) -> bool:
    return name != "training" and (
        isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))
    )

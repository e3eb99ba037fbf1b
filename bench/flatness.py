"""How flat the minimum of a finished run is: its loss along random directions, and the curvature of the largest size.

Both are of the network as it is used, with its quantizers, on training images without augmentation. What is moved are the latent
weights of all layers; biases, norms and the quantizers' own parameters stay where they are. The loss can be compared across
methods. The curvature is that of the gradients that the method trains with: where a quantizer has not the straight-through one but
a surrogate of its own (`has_surrogate`), it tells of the surrogate, too, and can be compared within the method alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .data import Batch
from .disk import Damaged, read_json, write_json
from .errors import UserError
from .method import Method
from .quant import Quantizer, quant_layers
from .runner import load_run
from .seeds import seed_for
from .spec import Frozen
from .store import Store, writing

RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REACH = 2e-3  # of a finite difference, see `top_eigenvalue`
CONVERGED = 0.2  # the largest residual of a power iteration that is taken for converged
CHUNK = 128  # images a pass
FILE = "flatness.json"
VERSION = 3  # goes up when the numbers move; what was measured before is then measured again

Weights = Mapping[str, Tensor]


class Settings(Frozen):
    """What a probe measures. The same settings give the same numbers."""

    images: int = Field(
        512, ge=1, le=1_000_000, description="training images, the same share of each domain; at most all there are"
    )
    directions: int = Field(10, ge=1, le=1000, description="random directions")
    iterations: int = Field(15, ge=1, le=1000, description="of the power iteration")
    seed: int = Field(0, ge=0, lt=2**31, description="draws the directions")
    radii: tuple[float, ...] = Field(
        RADII, min_length=1, description="how far along a direction; 1: a filter's own norm"
    )


# --- measuring: on anything that has a loss and weights -------------------------------------------------------------------


@contextmanager
def moved(weights: Weights) -> Iterator[dict[str, Tensor]]:
    """Weights may be overwritten in here, and are put back from a copy, which is yielded: the same to the bit."""
    before = {name: w.detach().clone() for name, w in weights.items()}
    try:
        yield before
    finally:
        _put(weights, before)


@torch.no_grad()
def _put(weights: Weights, start: Weights, direction: Weights | None = None, radius: float = 0.0) -> None:
    """``w = start + radius * direction``."""
    for name, w in weights.items():
        w.copy_(start[name] if direction is None else start[name] + radius * direction[name])


def directions(weights: Weights, n: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """``n`` random filter-normalised directions (Li et al. 2018, arXiv 1712.09913, sec. 4).

    ``d = z ||w|| / ||z||`` with Gaussian z, filter by filter; a filter is a row of dimension 0. So a radius is relative to each
    filter's own size, and scaling a filter, which a BatchNorm undoes, changes nothing. z depends on the seed, the number of the
    direction and the layer's name and shape alone: methods on one network are probed along the same z.

    Args:
        weights: Name -> weight, float [filters, ...] of rank 2 or more.
        n: How many.
        seed: Of the draws; the global generator is not touched.
    """
    for k in range(n):
        yield {
            name: _filter_normalised(_gaussian(w, "direction", seed, k, name), w.detach())
            for name, w in weights.items()
        }


def _gaussian(like: Tensor, *key: str | int) -> Tensor:
    rng = torch.Generator().manual_seed(seed_for("flatness", *key))
    return torch.empty_like(like, requires_grad=False).copy_(torch.randn(like.shape, generator=rng))


def _filter_normalised(z: Tensor, w: Tensor) -> Tensor:
    rest = tuple(range(1, w.ndim))
    return z * (w.square().sum(rest, keepdim=True).sqrt() / z.square().sum(rest, keepdim=True).sqrt())


def loss_along(loss: Callable[[], float], weights: Weights, direction: Weights, radii: Sequence[float]) -> list[float]:
    """``L(w + r d)`` for each radius r. The weights are put back, to the bit."""
    found = []
    with moved(weights) as start:
        for radius in radii:
            _put(weights, start, direction, radius)
            found.append(loss())
    return found


@dataclass(frozen=True)
class Eigenvalue:
    """What `top_eigenvalue` found.

    Attributes:
        value: The Rayleigh quotient ``v . Hv`` of the last iteration.
        residual: ``||Hv - value v|| / ||Hv||`` there; 0 for an eigenvector.
        eps: Norm of the step to either side, in weight space.
        vector: v, of norm 1.
    """

    value: float
    residual: float
    eps: float
    vector: dict[str, Tensor]


def top_eigenvalue(
    gradient: Callable[[], Weights], weights: Weights, iterations: int, seed: int, reach: float = REACH
) -> Eigenvalue:
    """The Hessian's eigenvalue of the largest size, with its sign, by power iteration on differences of gradients.

    At a minimum it is the curvature of the steepest direction. Far from one a negative eigenvalue may be as large, and no iteration
    converges: the residual shows it.

    ``Hv ~ (g(w + eps v) - g(w - eps v)) / (2 eps)``, ``||v|| = 1``, ``eps = reach ||w||``. A second backward pass is no way: a
    quantizer's own gradient rule has no derivative. Where weights are rounded, g is the straight-through gradient, which stays as
    it is until a weight crosses a rounding threshold and then jumps. A difference is therefore an average over the weights that
    cross, as if the grid were fine; it means something where they are many, and eps is small against the valley.

    The default was chosen on resnet8 (78,000 weights, LSQ). In float it is 10 % above the limit of small reaches (257, 233). At
    2 bits two random starts agree within 1 % at 3e-3 (348, 349), and differ by a quarter at 1e-3 (364, 286) and below, where too
    few weights cross. From 1e-2 on the value falls with the reach, and from 3e-2 on no iteration converges: for each weight to
    cross several steps of a grid of few bits, all of them would have to move by more than their own size.

    Args:
        gradient: Of the loss in the weights, as they are when it is called.
        weights: Name -> weight; put back, to the bit.
        iterations: How many products with H, of two gradients each.
        seed: Of the first v; the global generator is not touched.
        reach: eps, relative to the norm of all weights together.
    """
    eps = reach * _norm(weights)
    following = {name: _gaussian(w, "vector", seed, name) for name, w in weights.items()}
    v, value, residual = following, 0.0, 0.0
    for _ in range(iterations):
        size = _norm(following)
        if size == 0:  # the loss is linear
            break
        v = {name: t / size for name, t in following.items()}
        following = hessian_vector(gradient, weights, v, eps)
        value, size = _dot(v, following), _norm(following)
        residual = math.sqrt(max(1 - (value / size) ** 2, 0.0)) if size else 0.0
    return Eigenvalue(value, residual, eps, v)


def hessian_vector(gradient: Callable[[], Weights], weights: Weights, v: Weights, eps: float) -> dict[str, Tensor]:
    """``(g(w + eps v) - g(w - eps v)) / (2 eps)``, about the Hessian times v. The weights are put back, to the bit."""
    with moved(weights) as start:
        _put(weights, start, v, eps)
        above = gradient()
        _put(weights, start, v, -eps)
        below = gradient()
    return {name: (above[name] - below[name]) / (2 * eps) for name in weights}


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((a[name].detach().double() * b[name].detach().double()).sum()) for name in a)


def _norm(a: Weights) -> float:
    return math.sqrt(_dot(a, a))


# --- measuring: a method --------------------------------------------------------------------------------------------------


class Landscape:
    """The task's loss of a method's network, as it is used, on some images: a function of the weights of all layers.

    In fp32, whatever the run's precision: bf16 has too few digits for differences.

    Args:
        method: In eval mode.
        batch: Images without augmentation.

    Attributes:
        weights: Layer -> the latent weight that the quantizer sees.
    """

    def __init__(self, method: Method, batch: Batch) -> None:
        self.method, self.images = method, len(batch)
        self.parts = [batch.select(rows) for rows in torch.arange(len(batch), device=batch.y.device).split(CHUNK)]
        self.weights = {s.name: method.net.get_parameter(f"{s.name}.weight") for s in method.sites if s.kind == "layer"}

    def _share(self, part: Batch) -> Tensor:
        """What a part of the images adds to the mean loss."""
        method = self.method
        method.scope.domain, method.scope.labels, method.scope.track = part.domain, None, False
        losses = method.task.losses(method.predict(method.net, part), part)
        return torch.stack(list(losses.values())).sum() * (len(part) / self.images)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss of an image, nats."""
        return sum(float(self._share(part)) for part in self.parts)

    def gradient(self) -> dict[str, Tensor]:
        """Its gradient, as in training: straight through the rounding."""
        total = {name: torch.zeros_like(w, requires_grad=False) for name, w in self.weights.items()}
        with torch.enable_grad():
            for part in self.parts:
                found = torch.autograd.grad(self._share(part), list(self.weights.values()), materialize_grads=True)
                for sum_, more in zip(total.values(), found, strict=True):
                    sum_ += more
        return total

    @torch.no_grad()
    def crossed(self, step: Eigenvalue) -> float | None:
        """The share of the quantized weights with other codes at the two ends of the last difference; None in a float network.

        Codes, not values: where a grid follows the weights, every value moves with it.
        """
        sides = []
        with moved(self.weights) as start:
            for eps in (step.eps, -step.eps):
                _put(self.weights, start, step.vector, eps)
                layers = [layer for _, layer in quant_layers(self.method.net)]
                found = [q.encode(layer.weight)[0] for layer in layers if (q := layer.weight_quantizer) is not None]
                sides.append(found)
        if not sides[0]:
            return None
        return sum(int((a != b).sum()) for a, b in zip(*sides, strict=True)) / sum(a.numel() for a in sides[0])


def has_surrogate(net: nn.Module) -> bool:
    """Whether a quantizer of the network says that its gradient is a surrogate, as `CdfQuantizer` does."""
    quantizers = [m for m in net.modules() if isinstance(m, Quantizer)]
    return any(getattr(q, flag, None) is True for q in quantizers for flag in ("surrogate", "unit"))


def probe(method: Method, batch: Batch, settings: Settings) -> dict[str, Any]:
    """What `probe_run` writes of a network; nothing in the network is left changed.

    Raises:
        UserError: A loss is not finite.
    """
    place = Landscape(method, batch)
    loss = _finite(place.loss(), "loss on training images")
    rises: list[list[float]] = []
    for direction in directions(place.weights, settings.directions, settings.seed):
        found = loss_along(place.loss, place.weights, direction, settings.radii)
        rises.append(
            [_finite(value, f"loss at radius {r:g}") - loss for r, value in zip(settings.radii, found, strict=True)]
        )
    top = top_eigenvalue(place.gradient, place.weights, settings.iterations, settings.seed)
    by_radius = list(zip(*rises, strict=True))
    return {
        "images": place.images,
        "loss": loss,
        "rise": {
            "mean": [statistics.mean(values) for values in by_radius],
            "sd": [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_radius],
            "min": [min(values) for values in by_radius],
            "max": [max(values) for values in by_radius],
        },
        "eigenvalue": _finite(top.value, "curvature"),
        "residual": top.residual,
        "converged": top.residual <= CONVERGED,
        "eps": top.eps,
        "crossed": place.crossed(top),
        "surrogate": has_surrogate(method.net),
    }


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise UserError(f"the {what} is {value}, so there is no landscape to measure; train with a smaller lr")
    return value


def probe_run(store: Store, run_id: str, settings: Settings, *, data_root: Path | None = None) -> dict[str, Any]:
    """Measure how flat a finished run is, and write it as ``flatness.json`` beside its record.

    A run that was probed with the same settings is not probed again.

    Args:
        store: Where the run lies.
        run_id: Its id, or the beginning of it.
        settings: What is measured.
        data_root: Where the user keeps data sets.

    Returns:
        What the file holds: ``settings``; what names the run (``run_id``, ``method``, ``bits``, ``network``, ``data``,
        ``protocol``, ``seed``, ``precision``), and ``acc``, its test accuracy; ``loss`` (nats, on ``images`` training images);
        ``rise``: for each of the settings' radii the ``mean``, ``sd``, ``min`` and ``max``, over directions, of how much the loss
        rises;
        ``eigenvalue``, the largest in size, which may be negative, with ``residual`` and ``eps`` (see `Eigenvalue`), whether the
        iteration has ``converged``, and ``crossed`` (see `Landscape.crossed`); ``surrogate``: whether the eigenvalue is of a
        surrogate gradient (see `has_surrogate`).

    Raises:
        UserError: There is no such run, it is not done, it cannot be rebuilt here, or its loss is not finite.
    """
    run_id = store.find(run_id)
    path, asked = store.path(run_id) / FILE, settings.model_dump(mode="json")
    known = _read(path)
    if known is not None and known["settings"] == asked:
        return known
    run = load_run(store, run_id, data_root=data_root)
    spec = run.record["spec"]
    try:
        images = min(settings.images, sum(len(run.data.splits[domain].train) for domain in run.data.protocol.train))
        measured = probe(run.method, run.data.probe(images), settings)
    except UserError as error:
        raise UserError(f"run {run_id}: {error}") from None
    named = {key: spec[key] for key in ("method", "bits", "network", "data", "protocol", "seed", "precision")}
    acc = run.record["metrics"].get("test/acc")
    found = {"version": VERSION, "run_id": run_id, **named, "acc": acc, "settings": asked, **measured}
    with writing(store.root):
        write_json(path, found)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """What was measured before by this version; None if nothing was, or the file cannot be read."""
    try:
        found = read_json(path)
    except (FileNotFoundError, Damaged):
        return None
    return found if found.get("version") == VERSION and "settings" in found else None


__all__ = [
    "RADII",
    "Eigenvalue",
    "Landscape",
    "Settings",
    "directions",
    "has_surrogate",
    "hessian_vector",
    "loss_along",
    "moved",
    "probe",
    "probe_run",
    "top_eigenvalue",
]

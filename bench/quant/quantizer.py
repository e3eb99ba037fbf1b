"""What a quantizer is, and what it may know of the batch in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..hooks import OF_QUANTIZER, guard
from ..site import Site

Decode = Callable[[Tensor], Tensor]


class Scope:
    """What a quantizer may know of the batch in flight. One object is shared by all quantizers of a network.

    Attributes:
        domain: int64 [B], the training domain of each image, -1 for a domain unseen in training; None before the first batch.
        labels: int64 [B] while training, None otherwise.
        track: Whether running statistics may move. False in evaluation, calibration and a method's second pass.
        compile: Whether elementwise quantizers run as compiled kernels, see `grid`.
        step, steps: The optimizer step and how many there will be.
        epoch, epochs: The epoch and how many there will be.
    """

    def __init__(self) -> None:
        self.domain: Tensor | None = None
        self.labels: Tensor | None = None
        self.track = self.compile = False
        self.step = self.steps = self.epoch = self.epochs = 0

        self._present: tuple[Tensor | None, list[int]] = None, []

    def present(self) -> list[int]:
        """The domains in the batch, ascending; read from the device once a batch."""
        if self._present[0] is not self.domain:
            self._present = self.domain, [] if self.domain is None else self.domain.unique().tolist()
        return self._present[1]

    def __deepcopy__(self, memo: dict) -> Scope:
        return self  # a copy of a network (teacher, deployed form) sees the same batch


class Quantizer(nn.Module):
    """Maps a tensor onto at most ``2**bits`` codes, with a useful gradient.

    State lives in buffers and parameters whose shapes are known when the quantizer is built, so that a checkpoint loads.
    A quantizer with a uniform grid has its spacing as ``step`` (parameter, buffer or property, broadcastable to the input);
    see `step_of`.

    Args:
        bits: Width of a code, 1 to 8.
        site: The layer whose weight or input is quantized.
        scope: Shared by all quantizers of the network.
        signed: Whether the input has negative values (weights always do; activations after a ReLU do not).
    """

    groups: ClassVar[dict[str, tuple[float, float | None]]] = {}
    """Parameter name -> (factor on the learning rate, weight decay or None for the run's)."""
    per: Literal["tensor", "channel", "sample", "domain"] = "tensor"
    """What shares one grid: the whole tensor, each channel (dimension 0 of a weight, 1 of an input), each sample, or each
    domain of the batch. Within it a code has one value, so there are at most ``2**bits`` values; the audit checks both."""

    by_sample: bool = False
    """Whether in use a sample's thresholds depend on what is known of it besides the input; there is no integer form then."""

    random: bool = False
    """Whether in training one input may be quantized in two ways; what was used is then kept, and not made again by `redo`."""
    rescales: bool = False
    """Whether a quantized weight has another scale than the float one, which the norm behind the layer undoes. The statistics of
    all BatchNorms then start from the calibrated network instead of the float network."""
    of: Literal["weight", "input"] = "weight"
    """What it quantizes; set by the layer that it is placed in."""

    def __init__(self, bits: int, site: Site, scope: Scope, signed: bool) -> None:
        super().__init__()
        self.bits, self.site, self.scope, self.signed = bits, site, scope, signed
        self.qmin = -(2 ** (bits - 1)) if signed else 0
        self.qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        guard(cls, Quantizer, OF_QUANTIZER)

    def fit(self, x: Tensor) -> None:
        """Set the state from a real tensor. The harness calls it once, on the shared probe batch, before training.

        If the layer runs several times in a pass, each call fits the quantizer again, to all inputs so far.

        A quantizer that fits itself in the first training step makes the ranks of a distributed run diverge.
        """

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid, differentiable. In eval mode equal, to the bit, to ``decode(encode(x))``."""
        raise NotImplementedError

    def redo(self, x: Tensor) -> Callable[[], Tensor] | None:
        """A function that makes ``quantize(x)`` once more, as it is now, or None if keeping it is cheaper.

        A layer needs its quantized input again in the backward pass; made once more it need not be kept until then.
        """
        return None

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Integer codes, int32 of the shape of ``x`` from ``qmin`` to ``qmax``, and the function that turns them back into values.

        The function takes codes of any shape that broadcasts against the grid: ``[1, 1, 1, 1]`` for a grid per tensor,
        ``[O, 1, 1, 1]`` for a weight's per channel, ``[B, 1, 1, 1]`` per sample. So the grid can be read off it, code by code.
        """
        raise NotImplementedError

    def constants(self) -> int:
        """How many 32-bit numbers decoding needs (steps, offsets, codebook entries); they are part of the network's size."""
        return sum(t.numel() for t in (*self.parameters(), *self.buffers()))

    def project(self) -> None:
        """Bring parameters back into their valid range; called after every optimizer step."""

    def forward(self, x: Tensor) -> Tensor:
        """See `quantize`."""
        return self.quantize(x)

    def extra_repr(self) -> str:
        """Bits and range, for ``print(net)``."""
        return f"bits={self.bits}, codes={self.qmin}..{self.qmax}"


def snap(x: Tensor, q: Tensor) -> Tensor:
    """The straight-through estimator that stays on the grid: value exactly ``q``, gradient that of ``x``.

    The usual ``x + (q - x).detach()`` leaves the grid in floating point: 18 values for a 16-entry codebook.
    """
    return q.detach() + (x - x.detach())


def step_of(quantizer: Quantizer) -> Tensor | None:
    """The grid spacing; None if the grid is not uniform."""
    return getattr(quantizer, "step", None)


def finite_state(quantizer: Quantizer) -> str | None:
    """The name of the first parameter or buffer that is not finite, or of a step that has collapsed to nothing."""
    for name, value in (*quantizer.named_parameters(recurse=False), *quantizer.named_buffers(recurse=False)):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return f"{name} is not finite"
    step = step_of(quantizer)
    if step is not None and bool((step <= 1e-8).any()):
        return "step collapsed to zero"
    return None

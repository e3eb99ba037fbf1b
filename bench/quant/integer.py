"""The integer reference: every quantized layer recomputed from integer codes, with integer accumulators, scales applied after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layer import QuantLayer, apply_layer, quant_layers, swap
from .levels import ROUNDING, Levels, read_levels
from .quantizer import Quantizer

EXACT = 2.0**53  # below it every integer is a float64, and so is every partial sum of integers, in whatever order
LARGEST_MULTIPLE = 2**15  # of a codebook's unit
FLOAT32 = 2.0**-24  # the rounding of one float32 operation, relative


@dataclass(frozen=True)
class Term:
    """A part of a tensor: ``factor * integers``.

    Attributes:
        factor: float64, one number or one for each channel or sample; it is constant over what a layer sums up.
        integers: float64 of the tensor's shape. They are integers, unless the tensor is not quantized.
    """

    factor: Tensor
    integers: Tensor


def terms(quantizer: Quantizer | None, x: Tensor) -> list[Term]:
    """``quantize(x)`` as a sum of terms.

    One for a grid of multiples; two for a uniform grid with an offset (codes, and ones: what a layer pads with is the value 0,
    which is neither code 0 nor a one); for any other codebook one for each code that occurs, with ones where it does.
    """
    if quantizer is None:
        return [Term(torch.ones((), dtype=torch.float64), x.detach().double())]
    codes, levels = read_levels(quantizer, x)
    found = list(_level_terms(levels, codes))
    if (
        quantizer.of == "input" and quantizer.per == "channel"
    ):  # what is summed up has several factors: one channel at a time
        return [part for term in found for part in _by_channel(term)]
    return found


def _level_terms(levels: Levels, codes: Tensor) -> Iterator[Term]:
    multiples, fit = levels.integers(-LARGEST_MULTIPLE, LARGEST_MULTIPLE), levels.affine()
    if multiples is not None:
        unit, numbers = multiples
        yield Term(unit, levels.look_up(numbers, codes))
    elif fit is not None:
        yield Term(fit[0], codes.double())
        yield Term(fit[1], torch.ones(codes.shape, dtype=torch.float64))
    else:
        for code in codes.unique().tolist():
            yield Term(levels.table[code - levels.low], (codes == code).double())


def _by_channel(term: Term) -> Iterator[Term]:
    for c in range(term.integers.shape[1]):
        alone = torch.zeros_like(term.integers)
        alone[:, c] = term.integers[:, c]
        yield Term(term.factor[:, c : c + 1], alone)


@torch.no_grad()
def integer_forward(layer: QuantLayer, x: Tensor) -> Tensor:
    """The layer's output from integers: ``sum_ij f_i g_j * (accumulator of integers i of the weight and j of the input) + bias``.

    Accumulators are float64 and checked to stay below 2**53, so they are the exact integers: a double-precision convolution is a
    matrix product of products and sums, and none of those rounds. A side in float (w4a32) is used as it is.

    Args:
        layer: In eval mode.
        x: Its input, float [B, ...].

    Returns:
        float64, of the shape of the layer's output.
    """
    total = None
    weights, inputs = terms(layer.weight_quantizer, layer.weight), terms(layer.act_quantizer, x)
    fan_in = layer.weight[0].numel()
    for w in weights:
        for a in inputs:
            bound = fan_in * float(w.integers.abs().max()) * float(a.integers.abs().max())
            if bound >= EXACT:
                raise ValueError(f"accumulators up to {bound:.3g} are not exact in float64")
            accumulated = apply_layer(a.integers, w.integers, None, layer.conv)
            part = accumulated * _of_output(w.factor, layer) * _of_samples(a.factor, accumulated.ndim)
            total = part if total is None else total + part
    assert total is not None  # a tensor has at least one code
    if layer.bias is not None:
        total = total + _of_output(layer.bias.detach().double(), layer)
    return total


def _of_output(factor: Tensor, layer: QuantLayer) -> Tensor:
    """A factor of each output channel, shaped to broadcast against the output."""
    factor = factor.flatten()
    return factor if layer.conv is None or len(factor) == 1 else factor.view(1, -1, 1, 1)


def _of_samples(factor: Tensor, ndim: int) -> Tensor:
    """A factor of each sample, shaped to broadcast against the output."""
    return factor.reshape(-1, *[1] * (ndim - 1))


class IntegerReference(nn.Module):
    """Stands for a `QuantLayer` and computes from integers (`integer_forward`)."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """In the type of ``x``."""
        return integer_forward(self.layer, x).to(x.dtype)


def integer_net(net: nn.Module) -> nn.Module:
    """A copy of the network, in eval mode, whose quantized layers all compute from integers."""
    net = copy.deepcopy(net).eval()
    for name, layer in list(quant_layers(net)):
        swap(net, name, IntegerReference(layer))
    return net


@dataclass(frozen=True)
class IntegerReport:
    """How a network and its integer reference compare.

    Attributes:
        layers: Layer -> largest ``|integer - fake-quantized|``, in roundings of float32: of `_rounding` each.
        agreement: Share of the images whose predicted class is the same when all layers run on integers.
        images: How many there were.
        ties: How many of them have a value so near a rounding boundary that the rounding errors of float32 put it on the other
            side. Which images these are depends on the CPU; a code more or less may change the prediction.
        agreement_without_ties: `agreement` of the other images; 1 unless something is wrong.
    """

    layers: dict[str, float]
    agreement: float
    images: int
    ties: int
    agreement_without_ties: float


@torch.no_grad()
def check_integers(
    net: nn.Module, x: Tensor, predict: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> IntegerReport:
    """Hold every quantized layer, and the whole network, against the integer reference.

    Args:
        net: The network. If a quantizer looks at its scope, the scope must be that of ``x``.
        x: Images, float [B, C, H, W].
        predict: Logits of a network; default: the network's output.
    """
    predict = predict or (lambda net, x: net(x))
    layers: dict[str, float] = {}
    codes: dict[str, list[Tensor]] = {}

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, QuantLayer)
            error = (integer_forward(layer, inputs[0]) - output).abs() / _rounding(layer, inputs[0])
            layers[name] = max(layers.get(name, 0.0), float(error.max()))
            if layer.act_quantizer is not None:
                codes.setdefault(name, []).append(layer.act_quantizer.encode(inputs[0])[0].short())

        return hook

    training = net.training
    handles = [layer.register_forward_hook(compare(name)) for name, layer in quant_layers(net)]
    try:
        ours = predict(net.eval(), x).argmax(1)
    finally:
        for handle in handles:
            handle.remove()
    integers, found = integer_net(net), torch.zeros(len(x), dtype=torch.int8)
    for name, module in integers.named_modules():
        if isinstance(module, IntegerReference) and name in codes:
            module.register_forward_pre_hook(_tie_finder(module, codes[name], found))
    same = ours == predict(integers, x).argmax(1)
    net.train(training)
    clear = same[found != TIE]
    without = float(clear.double().mean()) if len(clear) else 1.0
    return IntegerReport(layers, float(same.double().mean()), len(x), int((found == TIE).sum()), without)


NEAR = 2.0**-16  # relative distance that rounding errors of float32 may add up to on the way from one layer to the next
TIE, WRONG = 1, 2


def _tie_finder(reference: IntegerReference, codes: list[Tensor], found: Tensor) -> Callable[..., None]:
    """A forward pre-hook that tells which images have other codes than ``codes``, and whether rounding errors explain it.

    Args:
        reference: The layer on integers.
        codes: Of the fake-quantized network's inputs of this layer, one tensor for each call; taken one by one.
        found: int8 [B], of all layers together: 0, or what the first difference in an image is: a `TIE` on a rounding boundary, or
            `WRONG`. What follows in that image shows nothing.
    """
    quantizer = reference.layer.act_quantizer
    assert quantizer is not None

    def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, ours = inputs[0], codes.pop(0)
        reach = NEAR * (x.abs() + x.abs().max())
        one, other = (quantizer.encode(x + side)[0].short() for side in (-reach, reach))
        near = (one.minimum(other) <= ours) & (ours <= one.maximum(other))
        differ = (quantizer.encode(x)[0].short() != ours).flatten(1).any(1)
        kind = torch.where(near.flatten(1).all(1), TIE, WRONG) * differ
        if len(x) != len(found):  # its first dimension is not that of the images
            kind = kind.max().expand(len(found))
        found.copy_(torch.where(found == 0, kind, found))

    return look


def _rounding(layer: QuantLayer, x: Tensor) -> Tensor:
    """What one rounding of float32 may amount to in each output: ``2**-24 * (sum |x_q| |w_q| + |bias|)``, see `_size`."""
    bias = None if layer.bias is None else layer.bias.abs().double()
    sizes = _size(layer.act_quantizer, x), _size(layer.weight_quantizer, layer.weight)
    return (FLOAT32 * apply_layer(*sizes, bias, layer.conv)).clamp(min=torch.finfo(torch.float32).tiny)


def _size(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """``|x_q|``, and its distance to the exact value in roundings: DoReFa's small values are differences of large ones."""
    if quantizer is None:
        return x.abs().double()
    exact = torch.stack([term.factor * term.integers for term in terms(quantizer, x)]).sum(0)
    value = quantizer(x).double()
    # Of the distance no more than float32 explains is granted: a wrong code must not excuse itself.
    return value.abs() + (exact - value).abs().clamp(max=ROUNDING * value.abs().max()) / FLOAT32

"""A quantized network as an ONNX graph: integer codes and their scales, so that a runtime can compute with integers.

Each `QuantLayer` becomes QuantizeLinear, DequantizeLinear and the layer's own operation (the pattern that ONNX Runtime turns into
QLinearConv), its weight int8 codes, its bias int32. Codebooks become tables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..site import Site
from .layer import QuantLayer, apply_layer, quant_layers, swap
from .levels import Levels, read_levels, switching_points
from .quantizer import Quantizer

UINT4, INT4 = 21, 22  # numbers of the types in ONNX, which torch has no arithmetic for
FOUR_BITS = 21  # the first opset with them
HUGE = 3e38  # a float32 beyond every grid
MOST_WEIGHT = 64  # 2 * 255 * 64 is an int16, in which the kernels of processors without VNNI add two products
BIAS_MOST = 2**30  # of an int32, with as much again for the sum


class Rounded(nn.Module):
    """An activation on a uniform grid: ``QuantizeLinear(x - offset) -> DequantizeLinear + offset``.

    Codes are stored without sign, whatever the sign of the activation: a runtime has fast integer kernels for unsigned inputs only.
    Codes of fewer than eight bits are spread over the whole byte, from 0 to 255 in equal steps. That cuts off what is beyond the
    grid, and a layer's int32 bias gets the finer grid that it needs: on that of few bits, rounding it changes predictions. The
    pattern is ``Dequantize -> LeakyRelu(1) -> Quantize``, which ONNX Runtime executes as one table of bytes.
    """

    scale: Tensor
    zero: Tensor
    first_scale: Tensor
    first_zero: Tensor
    highest: Tensor

    def __init__(self, scale: float, lowest: int, highest: int, offset: float, four: bool) -> None:
        super().__init__()
        self.offset, self.integer, self.four = offset, offset == 0.0, four
        self.parts = 255 // (highest - lowest)
        self.clips = 2 * (highest - lowest) > 255 > highest - lowest
        self.kind = INT4 if lowest < 0 else UINT4
        self.bounds = (lowest * scale, highest * scale)
        first_zero, zero = -lowest, 255 - self.parts * highest if self.parts > 1 else -lowest
        for name, value in (("first_zero", first_zero), ("zero", zero), ("highest", highest - lowest)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.uint8))
        self.register_buffer("first_scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale if four else scale / self.parts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Float to float."""
        x = x - self.offset if self.offset else x
        x = self._four_bits(x) if self.four else self._byte(x)
        return x + self.offset if self.offset else x

    def _four_bits(self, x: Tensor) -> Tensor:
        codes = _op("QuantizeLinear", [x.clamp(*self.bounds), self.scale], self.kind, x.shape, output_dtype=self.kind)
        return _op("DequantizeLinear", [codes, self.scale], torch.float32, x.shape)

    def _byte(self, x: Tensor) -> Tensor:
        grid = [self.first_scale, self.first_zero]
        codes = _op("QuantizeLinear", [x, *grid], torch.uint8, x.shape)
        if self.clips:
            codes = _op("Clip", [codes, None, self.highest], torch.uint8, x.shape)
        if self.parts > 1:
            value = _op("DequantizeLinear", [codes, *grid], torch.float32, x.shape)
            value = _op("LeakyRelu", [value], torch.float32, x.shape, alpha=1.0)
            codes = _op("QuantizeLinear", [value, self.scale, self.zero], torch.uint8, x.shape)
        return _op("DequantizeLinear", [codes, self.scale, self.zero], torch.float32, x.shape)


class LookedUp(nn.Module):
    """An activation on a grid that is not rounding: the code is found among exact thresholds, by halving, and its value in a table.

    Where the values are multiples of a unit the table holds uint8 integers, and the layer can compute with them.
    """

    thresholds: Tensor
    table: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, thresholds: Tensor, values: Tensor, unit: float | None) -> None:
        super().__init__()
        self.steps = max(1, (len(values) - 1).bit_length())
        padding = torch.full((2**self.steps - 1 - len(thresholds),), torch.inf)
        self.register_buffer("thresholds", torch.cat([thresholds.float(), padding]))
        self.integer, self.four = unit is not None, False
        least = values.min().clamp(max=0) if self.integer else 0.0
        self.register_buffer("table", (values - least).to(torch.uint8) if self.integer else values.float())
        self.register_buffer("scale", torch.tensor(unit or 1.0, dtype=torch.float32))
        self.register_buffer("zero", torch.tensor(-int(least), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Float to float."""
        code = torch.zeros_like(x, dtype=torch.int64)
        for half in (2**k for k in reversed(range(self.steps))):
            threshold = _op("Gather", [self.thresholds, code + (half - 1)], torch.float32, x.shape)
            code = code + half * (x >= threshold).long()
        value = _op("Gather", [self.table, code], self.table.dtype, x.shape)
        if not self.integer:
            return value
        return _op("DequantizeLinear", [value, self.scale, self.zero], torch.float32, x.shape)


class CodedWeight(nn.Module):
    """A weight as int8 integers with a scale each output channel, or as codes of a table of float values."""

    codes: Tensor
    scale: Tensor
    table: Tensor

    def __init__(self, codes: Tensor, levels: Levels, factor: Tensor | None, four: bool) -> None:
        """factor: float64 [O], multiplied into the scales; None: a table is used if there is no other way."""
        super().__init__()
        found = levels.integers(-128, 127)
        self.integer, self.four = found is not None, False
        self.shape = codes.shape
        if found is None:
            index = codes.long() - levels.low
            if levels.table[0].numel() > 1:  # a table a channel: all of them, one after the other
                index = index + len(levels.table) * torch.arange(len(codes)).view(-1, *[1] * (codes.ndim - 1))
            self.register_buffer("codes", index.to(torch.uint8 if int(index.max()) < 256 else torch.int32))
            self.register_buffer("table", levels.table.flatten(1).T.flatten().float())
            return
        unit, numbers = found
        codes, unit = levels.look_up(numbers, codes), unit.flatten().expand(len(codes)).clone()
        if factor is not None:
            unit = unit * factor
        # A scale is positive: a negative factor turns the codes' sign, unless one of them is -128; a factor of 0 makes them 0.
        rows = (-1, *[1] * (codes.ndim - 1))
        turned = (unit < 0) & (codes.flatten(1).amin(1) > -128)
        codes = codes * torch.where(turned, -1.0, 1.0).view(rows) * (unit != 0).view(rows)
        unit = torch.where(turned, -unit, torch.where(unit == 0, 1.0, unit))
        # Few bits make a coarse grid, on which the bias would be rounded as well: finer integers have the same values.
        self.four = four and float(codes.min()) >= -8 and float(codes.max()) <= 7
        finer = (MOST_WEIGHT / codes.flatten(1).abs().amax(1).clamp(min=1)).floor().clamp(min=1)
        finer = torch.ones_like(finer) if self.four else finer
        self.unit = unit / finer
        self.register_buffer("codes", (codes * finer.view(rows)).to(torch.int8))
        self.register_buffer("scale", self.unit.float())

    def forward(self) -> Tensor:
        """Float, of the weight's shape."""
        if self.integer:
            return _op("DequantizeLinear", [self.codes, self.scale], torch.float32, self.shape, axis=0)
        index = self.codes.long() if self.codes.dtype == torch.uint8 else self.codes
        return _op("Gather", [self.table, index], torch.float32, self.shape)


class OnnxLayer(nn.Module):
    """A `QuantLayer` whose export is made of ONNX's own quantization operators; outside an export its values mean nothing.

    Args:
        layer: The layer, in eval mode.
        x: An input that it really meets.
        norm: The batch norm that takes the layer's output and nothing else. It is multiplied into the scales, and the codes stay.
        four: Whether four-bit types are used.
        integer_bias: Whether the bias is rounded to the grid of the integer sums, which the runtime's integer kernels ask for. With
            few bits that grid is coarse enough to turn codes of the next layer (LSQ W4A4, resnet20, CIFAR-10: 4 % of predictions).
    """

    bias: Tensor | None
    bias_scale: Tensor | None
    weight: Tensor

    def __init__(
        self, layer: QuantLayer, x: Tensor, norm: nn.BatchNorm2d | None, four: bool, integer_bias: bool
    ) -> None:
        super().__init__()
        self.conv = layer.conv
        self.act = nn.Identity() if layer.act_quantizer is None else _activation(layer.act_quantizer, x, four)
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
        bias, factor = bias.double(), None
        self.coded: CodedWeight | None = None
        if layer.weight_quantizer is not None:
            codes, levels = read_levels(layer.weight_quantizer, layer.weight)
            if norm is not None and levels.integers(-128, 127) is not None:
                factor, shift = folded(norm)
                bias = bias * factor + shift
            self.coded = CodedWeight(codes, levels, factor, four)
        else:
            self.register_buffer("weight", layer.weight.detach())
        self.folds = factor is not None
        # What a runtime can turn into an integer kernel; a looked-up input only looks like it.
        coded = self.coded is not None and self.coded.integer and getattr(self.act, "integer", False)
        self.integer = coded and isinstance(self.act, Rounded)
        self.apart = coded
        self.register_buffer("bias", bias.float() if layer.bias is not None or self.folds else None)
        self.register_buffer("bias_scale", None)
        if self.integer and integer_bias and not self._four():
            assert self.coded is not None
            grain = self.coded.unit * self.act.scale.double()  # type: ignore[operator]
            codes = (bias / grain).round()
            if float(codes.abs().max()) < BIAS_MOST:  # else the norm has all but switched a channel off
                self.bias = codes.to(torch.int32)
                self.bias_scale = grain.float()

    def _four(self) -> bool:
        return (self.coded is not None and self.coded.four) or getattr(self.act, "four", False)

    def forward(self, x: Tensor) -> Tensor:
        """As `QuantLayer.forward`, and the norm."""
        x = self.act(x)
        weight = self.weight if self.coded is None else self.coded()
        if self.bias is None or not self.apart:
            return apply_layer(x, weight, self.bias, self.conv)
        if self.bias_scale is not None:
            bias = _op("DequantizeLinear", [self.bias, self.bias_scale], torch.float32, self.bias.shape, axis=0)
            return apply_layer(x, weight, bias, self.conv)
        # Apart from the layer: ONNX Runtime's pass WeightBiasQuantization would round it to the accumulator's grid.
        return apply_layer(x, weight, None, self.conv) + self.bias.view(-1, *[1] * (0 if self.conv is None else 2))


def folded(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and shift (float64 [C]) that the norm is in eval mode: ``gamma / sigma`` and ``beta - mean gamma / sigma``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def _activation(quantizer: Quantizer, x: Tensor, four: bool) -> nn.Module:
    """The quantizer in ONNX's operators; the quantizer itself, in float operations, where its grid depends on the input."""
    levels = read_levels(quantizer, x)[1]
    fixed = quantizer.per == "tensor" and torch.equal(levels.table, read_levels(quantizer, 2 * x)[1].table)
    if not fixed:
        return quantizer
    lowest, highest = (int(quantizer.encode(torch.tensor([end]))[0]) for end in (-HUGE, HUGE))
    first = lowest - levels.low
    levels = Levels(lowest, levels.table[first : first + highest - lowest + 1])
    thresholds = find_thresholds(quantizer, lowest, highest)
    found, fit = levels.integers(-255, 255), levels.affine()
    if found is not None:
        unit, numbers = float(found[0]), found[1].flatten()
        if _rounds(thresholds, numbers, unit):
            least, most = int(numbers[0]), int(numbers[-1])
            return Rounded(unit, least, most, 0.0, four and least >= -8 and most <= (7 if least < 0 else 15))
        if float(numbers.max() - numbers.min().clamp(max=0)) <= 255 and float(numbers.max()) >= 0:
            return LookedUp(thresholds, numbers, unit)
    if fit is not None:
        scale, offset = float(fit[0]), float(fit[1])
        if _rounds(thresholds - offset, levels.codes.flatten(), scale):
            return Rounded(scale, lowest, highest, offset, four=False)
    return LookedUp(thresholds, levels.table.flatten(), None)


def _rounds(thresholds: Tensor, numbers: Tensor, unit: float) -> bool:
    """Whether the thresholds lie in the middle between neighbouring integers: then QuantizeLinear is the quantizer."""
    if not torch.equal(numbers.diff(), torch.ones(len(numbers) - 1, dtype=torch.float64)) or unit <= 0:
        return False
    middles = (numbers[1:] - 0.5) * unit
    return bool(((thresholds - middles).abs() <= 1e-4 * unit).all()) and float(numbers[-1] - min(numbers[0], 0)) <= 255


def find_thresholds(quantizer: Quantizer, lowest: int, highest: int) -> Tensor:
    """The smallest float32 of each code but the lowest, as float64 [highest - lowest], exact.

    Raises:
        ValueError: The codes do not rise with the input.
    """
    codes = torch.arange(lowest + 1, highest + 1)
    found = switching_points(lambda x: quantizer.encode(x[0])[0][None], codes)[0]
    if not torch.equal(quantizer.encode(found)[0].long(), codes):
        raise ValueError(
            f"{type(quantizer).__name__} does not give every code from {lowest} to {highest} in rising order"
        )
    return found.double()


def _op(
    kind: str, inputs: Sequence[Tensor | None], dtype: torch.dtype | int, shape: Sequence[Any], **attributes: Any
) -> Tensor:
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape)


def _keep(inputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    return hook


@torch.no_grad()
def onnx_net(net: nn.Module, sites: Sequence[Site], x: Tensor, four: bool, integer_bias: bool) -> nn.Module:
    """A copy of the network, in eval mode, made of `OnnxLayer`.

    Args:
        net: The network.
        sites: Its sites, which say whose output a norm takes.
        x: Images, float [B, C, H, W], on which grids are looked at.
        four: Whether four-bit types are used.
        integer_bias: See `OnnxLayer`.
    """
    inputs: dict[str, Tensor] = {}
    net = copy.deepcopy(net).eval().requires_grad_(False)
    layers = list(quant_layers(net))
    for name, layer in layers:
        layer.register_forward_pre_hook(_keep(inputs, name))
    net(x)
    norms = {site.name: site.norm for site in sites if site.kind == "layer" and site.norm is not None}
    for name, layer in layers:
        norm = net.get_submodule(norms[name]) if name in norms else None
        if not isinstance(norm, nn.BatchNorm2d) or type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            norm = None  # a method's own norm, which may do anything
        # What the first layer puts out for a blank background is the same number all over an image; where that lies near a boundary
        # of the next layer's codes, rounding the bias turns all of them.
        new = OnnxLayer(layer, inputs[name], norm, four, integer_bias and name != next(iter(inputs)))
        swap(net, name, new)
        if new.folds:
            swap(net, norms[name], nn.Identity())
    return net

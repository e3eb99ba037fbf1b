"""The integer reference: every method's layers are what integers with integer accumulators give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qatbench.bench.data import Batch
from qatbench.bench.method import Wrapper
from qatbench.bench.quant import Quantizer, QuantLayer, Scope, UniformQuantizer
from qatbench.bench.quant.integer import IntegerReport, check_integers, integer_forward
from qatbench.bench.quant.levels import Levels, read_levels
from qatbench.bench.registry import plugins
from qatbench.bench.site import Site
from qatbench.bench.spec import FLOAT_BITS
from qatbench.bench.testing import all_train, ready, train
from torch import Tensor, nn

ROUNDINGS = 8  # of float32: what a sum of some hundred products may be off, in roundings of the sum of their sizes
SITE = Site("conv", "layer", (4,), signed_input=True)
METHODS = [
    p.name
    for p in plugins("methods")
    if p.cls and not issubclass(p.cls, Wrapper) and tuple(p.cls.bits) != (FLOAT_BITS,)
]


class Table(Quantizer):
    """A codebook without a unit: the nearest of four values."""

    values = torch.tensor([-1.0, -0.31, 0.17, 0.9001])

    def quantize(self, x: Tensor) -> Tensor:
        codes, decode = self.encode(x)
        return decode(codes)

    def encode(self, x):
        codes = (x.unsqueeze(-1) - self.values).abs().argmin(-1).int() + self.qmin
        return codes, lambda c: self.values[(c - self.qmin).long()]


class Shifted(UniformQuantizer):
    """A grid with an offset that is no multiple of its step, for each channel or sample its own."""

    def __init__(self, bits: int, per: str) -> None:
        super().__init__(bits, SITE, Scope(), True)
        self.per = per  # type: ignore[assignment]

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dim = 1 if self.per == "channel" and self.of == "input" else 0
        shape = [1] * x.ndim
        shape[dim] = x.shape[dim] if self.per != "tensor" else 1
        n = torch.arange(1, shape[dim] + 1).float().view(shape)
        return 0.07 * n, 0.011 * n + 0.02

    def quantize(self, x: Tensor) -> Tensor:
        codes, decode = self.encode(x)
        return decode(codes)

    def encode(self, x):
        step, offset = self._grid(x)
        codes = ((x - offset) / step).clamp(self.qmin, self.qmax).round().int()
        return codes, lambda c: c * step + offset


# adq at 8 bits has 255 values a codebook, and a pass for each.
@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m == "adq")) for m in METHODS])
def test_every_method_is_integers(method: str, tmp_path: Path) -> None:
    """What a method trains would not be what integer hardware computes: its bits would be emulation only."""
    torch.set_num_threads(1)
    for width in (2, 3, 4, 8):
        made, data = ready(method, bits=f"w{width}a{width}", epochs=1)
        if made.trains:
            train(made, data, tmp_path / str(width))
        made.eval()
        batch = all_train(data)
        made.scope.domain, made.scope.labels, made.scope.track = batch.domain, None, False
        found = check_integers(
            made.net, batch.x, lambda net, x, made=made, batch=batch: made.predict(net, Batch(x, batch.y, batch.domain))
        )
        assert max(found.layers.values()) <= ROUNDINGS, (width, found.layers)
        assert found.agreement_without_ties == 1.0, width
        assert found.agreement >= 0.9, width  # which codes are ties depends on the CPU
        assert found.images == len(batch)


@pytest.mark.parametrize("weight", ["tensor", "channel", "table", None])
@pytest.mark.parametrize("act", ["tensor", "channel", "sample", "table", None])
def test_every_kind_of_grid(weight: str | None, act: str | None) -> None:
    """An offset would be counted at padded places, a table summed with wrong values, or a scale put on another channel."""

    def quantizer(kind: str | None) -> Quantizer | None:
        if kind == "table":
            return Table(2, SITE, Scope(), True)
        return None if kind is None else Shifted(4, kind)

    torch.manual_seed(0)
    for layer, x in ((nn.Conv2d(4, 6, 3, 2, 1), torch.randn(5, 4, 7, 7)), (nn.Linear(4, 6), torch.randn(5, 4))):
        if weight is None and act is None:
            continue
        placed = QuantLayer(layer, quantizer(weight), quantizer(act)).eval()
        torch.testing.assert_close(integer_forward(placed, x).float(), placed(x), rtol=1e-5, atol=1e-5)


def test_a_wrong_code_is_found() -> None:
    """A check that passes whatever the codes are would be none."""
    made, data = ready("lsq")
    made.eval()
    layer = made.net.get_submodule("layer1.0.conv1")
    assert isinstance(layer, QuantLayer)
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    encode = quantizer.encode
    quantizer.encode = lambda x: (lambda codes, decode: (codes.clone().index_fill_(0, torch.tensor([0]), 1), decode))(
        *encode(x)
    )
    found = check_integers(made.net, all_train(data).x)
    assert found.layers["layer1.0.conv1"] > 100 * ROUNDINGS


def test_a_tie_is_told_from_a_wrong_code() -> None:
    """Images on a rounding boundary would fail the check on some CPUs; or a real difference would be excused as such."""

    def report(shift: float) -> IntegerReport:
        torch.manual_seed(0)
        step = UniformQuantizer(4, SITE, Scope(), True)
        step.step.fill_(0.25)
        first = QuantLayer(nn.Linear(4, 4, bias=False), UniformQuantizer(8, SITE, Scope(), True), None)
        second = QuantLayer(nn.Linear(4, 4, bias=False), UniformQuantizer(8, SITE, Scope(), True), step)
        with torch.no_grad():
            first.weight.copy_(torch.eye(4) * 127 / 128)
        for layer in (first, second):
            assert layer.weight_quantizer is not None
            layer.weight_quantizer.fit(layer.weight)
        net = nn.Sequential(first, Shift(shift), second).eval()
        x = torch.full((3, 4), 0.1)
        x[1] = 0.375 * 128 / 127  # three halves of a step
        return check_integers(net, x)

    assert report(0.0).ties in (0, 1)
    assert report(0.0).agreement_without_ties == 1.0
    assert report(0.2).ties == 0


class Shift(nn.Module):
    """Adds a number in float64, that is to say in the integer reference, alone."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.calls = shift, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.shift * (self.calls > 1)


def test_levels_of_a_grid() -> None:
    """Integers would be offered for a codebook that has none, or withheld from one that has."""
    codes = torch.arange(8.0, dtype=torch.float64)
    uniform, halves = Levels(0, 0.3 * codes), Levels(0, 0.3 * (2 * codes - 7))
    powers, table = (
        Levels(0, torch.tensor([0.0, 0.25, 0.5, 1.0]).double()),
        Levels(0, torch.tensor([0.0, 0.3141, 0.71, 1.0]).double()),
    )
    found = [levels.integers(-128, 127) for levels in (uniform, halves, powers)]
    assert [None if f is None else f[1].tolist() for f in found] == [
        list(range(8)),
        list(range(-7, 8, 2)),
        [0, 1, 2, 4],
    ]
    assert table.integers(-128, 127) is None
    assert table.affine() is None
    assert uniform.integers(-4, 3) is None


@pytest.mark.parametrize("broad", [True, False])
def test_a_false_group_is_refused(broad: bool) -> None:
    """A grid per channel that calls itself one per tensor would be exported with the first channel's values."""

    class Untrue(Shifted):
        def encode(self, x):
            step = torch.arange(1.0, len(x) + 1).view(-1, 1)
            return (x / step).clamp(-8, 7).round().int(), lambda c: c * (step if broad or len(c) > 1 else step[:1])

    with pytest.raises(ValueError, match="not one value for each code: it says one grid per tensor"):
        read_levels(Untrue(4, "tensor"), torch.randn(3, 4))

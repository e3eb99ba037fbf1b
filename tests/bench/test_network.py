"""A network is checked before anything is trained: what it returns, what it is made of, and the batch that it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qatbench.bench.errors import UserError
from qatbench.bench.network import check_network

Plug = Callable[..., Path]

NETWORK = """
class Odd(nn.Module):
    name = "odd"
    def __init__(self, channels, outputs):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(8, outputs)
    def logits(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))
    def forward(self, x):
        return {}
"""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            "torch.cat([self.logits(x)] * 2, 1)",
            r"in use it returns torch.float32 \[2, 20\] for 2 images; the task has 10 outputs",
        ),
        ("(self.logits(x),)", r"in use it returns a tuple; return the logits alone, float \[2, 10\]"),
        ("(self.logits(x), x) if self.training else self.logits(x)", "in training it returns a tuple"),
        ("self.logits(x)[:1]", r"in use it returns torch.float32 \[1, 10\] for 2 images"),
        ("self.logits(x).argmax(1)", r"in use it returns torch.int64 \[2\]"),
        ("print(self.logits(x).shape)", "in use it returns a NoneType"),
        ("self.logits(x.flatten())", "on 3x8x8 images: RuntimeError: "),
        ("self.logits(x) if not self.training else [][0]", "IndexError: list index out of range"),
    ],
)
def test_what_a_network_returns_is_checked(returned: str, message: str, plug: Plug) -> None:
    """It would train to the end with 1,000 logits for ten classes, or fail in the loss function's own words, after hours."""
    plug(NETWORK.format(returned))
    with pytest.raises(UserError, match=message):
        check_network("odd", (3, 8, 8), 10, 64)


def test_a_network_that_cannot_be_built_or_has_no_layer(plug: Plug) -> None:
    """A traceback of the plugin would end the command; or a table would show a quantized network without a quantizer."""
    plug("""
    class Unbuilt(nn.Module):
        name = "unbuilt"
        def __init__(self, channels, outputs):
            raise KeyError("width")
    class Empty(nn.Module):
        name = "empty"
        def __init__(self, channels, outputs):
            super().__init__()
            self.outputs = outputs
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None].expand(-1, self.outputs)
    """)
    with pytest.raises(
        UserError, match="network 'unbuilt' cannot be built for 3 channels and 10 outputs: KeyError: 'width'"
    ):
        check_network("unbuilt", (3, 8, 8), 10, 64)
    with pytest.raises(UserError, match=r"network 'empty' has no nn.Conv2d or nn.Linear"):
        check_network("empty", (3, 8, 8), 10, 64)


def test_one_image_a_pass_is_too_few_for_a_batchnorm_on_one_pixel() -> None:
    """The float network would be trained first, and then each run fail with a sentence about values per channel."""
    with pytest.raises(UserError, match="one image a pass leaves a BatchNorm one value a channel; raise batch"):
        check_network("resnet18", (3, 8, 8), 10, 1)
    assert check_network("resnet18", (3, 8, 8), 10, 2)
    assert check_network("resnet8", (3, 8, 8), 10, 1)  # its last maps are 2x2


def test_a_check_draws_no_random_number() -> None:
    """The first run of a process would get other initial weights than the others."""
    before = torch.get_rng_state()
    check_network("resnet8", (1, 9, 9), 7, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_request_that_cannot_work_is_refused_before_training(tiny, tmp_path) -> None:
    """Exit status 2 and one line, but only after the float network was trained."""
    plugin = tmp_path / "wide.py"
    plugin.write_text("from torch import nn\n" + NETWORK.replace("return {}", "return self.logits(x).repeat(1, 3)"))
    answer = tiny("lsq", "--plugin", plugin, "--network", "odd")
    assert (answer.status, len(answer.err.splitlines())) == (2, 1)
    assert "network 'odd' on 1x8x8 images: in use it returns" in answer.err
    assert not (tmp_path / "runs" / "float").exists()

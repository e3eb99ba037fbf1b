"""SAM: the gradient of the loss at the worst point nearby, which prefers flat minima (Foret et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Run, Wrapper
from ..bench.quant import Quantizer
from ..bench.spec import Frozen

SMALLEST_NORM = 1e-12
FLOOR = 0.25  # of a quantizer's parameter that is positive: what is left of it at the perturbed point, at least


def trained(run: Run) -> list[tuple[nn.Parameter, Tensor]]:
    """Everything that the optimizer moves and that has a gradient, and the gradient."""
    return [(p, p.grad) for group in run.opt.param_groups for p in group["params"] if p.grad is not None]


class SAM(Wrapper):
    """Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412) around any method that trains.

    ::

        g1 = grad L(theta);  e = rho g1 / ||g1||;  g = grad L(theta + e);  the optimizer steps from theta with g

    After the public code (davda54/sam), its adaptive form included, ``e = rho theta^2 g1 / ||theta g1||`` (ASAM, Kwon et al. 2021,
    arXiv 2102.11600). The norm is over all that is perturbed: latent weights, biases, norms and the quantizers' own parameters, or
    all but the last; what another member of the chain has frozen has no part in it. Running statistics move in the first pass only,
    and theta is restored from a copy, to the bit, which is all the memory that this takes besides the inner method's.

    Departure: a quantizer's parameter that is positive, such as a step, keeps a quarter of itself at the perturbed point, since a
    step of 0 or less is no grid. The logged training loss is the mean over both passes.
    """

    name = "sam"
    paper = "Foret et al., Sharpness-aware minimization for efficiently improving generalization, ICLR 2021, arXiv 2010.01412"
    fidelity = "paper"
    default_inner = "lsq"
    alters = frozenset({"step"})

    class Params(Frozen):
        """Settings of SAM."""

        rho: float = Field(
            0.05, ge=0, le=1000, description="length of the perturbation; 2 is usual where it is adaptive"
        )
        adaptive: bool = Field(False, description="perturb every value in proportion to its square (ASAM)")
        perturb: Literal["all", "weights"] = Field(
            "all", description="what is perturbed; weights: the quantizers' parameters are not"
        )

    # With Adam, at the contract's learning rate, a step of 8 bits is as small as one update, and one wrong sign ends it.
    test_params = {"rho": 0.02}  # noqa: RUF012

    def prepare(self, net: nn.Module) -> None:
        """Find the quantizers' own parameters."""
        quantizers = [m for m in net.modules() if isinstance(m, Quantizer)]
        self.scales = {p for q in quantizers for p in q.parameters(recurse=False)}
        self.of_quantizers = {p for q in quantizers for p in q.parameters()}

    def reach(self, norm: Tensor) -> Tensor:
        """What the gradient is multiplied by to make the perturbation, for a gradient of this norm (both scalars)."""
        return self.params.rho / norm.clamp(min=SMALLEST_NORM)

    def unperturbed(self) -> set[nn.Parameter]:
        """What stays where it is at the perturbed point, besides all that has no gradient."""
        return self.of_quantizers if self.params.perturb == "weights" else set()

    @contextmanager
    def perturbed(self, run: Run) -> Iterator[None]:
        """In here the parameters stand at ``theta + e`` for the present gradients; afterwards at theta, whatever happened."""
        skip = self.unperturbed()
        before = {p: p.detach().clone() for p, _ in trained(run) if p not in skip}
        try:
            self._move(before)
            yield
        finally:
            with torch.no_grad():
                for p, theta in before.items():
                    p.copy_(theta)

    @torch.no_grad()
    def _move(self, before: dict[nn.Parameter, Tensor]) -> None:
        # On its own, so that nothing holds the gradients of the first pass when the second one makes new ones.
        adaptive = self.params.adaptive
        gradients = {p: p.grad for p in before if p.grad is not None}
        if not gradients:
            return
        sizes = [torch.linalg.vector_norm(g * p if adaptive else g) for p, g in gradients.items()]
        reach = self.reach(torch.linalg.vector_norm(torch.stack(sizes)))
        for p, g in gradients.items():
            theta = before[p]
            p.addcmul_(g * theta.square() if adaptive else g, reach)
            if p in self.scales:
                p.copy_(torch.where(theta > 0, p.maximum(FLOOR * theta), p))

    def step(self, run: Run) -> None:
        """Two passes, one update."""
        run.backward()
        with self.perturbed(run):
            run.backward(track=False)
        run.update()

"""SAGM: the gradients here and at the perturbed point, in equal parts, as one direction (Wang et al., CVPR 2023)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..bench.method import Run
from .sam import SAM, trained


def halve(run: Run) -> None:
    """The sum of two gradients becomes their mean."""
    for _, grad in trained(run):
        grad.mul_(0.5)


class SAGM(SAM):
    """Sharpness-aware gradient matching (Wang et al. 2023, arXiv 2303.10353) around any method that trains.

    ::

        g1 = grad L(theta);  e = (rho / ||g1|| - alpha) g1;  g2 = grad L(theta + e);  g = (g1 + g2) / 2

    After the public code (Wang-pengfei/SAGM), except that theta is restored from a copy and not by subtracting e, which is off by
    a rounding. The second pass adds to the gradients of the first, so this, too, takes one copy of the weights and no more. What
    is perturbed, the guard of the steps and the logged loss are as in `SAM`. ``adaptive`` is not in the paper: in e it puts
    ``theta^2 g1`` for g1 and ``||theta g1||`` for its norm, so that alpha, too, pulls each value back in proportion to its square.
    """

    name = "sagm"
    paper = "Wang et al., Sharpness-aware gradient matching for domain generalization, CVPR 2023, arXiv 2303.10353"
    fidelity = "paper"

    class Params(SAM.Params):
        """Settings of SAGM."""

        alpha: float = Field(
            0.001, ge=0, le=1000, description="how far the perturbed point is pulled back along the gradient"
        )

    def reach(self, norm: Tensor) -> Tensor:
        """See `SAM.reach`."""
        return super().reach(norm) - self.params.alpha

    def step(self, run: Run) -> None:
        """Two passes, one update."""
        run.backward()
        with self.perturbed(run):
            run.backward(track=False, add=True)
        halve(run)
        run.update()

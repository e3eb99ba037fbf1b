"""GAQAT: where two gradients hold a scale in balance, the task's is frozen (Jiang et al. 2024); FQAT's predecessor."""

from __future__ import annotations

from pydantic import Field

from ..bench.freezing import Refresh, Rule, Signal, Target
from .fqat import FQAT, On


class GAQAT(FQAT):
    """Gradient-adaptive quantization-aware training (Jiang et al. 2024, arXiv 2412.05551): our reconstruction.

    As `FQAT`, whose settings it has with other defaults: every K steps the disorder of the task gradient g1 is taken of each scale,
    and scales whose disorder is below a threshold are moved by the flatness gradient g2 alone for the next K steps. Low disorder is
    the symptom, since a scale between two optima has gradients of steady and opposite sign. Recovered from public reviews: this
    rule, that it is decided anew each window, and a variant that never unfreezes (``unfreeze="never"``). Not recovered: the
    threshold, K and the equations. ``unfreeze="duty"`` is ours: else a scale at its flat optimum stays frozen. As in the rule, all
    scales below the threshold are frozen, however many, for as long as they are: FQAT's ``cap`` and ``release`` are off.

    A method without learned scales gives it nothing to freeze: it is then `SAGM`, and the run's log says so.
    """

    name = "gaqat"
    version = 3  # 3: what is frozen as a whole is not perturbed
    paper = (
        "Jiang et al., Gradient-adaptive quantization-aware training for domain generalization, 2024, arXiv 2412.05551"
    )

    class Params(FQAT.Params):
        """Settings of FQAT, with GAQAT's defaults."""

        signal: Signal = Field("task", description="which gradient is watched; see fqat")
        on: On = Field("scales", description="of which parameters of a layer; see fqat")
        rule: Rule = Field("low", description="what is frozen, by disorder; see fqat")
        target: Target = Field("scale_task_grad", description="what of it is frozen; see fqat")
        refresh: Refresh = Field("window", description="when it is decided what is frozen; see fqat")
        cap: float = Field(1.0, ge=0, le=1, description="share of scales that is frozen at most")
        release: int = Field(0, ge=0, description="windows frozen in a row before a free one; 0: no end; see fqat")

    test_params = {"window": 2, "low": 0.9}  # noqa: RUF012

"""The figure of the flatness probe, from probes written by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from qatbench.reports.flatness import IN_FP32, SURROGATE, _footer, eigenvalue, flatness_figure, labels

RADII = [0.01, 0.1, 1.0]


def probed(
    method: str = "lsq", bits: str = "w4a4", seed: int = 0, rise: float = 1.0, top: float = 10.0, **more
) -> dict:
    mean = [rise * r**2 for r in RADII]
    return {
        "run_id": f"{abs(hash((method, bits, seed, rise))):016x}"[:16], "method": method, "bits": bits, "seed": seed,
        "network": "resnet8", "data": "optdigits", "protocol": "mdl", "precision": "fp32", "acc": 0.9, "images": 510, "loss": 0.5,
        "settings": {"radii": RADII, "directions": 3, "iterations": 5, "seed": 0, "images": 512},
        "rise": {"mean": mean, "sd": mean, "min": [-v for v in mean], "max": [2 * v for v in mean]},
        "eigenvalue": top, "residual": 0.0, "converged": True, "eps": 0.1, "crossed": None, "surrogate": False, **more,
    }  # fmt: skip


def picture(probes: list[dict]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(flatness_figure(probes))).convert("RGB")).astype(int)


def test_labels_tell_runs_apart() -> None:
    """Two lines of the figure would have one name."""
    runs = [probed(), probed(bits="w2a2"), probed("fqat"), probed("fqat", seed=1)]
    assert labels(runs) == ["lsq w4a4", "lsq w2a2", "fqat w4a4 seed 0", "fqat w4a4 seed 1"]
    same = [probed(run_id="aaaaaaaa"), probed(run_id="bbbbbbbb")]
    assert labels(same) == ["lsq w4a4 seed 0 aaaaaa", "lsq w4a4 seed 0 bbbbbb"]


def test_eigenvalues_that_did_not_converge_are_marked() -> None:
    """A number that means nothing would stand beside those that do."""
    assert eigenvalue(probed(top=1234.5)) == "1.23e+03"
    assert eigenvalue(probed(top=12.34, converged=False)) == "~12.3"


def test_eigenvalues_of_surrogate_gradients_are_marked() -> None:
    """A method would look flat because its surrogate is small."""
    own = probed("emaq", top=12.34, surrogate=True)
    assert eigenvalue(own) == "12.3*"
    assert eigenvalue({**own, "converged": False}) == "~12.3*"
    assert _footer([probed(), own])[1:] == [SURROGATE]
    assert len(_footer([probed()])) == 1
    assert _footer([probed(precision="bf16")])[1:] == [IN_FP32]
    one, other = (picture([probed(), {**own, "surrogate": marked}]) for marked in (False, True))
    assert one.shape == other.shape
    assert (one != other).any()


@pytest.mark.parametrize("runs", [1, 2, 12])
def test_every_run_has_a_bar_and_a_line(runs: int) -> None:
    """A run that was asked for would be missing from the figure."""
    import seaborn as sns

    palette = sns.color_palette("colorblind", 10) if runs <= 10 else sns.husl_palette(runs, l=0.5)
    seen = picture([probed(seed=k, rise=1.0 + k, top=5.0 + k) for k in range(runs)])
    half = seen.shape[1] // 2
    for colour in palette[:runs]:
        near = (abs(seen - (np.array(colour[:3]) * 255).round()) <= 2).all(2)
        assert near[:, :half].sum() > 50
        assert near[:, half:].sum() > 500


def test_the_same_probes_give_the_same_bytes() -> None:
    """A figure under version control would change by being looked at."""
    assert flatness_figure([probed(), probed("fp32")]) == flatness_figure([probed(), probed("fp32")])


def test_losses_that_fall_and_saddles_are_drawn() -> None:
    """A flat run, whose loss falls in some directions, would end in a traceback or be cut off."""
    flat = probed(rise=0.0, top=0.0)
    flat["rise"] = {"mean": [-0.001, 0.0, 0.0], "sd": [0.0] * 3, "min": [-0.5, 0.0, 0.0], "max": [0.0] * 3}
    saddle = probed("fp32", top=-30.0, converged=False, rise=1e4)
    assert picture([flat, saddle]).std() > 0

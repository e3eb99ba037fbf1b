"""The flatness probe: directions and curvatures that are known, and runs that come out as they went in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as cases
from hypothesis import strategies as st
from qatbench.bench import flatness, registry
from qatbench.bench.errors import UserError
from qatbench.bench.flatness import (
    Landscape,
    Settings,
    directions,
    hessian_vector,
    loss_along,
    moved,
    probe,
    probe_run,
    top_eigenvalue,
)
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import load_run, run
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from qatbench.bench.testing import all_train, ready, same, state, train
from torch import Tensor, nn

SQUARES = Path(__file__).parents[1] / "squares.py"
SMALL = cases(deadline=None, derandomize=True, database=None, max_examples=25)
QUICK = Settings(images=40, directions=2, iterations=3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Directions


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(-8, 8), st.integers(0, 99))
@SMALL
def test_each_filter_of_a_direction_is_as_long_as_the_weights(shape: list[int], power: int, seed: int) -> None:
    """A radius would mean another thing in each filter, and scales that a BatchNorm undoes would decide what is flat."""
    w = normal(*shape, seed=seed) * 10.0**power
    (d,) = directions({"w": w}, 1, seed)
    torch.testing.assert_close(d["w"].flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
    (scaled,) = directions({"w": 3 * w}, 1, seed)
    torch.testing.assert_close(scaled["w"], 3 * d["w"])


def test_an_empty_filter_stays_empty() -> None:
    """A pruned filter would turn the whole landscape into NaN."""
    w = normal(3, 4)
    w[1] = 0
    (d,) = directions({"w": w}, 1, 0)
    assert d["w"][1].tolist() == [0.0] * 4
    assert d["w"].isfinite().all()


def test_two_methods_share_their_directions() -> None:
    """Methods would be compared along directions of which one may be steeper by chance."""
    places = [Landscape(method, method.probe) for method in (ready("lsq")[0], ready("pact", bits="w4a4")[0])]
    rng = torch.get_rng_state()
    one, other = (list(directions(place.weights, 3, 0)) for place in places)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(same(a, b) == [] for a, b in zip(one, other, strict=True))  # both start at the float network's weights
    assert same(one[0], one[1]) == list(places[0].weights)
    (again,) = directions(places[0].weights, 1, 1)
    assert same(one[0], again) == list(places[0].weights)


def test_what_is_moved_are_the_layers_weights() -> None:
    """Biases, norms or steps would be moved by noise of their own size, and methods with more of them look sharper."""
    method, _ = ready("lsq")
    found = Landscape(method, method.probe).weights
    assert set(found) == {site.name for site in method.sites if site.kind == "layer"}
    assert all(w.ndim > 1 for w in found.values())


# The loss


def test_loss_along_a_direction_and_back() -> None:
    """The rise would be that of another place; or a probe would leave the network elsewhere than it was trained to."""
    w = {"a": normal(3, 4), "b": normal(2, 5, seed=1)}
    before = {name: t.clone() for name, t in w.items()}
    d = next(directions(w, 1, 0))
    found = loss_along(lambda: float(w["a"].square().sum()), w, d, (0.1, 1.0))
    assert found == pytest.approx([float((before["a"] + r * d["a"]).square().sum()) for r in (0.1, 1.0)])
    assert same(before, w) == []

    def broken() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_along(broken, w, d, (0.5,))
    assert same(before, w) == []
    with moved(w) as copies:
        w["a"].zero_()
        assert same(before, copies) == []
    assert same(before, w) == []


@pytest.mark.parametrize("method", ["fp32", "lsq", "asq"])
def test_the_loss_is_that_of_the_network_in_use(method: str, tmp_path: Path) -> None:
    """The float network's landscape would be measured, or that of a network in training; or batches would change it."""
    made, data = ready(method, epochs=1)
    train(made, data, tmp_path)
    made.eval()
    batch = all_train(data)
    before = state(made)
    place = Landscape(made, batch)
    made.scope.domain, made.scope.track = batch.domain, False
    with torch.no_grad():
        expected = float(data.task.losses(made.predict(made.net, batch), batch)["task"])
    assert len(place.parts) > 1
    assert place.loss() == pytest.approx(expected, rel=1e-5)
    probe(made, batch, QUICK)
    assert same(before, state(made)) == []


# The eigenvalue


def quadratic(eigenvalues: list[float]) -> tuple[Any, dict[str, Tensor]]:
    """``L = w A w / 2`` in two tensors: its gradient, and the weights."""
    n = len(eigenvalues)
    q = torch.linalg.qr(normal(n, n))[0]
    a = q @ torch.diag(torch.tensor(eigenvalues)) @ q.T
    w = {"one": normal(2, 1, seed=1), "two": normal(n - 2, 1, seed=2)}

    def gradient() -> dict[str, Tensor]:
        g = a @ torch.cat([w["one"], w["two"]])
        return {"one": g[:2], "two": g[2:]}

    return gradient, w


@pytest.mark.parametrize("eigenvalues", [[5.0, 1.0, 0.5, 0.1], [-7.0, 2.0, 1.0, 1.0], [1e-4, 0.0, 0.0, 0.0]])
def test_eigenvalue_of_a_quadratic(eigenvalues: list[float]) -> None:
    """The number would not be an eigenvalue, or lose its sign at a saddle."""
    gradient, w = quadratic(eigenvalues)
    before = {name: t.clone() for name, t in w.items()}
    found = top_eigenvalue(gradient, w, 25, 0, reach=0.05)
    assert found.value == pytest.approx(eigenvalues[0], rel=1e-3)
    assert found.residual < 0.02
    assert sum(float(t.square().sum()) for t in found.vector.values()) == pytest.approx(1)
    size = sum(float(t.square().sum()) for t in before.values()) ** 0.5
    assert found.eps == pytest.approx(0.05 * size)
    assert same(before, w) == []


def test_a_flat_loss_has_no_curvature() -> None:
    """A loss that does not bend would end in NaN."""
    w = {"w": normal(2, 2)}
    found = top_eigenvalue(lambda: {"w": torch.ones(2, 2)}, w, 5, 0)
    assert (found.value, found.residual) == (0.0, 0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_hessian_vector_products_of_a_float_network_are_exact(seed: int, tmp_path: Path) -> None:
    """Differences of gradients would measure something else than the Hessian."""
    method, data = ready("fp32", epochs=1)
    train(method, data, tmp_path)
    method.double().eval()
    batch = dataclasses.replace(data.probe(48), x=data.probe(48).x.double())
    place = Landscape(method, batch)
    method.scope.domain = batch.domain
    loss = data.task.losses(method.predict(method.net, batch), batch)["task"]
    weights = list(place.weights.values())
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    v = {name: normal(*w.shape, seed=seed).double() / 70 for name, w in place.weights.items()}  # norm 1, about
    exact = torch.cat([t.flatten() for t in torch.autograd.grad(gradients, weights, list(v.values()))])
    found = torch.cat([t.flatten() for t in hessian_vector(place.gradient, place.weights, v, 1e-7).values()])
    assert float((found - exact).norm() / exact.norm()) < 1e-4  # so close that no ReLU turns on or off


def test_eigenvalue_of_a_network_is_that_of_its_exact_hessian() -> None:
    """The power iteration would stop at another direction than the steepest."""
    x, y = normal(64, 6), torch.arange(64) % 3
    weights = {"first": normal(5, 6, seed=1) / 2, "second": normal(3, 5, seed=2) / 2}

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return nn.functional.cross_entropy((x @ first.T).tanh() @ second.T, y)

    def gradient() -> dict[str, Tensor]:
        leaves = [w.clone().requires_grad_() for w in weights.values()]
        return dict(zip(weights, torch.autograd.grad(loss(*leaves), leaves), strict=True))

    blocks = torch.autograd.functional.hessian(loss, tuple(weights.values()))
    sizes = [w.numel() for w in weights.values()]
    exact = torch.cat([torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, blocks, strict=True)])
    found = top_eigenvalue(gradient, weights, 200, 0)
    eigenvalues = torch.linalg.eigvalsh(exact)
    assert found.residual < 0.05
    assert found.value == pytest.approx(float(eigenvalues[eigenvalues.abs().argmax()]), rel=0.01)


def test_eigenvalue_through_rounding_is_that_of_the_smooth_loss() -> None:
    """On a grid the gradient is piecewise constant: differences would be 0, or the height of one jump over the reach."""
    grid, start = 0.05, normal(400, 50)
    curved = {"w": start.clone()}
    scale = torch.ones(400, 1)
    scale[:40] = 4.0  # the Hessian is that of  scale^2 w^2 / 2

    def straight_through() -> dict[str, Tensor]:
        rounded = (curved["w"] / grid).round() * grid
        return {"w": scale**2 * rounded}

    found = top_eigenvalue(straight_through, curved, 15, 0)
    smallest = 0.02 * grid / found.eps  # what few crossings would be worth
    assert smallest < 0.01
    assert found.value == pytest.approx(16.0, rel=0.1)


@pytest.mark.parametrize("name", ["lsq", "dorefa", "n2uq"])
def test_crossed_counts_the_weights_that_take_another_code(name: str) -> None:
    """One could not see whether a difference is an average over many jumps, or one of them; or a grid would jump that slides."""
    counts = {}
    for bits in ("w2a2", "w8a8"):
        method, data = ready(name, bits=bits)
        place = Landscape(method.eval(), data.probe(24))
        found = top_eigenvalue(place.gradient, place.weights, 2, 0, reach=0.02)
        counts[bits] = place.crossed(found)
    assert 0 < counts["w2a2"] < counts["w8a8"] < 1
    assert counts["w2a2"] < 0.2


def test_crossed_of_a_float_network() -> None:
    """It would be said to have jumps."""
    method, data = ready("fp32")
    place = Landscape(method.eval(), data.probe(24))
    assert place.crossed(top_eigenvalue(place.gradient, place.weights, 1, 0)) is None


@pytest.mark.parametrize(
    ("chain", "surrogate"),
    [("fp32", False), ("lsq", False), ("n2uq", False), ("alignq", False), ("emaq", True), ("crt+emaq-lt", True)],
)
def test_surrogate_gradients_are_told(chain: str, surrogate: bool) -> None:
    """Curvatures of gradients that are scaled differently would be compared."""
    method, data = ready(chain)
    assert flatness.has_surrogate(method.net) == surrogate
    assert probe(method.eval(), data.probe(24), QUICK)["surrogate"] == surrogate


# Runs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    """A store with finished runs of the tiny data set, and a failed one."""
    torch.set_num_threads(1)
    before = dict(registry._files)
    registry.load_file(SQUARES)
    where, ids = Store(tmp_path_factory.mktemp("store")), {}
    tiny = {"data": "squares", "epochs": 1, "float_epochs": 1, "batch": 32, "calibration": 32}
    for name, settings in {"fp32": {}, "lsq": {}, "ptq": {"bits": "w8a8"}}.items():
        spec = RunSpec(**{"method": name, **tiny, **settings})
        ids[name] = run(resolve(spec, data_root=None, cache=where.cache), where, wandb=False)["run_id"]
    where.write(
        {
            **(where.read(ids["lsq"]) or {}),
            "run_id": "0failed",
            "status": "failed",
            "reason": "diverged",
            "provenance": {},
        }
    )
    registry._files.clear()
    registry._files.update(before)
    return where, ids


@pytest.fixture
def squares() -> Any:
    before = dict(registry._files)
    registry.load_file(SQUARES)
    yield
    registry._files.clear()
    registry._files.update(before)


@pytest.mark.parametrize("method", ["fp32", "lsq", "ptq"])
def test_probe_writes_what_it_returns(store: tuple[Store, dict[str, str]], squares: None, method: str) -> None:
    """A figure could not be drawn again, or a file would not say what was measured how."""
    where, ids = store
    record = (where.path(ids[method]) / "result.json").read_bytes()
    found = probe_run(where, ids[method][:10], QUICK)
    folder = where.path(ids[method])
    kept = json.loads((folder / "flatness.json").read_text())
    assert kept.pop("digest")
    assert kept == found
    assert (folder / "result.json").read_bytes() == record
    assert not list(folder.glob("*.tmp*"))
    assert (found["run_id"], found["method"], found["settings"]["seed"]) == (ids[method], method, 0)
    assert found["images"] == 40
    rise = found["rise"]
    assert {len(rise[key]) for key in rise} == {len(found["settings"]["radii"])} == {7}
    assert all(a <= b <= c for a, b, c in zip(rise["min"], rise["mean"], rise["max"], strict=True))
    assert (found["crossed"] is None) == (method == "fp32")
    assert found["eps"] > 0
    assert found["converged"] == (found["residual"] <= 0.2)


def test_a_probed_run_is_not_probed_again(
    store: tuple[Store, dict[str, str]], squares: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure of runs that were probed would take minutes each time; or other settings would show the old numbers."""
    where, ids = store
    first = probe_run(where, ids["lsq"], QUICK)
    other = probe_run(where, ids["lsq"], QUICK.model_copy(update={"seed": 1}))
    assert other["rise"] != first["rise"]
    assert probe_run(where, ids["lsq"], QUICK) == first  # to the last digit
    monkeypatch.setattr(flatness, "probe", lambda *_: pytest.fail("probed again"))
    assert probe_run(where, ids["lsq"], QUICK) == first
    monkeypatch.undo()
    for broken in ("{", "[]", '{"version": 1}', '{"version": 0, "settings": {}}'):
        (where.path(ids["lsq"]) / "flatness.json").write_text(broken)
        assert probe_run(where, ids["lsq"], QUICK) == first


def test_more_images_than_there_are(store: tuple[Store, dict[str, str]], squares: None) -> None:
    """Each image would be looked at many times, for minutes, and the file say that there were so many."""
    where, ids = store
    found = probe_run(where, ids["fp32"], QUICK.model_copy(update={"images": 100_000}))
    assert found["settings"]["images"] == 100_000
    data = load_run(where, ids["fp32"], data_root=None).data
    assert found["images"] == sum(len(data.splits[domain].train) for domain in data.protocol.train)


def test_ctrl_c_leaves_nothing_half_written(
    store: tuple[Store, dict[str, str]], squares: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before would be lost, or a file half written be read as a result."""
    where, ids = store
    probe_run(where, ids["lsq"], QUICK)
    before = (where.path(ids["lsq"]) / "flatness.json").read_bytes()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for what in ("top_eigenvalue", "write_json"):
        monkeypatch.setattr(flatness, what, stop)
        with pytest.raises(KeyboardInterrupt):
            probe_run(where, ids["lsq"], QUICK.model_copy(update={"seed": 2}))
        monkeypatch.undo()
    assert (where.path(ids["lsq"]) / "flatness.json").read_bytes() == before
    assert not list(where.path(ids["lsq"]).glob("*.tmp*"))


def test_bad_requests(store: tuple[Store, dict[str, str]], squares: None) -> None:
    """A user would read a traceback instead of what to do."""
    where, ids = store

    def answer(run_id: str) -> str:
        with pytest.raises(UserError) as caught:
            probe_run(where, run_id, QUICK)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    near = ids["lsq"][:-1] + ("0" if ids["lsq"][-1] != "0" else "1")
    assert f"did you mean '{ids['lsq']}'?" in answer(near)
    assert "is failed (diverged); only a run that is done" in answer("0failed")


def test_a_loss_that_is_not_finite_is_refused(
    store: tuple[Store, dict[str, str]], squares: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that has diverged would be drawn as if it were flat."""
    where, ids = store
    fresh = QUICK.model_copy(update={"seed": 3})
    for method, at in (("fp32", 0), ("ptq", 3)):  # at its weights; at the third radius
        before = (where.path(ids[method]) / "flatness.json").exists()
        calls = iter(range(1000))
        real = Landscape.loss
        monkeypatch.setattr(Landscape, "loss", lambda self: float("nan") if next(calls) == at else real(self))  # noqa: B023
        with pytest.raises(UserError, match=f"run {ids[method]}: the loss .* is nan, so there is no landscape"):
            probe_run(where, ids[method], fresh)
        monkeypatch.undo()
        assert (where.path(ids[method]) / "flatness.json").exists() == before

from __future__ import annotations

import contextlib
import copy
import json
import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from qatbench.bench.data import Batch
from qatbench.bench.errors import UserError
from qatbench.bench.method import Probe
from qatbench.bench.quant import Budget
from qatbench.bench.quant.sensitivity import Loss, hessian_trace
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import run
from qatbench.bench.site import find_sites
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from qatbench.bench.testing import IMAGE, float_net, ready
from qatbench.bench.traces import Traces
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = {
    "data": "optdigits", "data_params": {"limit": 60}, "network": "resnet8", "batch": 48, "float_epochs": 1, "calibration": 32,
}  # fmt: skip


class Scaled(nn.Linear):
    """A layer with a setting that is in no state dict."""

    def __init__(self, scale: float) -> None:
        torch.manual_seed(0)
        super().__init__(3, 2)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x)


def batch_of(n: int) -> Batch:
    rng = torch.Generator().manual_seed(5)
    return Batch(torch.randn(n, 3, generator=rng), torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))


def measure(traces: Traces, net: nn.Module, batch: Batch | None = None, probes: int = 6, seed: int = 0) -> dict:
    batch = batch or batch_of(40)
    return traces.of(net, lambda b: F.cross_entropy(net(b.x), b.y), batch, dict(net.named_parameters()), probes, seed)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each measurement, which takes few random vectors."""
    calls: list[int] = []

    def few(self: Traces, loss: Loss, batch: Batch, params: Mapping[str, Tensor], probes: int, seed: int) -> dict:
        calls.append(probes)
        return hessian_trace(loss, batch, params, min(probes, 6), seed)

    monkeypatch.setattr(Traces, "_measure", few)
    return calls


def files(root: Path) -> list[Path]:
    return sorted(root.glob("float/net/traces-*"))


def test_traces_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every budget of a sweep would wait minutes for the same numbers; or what is read is not what was measured."""
    calls, net = counted(monkeypatch), Scaled(1.0)
    direct = measure(Traces(), net)
    assert [measure(Traces(Store(tmp_path), "net"), net) for _ in range(3)] == [direct] * 3
    assert list(measure(Traces(Store(tmp_path), "net"), net)) == list(direct)
    assert len(calls) == 2
    assert len(files(tmp_path)) == 1


def test_what_the_traces_depend_on_is_told_apart(tmp_path: Path) -> None:
    """Traces of another network, other images, another seed or another setting of a layer would be taken for these."""
    store, net = Store(tmp_path), Scaled(1.0)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved.weight[0, 0] += 1e-6
    relabelled = batch_of(40)
    relabelled.y[0] = 1 - relabelled.y[0]
    cases = [
        (net, None, 6, 0), (moved, None, 6, 0), (Scaled(2.0), None, 6, 0), (net, batch_of(41), 6, 0),
        (net, relabelled, 6, 0), (net, None, 8, 0), (net, None, 6, 1), (nn.Sequential(net), None, 6, 0),
    ]  # fmt: skip
    for n, case in enumerate(cases, start=1):
        assert measure(Traces(store, "net"), *case) == measure(Traces(), *case)
        assert len(files(tmp_path)) == n


@pytest.mark.parametrize("damage", ["flip", "short", "empty", "list", "nan", "renamed", "swapped", "folder"])
def test_a_damaged_file_is_measured_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plan would be made of numbers that nobody measured, or the run would end with a traceback."""
    net, store = Scaled(1.0), Store(tmp_path)
    right = measure(Traces(store, "net"), net)
    (path,) = files(tmp_path)
    text = path.read_text()
    value = json.loads(text)
    other = {"empty": "", "list": "[1]", "short": text[:-40]}.get(damage)
    if damage == "nan":
        other = json.dumps({**value, "traces": {**right, "weight": float("nan")}})
    elif damage == "renamed":
        other = text.replace("weight", "weighs")
    elif damage == "swapped":
        other = json.dumps({**value, "traces": {"weight": right["bias"], "bias": right["weight"]}})
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif other is not None:
        path.write_text(other)
    for n in range(30 if damage == "flip" else 1):
        if damage == "flip":
            whole = bytearray(text.encode())
            whole[random.Random(n).randrange(len(whole))] ^= 1 << n % 8
            path.write_bytes(whole)
        with caplog.at_level(logging.WARNING, "qatbench"):
            assert measure(Traces(store, "net"), net) == right
    assert any("is damaged" in message for message in caplog.messages)
    assert damage == "folder" or path.read_text() == text  # and whole again


def test_traces_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run would fail for want of a file that only saves time."""
    (tmp_path / "float").write_text("in the way")
    with caplog.at_level(logging.WARNING, "qatbench"):
        assert measure(Traces(Store(tmp_path), "net"), Scaled(1.0)) == measure(Traces(), Scaled(1.0))
    assert any("could not be kept" in message for message in caplog.messages)


def test_a_store_that_may_only_be_read_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in an archive that was unpacked read-only could not be exported."""

    @contextlib.contextmanager
    def no_lock(self: Store, name: str, wait: bool = True) -> Iterator[None]:
        raise UserError("store is read-only")
        yield

    def no_file(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Store, "lock", no_lock)
    monkeypatch.setattr("qatbench.bench.traces.write_json", no_file)
    assert measure(Traces(Store(tmp_path), "net"), Scaled(1.0)) == measure(Traces(), Scaled(1.0))
    assert files(tmp_path) == []


def test_the_phase_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Minutes would pass without a word of what is going on, and of how long it takes."""
    monkeypatch.setattr("qatbench.bench.traces.LOG_SECONDS", 0.0)
    monkeypatch.setattr("qatbench.bench.traces.TELL_SECONDS", 0.0)
    told: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO, "qatbench"):
        measure(Traces(Store(tmp_path), "net", lambda done, of: told.append((done, of))), Scaled(1.0))
    assert told == [(n, 12) for n in range(1, 13)]  # two parameters, six vectors each
    assert "Hessian traces of 2 layers, 6 random vectors each" in caplog.messages
    assert any(message.startswith("Hessian traces: 50 %, about ") for message in caplog.messages)
    assert any(message.startswith("Hessian traces: measured in ") for message in caplog.messages)


@pytest.mark.parametrize("name", ["lsq", "adq", "ldam-drw+lsq"])
def test_budgets_share_the_traces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over budgets would measure the same traces for each; or a network with another head would take those of this one."""
    calls = counted(monkeypatch)
    method, _ = ready(name, bits="avg2.5")
    measured_alone = len(calls)
    kept, net = Traces(Store(tmp_path), "net"), float_net()
    plans = [method.plan(find_sites(net, IMAGE), Budget(b, 3), Probe(net, method.probe, kept)) for b in (2.5, 3.5)]
    assert {n: b for n, b in plans[0].items() if n in method.bit_plan} == {
        n: b for n, b in method.bit_plan.items() if n in plans[0]
    }
    assert len(calls) - measured_alone == len(files(tmp_path)) == 1


@pytest.mark.slow
def test_a_run_keeps_them_beside_its_float_network(tmp_path: Path) -> None:
    """The runner would hand nothing on, so that each run of a sweep measures anew; or a resumed run would have another plan."""
    told: list[dict] = []
    for epochs in (1, 2):
        spec = RunSpec(**SMALL, method="adq", params={"adq": {"probes": 2}}, bits="avg3.5", epochs=epochs)
        resolved = resolve(spec, data_root=None, cache=tmp_path / "data")
        record = run(resolved, Store(tmp_path), wandb=False, device="cpu", progress=told.append)
        assert record["status"] == "done", record["reason"]
    (path,) = tmp_path.glob("float/*/traces-*.json")
    assert path.parent.name == resolved.float_id
    traces = [event for event in told if event["phase"] == "traces"]
    assert traces[-1]["step"] == traces[-1]["steps"]
    assert len({event["run_id"] for event in traces}) == 1
    assert f"read from {path}" in Store(tmp_path).log_path(resolved.run_id).read_text()

"""The ONNX export: what the file computes is what the run measured, on integers where they are fast."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from qatbench import cli
from qatbench.bench import export, registry
from qatbench.bench.errors import UserError
from qatbench.bench.export import Session, export_method, export_run, logits, operators, types
from qatbench.bench.quant import Scope, UniformQuantizer
from qatbench.bench.quant.export import find_thresholds
from qatbench.bench.registry import find
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import load_run, run
from qatbench.bench.site import Site
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from qatbench.bench.testing import all_train, ready, train
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="pip install 'qatbench[export]'")
pytest.importorskip("onnxscript", reason="pip install 'qatbench[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'qatbench[export]'")

SQUARES = Path(__file__).parents[1] / "squares.py"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(method: str, folder: Path, bits: str, **settings: Any) -> tuple[Any, torch.Tensor]:
    """A method after a short training, and the training images."""
    made, data = ready(method, bits=bits, epochs=8, **settings)
    if made.trains:
        train(made, data, folder)
    return made.eval(), all_train(data).x


def off(made: Any, model: Any, x: torch.Tensor) -> tuple[float, float]:
    """Share of other predictions, and the mean distance of logits relative to their spread."""
    ours, theirs = logits(made, made.net, x), Session(model)(x)
    return float((ours.argmax(1) != theirs.argmax(1)).double().mean()), float((ours - theirs).abs().mean() / ours.std())


# lsq: uniform; dorefa: halves; lsqplus: an offset; apot: a codebook with a unit; adq: one without; n2uq: uneven thresholds
FORMS = ["lsq", "dorefa", "lsqplus", *(pytest.param(m, marks=pytest.mark.slow) for m in ("apot", "adq", "n2uq"))]


@pytest.mark.parametrize("method", FORMS)
def test_every_form_of_grid_agrees(method: str, tmp_path: Path) -> None:
    """What is shipped would predict otherwise than what was measured."""
    made, x = trained(method, tmp_path, "w4a4")
    exported = export_method(made, x)
    wrong, distance = off(made, exported.model, x)
    assert wrong <= 0.02
    assert distance <= 0.01
    assert types(exported.model)["weights"] != []


def test_eight_bits_stay_integers_between_layers(tmp_path: Path) -> None:
    """The file would be no faster than the float network: each residual sum would go through float."""
    made, x = trained("lsq", tmp_path, "w8a8")
    exported = export_method(made, x)
    found = operators(exported.model)
    assert exported.sums == "int8"
    assert found["QLinearConv"] == 8  # all but the first layer, whose bias stays in float
    assert found["QLinearAdd"] == 3
    wrong, distance = off(made, exported.model, x)
    assert wrong <= 0.02
    assert distance <= 0.05
    plain = export_method(made, x, sums="float")
    assert plain.sums == "float"
    assert "QLinearAdd" not in operators(plain.model)


@pytest.mark.slow
def test_four_bit_types(tmp_path: Path) -> None:
    """A file of four-bit weights would be as large as one of eight."""
    made, x = trained("lsq", tmp_path, "w4a4")
    small, large = export_method(made, x, opset=21), export_method(made, x, opset=20)
    assert types(small.model) == {"weights": ["int4", "int8"], "activations": ["uint4", "uint8"]}
    assert types(large.model) == {"weights": ["int8"], "activations": ["uint8"]}
    assert off(made, small.model, x)[0] <= 0.02


def test_thresholds_are_exact() -> None:
    """An input between a threshold and its float32 neighbour would get another code than in training."""
    quantizer = UniformQuantizer(4, Site("conv", "layer", (1,)), Scope(), signed=False)
    quantizer.step.fill_(0.3)
    found = find_thresholds(quantizer, 0, 15).float()
    below = torch.nextafter(found, torch.tensor(-torch.inf))
    assert quantizer.encode(found)[0].tolist() == list(range(1, 16))
    assert quantizer.encode(below)[0].tolist() == list(range(15))


def test_the_file_names_nothing_of_this_machine(tmp_path: Path) -> None:
    """Paths and stack traces would be shipped, and make a small file twice as large."""
    made, x = trained("ptq", tmp_path, "w8a8")
    content = export_method(made, x).model.SerializeToString()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"bench" not in content


def test_any_batch(tmp_path: Path) -> None:
    """The file would take batches of one size only."""
    made, x = trained("ptq", tmp_path, "w8a8")
    session = Session(export_method(made, x).model)
    assert torch.allclose(session(x[:5]), session(x[:1].repeat(5, 1, 1, 1))) is False
    assert torch.allclose(session(x[:1]), session(x[:5])[:1], atol=1e-5)


# The verb


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    """A store with three finished runs of the tiny data set, and a failed one."""
    torch.set_num_threads(1)
    before = dict(registry._files)
    registry.load_file(SQUARES)
    where, ids = Store(tmp_path_factory.mktemp("store")), {}
    tiny = {"data": "squares", "epochs": 1, "float_epochs": 1, "batch": 32, "calibration": 32}
    for name, settings in {
        "lsq": {},
        "ptq": {"bits": "w8a8"},
        "fp32": {},
        "best": {"method": "lsq", "selection": "best"},
    }.items():
        spec = RunSpec(**{"method": name, **tiny, **settings})
        ids[name] = run(resolve(spec, data_root=None, cache=where.cache), where, wandb=False)["run_id"]
    failed = {
        **(where.read(ids["lsq"]) or {}),
        "run_id": "0failed",
        "status": "failed",
        "reason": "diverged",
        "provenance": {},
    }
    where.write(failed)
    registry._files.clear()
    registry._files.update(before)
    return where, ids


@pytest.fixture
def squares() -> Any:
    before = dict(registry._files)
    registry.load_file(SQUARES)
    yield find("datasets", "squares")
    registry._files.clear()
    registry._files.update(before)


def test_a_run_comes_back_as_it_was(store: tuple[Store, dict[str, str]], squares: Any) -> None:
    """What is exported would not be the network whose accuracy is in the record."""
    where, ids = store
    for name in ("lsq", "ptq", "best"):
        back = load_run(where, ids[name])
        right = []
        for loader in back.data.open_test():
            hits = [logits(back.method, back.method.net, b.x, b.domain).argmax(1) == b.y for b in loader]
            right.append(float(torch.cat(hits).double().mean()))
        assert sum(right) / len(right) == pytest.approx(back.record["metrics"]["test/acc"]), name


@pytest.mark.slow
def test_export_writes_files_and_the_record(store: tuple[Store, dict[str, str]], squares: Any) -> None:
    """A record would lose what it said, or say nothing of the export."""
    where, ids = store
    before = where.read(ids["ptq"])
    found = export_run(where, ids["ptq"][:8], data_root=None)
    record = where.read(ids["ptq"])
    assert record is not None
    assert record.pop("export") == found
    assert record == before
    assert found["status"] == "done"
    assert found["agreement"] >= 0.99
    assert found["latency_ratio"] > 0
    assert Path(found["file"]).stat().st_size == found["bytes"] < found["float_bytes"]
    onnx.checker.check_model(found["file"])
    assert not list(where.path(ids["ptq"]).glob("*.tmp*"))
    export_run(where, ids["ptq"], opset=18)  # again: the record takes the newer one
    assert (where.read(ids["ptq"]) or {})["export"]["opset"] == 18


def test_bad_requests(
    store: tuple[Store, dict[str, str]], squares: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user would read a traceback instead of what to do."""
    where, ids = store

    def answer(run_id: str, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            export_run(where, run_id, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    near = ids["lsq"][:-1] + ("0" if ids["lsq"][-1] != "0" else "1")
    assert f"did you mean '{ids['lsq']}'?" in answer(near)
    assert "is failed (diverged); only a run that is done" in answer("0failed")
    assert "opset 9 is out of range; give one from 18 to 25" in answer(ids["lsq"], opset=9)
    assert "give another file with --out" in answer(ids["ptq"], out=tmp_path / "no" / "model.onnx")
    copied = Store(tmp_path / "copy")
    shutil.copytree(where.root, copied.root)
    (copied.path(ids["lsq"]) / "last.ckpt").unlink()
    with pytest.raises(UserError, match=r"last\.ckpt is missing"):
        export_run(copied, ids["lsq"])
    shutil.rmtree(copied.root / "float")
    with pytest.raises(UserError, match=r"net\.pt is missing"):
        export_run(copied, ids["ptq"])
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'qatbench[export]'" in answer(ids["lsq"])


def test_no_integer_form(store: tuple[Store, dict[str, str]], squares: Any) -> None:
    """A float method would look as if its export had been forgotten."""
    where, ids = store
    result = CliRunner().invoke(cli.app, ["export", ids["fp32"], "--store", str(where.root), "--json"])
    assert isinstance(result.exception, UserError)  # exit status 2
    assert "no integer form: fp32 at w32a32 has no quantized layer" in str(result.exception)
    found = json.loads(result.stdout)
    assert found == {"status": "none", "reason": "fp32 at w32a32 has no quantized layer: its network is float"}
    assert (where.read(ids["fp32"]) or {})["export"] == found
    assert not (where.path(ids["fp32"]) / "model.onnx").exists()


def test_domains_have_no_integer_form(plug: Any) -> None:
    """A file would be written that predicts otherwise than the run did, because it cannot know an image's domain."""
    plug("""
    class ByDomain(LSQ):
        name = "bydomain"

        def predict(self, net, batch):
            return net(batch.x) + batch.domain[:, None]
    """)
    made, data = ready("bydomain")
    with pytest.raises(export.NoIntegerForm, match="bydomain predicts by the image's domain"):
        export_method(made.eval(), all_train(data).x)

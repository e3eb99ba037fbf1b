from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qatbench.bench import registry
from qatbench.bench import resolve as resolving
from qatbench.bench.errors import UserError
from qatbench.bench.models.resnet import ResNet8
from qatbench.bench.resolve import Resolved, resolve
from qatbench.bench.spec import RunSpec
from qatbench.methods.kd import KD
from qatbench.methods.lsq import LSQ
from qatbench.methods.pact import PACT

Plug = Callable[..., Path]

DATA = """
from qatbench.bench.data import DataSet, Domain

class Tiny(DataSet):
    name = "tiny"
    domains = ("a", "b")
    classes = ("x", "y")
    image = (3, 8, 8)
    augment = "shift"

    class Params(DataSet.Params):
        shade: float = 1.0

    def fingerprint(self):
        return (self.root / "seed.txt").read_text()

    def load(self):
        rng = torch.Generator().manual_seed(int(self.fingerprint()))
        labels = torch.arange(60) % 2
        return [Domain(d, torch.randint(0, 256, (60, 3, 8, 8), generator=rng).to(torch.uint8), labels) for d in self.selected]
"""


@pytest.fixture
def find_run(plug: Plug, tmp_path: Path) -> Callable[..., Resolved]:
    """Resolves a run on a made data set of two domains; ``pixels`` makes other images."""
    plug(DATA, stem="tiny")

    def find_run(method: str = "lsq", pixels: int = 0, **settings: Any) -> Resolved:
        root = tmp_path / f"root{pixels}"
        root.mkdir(exist_ok=True)
        (root / "seed.txt").write_text(str(pixels))
        spec = RunSpec(**{"method": method, "data": "tiny", **settings})
        return resolve(spec, data_root=root, cache=tmp_path / f"cache{pixels}")

    yield find_run  # type: ignore[misc]
    for key in [key for key in resolving._opened if key[0] == "tiny"]:
        del resolving._opened[key]


FindRun = Callable[..., Resolved]


def test_normal_form_is_whole(find_run: FindRun) -> None:
    """A record would not tell what was run: a default that changes later would change its meaning."""
    found = find_run("kd+lsq", params={"kd": {"weight": 0.25}})
    assert found.spec.params == {"kd": {"weight": 0.25, "temperature": 4.0}, "lsq": {"act_start": "paper"}}
    assert found.spec.protocol == "mdl"
    assert found.spec.augment == "shift"
    plain = {"limit": None, "val": 0.1, "balance": False, "imbalance": None, "lt_list": "ldam"}
    assert found.spec.data_params == {"domains": ["a", "b"], "shade": 1.0, **plain}
    assert found.skip is None
    assert set(found.code) == {"harness", "method kd", "method lsq", "data set tiny", "network resnet8"}
    assert len(found.run_id) == len(found.float_id) == 16


def test_normal_form_is_a_fixed_point(find_run: FindRun) -> None:
    """A spec that is read back from a record would be another run."""
    for method in ("lsq", "fp32", "ptq", "kd+pact"):
        found = find_run(method)
        assert resolve_again(find_run, found) == found


def resolve_again(find_run: FindRun, found: Resolved) -> Resolved:
    return find_run(**found.spec.model_dump())


SAME = [
    ({"method": "lsq"}, {"method": "lsq", "protocol": "mdl"}),
    ({"method": "lsq"}, {"method": "lsq", "augment": "shift"}),
    ({"method": "lsq"}, {"method": " lsq "}),
    ({"method": "lsq"}, {"method": "lsq", "data_params": {"domains": ["b", "a"]}}),
    ({"method": "lsq"}, {"method": "lsq", "data_params": {"domains": []}}),
    ({"method": "lsq", "data_params": {"shade": 1}}, {"method": "lsq", "data_params": {"shade": 1.0}}),
    ({"method": "kd+lsq"}, {"method": "kd+lsq", "params": {"kd": {"weight": 0.5, "temperature": 4}, "lsq": {}}}),
    ({"method": "pact", "params": {"pact": {"alpha": 8}}}, {"method": "pact", "params": {"pact": {"alpha": 8.0}}}),
    ({"method": "fp32", "bits": "w4a4"}, {"method": "fp32", "bits": "w2a2"}),
    ({"method": "fp32", "bits": "w32a32"}, {"method": "fp32", "bits": "w8a8", "first_last": "fp", "calibration": 7}),
    ({"method": "ptq"}, {"method": "ptq", "epochs": 99, "lr": 0.5, "clip": 1.0, "accumulate": 2, "selection": "best"}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_cells_that_mean_the_same_are_one(one: dict, other: dict, find_run: FindRun) -> None:
    """The same number would be computed twice, and stand in the table as two rows or with twice the seeds."""
    assert find_run(**one) == find_run(**other)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "w3a4"}, {"seed": 1}, {"epochs": 5}, {"float_epochs": 11},
        {"lr": 0.02}, {"float_lr": 0.2}, {"batch": 32}, {"clip": 1.0},
        {"protocol": "lodo:a"}, {"protocol": "single:a"},
        {"network": "resnet20"}, {"method": "pact"}, {"method": "kd+lsq"}, {"threads": 2},
        {"precision": "bf16"}, {"first_last": "fp"}, {"selection": "best"},
        {"calibration": 8}, {"accumulate": 2}, {"optimizer": "adam"},
        {"data_params": {"shade": 0.5}}, {"data_params": {"limit": 20}},
        {"data_params": {"domains": ["a"]}}, {"pixels": 1}, {"augment": "none"},
        {"schedule": "step"}, {"momentum": 0.8}, {"weight_decay": 0.0},
    ],
)  # fmt: skip
def test_what_moves_the_number_moves_the_id(change: dict, find_run: FindRun) -> None:
    """A run would be taken for finished although another was asked for."""
    assert find_run(**change).run_id != find_run().run_id


@pytest.mark.parametrize("cls", [LSQ, KD])
def test_a_members_version_moves_the_id(cls: type, find_run: FindRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a correction of a method its old numbers would stay in the table."""
    before, other = find_run("kd+lsq"), find_run("pact")
    monkeypatch.setattr(cls, "version", cls.version + 1)
    after = find_run("kd+lsq")
    assert after.run_id != before.run_id
    assert after.float_id == before.float_id
    assert after.code[f"method {cls.name}"] == str(cls.version)
    assert find_run("pact") == other


def test_the_data_sets_version_moves_both_ids(find_run: FindRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a correction of a data set its old numbers, and old float networks, would stay in use."""
    before = find_run()
    monkeypatch.setattr(registry.find("datasets", "tiny"), "version", 2)
    after = find_run()
    assert after.run_id != before.run_id
    assert after.float_id != before.float_id


def test_the_networks_version_moves_both_ids(find_run: FindRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a correction of a network, quantized runs would start from weights of the old one."""
    before = find_run()
    monkeypatch.setattr(ResNet8, "version", 7, raising=False)
    after = find_run()
    assert after.run_id != before.run_id
    assert after.float_id != before.float_id


def test_the_harness_version_moves_both_ids(find_run: FindRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a correction of the training loop all old numbers would stay in the table."""
    before = find_run()
    monkeypatch.setattr(resolving, "HARNESS", resolving.HARNESS + 1)
    after = find_run()
    assert after.run_id != before.run_id
    assert after.float_id != before.float_id


def test_other_images_move_both_ids(find_run: FindRun) -> None:
    """Numbers of two different data sets of one name would be averaged; a quantized run would start from the other's network."""
    one, other = find_run(pixels=0), find_run(pixels=1)
    assert one.data_hash != other.data_hash
    assert one.run_id != other.run_id
    assert one.float_id != other.float_id


@pytest.mark.parametrize(
    "change",
    [
        {"method": "pact"}, {"method": "kd+lsq"}, {"method": "ptq"},
        {"method": "fp32"}, {"bits": "w2a2"}, {"lr": 0.5}, {"epochs": 50},
        {"clip": 1.0}, {"accumulate": 2}, {"selection": "best"}, {"first_last": "fp"}, {"calibration": 5},
    ],
)  # fmt: skip
def test_the_float_network_is_shared_by_all_methods(change: dict, find_run: FindRun) -> None:
    """Methods would start from different float networks, so their difference would be partly luck; each would wait for its own."""
    one, other = find_run(), find_run(**change)
    assert one.float_id == other.float_id
    assert one.float_spec == other.float_spec


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"protocol": "lodo:a"}, {"network": "resnet20"},
        {"float_epochs": 3}, {"float_lr": 0.3}, {"batch": 32}, {"augment": "none"},
        {"data_params": {"limit": 20}}, {"threads": 2}, {"precision": "bf16"},
        {"optimizer": "adamw"}, {"schedule": "step"}, {"momentum": 0.5},
        {"weight_decay": 0.0},
    ],
)  # fmt: skip
def test_what_moves_the_float_network_moves_its_id(change: dict, find_run: FindRun) -> None:
    """A held-out domain would have been seen by the float network of another protocol; or a float recipe would have no effect."""
    one, other = find_run(), find_run(**change)
    assert one.float_id != other.float_id
    assert one.float_spec != other.float_spec


def test_the_float_network_is_trained_by_its_own_recipe(find_run: FindRun) -> None:
    """The float network would get the epochs and the learning rate of quantized training."""
    spec = find_run("pact", bits="w2a2", epochs=3, lr=0.01, float_epochs=7, float_lr=0.3, clip=1.0).float_spec
    assert (spec.method, spec.bits, spec.params) == ("fp32", "w32a32", {})
    assert (spec.epochs, spec.lr, spec.clip) == (7, 0.3, None)


WRAP = "class Wrap(Wrapper):\n    name = 'wrap'\n    default_inner = 'lsq'\n"


def test_a_default_inner_method_is_left_out(plug: Plug, find_run: FindRun) -> None:
    """``fqat`` and ``fqat+lsq`` would be two rows."""
    plug(WRAP)
    assert find_run("wrap") == find_run("wrap+lsq")
    assert find_run("wrap").spec.method == "wrap"
    assert find_run("wrap").code.keys() >= {"method wrap", "method lsq"}
    assert find_run("wrap").run_id != find_run("wrap+pact").run_id


def test_the_content_of_a_plugin_file_moves_the_id(plug: Plug, find_run: FindRun) -> None:
    """Somebody who edits a plugin and runs it again would be shown the old number."""
    plug(WRAP)
    one = find_run("wrap")
    plug(WRAP + "\n# another line\n")
    other = find_run("wrap")
    plug(WRAP)
    assert one.run_id != other.run_id
    assert one.float_id == other.float_id
    assert find_run("wrap") == one


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"method": "lqs"}, "unknown method 'lqs'; did you mean 'lsq'?"),
        ({"data": "optdigit"}, "unknown data set 'optdigit'; did you mean 'optdigits'?"),
        ({"network": "resnet9"}, "unknown network 'resnet9'; did you mean 'resnet"),
        ({"protocol": "mld"}, "did you mean 'mdl'?"),
        ({"protocol": "lodo:c"}, "'c'"),
        ({"protocol": "lodo"}, "lodo"),
        ({"augment": "shfit"}, "did you mean 'shift'?"),
        ({"data_params": {"domain": ["a"]}}, "unknown key 'domain'; did you mean 'domains'?"),
        ({"data_params": {"domains": ["c"]}}, "has no domain 'c'"),
        ({"data_params": {"limit": -1}}, "limit=-1"),
        ({"data_params": {"shade": float("nan")}}, "shade"),
        ({"data_params": {"shade": object()}}, "shade"),
        ({"params": {"lsq": {"x": 1}}}, "unknown key 'x'"),
        ({"params": {"pact": {}}}, "'pact' is not part of method 'lsq'"),
        ({"bits": "w1a4"}, "lsq takes 2 to 8 bits for weights (or 32), not w1a4"),
        ({"bits": "w4a1"}, "lsq takes 2 to 8 bits for activations (or 32), not w4a1"),
        ({"bits": "w32a32"}, "quantizes nothing; use method fp32"),
        ({"method": "kd+lsq+kd"}, "lsq is not a wrapper"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(wrong: dict, answer: str, find_run: FindRun) -> None:
    """A slip in a suite would end in a traceback, or run something else."""
    with pytest.raises(UserError) as caught:
        find_run(**wrong)
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_method_cannot_do_is_skipped_with_its_reason(find_run: FindRun) -> None:
    """A pair that makes no sense would be trained, or fail."""
    assert find_run("kd+ptq").skip == "ptq does not train, so kd has nothing to add to"


def test_a_method_sees_the_training_splits_task(plug: Plug, find_run: FindRun) -> None:
    """A method that needs several domains, or class counts, would decide on the wrong ones: also on the held-out domain's."""
    plug(
        """
    class Asks(LSQ):
        name = "asks"
        def skip(self, task):
            return f"{task.kind} {task.domains} {sum(task.class_counts)}"
    """
    )
    whole = find_run("asks", protocol="mdl").skip
    assert find_run("asks", protocol="lodo:a").skip.startswith("classification ('b',)")
    assert whole.startswith("classification ('a', 'b')")
    assert int(whole.split()[-1]) < 2 * 60 * 0.8


def test_alpha_is_in_the_id_of_pact_only(find_run: FindRun) -> None:
    """A hyper-parameter could be swept without any effect on the id."""
    assert find_run("pact", params={"pact": {"alpha": 4}}).run_id != find_run("pact").run_id
    assert f"method {PACT.name}" in find_run("pact").code


def test_native_policy_is_the_methods_own(find_run: FindRun) -> None:
    """DoReFa would be run with eight bits where its paper leaves float; or a policy spelt out would be another cell."""
    for method, policy in (("lsq", "8bit"), ("dorefa", "fp"), ("pact", "fp"), ("kd+dorefa", "fp")):
        found = find_run(method)
        assert found.spec.first_last == policy
        assert find_run(method, first_last=policy) == found
        assert find_run(method, first_last="same").run_id != found.run_id


def test_a_budget_outside_the_range_is_refused(find_run: FindRun) -> None:
    """A budget that no plan can keep would be found out after the float network was trained."""
    for bits, method in (("avg1.5", "lsq"), ("avg1.99", "kd+lsq")):
        with pytest.raises(UserError, match=r"an average is 2 to 8, not 1\.\d+"):
            find_run(method, bits=bits)
    assert find_run("lsq", bits="avg2").spec.bits == "avg2"
    assert find_run("fp32", bits="avg2.81").spec.bits == "w32a32"


LAYERS = [n for n, m in ResNet8(3, 2).named_modules() if hasattr(m, "weight") and m.weight.ndim > 1]


def test_a_plan_must_name_every_layer_and_no_other(find_run: FindRun) -> None:
    """A layer left out, misspelt, or given bits that the method does not have would end the run after its float network."""
    plan: dict[str, str] = dict.fromkeys(LAYERS, "w4a4")
    found = find_run("lsq", plan=plan)
    assert found.spec.plan is not None
    assert resolve_again(find_run, found) == found
    assert find_run("lsq", plan=plan, first_last="fp", bits="w2a2") == found
    with pytest.raises(UserError, match=r"has no layer 'layer1\.0\.conv9'; did you mean 'layer1\.0\.conv2'"):
        find_run("lsq", plan=plan | {"layer1.0.conv9": "w4a4"})
    with pytest.raises(UserError, match=r"layer 'head' of resnet8 is missing \(1 of 10\)"):
        find_run("lsq", plan={k: v for k, v in plan.items() if k != "head"})
    with pytest.raises(UserError, match=r"takes 2 to 8 bits .* not w1a4 \(conv1\)"):
        find_run("lsq", plan=plan | {"conv1": "w1a4"})
    assert find_run("fp32", plan=plan) == find_run("fp32")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"batch": 4, "accumulate": 3}, "2 of each domain); take batch=6 or more, or accumulate=2 or less"),
        ({"batch": 4, "accumulate": 5, "protocol": "single:a"}, "(4); take batch=5 or more, or accumulate=4 or less"),
        ({"batch": 9, "accumulate": 9, "protocol": "lodo:a", "method": "kd+lsq"}, None),
        ({"protocol": "mld"}, "no protocol 'mld'"),
        ({"protocol": "lodo:c"}, "no domain 'c'"),
        ({"network": "resnet9"}, "unknown network 'resnet9'"),
        ({"augment": "shfit"}, "did you mean 'shift'"),
        ({"bits": "w1a4"}, "lsq takes 2 to 8 bits"),
        ({"bits": "w32a32"}, "use method fp32"),
        ({"selection": "best", "data_params": {"val": 0}}, "needs validation images"),
        ({"params": {"lsq": {"x": 1}}}, "unknown key 'x'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_data_is_prepared(
    find_run: FindRun, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], words: str | None
) -> None:
    """A typing error would be told after an hour of decoding, or after the float network was trained."""

    def opened(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(resolving, "open_data", opened)
    with pytest.raises(UserError if words else InterruptedError) as caught:
        find_run(**asked)
    assert (words or "") in str(caught.value)


def test_one_image_for_a_norm_is_refused_before_training(find_run: FindRun) -> None:
    """resnet18 leaves one value a channel of an 8x8 image: torch would say so after the data set was prepared and opened."""
    for asked in ({"batch": 1}, {"batch": 3, "accumulate": 3}):
        with pytest.raises(UserError, match=r"BatchNorm one value a channel; raise batch, or lower accumulate"):
            find_run(network="resnet18", protocol="single:a", **asked)
    find_run(network="resnet18", batch=1)  # of two domains one each

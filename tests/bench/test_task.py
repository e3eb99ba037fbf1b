"""The loss and the metrics, against hand computations and torchmetrics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qatbench.bench.data import Batch
from qatbench.bench.longtail import shots
from qatbench.bench.task import ECE_BINS, Meter, Task, combine
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassRecall

DIGITS = Task("classification", ("a", "b", "c"), (500, 50, 5), ("d0",))
COARSE = replace(DIGITS, superclasses=("x", "y"), superclass=(1, 0, 1))


def measured(task: Task, logits: torch.Tensor, labels: torch.Tensor, batch: int = 7) -> Meter:
    meter = task.meter("cpu")
    for x, y in zip(logits.split(batch), labels.split(batch), strict=True):
        meter.update(x, y)
    return meter


def said(classes: list[int], width: int = 3) -> torch.Tensor:
    """Logits of a network that says these classes."""
    return 4.0 * F.one_hot(torch.tensor(classes), width).float()


def a_task(classes: int, counts: tuple[int, ...] | None = None) -> Task:
    names = tuple(str(c) for c in range(classes))
    return Task("classification", names, counts or (1,) * classes, ("d0",), groups=counts is not None)


@st.composite
def answers(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C] and labels of some images."""
    n, classes = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(n, classes, generator=rng)
    return logits, torch.randint(classes, (n,), generator=rng)


def test_metrics_by_hand() -> None:
    """Fails if a metric were another one: recalls 3/4, 1/2 and 0 give other means by image and by class."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    meter = measured(replace(DIGITS, groups=True), said([0, 0, 0, 1, 1, 2, 1]), labels, batch=3)
    found = meter.compute()
    assert meter.per_class() == [0.75, 0.5, 0.0]
    assert found["acc"] == pytest.approx(4 / 7)
    assert found["bacc"] == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert (found["acc_many"], found["acc_medium"], found["acc_few"]) == (0.75, 0.5, 0.0)
    sure = math.exp(4) / (math.exp(4) + 2)
    assert found["ece"] == pytest.approx(sure - 4 / 7)
    assert found["loss"] == pytest.approx((-4 * math.log(sure) + 3 * (4 - math.log(sure))) / 7)


def test_a_class_that_is_absent_counts_nowhere() -> None:
    """Fails if a class without test images pulled the balanced accuracy or its group's down to 0."""
    task = a_task(4, counts=(500, 400, 50, 0))
    meter = measured(task, said([0, 3, 0], width=4), torch.tensor([0, 3, 3]))
    assert meter.per_class() == [1.0, None, None, 0.5]
    found = meter.compute()
    assert found["bacc"] == 0.75
    assert (found["acc_many"], found["acc_few"]) == (1.0, 0.5)
    assert "acc_medium" not in found


def test_groups_are_measured_only_where_the_protocol_asks() -> None:
    """Fails if numbers of shots stood beside balanced data, where every class is of one group."""
    found = measured(DIGITS, said([0]), torch.tensor([0])).compute()
    assert set(found) == {"acc", "loss", "bacc", "ece"}


@given(answers())
def test_metrics_agree_with_torchmetrics(case) -> None:
    """Fails if gathering over batches, or the shortcut to the highest probability, moved a number."""
    logits, labels = case
    classes = logits.shape[1]
    found = measured(a_task(classes), logits, labels).compute()
    ece = MulticlassCalibrationError(classes, n_bins=ECE_BINS, norm="l1")
    assert found["acc"] == pytest.approx(float(MulticlassAccuracy(classes, average="micro")(logits, labels)), abs=1e-6)
    assert found["ece"] == pytest.approx(float(ece(logits.softmax(1), labels)), abs=1e-5)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    recalls = MulticlassRecall(classes, average="none")(logits, labels)
    assert found["bacc"] == pytest.approx(float(recalls[labels.unique()].mean()), abs=1e-6)


@given(answers(), st.integers(1, 50))
def test_batches_do_not_matter(case, batch: int) -> None:
    """Fails if a number hung on how the images are cut into batches."""
    logits, labels = case
    task = a_task(logits.shape[1])
    whole = measured(task, logits, labels, len(labels)).compute()
    assert measured(task, logits, labels, batch).compute() == pytest.approx(whole, rel=1e-5, abs=1e-7)


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 10_000))
def test_balanced_accuracy_is_accuracy_on_balanced_data(each: int, classes: int, seed: int) -> None:
    """Fails if the two disagreed where every class weighs the same by itself."""
    labels = torch.arange(classes).repeat(each)
    logits = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    found = measured(a_task(classes), logits, labels).compute()
    assert found["bacc"] == pytest.approx(found["acc"])


@given(answers(), st.data())
def test_groups_are_a_partition_of_the_classes(case, data) -> None:
    """Fails if a class were in no group or in two: weighted by their classes, the groups give the balanced accuracy."""
    logits, labels = case
    classes = logits.shape[1]
    counts = tuple(data.draw(st.lists(st.integers(0, 200), min_size=classes, max_size=classes)))
    found = measured(a_task(classes, counts), logits, labels).compute()
    present = set(labels.tolist())
    sizes = {name: len(present & set(group)) for name, group in shots(counts).items()}
    assert {name for name in sizes if f"acc_{name}" in found} == {name for name, size in sizes.items() if size}
    weighted = sum(found[f"acc_{name}"] * size for name, size in sizes.items() if size)
    assert weighted / len(present) == pytest.approx(found["bacc"])


@given(st.integers(2, 20), st.data())
def test_a_calibrated_guess_has_no_calibration_error(classes: int, data) -> None:
    """Fails if a predictor that is right as often as it says were called badly calibrated."""
    right = data.draw(st.integers(1, 50))
    n = data.draw(st.integers(right, 2 * right)) if classes == 2 else data.draw(st.integers(right, classes * right))
    p = right / n
    logits = torch.full((n, classes), math.log(max((1 - p) / (classes - 1), 1e-30)))
    logits[:, 0] = math.log(p) + 1e-6  # the first class leads, if by a hair
    labels = torch.tensor([0] * right + [1] * (n - right))
    assert measured(a_task(classes), logits, labels).compute()["ece"] == pytest.approx(0, abs=1e-4)


@given(st.floats(0.05, 0.95))
def test_the_calibration_error_of_a_constant_is_its_distance(share: float) -> None:
    """Fails if over- or underconfidence were not measured as what it is."""
    labels = torch.zeros(200, dtype=torch.int64)
    labels[round(200 * share) :] = 1
    found = measured(a_task(2), torch.tensor([[math.log(9), 0.0]]).expand(200, 2), labels).compute()
    assert found["ece"] == pytest.approx(abs(0.9 - found["acc"]), abs=1e-6)


def test_a_network_that_diverged_is_measured_as_such() -> None:
    """Fails if NaN logits crashed the evaluation, or gave a fine calibration error."""
    found = measured(DIGITS, torch.full((4, 3), math.nan), torch.tensor([0, 1, 2, 0])).compute()
    assert math.isnan(found["loss"])
    assert math.isnan(found["ece"])
    assert 0 <= found["acc"] <= 1


def test_half_precision_is_measured_in_single() -> None:
    """Fails if probabilities were rounded to the eight bits of an autocast network before they are measured."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.bfloat16)
    found = measured(DIGITS, logits, torch.tensor([0])).compute()
    assert found["loss"] == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-6)


def test_superclasses_are_a_second_head() -> None:
    """Fails if the superclass were read off the class head, or the class head saw the other's logits."""
    fine, coarse = said([0, 1, 2]), said([1, 0, 0], width=2)  # superclasses of the classes: 1, 0, 1
    logits, labels = torch.cat([fine, 9 * coarse], 1), torch.tensor([0, 1, 2])
    assert COARSE.outputs == logits.shape[1] == 5
    heads = COARSE.heads(logits)
    assert list(heads) == ["", "coarse"]
    assert torch.equal(heads[""], fine)
    assert torch.equal(heads["coarse"], 9 * coarse)
    found = measured(COARSE, logits, labels, batch=2).compute()
    assert found["acc"] == 1.0
    assert found["acc_coarse"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(fine, labels)))


def test_losses_of_both_heads() -> None:
    """Fails if a head learned another's labels."""
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])
    batch = Batch(torch.zeros(6, 1, 1, 1), labels, torch.zeros(6, dtype=torch.int64))
    losses = COARSE.losses(logits, batch)
    assert list(losses) == ["task", "coarse"]
    assert torch.equal(losses["task"], F.cross_entropy(logits[:, :3], labels))
    assert torch.equal(losses["coarse"], F.cross_entropy(logits[:, 3:], torch.tensor([1, 0, 1, 1, 0, 1])))
    (alone,) = DIGITS.losses(logits[:, :3], batch).values()
    assert torch.equal(alone, losses["task"])


def test_one_head_is_the_whole_output() -> None:
    """Fails if a task without superclasses cut or copied the logits."""
    logits = torch.randn(2, 3)
    assert DIGITS.outputs == 3
    assert DIGITS.heads(logits)[""] is logits
    assert list(DIGITS.heads(logits)) == [""]


def test_evaluation_first_leaves_training_possible() -> None:
    """Fails if a table made under Lightning's inference mode could not be used in a step that trains."""
    task = replace(COARSE, superclass=(0, 1, 1))  # no other test has made its table
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        measured(task, logits.detach(), labels).compute()
    batch = Batch(torch.zeros(3, 1, 1, 1), labels, torch.zeros(3, dtype=torch.int64))
    torch.stack(list(task.losses(logits, batch).values())).sum().backward()
    assert bool(logits.grad.any())


METRICS = st.dictionaries(st.sampled_from(["acc", "bacc", "acc_few"]), st.floats(0, 1), min_size=1)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), METRICS, min_size=1))
def test_combine_means_over_the_domains_that_have_the_metric(domains) -> None:
    """Fails if a domain without a metric counted as 0, or the worst domain were not the worst."""
    flat = combine(domains, "test")
    for metric in {m for values in domains.values() for m in values}:
        known = {d: values[metric] for d, values in domains.items() if metric in values}
        assert flat[f"test/{metric}"] == pytest.approx(sum(known.values()) / len(known))
        assert {d: flat[f"test/{metric}/{d}"] for d in known} == known
        assert not [d for d in set(domains) - set(known) if f"test/{metric}/{d}" in flat]
        if metric == "acc":
            assert flat["test/acc_worst"] == min(known.values())
    assert ("test/acc_worst" in flat) == any("acc" in values for values in domains.values())
    assert [name for name in flat if not name.startswith("test/")] == []


def test_combine_of_nothing_is_nothing() -> None:
    """Fails if a run without validation images ended in a traceback."""
    assert combine({}, "val") == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_gives_the_numbers_of_the_cpu() -> None:
    """Fails if the meter mixed devices, or measured otherwise on another one."""
    logits, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    meter = COARSE.meter("cuda")
    meter.update(logits.cuda(), labels.cuda())
    assert meter.compute() == pytest.approx(measured(COARSE, logits, labels).compute(), rel=1e-4)


# --- what is met in training ------------------------------------------------------------------------------------------


def test_class_sizes_of_one_domain_and_of_equal_ones_are_the_counts() -> None:
    """Every number of a set with one domain would move by a rounding."""
    task = replace(DIGITS, domain_counts=((500, 50, 5),))
    assert task.class_sizes == DIGITS.class_sizes == (500, 50, 5)
    equal = replace(DIGITS, class_counts=(8, 12, 1), domain_counts=((7, 0, 0), (0, 7, 0), (1, 5, 1)))
    assert equal.class_sizes == (8, 12, 1)


def test_class_sizes_of_unequal_domains_are_those_of_the_batches() -> None:
    """A loss would make up for a tail that no batch has: Office-31's priors were off by a quarter."""
    task = replace(DIGITS, class_counts=(90, 19, 11), domain_counts=((90, 9, 1), (0, 10, 10)))
    share = [(0.9 + 0) / 2, (0.09 + 0.5) / 2, (0.01 + 0.5) / 2]
    assert task.class_sizes == pytest.approx([120 * pi for pi in share], rel=1e-12)
    assert sum(task.class_sizes) == pytest.approx(120, rel=1e-12)

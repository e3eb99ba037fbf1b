"""Speed and memory beside their targets: ``make perf``, or ``python tests/perf/perf.py NAME ...`` for some of them.

What is compared runs in turn, A B A B, and the ratio is taken pair by pair: a machine's speed drifts, a ratio does not. Every
figure is a median with its range. Nothing here is asserted in the test suite.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QATBENCH = [sys.executable, "-m", "qatbench"]
SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("QATBENCH_DATA", SHARED))


@dataclass(frozen=True)
class Figure:
    """One measurement: its values, what they are, and what they should be."""

    what: str
    values: list[float]
    unit: str
    target: float
    at_most: bool = True

    def row(self) -> list[str]:
        """For the table."""
        median = statistics.median(self.values)
        met = median <= self.target if self.at_most else median >= self.target
        low, high = min(self.values), max(self.values)
        sign = "at most" if self.at_most else "at least"
        target = f"{sign} {self.target:,g} {self.unit}".strip()
        return [
            self.what,
            f"{median:,.3g} {self.unit}".strip(),
            f"{low:,.3g} to {high:,.3g}",
            target,
            "yes" if met else "NO",
        ]


def in_turn(a: Callable[[], float], b: Callable[[], float], rounds: int) -> list[float]:
    """Ratios A/B of what the two return, measured in turn after one round that does not count."""
    a(), b()
    return [a() / b() for _ in range(rounds)]


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long it takes; on the wall clock, or by `time.process_time` in CPU seconds of this process."""
    begin = clock()
    work()
    return clock() - begin


def help_answers() -> list[Figure]:
    """Start-up of the command."""
    times = [seconds(lambda: subprocess.run([*QATBENCH, "--help"], capture_output=True, check=True)) for _ in range(8)][
        1:
    ]
    return [Figure("qatbench --help", times, "s", 0.3)]


def _ready(method: str, network: str, size: int, batch: int, bits: str = "w4a4", domains: int = 1) -> tuple[Any, Any]:
    """A method on a real network with random images, and one batch in which every domain has the same share."""
    import torch
    from qatbench.bench.assemble import assemble
    from qatbench.bench.data import Batch
    from qatbench.bench.registry import find
    from qatbench.bench.spec import RunSpec
    from qatbench.bench.task import Task

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    images = Batch(x, torch.randint(10, (batch,)), torch.arange(batch) % domains)
    net = find("networks", network)(3, 10).to(memory_format=torch.channels_last)
    spec = RunSpec(
        method=method, bits="w32a32" if method == "fp32" else bits, network=network, batch=batch, protocol="single"
    )
    tail = tuple(max(1, round(5000 * 50 ** (-c / 9))) for c in range(10))
    task = Task("classification", tuple("0123456789"), tail, tuple("abc"[:domains]))
    return assemble(spec, net, task, images), images


def _stepper(made: Any, images: Any) -> Callable[[], float]:
    """CPU seconds of one training step of a method."""
    opt = made.configure_optimizers()
    made.train()

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        sum(made.compute_losses(images, True).values()).backward()
        opt.step()

    return lambda: seconds(step, time.process_time)


def _resnet20(method: str, compiled: bool = False) -> tuple[Any, Any]:
    """A method on resnet20 at W4A4, batch 128 of 32x32, channels_last."""
    import torch
    from qatbench.bench.quant.grid import ready_to_compile

    made, images = _ready(method, "resnet20", 32, 128)
    made.scope.compile = compiled and ready_to_compile(torch.device("cpu"))
    return made, images


def _saved_bytes(made: Any, images: Any) -> int:
    """What autograd keeps between forward and backward pass, each storage once."""
    import torch

    seen: dict[int, int] = {}

    def pack(t: Any) -> Any:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    made.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses = made.compute_losses(images, True)
    del losses
    return sum(seen.values())


def lsq_step() -> list[Figure]:
    """A training step of LSQ, compiled and not, against that of the float network: time and memory (resnet20, batch 128, W4A4)."""
    compiled, plain, base = _resnet20("lsq", compiled=True), _resnet20("lsq"), _resnet20("fp32")
    kept = {name: _saved_bytes(*made) for name, made in (("compiled", compiled), ("plain", plain), ("float", base))}
    steps = [_stepper(*made) for made in (compiled, plain, base)]
    for step in steps:
        step()
    rounds = [[step() for step in steps] for _ in range(15)]
    return [
        Figure("LSQ step, compiled / float step (CPU seconds)", [a / c for a, _, c in rounds], "", 1.20),
        Figure("LSQ step, uncompiled / float step (CPU seconds)", [b / c for _, b, c in rounds], "", 1.35),
        Figure("kept for backward, LSQ compiled / float", [kept["compiled"] / kept["float"]], "", 1.35),
        Figure("kept for backward, LSQ uncompiled / float", [kept["plain"] / kept["float"]], "", 1.6),
    ]


def method_steps() -> list[Figure]:
    """Training steps of other methods against the float step (resnet20, batch 128, W4A4, CPU seconds), and ADQ's codebooks."""
    targets = {"adq": 1.6, "n2uq": 1.8, "apot": 1.8}
    base = _stepper(*_resnet20("fp32"))
    figures = []
    for name, target in targets.items():
        made = _resnet20(name)
        step = _stepper(*made)
        figures.append(Figure(f"{name} step / float step (CPU seconds)", in_turn(step, base, rounds=9), "", target))
        if name == "adq":
            figures.append(_upkeep(made[0], step))
    return figures


def _whole_step(made: Any, images: Any) -> Callable[[], Any]:
    """A training step as the method does it, with all its passes."""
    from types import SimpleNamespace

    from qatbench.bench.testing import Loop

    loop = Loop(made, SimpleNamespace(steps=1000))  # type: ignore[arg-type]
    made.scope.steps, loop.run.batch = 1000, images
    made.train()

    def step() -> None:
        made.step(loop.run)
        made.scope.step += 1

    return step


def training_steps() -> list[Figure]:
    """Whole steps of the training algorithms against LSQ's on the same batch (resnet20, batch 126, W4A4, CPU seconds)."""
    figures = []
    for name, domains, target in (
        ("sam", 1, 2.1), ("sagm", 1, 2.1), ("gaqat", 1, 2.3), ("fqat", 1, 2.3), ("emaq", 3, 1.5), ("emaq-lt", 1, 1.6),
    ):  # fmt: skip
        ours = _whole_step(*_ready(name, "resnet20", 32, 126, domains=domains))
        base = _whole_step(*_ready("lsq", "resnet20", 32, 126, domains=domains))
        ratios = in_turn(lambda: seconds(ours, time.process_time), lambda: seconds(base, time.process_time), rounds=9)  # noqa: B023
        where = f", {domains} domains" if domains > 1 else ""
        figures.append(Figure(f"{name} step{where} / LSQ step (CPU seconds)", ratios, "", target))
    return figures


_STEPS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("perf", sys.argv[1])
perf = importlib.util.module_from_spec(spec)
sys.modules["perf"] = perf
spec.loader.exec_module(perf)
step = perf._whole_step(*perf._ready(sys.argv[2], "resnet18", 32, 6, domains=int(sys.argv[3])))
for _ in range(3):
    step()
"""


def training_memory() -> list[Figure]:
    """Peak memory of training beyond LSQ's, in copies of the weights (resnet18, 6 images: next to nothing but weights)."""
    from qatbench.bench.registry import find

    copy_gb = sum(p.numel() for p in find("networks", "resnet18")(3, 10).parameters()) * 4 / 1e9

    def peak(name: str, domains: int) -> float:
        return _peak_gb([sys.executable, "-c", _STEPS, __file__, name, str(domains)])

    figures = []
    for name, domains, target in (("sam", 1, 1), ("sagm", 1, 1), ("fqat", 1, 1), ("emaq", 2, 2), ("emaq", 3, 2)):
        extra = [(peak(name, domains) - peak("lsq", domains)) / copy_gb for _ in range(3)]
        figures.append(Figure(f"memory of {name}, {domains} domain(s), beyond LSQ's", extra, "copies", target))
    return figures


def _upkeep(adq: Any, step: Callable[[], float]) -> Figure:
    """Share of the time of ADQ's steps that moving the codebooks takes."""
    import torch
    from qatbench.bench.method import Run

    run, period, shares = Run(adq), adq.params.period, []
    adq.scope.steps = 100 * period  # else training has ended, and codebooks stay

    @torch.no_grad()
    def follow() -> None:
        for adq.scope.step in range(period):
            adq.after_update(run)

    for _ in range(5):
        upkeep = seconds(follow, time.process_time)
        shares.append(100 * upkeep / (upkeep + sum(step() for _ in range(2)) * period / 2))
    return Figure("codebook upkeep / all of ADQ's training", shares, "%", 5)


def brevitas_step() -> list[Figure]:
    """A step of the same network in brevitas with learned scales against LSQ's.

    Brevitas is no dependency: install it into a folder of its own, and name the folder::

        pip install --no-deps --target SCRATCH 'brevitas==0.13.*' dependencies==2.0.1 unfoldNd
        QATBENCH_BREVITAS=SCRATCH make perf ARGS=brevitas_step
    """
    place = os.environ.get("QATBENCH_BREVITAS")
    if not place:
        print("brevitas_step is left out: QATBENCH_BREVITAS names no folder with brevitas", file=sys.stderr)
        return []
    sys.path.append(place)
    made, images = _resnet20("fp32")
    _to_brevitas(made.net)
    theirs = _stepper(made, images)
    for _ in range(4):  # the scales are collected in the first two steps, and are parameters from then on
        theirs()
    compiled, plain = _stepper(*_resnet20("lsq", compiled=True)), _stepper(*_resnet20("lsq"))
    return [
        Figure(
            "brevitas step / LSQ step, compiled (CPU seconds)", in_turn(theirs, compiled, 9), "", 1.35, at_most=False
        ),
        Figure("brevitas step / LSQ step, uncompiled (CPU seconds)", in_turn(theirs, plain, 9), "", 1.0, at_most=False),
    ]


def _to_brevitas(net: Any) -> None:
    """Put brevitas's layers with learned scales in the place of a network's: 4 bits, 8 in the first and the last."""
    import torch
    from brevitas import nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
    from qatbench.bench.quant import swap
    from qatbench.bench.site import find_sites
    from torch import nn

    weight = Int8WeightPerTensorFloat.let(scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS)
    for site in [s for s in find_sites(net, (3, 32, 32)) if s.kind == "layer"]:
        old, bits = net.get_submodule(site.name), 8 if site.edge else 4
        act = Int8ActPerTensorFloat if site.signed_input else Uint8ActPerTensorFloat
        common = {"weight_quant": weight, "weight_bit_width": bits, "bias": old.bias is not None}
        if isinstance(old, nn.Conv2d):
            new = qnn.QuantConv2d(
                old.in_channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding, **common
            )
        else:
            new = qnn.QuantLinear(old.in_features, old.out_features, **common)
        identity = qnn.QuantIdentity(act_quant=act.let(collect_stats_steps=2), bit_width=bits)
        swap(net, site.name, nn.Sequential(identity, new))
    net.to(memory_format=torch.channels_last)


def planning() -> list[Figure]:
    """Bit plans: sensitivities of resnet20 by 50 Hutchinson probes on 256 images, two threads; allocation for resnet56."""
    import torch
    from qatbench.bench.method import Probe
    from qatbench.bench.quant.allocate import allocate
    from qatbench.bench.registry import find
    from qatbench.bench.site import find_sites

    made, images = _ready("adq", "resnet20", 32, 256)
    net = find("networks", "resnet20")(3, 10).to(memory_format=torch.channels_last).eval()
    inner = [s for s in find_sites(net, (3, 32, 32)) if s.kind == "layer" and not s.edge]
    torch.set_num_threads(2)
    times = [seconds(lambda: made.harm(inner, made.candidates, Probe(net, images)))]
    torch.set_num_threads(1)
    large = [
        s for s in find_sites(find("networks", "resnet56")(3, 10), (3, 32, 32)) if s.kind == "layer" and not s.edge
    ]
    rng = torch.Generator().manual_seed(0)
    sensitivity = torch.randn(len(large), generator=rng).exp().tolist()
    costs = {s.name: {b: t * s.weights * 4.0**-b for b in range(2, 9)} for s, t in zip(large, sensitivity, strict=True)}
    sizes = {s.name: s.weights for s in large}
    spent = [seconds(lambda: allocate(costs, sizes, 2.81)) for _ in range(3)]
    return [
        Figure("sensitivities of resnet20, two threads", times, "s", 60),
        Figure("allocation of 2 to 8 bits, resnet56", spent, "s", 1),
    ]


def _epoch(method: Any, data: Any, tracker: Any, folder: Path) -> float:
    """CPU seconds a step of one epoch under the harness, after a first epoch that does not count."""
    import lightning as L
    from qatbench.bench.fit import Recorder, fit
    from qatbench.bench.resolve import Resolved

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.spent: list[float] = []

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.begin = time.process_time()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == trainer.num_training_batches - 1:
                self.spent.append(time.process_time() - self.begin)

    clock = Clock()
    recorder = Recorder(folder, Resolved(method.spec, "perf", "perf", {}, "", None), tracker, None)
    fit(method, data, recorder, callbacks=[clock])
    return min(clock.spent[1:]) / data.steps


def _bare(method: Any, data: Any) -> float:
    """The same by a bare PyTorch loop: same network, batches, loss and optimizer."""
    from torch.nn import functional as F

    opt = method.configure_optimizers()
    net = method.net.train()

    def epoch() -> None:
        for batch in data.train_dataloader():
            opt.zero_grad(set_to_none=True)
            F.cross_entropy(net(batch.x), batch.y).backward()
            opt.step()

    epoch()
    return min(seconds(epoch, time.process_time) for _ in range(2)) / data.steps


def _made_data(images: int, size: int, batch: int) -> Any:
    """A data module of random images."""
    import torch
    from qatbench.bench.data import DataModule, Domain, Loaded

    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, size, size, 3), generator=rng).to(torch.uint8).permute(0, 3, 1, 2)
    domain = Domain("all", pixels, torch.arange(images) % 10)
    return DataModule(Loaded("perf", [domain], f"perf-{images}-{size}", tuple("0123456789"), "shift"), None, 0, batch)


def _float_method(data: Any, net: Any) -> Any:
    """fp32 on a network, ready for three epochs."""
    import torch
    from qatbench.bench.assemble import assemble
    from qatbench.bench.spec import RunSpec

    torch.set_num_threads(1)
    spec = RunSpec(method="fp32", bits="w32a32", epochs=3, batch=data.batch, protocol="single")
    return assemble(spec, net.to(memory_format=torch.channels_last), data.task, data.probe(64))


def harness_step() -> list[Figure]:
    """What the harness adds to a step: against a bare PyTorch loop, and on a network that costs next to nothing."""
    import torch
    from qatbench.bench.registry import find
    from qatbench.bench.tracking import Tracker
    from torch import nn

    data = _made_data(5000, 28, 128)
    build = find("networks", "resnet8")

    def harness() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return _epoch(_float_method(data, build(3, 10)), data, None, Path(folder))

    ratios = in_turn(harness, lambda: _bare(_float_method(data, build(3, 10)), data), rounds=4)
    figures = [Figure("harness step / bare PyTorch step (resnet8, batch 128, CPU seconds)", ratios, "", 1.03)]

    torch.set_num_threads(1)
    small, times = _made_data(8000, 8, 8), []
    for k in range(4):
        with tempfile.TemporaryDirectory() as folder:
            method = _float_method(small, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
            tracker = Tracker(Path(folder), f"perf{k}", {})
            times.append(1000 * _epoch(method, small, tracker, Path(folder)))
            tracker.finish()
    return [*figures, Figure("harness step, one-layer network, W&B on (CPU)", times, "ms", 1.0)]


def _augmented(stored: int, crop: int, images: int) -> Any:
    """A data module of random images, in memory as prepared data sets are: pixel by pixel."""
    import torch
    from qatbench.bench.data import DataModule, Domain, Loaded

    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, stored, stored, 3), generator=rng, dtype=torch.uint8).permute(0, 3, 1, 2)
    domain = Domain("all", pixels, torch.arange(images) % 10)
    loaded = Loaded(
        "perf", [domain], f"perf-{images}-{stored}", tuple("0123456789"), augment="crop-flip", crop=(crop, crop)
    )
    return DataModule(loaded, None, 0, 128)


def augmentation() -> list[Figure]:
    """Gathering, augmenting and normalising batches of 128 uint8 images, one thread, in CPU seconds."""
    import torch
    from qatbench.bench.augment import find_augment

    torch.set_num_threads(1)
    figures = []
    for stored, crop, images, target, names in (
        (32, 32, 20_000, 200_000, ("shift", "crop-flip")),
        (256, 224, 1024, 3_000, ("crop-flip", "resized-crop-flip", "domainbed")),
    ):
        data = _augmented(stored, crop, images)
        for name in names:
            data.augment = find_augment(name, name)
            rates = []
            for epoch in range(6):
                data.epoch = epoch
                batches = data.train_dataloader()
                rates.append(data.steps * data.share / seconds(lambda it=batches: sum(map(len, it)), time.process_time))
            what = f"batches, {name}, {stored} to {crop} pixels, one thread"
            figures.append(Figure(what, rates[1:], "images/s", target, at_most=False))
    return figures


SUITE = """
description: eight short runs that share two float networks
method: [fp32, lsq, dorefa, pact]
seed: [0, 1]
epochs: 2
float_epochs: 1
"""


def workers() -> list[Figure]:
    """Runs an hour with two workers against one, float networks ready."""
    ratios = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        suite = root / "scale.yaml"
        suite.write_text(SUITE)
        sweep = [*QATBENCH, "sweep", str(suite), "--no-wandb"]
        ready = root / "ready"
        subprocess.run([*sweep, "--store", str(ready)], check=True, capture_output=True)
        for round_ in range(3):
            spent = {}
            for n in (1, 2):
                store = root / f"{round_}-{n}"
                store.mkdir()
                for kept in ("float", "data"):
                    os.symlink(ready / kept, store / kept)
                command = [*sweep, "--store", str(store), "--workers", str(n)]
                spent[n] = seconds(lambda: subprocess.run(command, check=True, capture_output=True))  # noqa: B023
            ratios.append(spent[1] / spent[2])
    return [Figure("runs/hour, two workers / one", ratios, "", 1.7, at_most=False)]


def quickstart() -> list[Figure]:
    """The main job on an empty store, and again."""
    with tempfile.TemporaryDirectory() as store:
        command = [*QATBENCH, "quickstart", "--store", store]
        first = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        again = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    return [Figure("quickstart", [first], "s", 240), Figure("quickstart again, nothing to do", [again], "s", 20)]


_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _peak_gb(command: list[str]) -> float:
    """Largest resident set of a command, in GB (10^9 bytes).

    A process between measures it: the kernel counts into a child's peak what its parent held when it was started.
    """
    answer = subprocess.run([sys.executable, "-c", _PEAK, *command], check=True, capture_output=True, text=True).stdout
    return int(answer) * (1 if sys.platform == "darwin" else 1024) / 1e9


def memory() -> list[Figure]:
    """Peak resident memory of a process that prepares the data, trains resnet8 and tests it."""
    name = "digits" if DATA.is_dir() else "optdigits"
    peaks = []
    for method in ("lsq", "kd+lsq"):
        with tempfile.TemporaryDirectory() as store:
            settings = [
                "--set",
                "epochs=1",
                "--set",
                "float_epochs=1",
                *(["--set", "digits.limit=5000"] if name == "digits" else []),
            ]
            root = ["--data-root", str(DATA)] if name == "digits" else []
            command = [*QATBENCH, "run", "--method", method, "--data", name, "--store", store, *settings, *root]
            peaks.append(_peak_gb(command))
    return [Figure(f"peak memory, resnet8 on {name}", peaks, "GB", 1.5)]


_STEPS = """
import sys, time, torch
from torch.nn import functional as F
from qatbench.bench.memory import keep_freed
from qatbench.bench.registry import find
torch.set_num_threads(1)
if sys.argv[1] == "keep": keep_freed()
net = find("networks", "resnet8")(3, 10).to(memory_format=torch.channels_last)
x, y = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (128,))
for step in range(13):
    if step == 3: begin = time.process_time()
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(x), y).backward()
print(time.process_time() - begin)
"""


def kept_memory() -> list[Figure]:
    """What a step costs, user and kernel together, if freed memory is kept for the next one (`bench.memory`)."""

    def steps(how: str) -> float:
        command = [sys.executable, "-c", _STEPS, how]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    ratios = in_turn(lambda: steps("keep"), lambda: steps("not"), 5)
    return [Figure("float resnet8 step, freed memory kept / handed back", ratios, "", 1.0)]


def preparing() -> list[Figure]:
    """Decoding real data sets into an empty store, and opening them again, without the start of Python and torch."""
    from qatbench.bench.data import open_data

    figures = []
    cases = (
        ("digits", {}, 20.0, 3, "MNIST, USPS, MNIST-M and Chars74K prepared"),
        ("office31", {}, 90.0, 2, "Office-31 at 224 prepared"),
    )
    for name, params, target, rounds, what in cases:
        first, again = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as cache:
                first.append(seconds(lambda: open_data(name, params, DATA, Path(cache))))  # noqa: B023
                again += [seconds(lambda: open_data(name, params, DATA, Path(cache))) for _ in range(3)]  # noqa: B023
        figures += [Figure(what, first, "s", target), Figure(f"{name} opened again", again, "s", 0.5)]
    return figures


_READER = """
import re, sys
from pathlib import Path
from qatbench.bench.data import DataModule, open_data
data = DataModule(open_data("digits", {}, Path(sys.argv[1]), Path(sys.argv[2])), "mdl", 0, 128)
for batch in data.train_dataloader(): pass
print("ready", flush=True)
sys.stdin.readline()
pss, ours = [0, 0], False
for line in open("/proc/self/smaps"):
    if re.match(r"[0-9a-f]+-", line): ours = line.rstrip().endswith(".npy")
    elif line.startswith("Pss:"): pss[0] += int(line.split()[1]) * ours; pss[1] += int(line.split()[1])
print(*pss, flush=True)
sys.stdin.readline()
"""


def sharing() -> list[Figure]:
    """Memory of four processes that train on one prepared set, against that of one (Linux: proportional set sizes)."""

    def use(n: int, cache: str) -> tuple[int, int]:
        command = [sys.executable, "-c", _READER, str(DATA), cache]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        readers: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(n)]  # type: ignore[call-overload]
        for reader in readers:
            reader.stdout.readline()
        measured = []
        for reader in readers:  # all are still there
            print(file=reader.stdin, flush=True)
            measured.append([int(word) for word in reader.stdout.readline().split()])
        for reader in readers:
            reader.communicate("\n")
        images, whole = zip(*measured, strict=True)
        return sum(images), sum(whole)

    with tempfile.TemporaryDirectory() as cache:
        use(1, cache)  # prepares
        ratios = [[four / one for four, one in zip(use(4, cache), use(1, cache), strict=True)] for _ in range(3)]
    images, whole = zip(*ratios, strict=True)
    return [
        Figure("memory of the images, four processes / one (digits)", list(images), "", 1.3),
        Figure("memory in all, Python and torch included, four / one", list(whole), "", 4.0),
    ]


def pipeline() -> list[Figure]:
    """What a batch costs beside the float step that it feeds: resnet20, batch 128, 32x32, crop-flip, one thread, CPU seconds."""
    from torch.nn import functional as F

    made, _ = _ready("fp32", "resnet20", 32, 128)
    made.train()
    data = _augmented(32, 32, 128 * 12)
    opt = made.configure_optimizers()
    shares = []
    for epoch in range(4):
        data.epoch, spent, steps = epoch, 0.0, 0.0
        batches = iter(data.train_dataloader())
        for _ in range(data.steps):
            begin = time.process_time()
            batch = next(batches)
            spent += time.process_time() - begin
            begin = time.process_time()
            opt.zero_grad(set_to_none=True)
            F.cross_entropy(made.net(batch.x), batch.y).backward()
            opt.step()
            steps += time.process_time() - begin
        shares.append(100 * spent / steps)
    return [Figure("batches / float resnet20 step", shares[1:], "%", 2.0)]


def export_latency() -> list[Figure]:
    """The exported integer network against the float one, both in ONNX Runtime on one thread."""
    from qatbench.bench.export import export_float, export_method, latency_ratios

    figures = []
    for bits, sums, target in (("w8a8", "int8", 0.75), ("w4a4", "int8", 1.0)):
        made, images = _ready("lsq", "resnet20", 32, 128, bits)
        made.eval()
        ratios = latency_ratios(export_method(made, images.x, sums=sums).model, export_float(made, images.x), images.x)
        what = "exported int8 resnet20" if bits == "w8a8" else "exported w4a4 resnet20, int8 sums"
        figures.append(Figure(f"{what} / float in ONNX Runtime, batch 128", ratios, "", target))
    return figures


ALL = (
    help_answers, lsq_step, method_steps, training_steps, training_memory, brevitas_step, planning, export_latency, harness_step,
    augmentation, pipeline, preparing, sharing, workers, kept_memory, memory, quickstart,
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    names = {f.__name__: f for f in ALL}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    chosen = parser.parse_args().names or list(names)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    table = Table("what", "median", "range", "target", "met")
    for name in chosen:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        for figure in names[name]():
            table.add_row(*figure.row())
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

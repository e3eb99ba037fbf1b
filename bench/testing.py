"""The suites that every method and every data set pass, importable by plugin authors.

    from qatbench.bench.testing import MethodContract

    class TestMine(MethodContract):
        method = "mine"            # a wrapper names what it wraps: "mine+lsq"
        plugin = "path/to/mine.py"  # for a method that is not installed

It trains a small real network on small made images (8x8, three domains, four classes), so that it takes seconds.
`DatasetContract` is the same for data sets: see `dataset_contract`.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from .alone import environment
from .assemble import assemble
from .chain import build, members
from .data import Batch, DataModule, Domain, Loaded
from .dataset_contract import DatasetContract
from .fit import LAST, Recorder, fit, make_trainer, read_checkpoint
from .method import Method, Run
from .models.resnet import CifarResNet
from .quant import Bits, Quantizer, quant_layers, swap
from .registry import load_file
from .resolve import Resolved
from .spec import FLOAT_BITS, RunSpec
from .task import Task

CLASSES, IMAGE = 4, (3, 8, 8)
SPEC: dict[str, Any] = {
    "data": "contract", "network": "resnet8", "bits": "w3a3", "batch": 24, "epochs": 4, "lr": 0.02, "calibration": 48,
    "protocol": "mdl", "first_last": "8bit",
}  # fmt: skip


class TinyNet(CifarResNet):
    """A ResNet-8 of width 8: every kind of site (layers, norms, joints, a head, projections) and 20,000 weights.

    Not narrower: its strided 1x1 convolutions would then take fewer than 8 channels, see `StridedPointwise`.
    """

    blocks = 1
    width = 8


def contract_data(domains: int = 3) -> Loaded:
    """Domains of 80 images whose class is the place of a bright patch; contrast and colour differ by domain."""
    rng = torch.Generator().manual_seed(7)
    made = []
    for d in range(domains):
        labels = torch.arange(80) % CLASSES
        images = torch.randint(0, 70, (80, *IMAGE), generator=rng)
        for k, label in enumerate(labels.tolist()):
            top, left = 4 * (label // 2), 4 * (label % 2)
            images[k, d % 3, top : top + 4, left : left + 4] += 90 + 30 * d
        made.append(Domain(f"d{d}", images.to(torch.uint8), labels))
    return Loaded("contract", made, f"contract-{domains}", tuple("abcd"), "shift")


def ready(method: str, domains: int = 3, *, norm: str = "batch", **settings: Any) -> tuple[Method, DataModule]:
    """A method on the contract's network and data, ready to train; the same arguments give the same weights.

    Args:
        method: A method or a chain.
        domains: Of the data.
        norm: ``batch``, or ``group``: a network without BatchNorm.
        settings: Of the run.
    """
    classes = members(method)
    params = {cls.name: dict(cls.test_params) for cls in classes if cls.test_params}
    protocol = {"protocol": "mdl" if domains > 1 else "single"}
    bits = {"bits": "w32a32"} if tuple(classes[-1].bits) == (FLOAT_BITS,) else {}
    spec = RunSpec(**{**SPEC, "method": method, "params": params, **protocol, **settings, **bits})
    views = max(m.views for m in build(method, params).members)
    data = DataModule(contract_data(domains), spec.protocol, spec.seed, spec.batch, "shift", views=views)
    net = float_net(spec.seed, norm)
    return assemble(spec, net, data.task, data.probe(spec.calibration)), data


def float_net(seed: int = 0, norm: str = "batch") -> nn.Module:
    """The contract's network with initial weights, in channels_last."""
    torch.manual_seed(seed)
    net = TinyNet(IMAGE[0], CLASSES)
    for name, module in list(net.named_modules()):
        if norm == "group" and isinstance(module, nn.BatchNorm2d):
            swap(net, name, nn.GroupNorm(2, module.num_features))
    return net.to(memory_format=torch.channels_last)


def recorder(folder: Path, method: Method) -> Recorder:
    """A recorder that only writes checkpoints and ``metrics.csv``."""
    return Recorder(folder, Resolved(method.spec, "contract", "contract", {}, "", None), None, None)


def train(method: Method, data: DataModule, folder: Path) -> None:
    """Train to the end; takes up a checkpoint that lies in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = (folder / LAST).exists()
    fit(method, data, recorder(folder, method), resume=resume)


def all_train(data: DataModule) -> Batch:
    """Every training image, without augmentation, in one batch."""
    parts = list(data.train_batches(1000))
    x, y, domain = (torch.cat([getattr(p, k) for p in parts]) for k in ("x", "y", "domain"))
    return Batch(x, y, domain)


def state(method: Method) -> dict[str, Tensor]:
    """A copy of everything that a checkpoint of the method would hold."""
    return {name: value.detach().clone() for name, value in method.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that differ, in any bit, between two states."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@torch.no_grad()
def logits(method: Method, net: nn.Module, batch: Batch) -> Tensor:
    """What the method predicts in use."""
    method.scope.domain, method.scope.labels, method.scope.track = batch.domain, None, False
    training = net.training
    out = method.predict(net.eval(), batch)
    net.train(training)
    return out


def quantizers_with_inputs(method: Method, batch: Batch) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """Every quantizer with a tensor that it really meets."""
    seen: dict[str, Tensor] = {}

    def note(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]

    handles = [m.register_forward_pre_hook(functools.partial(note, name)) for name, m in quant_layers(method.net)]
    logits(method, method.net, batch)
    for handle in handles:
        handle.remove()
    for name, layer in quant_layers(method.net):
        if layer.weight_quantizer is not None:
            yield f"{name}.weight", layer.weight_quantizer, layer.weight.detach()
        if layer.act_quantizer is not None:
            yield f"{name}.input", layer.act_quantizer, seen[name].detach()


class _StopHere(Exception):
    """Stands for the kill."""


class _Killer(L.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise _StopHere


class MethodContract:
    """What every method must do. Subclass it, set ``method``, and let pytest find the subclass."""

    method: ClassVar[str]
    plugin: ClassVar[str | None] = None

    @pytest.fixture(autouse=True)
    def _plugin(self) -> None:
        if self.plugin is not None:
            load_file(self.plugin)
        torch.set_num_threads(1)

    @pytest.fixture
    def trains(self) -> None:
        """Skips what only a method that trains can show."""
        if not self._cls().trains:
            pytest.skip(f"{self.method} does not train")

    def _cls(self) -> type[Method]:
        return members(self.method)[-1]

    def _widths(self) -> list[int]:
        return [b for b in (2, 3, 4, 8) if b in self._cls().bits] or [FLOAT_BITS]

    def test_builds_at_every_width(self) -> None:
        """A user could not run the method at bits that it claims to support."""
        for width in self._widths():
            method, _ = ready(self.method, bits=f"w{width}a{width}")
            assert torch.isfinite(logits(method, method.net, method.probe)).all(), f"{width} bits"

    def test_loss_falls(self, trains: None, tmp_path: Path) -> None:
        """The method would not learn."""
        method, data = ready(self.method)
        batch = all_train(data)
        before = data.task.losses(logits(method, method.net, batch), batch)["task"]
        train(method, data, tmp_path)
        after = data.task.losses(logits(method, method.net, batch), batch)["task"]
        assert after < before

    def test_every_parameter_gets_a_gradient(self, trains: None) -> None:
        """A parameter would stay at its starting value for ever; or the loss would not reach it."""
        method, data = ready(self.method)
        reached: dict[str, bool] = {}

        class Watch(L.Callback):
            def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        has = parameter.grad is not None and bool(parameter.grad.any())
                        reached[name] = reached.get(name, False) or has

        make_trainer(torch.device("cpu"), epochs=2, callbacks=[Watch()]).fit(method, data)
        assert reached
        assert [name for name, has in reached.items() if not has] == []

    def test_codes(self, tmp_path: Path) -> None:
        """A width would be a claim, or the deployed integers would not be the numbers that were trained."""
        for width in self._widths():
            method, data = ready(self.method, bits=f"w{width}a{width}", epochs=1)
            if method.trains:
                train(method, data, tmp_path / str(width))
            method.eval()
            images = all_train(data)
            for name, quantizer, x in quantizers_with_inputs(method, images):
                method.scope.domain = images.domain
                check_codes(name, quantizer, x)
                method.scope.domain = method.probe.domain
                wild = torch.randn(len(method.probe), *x.shape[1:], generator=torch.Generator().manual_seed(0)) * 10
                if not name.endswith(".weight"):
                    check_codes(name, quantizer, wild if quantizer.signed else wild.relu())

    def test_evaluation_moves_no_state(self, tmp_path: Path) -> None:
        """A number would depend on how often one looked at it."""
        method, data = ready(self.method, epochs=1)
        if method.trains:
            train(method, data, tmp_path)
        method.eval()
        before, rng = state(method), torch.get_rng_state()
        first = logits(method, method.net, method.probe)
        second = logits(method, method.net, method.probe)
        assert same(before, state(method)) == []
        assert torch.equal(first, second)
        assert torch.equal(rng, torch.get_rng_state())

    def test_second_pass_moves_no_statistics(self, trains: None) -> None:
        """A two-pass wrapper around this method would move running statistics twice a step."""
        method, data = ready(self.method)
        method.train()
        buffers = {name: value.clone() for name, value in method.named_buffers()}
        with torch.no_grad():
            method.compute_losses(next(iter(data.train_dataloader())), track=False)
        moved = [name for name, value in method.named_buffers() if not torch.equal(value, buffers[name])]
        assert moved == []

    def test_resume_equals_uninterrupted(self, trains: None, tmp_path: Path) -> None:
        """A run that was killed would end with other weights than one that was not."""
        whole, data = ready(self.method)
        train(whole, data, tmp_path / "whole")
        killed, data = ready(self.method)
        (tmp_path / "killed").mkdir()
        callbacks = [recorder(tmp_path / "killed", killed), _Killer(epoch=2)]
        with pytest.raises(_StopHere):
            make_trainer(torch.device("cpu"), epochs=killed.spec.epochs, callbacks=callbacks).fit(killed, data)
        saved = read_checkpoint(tmp_path / "killed" / LAST)
        assert saved is not None
        plan = {name: Bits(*bits) for name, bits in saved["qatbench"]["plan"].items()}
        again, data = ready(self.method)
        again = assemble(again.spec, float_net(), data.task, data.probe(48), plan)
        train(again, data, tmp_path / "killed")
        assert same(state(whole), state(again)) == []

    def test_plan_keeps_the_budget(self) -> None:
        """A mixed-precision plan would compare more bits with fewer."""
        for width in self._widths():
            method, _ = ready(self.method, bits=f"w{width}a{width}")
            inner = [s for s in method.sites if s.kind == "layer" and not s.edge]
            asked = (width, FLOAT_BITS if method.weights_only else width)
            for kind, size in ((0, "weights"), (1, "inputs")):
                spent = sum(getattr(s, size) * method.bit_plan[s.name][kind] for s in inner)
                assert spent <= asked[kind] * sum(getattr(s, size) for s in inner)

    def test_no_site_is_skipped(self) -> None:
        """A layer would stay in float while the table says that it has few bits."""
        method, _ = ready(self.method)
        placed = dict(quant_layers(method.net))
        layers = [s.name for s in method.sites if s.kind == "layer"]
        assert sorted(method.bit_plan) == sorted(layers)
        for name, bits in method.bit_plan.items():
            layer = placed.get(name)
            assert (bits.w < FLOAT_BITS) == (layer is not None and layer.weight_quantizer is not None), name
            assert (bits.a < FLOAT_BITS) == (layer is not None and layer.act_quantizer is not None), name

    def test_same_seed_same_weights(self, trains: None, tmp_path: Path) -> None:
        """A result could not be reproduced."""
        states = []
        for folder in ("one", "two"):
            method, data = ready(self.method, epochs=1)
            train(method, data, tmp_path / folder)
            states.append(state(method))
        assert same(*states) == []

    def test_one_domain_works_as_well(self, trains: None, tmp_path: Path) -> None:
        """The method could not be run on an ordinary data set."""
        method, data = ready(self.method, domains=1, epochs=1)
        train(method, data, tmp_path)
        assert torch.isfinite(logits(method, method.net, method.probe)).all()

    def test_accumulation_clipping_and_bf16(self, trains: None, tmp_path: Path) -> None:
        """The method would break under a setting that the harness offers for all of them."""
        settings = {"accumulate": 2, "clip": 1.0, "precision": "bf16", "optimizer": "adamw", "epochs": 1}
        method, data = ready(self.method, **settings)
        train(method, data, tmp_path)
        assert all(torch.isfinite(value).all() for value in state(method).values() if value.is_floating_point())

    def test_float_weights_load(self) -> None:
        """Training would start from other weights than the float network's."""
        method, _ = ready(self.method)
        float_state, ours = float_net().state_dict(), method.net.state_dict()
        replaced = {name for name in float_state if name not in ours}
        parts = {s.name for s in method.sites if s.kind != "layer"}
        assert all(any(name.startswith(f"{part}.") for part in parts) for name in replaced), replaced
        kept = [name for name in float_state if name.endswith("weight") and name in ours and ours[name].ndim > 1]
        assert kept
        assert [name for name in kept if not torch.equal(float_state[name], ours[name])] == []

    def test_deployed_form_agrees(self, tmp_path: Path) -> None:
        """What is shipped would not be what was measured."""
        method, data = ready(self.method, epochs=1)
        if method.trains:
            train(method, data, tmp_path)
        method.eval()
        batch = all_train(data)
        shipped = method.deploy(Run(method))
        ours, theirs = logits(method, method.net, batch), logits(method, shipped, batch)
        assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.99
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_two_ranks_agree(self, trains: None, tmp_path: Path) -> None:
        """Distributed training would hang, or its ranks would drift apart."""
        states = two_ranks(self.method, self.plugin, tmp_path)
        for moment in ("before", "after"):
            differ = same(states[0][moment], states[1][moment])
            assert differ == [], f"{moment} training"
        assert same(states[0]["before"], states[0]["after"]) != []


def check_codes(name: str, quantizer: Quantizer, x: Tensor) -> None:
    """At most ``2**bits`` integer codes, whose decoded values are the quantizer's output, to the bit."""
    with torch.no_grad():
        codes, decode = quantizer.encode(x)
        values = quantizer(x)
    assert not codes.is_floating_point(), name
    assert codes.unique().numel() <= 2**quantizer.bits, name
    assert torch.equal(decode(codes), values), name


def two_ranks(
    method: str, plugin: str | None, folder: Path, norm: str = "batch", steps: int | None = None
) -> list[dict[str, dict[str, Tensor]]]:
    """Train one epoch, or its first steps, on two CPU processes (gloo); each rank's parameters before and after."""
    with tempfile.TemporaryDirectory() as meeting:
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        processes = []
        for rank in (0, 1):
            command = [sys.executable, "-m", __name__, method, plugin or "", str(folder), norm, str(steps or "")]
            env = {**environment(), **place, "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            log = open(Path(meeting) / f"{rank}.txt", "w")  # noqa: SIM115
            processes.append((subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=meeting), log))
        for rank, (process, log) in enumerate(processes):
            try:
                process.wait(timeout=180)
            except subprocess.TimeoutExpired:
                for other, _ in processes:
                    other.kill()
                raise AssertionError(f"rank {rank} hangs: do the ranks call backward equally often?") from None
            finally:
                log.close()
            if process.returncode != 0:
                for other, _ in processes:
                    other.kill()
                raise AssertionError((Path(meeting) / f"{rank}.txt").read_text()[-3000:])
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def check_ranks(method: str, folder: Path, steps: int = 4) -> None:
    """Two processes with half a batch each end where one process with the whole batch does, to float tolerance.

    The network has no BatchNorm, whose statistics are each process's own. Each tensor may be off by 1 % of the distance it
    moved: sums in another order put a rare value on the other side of a rounding boundary; without those it is under 1e-4.
    """
    both = two_ranks(method, None, folder, "group", steps)[0]
    alone, data = ready(method, norm="group")
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    assert same(before, both["before"]) == []
    make_trainer(torch.device("cpu"), limit_train_batches=steps).fit(alone, data)
    for name, p in alone.named_parameters():
        moved, theirs = p.detach() - before[name], both["after"][name] - before[name]
        assert float((theirs - moved).norm()) <= 0.01 * float(moved.norm()) + 1e-7, name


def _one_rank(method_name: str, plugin: str, folder: str, norm: str, steps: str) -> None:
    """What each process of `two_ranks` does."""
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    torch.set_num_threads(1)
    if plugin:
        load_file(plugin)
    rank = int(os.environ["LOCAL_RANK"])
    method, _ = ready(method_name, norm=norm)
    spec = method.spec
    data = DataModule(
        contract_data(), spec.protocol, spec.seed, spec.batch, "shift", views=method.views, rank=rank, world=2
    )

    def parameters() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in method.named_parameters()}

    before = parameters()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, plugins=[LightningEnvironment()], max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, limit_train_batches=int(steps) if steps else None,
    )  # fmt: skip
    trainer.fit(method, data)
    torch.save({"before": before, "after": parameters()}, Path(folder) / f"rank{rank}.pt")


def check_pair(method: str) -> None:
    """The short form of the contract, for every other pair of wrapper and method: build, step, resume, codes; under a second."""
    one, data = ready(method, epochs=1)
    batches = list(data.train_dataloader())[:2]
    one.to(torch.device("cpu"))
    reason = one.skip(data.task)
    if reason is not None:
        pytest.skip(reason)
    loop = Loop(one, data)
    loop.epoch(batches[:1])
    middle = copy.deepcopy({"state": one.state_dict(), "opt": loop.run.opt.state_dict()})
    loop.epoch(batches[1:], 1)
    other, data = ready(method, epochs=1)
    again = Loop(other, data)
    other.load_state_dict(middle["state"])
    again.run.opt.load_state_dict(middle["opt"])
    again.epoch(batches[1:], 1)
    assert same(state(one), state(other)) == []
    one.eval()
    for name, quantizer, x in quantizers_with_inputs(one, all_train(data)):
        check_codes(name, quantizer, x)


class Loop:
    """Training steps without a Lightning Trainer, whose start alone takes longer than they do."""

    training = True  # what a method may ask of its trainer

    def __init__(self, method: Method, data: DataModule) -> None:
        self.method, self.datamodule, self.current_epoch = method, data, 0
        method.trainer = self  # type: ignore[assignment]
        method.manual_backward = lambda loss, *a, **k: loss.backward()  # type: ignore[method-assign]
        method.scope.epochs, method.scope.steps = method.spec.epochs, method.spec.epochs * data.steps
        self.run = method.run_in_progress = Run(method)
        self.run.opt = method.configure_optimizers()

    def epoch(self, batches: list[Batch], epoch: int = 0) -> list[float]:
        """One epoch of these batches; the sum of the losses of each step."""
        method, run, losses = self.method.train(), self.run, []
        self.current_epoch = method.scope.epoch = epoch
        method.scope.step = epoch * self.datamodule.steps
        with torch.no_grad():
            if epoch == 0:
                for member in method.members:
                    member.start(run, method.stages(method.spec.epochs)[0])
            for member in method.members:
                member.epoch_start(run)
        for step, batch in enumerate(batches):
            torch.manual_seed(step)
            run.batch = batch
            for group in run.opt.param_groups:
                group["lr"] = method.spec.lr * group["lr_scale"]
            before = sum(float(v) for v in method.losses_seen.values())
            method.step(run)
            losses.append(sum(float(v) for v in method.losses_seen.values()) - before)
            method.scope.step += 1
        return losses


__all__ = [
    "DatasetContract",
    "Loop",
    "MethodContract",
    "Task",
    "check_codes",
    "check_pair",
    "check_ranks",
    "contract_data",
    "float_net",
    "ready",
    "train",
]

if __name__ == "__main__":
    _one_rank(*sys.argv[1:])

"""A plugin's hooks may raise or return anything: the run fails with the hook's name, and nothing else happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from qatbench.bench.errors import RunFailed, UserError
from qatbench.bench.hooks import OF_METHOD, OF_QUANTIZER
from qatbench.bench.method import Method, Run
from qatbench.bench.quant import Quantizer
from qatbench.bench.testing import logits, ready, train

Plug = Callable[..., Path]

RAISES = ["StopIteration", "SystemExit", "GeneratorExit", "MemoryError", "KeyError", "RecursionError"]


def everything(method: str, folder: Path, bits: str = "w3a3") -> None:
    """Build, train, use and deploy: every hook is called, those of a budget if the bits are one."""
    made, data = ready(method, epochs=1, bits=bits)
    made.skip(data.task)
    train(made, data, folder)
    made.deploy(Run(made))
    logits(made, made.net, made.probe)


@pytest.mark.parametrize("hook", [*OF_METHOD])
def test_what_a_hook_raises_is_told_with_its_name(hook: str, plug: Plug, tmp_path: Path) -> None:
    """An epoch would end in silence (StopIteration), or a sweep (SystemExit), or the reason would be a bare KeyError."""
    error = RAISES[list(OF_METHOD).index(hook) % len(RAISES)]
    plug(f"""
    class Cheap(LSQ):  # the Hessian's trace takes seconds
        def harm(self, sites, widths, probe):
            self.quantized(sites, probe)
            return {{site.name: {{width: 1.0 for width in widths}} for site in sites}}
    class Wild(Cheap):
        name = "wild"
        def {hook}(self, *args):
            raise {error}("of the plugin")
    """)
    bits = "avg3" if hook in ("harm", "allocate", "quantized") else "w3a3"
    with pytest.raises(RunFailed) as caught:
        everything("wild", tmp_path / "run", bits)
    said = "'of the plugin'" if error == "KeyError" else "of the plugin"
    assert str(caught.value) == f"wild.{hook} raised {error}: {said}"


@pytest.mark.parametrize("error", RAISES)
def test_no_error_ends_training_in_silence(error: str, plug: Plug, tmp_path: Path) -> None:
    """A run that trained half an epoch would be `done`."""
    plug(f"""
    class Wild(LSQ):
        name = "wild"
        def losses(self, out, batch):
            if self.scope.step == 3:
                raise {error}()
            return super().losses(out, batch)
    """)
    method, data = ready("wild", epochs=1)
    with pytest.raises(RunFailed, match=rf"^wild.losses raised {error}$"):
        train(method, data, tmp_path / "run")


def test_ctrl_c_in_a_hook_is_ctrl_c(plug: Plug, tmp_path: Path) -> None:
    """Whoever presses it while a hook runs would see the run fail, and the sweep go on."""
    plug("""
    class Slow(LSQ):
        name = "slow"
        def losses(self, out, batch):
            raise KeyboardInterrupt
    """)
    method, data = ready("slow", epochs=1)
    with pytest.raises(KeyboardInterrupt):
        train(method, data, tmp_path / "run")


WRONG = {
    "plan": ["None", "{'nowhere': Bits(2, 2)}", "{s.name: 3 for s in args[0] if s.kind == 'layer'}",
             "{s.name: (33, 2) for s in args[0] if s.kind == 'layer'}"],
    "weight_quantizer": ["None", "nn.Identity()", "LSQ.weight_quantizer(self, args[0] + 1, *args[1:])"],
    "act_quantizer": ["None", "3"],
    "replace": ["None", "'bn1'"],
    "taps": ["None", "'conv1'", "[3]"],
    "param_groups": ["None", "[{'params': []}]", "LSQ.param_groups(self, *args) * 2"],
    "stages": ["None", "[]", "[Stage('train', args[0] - 1)]", "['train']"],
    "frozen": ["None", "[3]", "'conv1'"],
    "losses": ["None", "{}", "0.5", "{'task': 0.5}", "{'task': torch.ones(3)}"],
    "predict": ["None", "torch.ones(3)", "(LSQ.predict(self, *args),)", "LSQ.predict(self, *args).long()"],
    "deploy": ["None"],
    "skip": ["''", "False"],
}  # fmt: skip


@pytest.mark.parametrize(("hook", "value"), [(hook, value) for hook, values in WRONG.items() for value in values])
def test_what_a_hook_returns_is_checked(hook: str, value: str, plug: Plug, tmp_path: Path) -> None:
    """A forgotten return would leave a layer in float, or be told by torch in words that nobody connects with it."""
    plug(f"""
    class Wild(LSQ):
        name = "wild"
        def {hook}(self, *args):
            return {value}
    """)
    with pytest.raises(RunFailed, match=rf"^wild\.{hook} returned .*; expected "):
        everything("wild", tmp_path / "run")


def test_losses_without_a_gradient(plug: Plug, tmp_path: Path) -> None:
    """Torch would say that element 0 of tensors does not require grad."""
    plug("""
    class Wild(LSQ):
        name = "wild"
        def losses(self, out, batch):
            return {"task": super().losses(out, batch)["task"].detach()}
    """)
    method, data = ready("wild", epochs=1)
    with pytest.raises(RunFailed, match=r"^wild.losses returned losses without a gradient"):
        train(method, data, tmp_path / "run")


def test_the_guilty_member_of_a_chain_is_named(plug: Plug, tmp_path: Path) -> None:
    """The wrapper would be blamed for what the method inside it returns."""
    plug("""
    class Inner(LSQ):
        name = "inner"
        def losses(self, out, batch):
            pass
    """)
    method, data = ready("kd+inner", epochs=1)
    with pytest.raises(RunFailed, match=r"^inner.losses returned None; expected a dict"):
        train(method, data, tmp_path / "run")


@pytest.mark.parametrize(
    ("body", "message"),
    [("pass", "wild.step has never called run.backward"), ("run.backward()", "wild.step has never called run.update")],
)
def test_a_step_that_trains_nothing(body: str, message: str, plug: Plug, tmp_path: Path) -> None:
    """The float network's accuracy would stand in the table as the method's."""
    plug(f"""
    class Wild(LSQ):
        name = "wild"
        def step(self, run):
            {body}
    """)
    method, data = ready("wild", epochs=1)
    with pytest.raises(RunFailed, match=message):
        train(method, data, tmp_path / "run")


QUANTIZER = """
    from qatbench.bench.quant import UniformQuantizer
    class Odd(UniformQuantizer):
        def {hook}(self, *args):
            {body}
    class Wild(LSQ):
        name = "wild"
        def act_quantizer(self, bits, site, scope):
            return Odd(bits, site, scope, site.signed_input)
"""


@pytest.mark.parametrize(
    ("hook", "body", "message"),
    [
        ("fit", "raise StopIteration", "Odd.fit raised StopIteration"),
        ("quantize", "pass", "Odd.quantize returned None; expected a tensor like the input, torch.float32"),
        ("quantize", "return args[0][:1]", "Odd.quantize returned a tensor"),
        ("quantize", "return args[0].double()", "Odd.quantize returned a tensor torch.float64"),
        ("project", "raise KeyError('step')", "Odd.project raised KeyError"),
    ],
)
def test_quantizers_are_guarded_too(hook: str, body: str, message: str, plug: Plug, tmp_path: Path) -> None:
    """An error inside a network's forward pass would be told without a word of where it comes from."""
    plug(QUANTIZER.format(hook=hook, body=body))
    with pytest.raises(RunFailed, match=f"^{message}"):
        everything("wild", tmp_path / "run")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("version = '2'", "wild.version is '2'; expected a whole number from 1 on"),
        ("bits = 4", "wild.bits is 4; expected widths"),
        ("bits = (2, 40)", r"wild.bits is \(2, 40\)"),
        ("fidelity = 'exact'", "wild.fidelity is 'exact'; expected 'paper', 'reconstruction' or 'baseline'"),
        ("views = 0", "wild.views is 0"),
        ("first_last = '8bits'", "wild.first_last is '8bits'; expected '8bit', 'fp' or 'same', .*did you mean '8bit'"),
        ("first_last = ('fp', 'sam')", "did you mean 'same'"),
        ("first_last = 'native'", "expected '8bit', 'fp' or 'same', or two of them"),
        ("first_last = ('fp',) * 3", "wild.first_last is .*expected"),
        ("first_last = 8", "wild.first_last is 8; expected"),
        ("teacher = 'me'", "wild.teacher is 'me'"),
        ("alters = 'loss'", "wild.alters is 'loss'; expected a frozenset of names"),
        ("trains = None", "wild.trains is None; expected True or False"),
        ("Params = dict", "wild.Params is .*; expected a subclass of"),
        ("test_params = None", "wild.test_params is None"),
        ("losses = None", "Wild.losses is None; it must be a function"),
    ],
)
def test_class_attributes_are_checked_when_a_plugin_is_loaded(attribute: str, message: str, plug: Plug) -> None:
    """A typing mistake would come out in the midst of a sweep, as an error of another place."""
    with pytest.raises(UserError, match=message):
        plug(f"class Wild(LSQ):\n    name = 'wild'\n    {attribute}\n")


def test_every_hook_of_the_contract_is_guarded() -> None:
    """A hook that is added to the contract would have no guard, and nobody would notice."""
    final = {
        "attach",
        "compute_losses",
        "record_losses",
        "epoch_losses",
        "update",
        "use",
        "train",
        "configure_optimizers",
    }
    public = {
        name for name, value in vars(Method).items()
        if inspect.isfunction(value) and not name.startswith(("_", "on_")) and not name.endswith("_step")
    }  # fmt: skip
    assert public - final == set(OF_METHOD)
    quantizer = {
        name for name, value in vars(Quantizer).items() if inspect.isfunction(value) and not name.startswith("_")
    }
    assert quantizer - {"forward", "extra_repr"} == set(OF_QUANTIZER)

"""A finished run as an integer ONNX file, held against the run in ONNX Runtime: same images, same predictions, how fast."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .data import Batch
from .disk import one_line, replace_file
from .errors import UserError
from .method import Method
from .quant import QuantLayer, quant_layers, swap
from .quant.export import FOUR_BITS, OnnxLayer, onnx_net
from .quant.integer import IntegerReport, check_integers
from .runner import Finished, load_run
from .store import Store

OPSETS = range(18, 26)  # 18: the first that torch exports to; 25: the last that the tests have run
DEFAULT_OPSET = 20
PROBE = 512  # training images on which grids are looked at
LATENCY_BATCH, LATENCY_ROUNDS = 128, 15
EXTRA = ("onnx", "onnxscript", "onnxruntime")
MODEL, FLOAT_MODEL = "model.onnx", "float.onnx"

Sums = Literal["auto", "int8", "float"]


class NoIntegerForm(Exception):
    """The method cannot be exported; the message is the reason, in one line."""


@dataclass(frozen=True)
class Exported:
    """An exported network.

    Attributes:
        model: ONNX ModelProto; ``images`` (float [B, C, H, W], normalised) to ``logits`` (float [B, classes]).
        opset: Of the ONNX operators.
        sums: What residual sums are kept as.
    """

    model: Any
    opset: int
    sums: Literal["int8", "float"]


def export_method(method: Method, images: Tensor, opset: int = DEFAULT_OPSET, sums: Sums = "auto") -> Exported:
    """Export a method's network as it is used: `Method.predict`, its layers on integers.

    Args:
        method: In eval mode, on the CPU.
        images: float [B, C, H, W], of the training split: grids are looked at on them, and residual sums are scaled to them.
        opset: One of `OPSETS`. From 21 on, weights and inputs of at most 4 bits are INT4 and UINT4.
        sums: What biases and residual sums are kept as. Methods leave them in float; ``int8`` rounds biases to the grid of the
            integer sums and residual sums to eight bits, so that the runtime need not leave the integers between two layers.
            ``auto`` does it where all layers read eight bits themselves: with fewer, the rounding moves too many predictions.

    Raises:
        NoIntegerForm: The network has no layer on integers, or its grids depend on what a file cannot know.
        UserError: The extra is not installed, or the opset is out of range.
    """
    _check_request(opset)
    from .quant.onnx_graph import four_bit_weights, integer_sums

    _check_form(method, images)
    wide = all(bits.a == 8 for bits in method.bit_plan.values())
    rounds = sums == "int8" or (sums == "auto" and wide)
    try:
        net = onnx_net(method.net, method.sites, images, four=opset >= FOUR_BITS, integer_bias=rounds)
    except ValueError as error:
        raise NoIntegerForm(str(error)) from error
    model = _to_onnx(_Predicts(method, net), images, opset)
    if opset >= FOUR_BITS:
        four_bit_weights(model)
    layers = [layer for layer in net.modules() if isinstance(layer, OnnxLayer)]
    eight = opset < FOUR_BITS or all(min(bits) > 4 for bits in method.bit_plan.values())
    if not (rounds and eight and all(layer.integer for layer in layers)):
        return Exported(model, opset, "float")
    integer_sums(model, lambda model, names: _values(model, names, images))
    return Exported(model, opset, "int8")


def export_float(method: Method, images: Tensor, opset: int = DEFAULT_OPSET) -> Any:
    """The same network without quantizers, as an ONNX ModelProto: what an integer file's latency is held against."""
    import copy

    _check_request(opset)
    net = copy.deepcopy(method.net).eval()
    for name, layer in list(quant_layers(net)):
        swap(net, name, _plain(layer))
    return _to_onnx(_Predicts(method, net), images, opset)


def _plain(layer: QuantLayer) -> nn.Module:
    """The layer without its quantizers."""
    layer.weight_quantizer = layer.act_quantizer = None
    return layer


def _check_request(opset: int) -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install 'qatbench[export]'")
    if opset not in OPSETS:
        raise UserError(f"opset {opset} is out of range; give one from {OPSETS[0]} to {OPSETS[-1]}")


def _check_form(method: Method, images: Tensor) -> None:
    """Refuse what has no integer form, with the reason."""
    quantizers = [
        q for _, layer in quant_layers(method.net) for q in (layer.weight_quantizer, layer.act_quantizer) if q
    ]
    if not quantizers:
        raise NoIntegerForm(f"{method.name} at {method.spec.bits} has no quantized layer: its network is float")
    if any(q.per == "domain" for q in quantizers):
        raise NoIntegerForm(
            f"{method.name} has a grid for each domain, and an image does not say which domain it is of"
        )
    if any(q.by_sample for q in quantizers):
        raise NoIntegerForm(f"{method.name} has other thresholds for each image, by a first pass over it")
    known = logits(method, method.net, images, method.probe.domain[0].expand(len(images)))
    if not torch.equal(known, logits(method, method.net, images)):
        raise NoIntegerForm(f"{method.name} predicts by the image's domain, which an image does not say")


class _Predicts(nn.Module):
    """What is exported: the outermost method's prediction with a network. The method's own copy of the network stays outside."""

    def __init__(self, method: Method, net: nn.Module) -> None:
        super().__init__()
        self.net, self._method = net, [method]

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        unknown = images.new_zeros(images.shape[:1], dtype=torch.int64)  # not by len(), which would fix the batch
        return self._method[0].predict(self.net, Batch(images, unknown, unknown - 1))


@torch.no_grad()
def logits(method: Method, net: nn.Module, images: Tensor, domain: Tensor | None = None) -> Tensor:
    """Logits (float [B, classes]) that the method predicts with a network; ``domain`` int64 [B], default: unknown."""
    domain = torch.full((len(images),), -1) if domain is None else domain
    method.scope.domain, method.scope.labels, method.scope.track = domain, None, False
    return method.predict(net, Batch(images, torch.zeros_like(domain), domain))


def _to_onnx(net: nn.Module, images: Tensor, opset: int) -> Any:
    """ONNX ModelProto with any number of images, checked.

    Raises:
        NoIntegerForm: The network does something that has no ONNX operator.
    """
    import onnx

    from .quant.onnx_graph import strip

    example = images[:2].contiguous()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                net.eval(), (example,), dynamo=True, opset_version=opset, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: "batch"},), verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise NoIntegerForm(f"the network has no ONNX form: {' '.join(str(cause).split())[:200]}") from error
    assert program is not None
    model = program.model_proto
    strip(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of itself, on every way out."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class Session:
    """A model in ONNX Runtime, on the CPU and one thread."""

    def __init__(self, model: Any, keep: Path | None = None) -> None:
        """keep: where to write the graph as the runtime has changed it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        if keep is not None:
            options.optimized_model_filepath = str(keep)
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images, float [B, C, H, W]."""
        return torch.from_numpy(self.session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _values(model: Any, names: Sequence[str], images: Tensor) -> dict[str, Any]:
    """See `bench.quant.onnx_graph.Values`."""
    import copy

    from onnx import TensorProto, helper

    model = copy.deepcopy(model)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n not in known
    )
    values = Session(model).session.run(names, {"images": images.contiguous().numpy()})
    return dict(zip(names, values, strict=True))


def operators(model: Any) -> dict[str, int]:
    """How often ONNX Runtime executes each operator, after its own changes to the graph."""
    import tempfile

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        Session(model, keep=path)
        return dict(collections.Counter(node.op_type for node in onnx.load(str(path)).graph.node))


def latency_ratios(model: Any, other: Any, images: Tensor, rounds: int = LATENCY_ROUNDS) -> list[float]:
    """Latency of one model over that of another on the same images, measured in turn."""
    one, two = Session(model), Session(other)
    for session in (one, two):
        _seconds(session, images)
    return [_seconds(one, images) / _seconds(two, images) for _ in range(rounds)]


def _seconds(session: Callable[[Tensor], Tensor], images: Tensor) -> float:
    begin = time.perf_counter()
    session(images)
    return time.perf_counter() - begin


def types(model: Any) -> dict[str, list[str]]:
    """Integer types of the weights and the activations in a model, by name."""
    from onnx import TensorProto

    initial = {t.name: t for t in model.graph.initializer}
    weights = {t.data_type for t in initial.values() if len(t.dims) > 1} - {TensorProto.FLOAT}
    activations = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            given = [a.i for a in node.attribute if a.name == "output_dtype"]
            activations.add(given[0] if given else initial[node.input[2]].data_type)
        elif (
            node.op_type == "Gather"
            and node.input[0] in initial
            and initial[node.input[0]].data_type == TensorProto.UINT8
        ):
            activations.add(TensorProto.UINT8)  # a table of integers
    names = {"weights": weights, "activations": activations}
    return {name: sorted(TensorProto.DataType.Name(kind).lower() for kind in kinds) for name, kinds in names.items()}


def export_run(
    store: Store,
    run_id: str,
    *,
    data_root: Path | None = None,
    out: Path | None = None,
    opset: int = DEFAULT_OPSET,
    sums: Sums = "auto",
) -> dict[str, Any]:
    """Export a finished run, hold the file against the run on its test images, and put what was found into its record.

    Args:
        store: Where the run lies.
        run_id: Its id, or the beginning of it.
        data_root: Where the user keeps data sets.
        out: The file; default: ``model.onnx`` in the run's folder. The float network lies beside it as ``float.onnx``.
        opset: See `export_method`.
        sums: See `export_method`.

    Returns:
        The record's ``export``: ``status`` (``done``, or ``none`` with the ``reason``), ``agreement`` (share of test images for
        which ONNX Runtime and the run, in the ``precision`` that it was measured in, predict the same class), ``acc`` (mean over
        test domains, in ONNX Runtime), ``latency_ratio`` against the float network (median and range), and what the file is
        made of.

    Raises:
        UserError: The run, the extra, the opset or the place of the file is not as it must be.
    """
    _check_request(opset)
    run = load_run(store, run_id, data_root=data_root)
    run_id = run.record["run_id"]
    images = run.data.probe(PROBE).x
    try:
        exported = export_method(run.method, images, opset, sums)
        plain = export_float(run.method, images, opset)
    except NoIntegerForm as reason:
        section: dict[str, Any] = {"status": "none", "reason": str(reason)}
        store.add(run_id, "export", section)
        return section
    path = out or store.path(run_id) / MODEL
    files = {"file": path, "float_file": path.with_name(FLOAT_MODEL)}
    for file, model in zip(files.values(), (exported.model, plain), strict=True):
        _write(file, model.SerializeToString())
    section = {
        "status": "done",
        "reason": None,
        **{name: str(file) for name, file in files.items()},
        "bytes": path.stat().st_size,
        "float_bytes": files["float_file"].stat().st_size,
        "opset": opset,
        "types": types(exported.model),
        "sums": exported.sums,
        "precision": run.method.spec.precision,
        "operators": operators(exported.model),
        **_tested(run, Session(exported.model)),
        **_latency(exported.model, plain, images),
        "versions": {name: importlib.metadata.version(name) for name in EXTRA},
    }
    store.add(run_id, "export", section)
    return section


def _write(path: Path, content: bytes) -> None:
    """The file, whole or not at all."""
    with one_line(path, "give another file with --out"):
        replace_file(path, content)


def _tested(run: Finished, session: Session) -> dict[str, Any]:
    """Agreement and accuracy on the run's test images, which it has been measured on before."""
    same, right = [], []
    for domain, loader in zip(run.data.test_domains, run.data.open_test(), strict=True):
        hits = []
        for batch in loader:
            with torch.no_grad():
                ours = run.method.use(batch).argmax(1)
            theirs = session(batch.x).argmax(1)
            same.append(ours == theirs)
            hits.append(theirs == batch.y)
        if domain in run.data.protocol.test:
            right.append(float(torch.cat(hits).double().mean()))
    every = torch.cat(same)
    return {"agreement": float(every.double().mean()), "images": len(every), "acc": statistics.mean(right)}


def _latency(model: Any, plain: Any, images: Tensor) -> dict[str, Any]:
    batch = images[torch.arange(LATENCY_BATCH) % len(images)]
    ratios = latency_ratios(model, plain, batch)
    return {
        "latency_ratio": statistics.median(ratios),
        "latency_range": [min(ratios), max(ratios)],
        "latency_batch": LATENCY_BATCH,
    }


def check_run(store: Store, run_id: str, *, data_root: Path | None = None, images: int = 500) -> IntegerReport:
    """Hold a finished run against the integer reference, on the first of its test images; see `check_integers`."""
    run = load_run(store, run_id, data_root=data_root)
    batches = [batch for loader in run.data.open_test() for batch in loader]
    x, domain = (torch.cat([getattr(b, k) for b in batches])[:images] for k in ("x", "domain"))
    return check_integers(run.method.net, x, lambda net, x: logits(run.method, net, x, domain))

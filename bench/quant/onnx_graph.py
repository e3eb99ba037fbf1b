"""What is done to an exported ONNX graph: residual sums on integers, four-bit weights, and nothing of this machine in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Values = Callable[[Any, Sequence[str]], Mapping[str, Any]]
"""Of a model and names of tensors: what each is on some images, float32 array."""


def strip(model: Any) -> None:
    """Drop names of source files, module scopes and stack traces."""
    holders = [model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer]
    for holder in (*holders, *model.graph.input, *model.graph.output):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    del model.graph.value_info[:]


def four_bit_weights(model: Any) -> None:
    """Store every int8 weight whose codes fit as INT4, two to a byte (opset 21 and later)."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in weights and tensor.data_type == TensorProto.INT8:
            codes = numpy_helper.to_array(tensor)
            if codes.min() >= -8 and codes.max() <= 7:
                tensor.CopyFrom(
                    helper.make_tensor(tensor.name, TensorProto.INT4, codes.shape, codes.flatten().tolist())
                )


def integer_sums(model: Any, values: Values) -> int:
    """Keep what residual sums add, and the sums, as uint8, so that a runtime can convolve and add without leaving the integers.

    A sum's grid is nested in the grid of the layer that reads it: an odd number of its steps make one step of the layer, so the
    boundaries between the layer's codes are boundaries of the sum's, and the layer's codes stay what they were.

    Args:
        model: ONNX ModelProto with QuantizeLinear in front of its layers; it is changed.
        values: See `Values`.

    Returns:
        How many sums there are.
    """
    from onnx import helper, numpy_helper

    nodes = list(model.graph.node)
    readers: dict[str, list[Any]] = {}
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in nodes:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sums = [node for node in nodes if node.op_type == "Add" and not constant.intersection(node.input)]
    stored = dict.fromkeys(name for node in sums for name in (*node.input, _after_relu(node, readers)))
    numbers = {t.name: t for t in model.graph.initializer}
    found = values(model, list(stored)) if stored else {}
    new: list[Any] = []
    taken: dict[str, str] = {}  # codes that a layer would have made -> the sum's, which are the same
    for node in nodes:
        for k, name in enumerate(node.input):
            node.input[k] = taken.get(name, name)
        if node.output[0] in taken:
            continue
        new.append(node)
        for name in node.output:
            if name not in stored:
                continue
            layers = [r for r in readers.get(name, ()) if r.op_type == "QuantizeLinear"]
            steps = [float(numpy_helper.to_array(numbers[r.input[1]])) for r in layers]
            zeros = [int(numpy_helper.to_array(numbers[r.input[2]])) if len(r.input) > 2 else None for r in layers]
            step, zero = _nested(found[name], [s for s, z in zip(steps, zeros, strict=True) if z == 0])
            codes, kept = f"{name}_codes", f"{name}_stored"
            grid = [f"{name}_step", f"{name}_zero"]
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(step, np.float32), grid[0]))
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(zero, np.uint8), grid[1]))
            new.append(helper.make_node("QuantizeLinear", [name, *grid], [codes], name=codes))
            new.append(helper.make_node("DequantizeLinear", [codes, *grid], [kept], name=kept))
            for reader in readers.get(name, ()):
                reader.input[:] = [kept if n == name else n for n in reader.input]
            for layer, own, none in zip(layers, steps, zeros, strict=True):
                if own == step and none == zero:
                    taken[layer.output[0]] = codes
    del model.graph.node[:]
    model.graph.node.extend(new)
    return len(sums)


def _after_relu(node: Any, readers: Mapping[str, list[Any]]) -> str:
    """Where the sum is stored: behind the ReLU, if that is all that reads it."""
    after = readers.get(node.output[0], [])
    return after[0].output[0] if [r.op_type for r in after] == ["Relu"] else node.output[0]


def _nested(values: Any, steps: Sequence[float]) -> tuple[float, int]:
    """Step and zero point of the uint8 grid for these values, which layers with these steps read."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if low == high:
        return 1.0, 0
    shares = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    grids = [_uint8(low * share, high * share, steps) for share in shares]  # some outliers for a finer grid
    return min(grids, key=lambda grid: _error(values, *grid))


def _uint8(low: float, high: float, steps: Sequence[float]) -> tuple[float, int]:
    parts = int(255 * steps[0] / high) if steps and low == 0 else 0
    if parts >= 1:
        return steps[0] / (parts - (parts % 2 == 0)), 0
    step = (high - low) / 255
    return step, round(-low / step)


def _error(values: Any, step: float, zero: int) -> float:
    """Mean squared distance of the values from the grid."""
    codes = np.clip(np.round(values / step) + zero, 0, 255)
    return float(np.mean(np.square((codes - zero) * step - values)))

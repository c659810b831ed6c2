"""Undo what rounding shifts on average: the bias of each quantized convolution is corrected, one after the other.

Rounded weights and activations move a channel's mean, and where much of a frame is one constant (the background of a
scan), all of it moves the same way and nothing averages out. After Nagel et al. 2019 (arXiv:1906.04721, section 4.2),
with means over calibration clips in place of those that BatchNorm remembers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float64
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Feeds = Sequence[Mapping[str, NDArray[Any]]]


def correct_biases(quantized: onnx.ModelProto, original: onnx.ModelProto, feeds: Feeds) -> None:
    """Change the int32 biases of `quantized` in place, so that each convolution's channels have the mean they have in
    `original` on `feeds`. Convolutions keep their names and order; those without a bias stay as they are.
    """
    graph = quantized.graph
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv" and len(node.input) > 2]
    if not convolutions:
        return
    names = {node.name: node.output[0] for node in original.graph.node if node.op_type == "Conv"}
    wanted = channel_means(original, [names[node.name] for node in convolutions], feeds)
    for node in convolutions:
        dequantized = producers[node.input[2]]
        bias, scale = (constants[name] for name in dequantized.input[:2])
        (means,) = channel_means(quantized, [node.output[0]], feeds).values()
        missing = wanted[names[node.name]] - means
        steps = np.round(missing / numpy_helper.to_array(scale).astype(np.float64))
        corrected = numpy_helper.to_array(bias).astype(np.int64) + steps.astype(np.int64)
        bounds = np.iinfo(np.int32)
        corrected = np.clip(corrected, bounds.min, bounds.max).astype(np.int32)
        bias.CopyFrom(numpy_helper.from_array(corrected, bias.name))


def channel_means(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> dict[str, Float64[np.ndarray, " C"]]:
    """Means of tensors (N C H W) of the graph over all but their channels, by name, over all `feeds`."""
    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    graph = measured.graph
    del graph.output[:]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3], np.int64), "measured.axes"))
    for name in names:
        output = f"measured.{name}"
        graph.node.append(helper.make_node("ReduceMean", [name, "measured.axes"], [output], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["channels"]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # as `exported.run` has it
    session = onnxruntime.InferenceSession(measured.SerializeToString(), options, providers=["CPUExecutionProvider"])
    read = {given.name for given in session.get_inputs()}
    sums = [np.zeros(0)] * len(names)
    weights = [float(next(iter(feed.values())).shape[0] * next(iter(feed.values())).shape[1]) for feed in feeds]
    for feed, weight in zip(feeds, weights, strict=True):
        said = session.run(None, {name: array for name, array in feed.items() if name in read})
        sums = [weight * one + (total if len(total) else 0) for one, total in zip(said, sums, strict=True)]
    return {name: total.astype(np.float64) / sum(weights) for name, total in zip(names, sums, strict=True)}

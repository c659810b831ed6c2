"""An ONNX graph in int8 or with half-size weights; the ONNX packages are imported here and in `scan_form` alone."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from videogru.export.bias_correction import correct_biases
from videogru.export.onnx_rnn_to_scan import scan_form

_PRODUCTS = ("Conv", "MatMul", "Gemm")
_BETWEEN = ("Add", "Relu", "MaxPool", "AveragePool")  # in 8 bits only on the way to a product
_CORRECTION_STRIDE = 2  # biases are corrected on every second feed: each convolution reads them once more
_SMALL = 64  # entries of a tensor that stays in float32: biases of few classes, scales, means


class _Clips(CalibrationDataReader):
    def __init__(self, feeds: Sequence[dict[str, NDArray[Any]]]) -> None:
        self._feeds: Iterator[dict[str, NDArray[Any]]] = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


def to_int8(model: onnx.ModelProto, feeds: Sequence[dict[str, NDArray[Any]]]) -> onnx.ModelProto:
    """Convolutions, matrix products and recurrent matrices in int8, between QuantizeLinear and DequantizeLinear.

    Weights per channel and symmetric, activations uint8 with ranges from their least and greatest values on `feeds`
    (inputs by name); biases of convolutions corrected on half of these. What is left in float: sums with a bias, the
    gates, normalization, attention's products of two activations, pooling and the softmax. Raises ConfigError
    for recurrent nodes that are not torch's.
    """
    onnxruntime.set_default_logger_severity(3)  # errors; what it tidies up itself is no news
    model = scan_form(model)
    _give_biases(model.graph)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        with _without_advice():
            quantize_static(
                before,
                after,
                _Clips(feeds),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=[*_PRODUCTS, *_BETWEEN],
                nodes_to_exclude=_left_in_float(model.graph),
                extra_options={
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
        quantized: onnx.ModelProto = onnx.load(after)
    correct_biases(quantized, model, feeds[::_CORRECTION_STRIDE])
    return quantized


@contextmanager
def _without_advice() -> Iterator[None]:
    """On every call, the quantizer logs that it has a tool for preparations, which are made here already."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _give_biases(graph: onnx.GraphProto) -> None:
    """A bias of zeros for convolutions without one, so that it can be corrected."""
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) == 2:
            bias = f"{node.name}.bias"
            graph.initializer.append(numpy_helper.from_array(np.zeros(shapes[node.input[1]][0], np.float32), bias))
            node.input.append(bias)


def _left_in_float(graph: onnx.GraphProto) -> list[str]:
    """Nodes between products that gain nothing in 8 bits: those whose result something reads in float.

    Rounding what is then averaged over a map costs most of all: small values vanish beside the few large ones. A bias
    is added in float too: what gates and softmax read would have few levels.
    """
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    kept = {node.name for node in graph.node if node.op_type in _PRODUCTS}
    left = []
    for node in reversed(graph.node):  # in order of use, so that readers come first
        if node.op_type not in _BETWEEN:
            continue
        has_bias = node.op_type == "Add" and constants & set(node.input)
        following = [reader for name in node.output for reader in readers.get(name, ["the end"])]
        if has_bias or not set(following) <= kept:
            left.append(node.name)
        else:
            kept.add(node.name)
    return left


def with_half_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its weights stored in float16 and cast back where they are used.

    Runtimes on a CPU fold the cast when they load: half the file at the same speed. What float16 cannot hold stays.
    """
    graph = model.graph
    kept: list[TensorProto] = []
    casts: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor) if tensor.data_type == TensorProto.FLOAT else None
        if values is None or values.size <= _SMALL or np.abs(values).max() > np.finfo(np.float16).max:
            kept.append(tensor)
            continue
        half = f"{tensor.name}.half"
        kept.append(numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(helper.make_node("Cast", [half], [tensor.name], name=f"{half}.cast", to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend([*casts, *nodes])
    return model

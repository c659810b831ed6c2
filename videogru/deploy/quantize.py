"""An ONNX graph in int8 or with half-size weights; the ONNX packages are imported here and in `scan_form` alone."""

import tempfile
from collections.abc import Iterator, Sequence
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

from videogru.deploy.scan_form import scan_form

_KINDS = ["Conv", "MatMul", "Gemm", "Add", "Relu", "MaxPool", "AveragePool"]
_SMALL = 64  # entries of a tensor that stays in float32: biases of few classes, scales, means


class _Clips(CalibrationDataReader):
    def __init__(self, feeds: Sequence[dict[str, NDArray[Any]]]) -> None:
        self._feeds: Iterator[dict[str, NDArray[Any]]] = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


def to_int8(model: onnx.ModelProto, feeds: Sequence[dict[str, NDArray[Any]]]) -> onnx.ModelProto:
    """Convolutions, matrix products and recurrent matrices in int8, between QuantizeLinear and DequantizeLinear.

    Weights per channel and symmetric, activations uint8 with ranges from their least and greatest values on `feeds`
    (inputs by name). What is left in float: sums with a bias, the gates, normalization, attention's products of two
    activations, pooling and the softmax. Raises ConfigError for recurrent nodes that are not torch's.
    """
    onnxruntime.set_default_logger_severity(3)  # errors; what it tidies up itself is no news
    model = scan_form(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    # A bias is added in float: rounded to 8 bits, what the gates and the softmax read would have few levels.
    in_float = [node.name for node in model.graph.node if node.op_type == "Add" and constants & set(node.input)]
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        quantize_static(
            before,
            after,
            _Clips(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=_KINDS,
            nodes_to_exclude=in_float,
            extra_options={
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            },
        )
        quantized: onnx.ModelProto = onnx.load(after)
    return quantized


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

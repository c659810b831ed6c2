"""GRU and LSTM nodes of an ONNX graph as a matrix product and a scan whose body multiplies in int8.

Runtimes keep the weights of these nodes in float32. Written out, the product with the inputs is a MatMul like any
other, which the quantizer sees, and the recurrent product stands in the body of a Scan between QuantizeLinear and
DequantizeLinear. The scale of the state needs no calibration: both cells keep it in -1..1, so that it is 1/127.

    hq = clip(round(127 h), -128, 127), kept as uint8 around 128     Rq = clip(round(R / s), -127, 127), s by row
    h R' is near (hq / 127) (s Rq)'                                  s = max |row of R| / 127

ONNX's gates: GRU z, r, n with the reset gate after the product; LSTM i, o, f, c.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from jaxtyping import Float32, Int8
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir, optimizer

from videogru.errors import ConfigError

STATE_SCALE = np.float32(1 / 127)
STATE_ZERO = np.uint8(128)
_EVERYTHING = 1 << 40  # bytes of a constant that may be folded


class Quantized(NamedTuple):
    """A recurrent matrix (G H) as integers and the scale of each row, a gate's unit."""

    values: Int8[np.ndarray, "G H"]
    scales: Float32[np.ndarray, " G"]


def quantize_rows(matrix: Float32[np.ndarray, "G H"]) -> Quantized:
    """Symmetric, row by row; a row of zeros has scale 1."""
    largest = np.abs(matrix).max(axis=1)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Quantized(np.clip(np.round(matrix / scales[:, None]), -127, 127).astype(np.int8), scales)


def scan_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, constants folded, with every GRU and LSTM in scan form.

    Raises ConfigError where one of them has what torch's layers have not.
    """
    folded = ir.serde.deserialize_model(model)
    # The gates of torch's weights are put in ONNX's order by nodes of the graph.
    optimizer.fold_constants(folded, input_size_limit=_EVERYTHING, output_size_limit=_EVERYTHING)
    optimizer.remove_unused_nodes(folded)
    model = ir.serde.serialize_model(folded)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type in ("GRU", "LSTM"):
            written = _WrittenOut(node, constants, f"recurrent{len(nodes)}")
            nodes += written.nodes
            graph.initializer.extend(written.initializers)
        else:
            nodes.append(node)
    _replace_nodes(graph, nodes)
    return onnx.shape_inference.infer_shapes(model)


def _replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    used |= {name for node in nodes for name in _outer_names(node)}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    # Shapes of values that are gone would contradict those that are inferred.
    del graph.value_info[:]


def _outer_names(node: onnx.NodeProto) -> set[str]:
    """What the bodies of a node read of the graph around it."""
    names: set[str] = set()
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names |= set(inner.input) | _outer_names(inner)
    return names


class _WrittenOut:
    """Nodes and initializers that take the place of one GRU or LSTM node."""

    def __init__(self, node: onnx.NodeProto, constants: dict[str, TensorProto], prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.prefix = prefix
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        inputs = [*node.input, *[""] * (8 - len(node.input))]
        is_gru = node.op_type == "GRU"
        if (
            (is_gru and given.get("linear_before_reset") != 1)
            or given.get("layout", 0)
            or given.keys() & {"activations", "clip"}
            or given.get("input_forget", 0)
            or inputs[4]
            or inputs[7]
            or any(name not in constants for name in inputs[1:4])
        ):
            raise ConfigError(f"int8 does not know this kind of {node.op_type} node: {node.name}", hint="Use fp16.")
        direction = given.get("direction", b"forward").decode()
        w, r, b = (np.asarray(numpy_helper.to_array(constants[name]), dtype=np.float32) for name in inputs[1:4])
        ways = [direction == "reverse"] if direction != "bidirectional" else [False, True]
        outputs, finals = [], []
        for way, backward in enumerate(ways):
            starts = [self._start(inputs[0], inputs[place], way, r.shape[2]) for place in ([5] if is_gru else [5, 6])]
            one, last = self._direction(inputs[0], starts, w[way], r[way], b[way], f"{way}", backward, is_gru)
            outputs.append(one)
            finals.append(last)
        names = [*node.output, *[""] * (3 - len(node.output))]
        self._joined([self._axis(name, 1) for name in outputs], names[0], 1)
        for place, name in enumerate(names[1 : 2 if is_gru else 3]):
            if name:
                self._joined([self._axis(last[place], 0) for last in finals], name, 0)

    def _direction(
        self,
        steps: str,
        starts: list[str],
        w: NDArray[np.float32],
        r: NDArray[np.float32],
        b: NDArray[np.float32],
        way: str,
        backward: bool,
        is_gru: bool,
    ) -> tuple[str, list[str]]:
        """Names of the outputs (S B H) and of the last states (B H)."""
        H = r.shape[1]
        of_input, of_state = np.split(b, 2)
        offset, inner = of_input.copy(), None
        if is_gru:
            # The reset gate multiplies the new gate's own product with its bias; all others are added to the input.
            offset[: 2 * H] += of_state[: 2 * H]
            inner = of_state[2 * H :]
        else:
            offset += of_state
        product = self._add("MatMul", [steps, self._constant(w.T, f"w{way}")], f"xw{way}")
        given = self._add("Add", [product, self._constant(offset, f"b{way}")], f"x{way}")
        body = _gru_body(quantize_rows(r), inner) if inner is not None else _lstm_body(quantize_rows(r))
        count = len(starts)
        names = [f"{self.prefix}.{name}{way}" for name in ("last_h", "last_c")[:count]]
        outputs = f"{self.prefix}.y{way}"
        self.nodes.append(
            helper.make_node(
                "Scan",
                [*starts, given],
                [*names, outputs],
                name=f"{self.prefix}.scan{way}",
                body=body,
                num_scan_inputs=1,
                scan_input_directions=[int(backward)],
                scan_output_directions=[int(backward)],
            )
        )
        return outputs, names

    def _start(self, steps: str, given: str, way: int, H: int) -> str:
        """The first state (B H): what the node was given (directions B H), else zeros."""
        name = f"start{way}.{len(self.nodes)}"
        if given:
            return self._add("Gather", [given, self._constant(np.array(way, np.int64), f"{name}.way")], name, axis=0)
        batch = self._add("Shape", [steps], f"{name}.batch", start=1, end=2)
        size = self._constant(np.array([H], np.int64), f"{name}.size")
        shape = self._add("Concat", [batch, size], f"{name}.shape", axis=0)
        return self._add("ConstantOfShape", [shape], name)

    def _axis(self, name: str, axis: int) -> str:
        axes = self._constant(np.array([axis], np.int64), f"axis{len(self.nodes)}")
        return self._add("Unsqueeze", [name, axes], f"wide{len(self.nodes)}")

    def _joined(self, names: list[str], output: str, axis: int) -> None:
        self.nodes.append(helper.make_node("Concat", names, [output], name=f"{output}.joined", axis=axis))

    def _add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = f"{self.prefix}.{name}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}.node", **attributes))
        return output

    def _constant(self, values: NDArray[Any], name: str) -> str:
        full = f"{self.prefix}.{name}"
        self.initializers.append(numpy_helper.from_array(np.array(values, order="C"), full))
        return full


def _recurrent_product(matrix: Quantized) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes from the state h to the product h R' named `hr`, in integers, and their constants."""
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["h", "h_scale", "h_zero"], ["hq"]),
        make("DequantizeLinear", ["hq", "h_scale", "h_zero"], ["hd"]),
        make("DequantizeLinear", ["Rq", "R_scale", "R_zero"], ["Rd"], axis=1),
        make("MatMul", ["hd", "Rd"], ["hr"]),
    ]
    constants = {
        "Rq": np.ascontiguousarray(matrix.values.T),
        "R_scale": matrix.scales,
        "R_zero": np.zeros(len(matrix.scales), np.int8),
        "h_scale": np.array(STATE_SCALE),
        "h_zero": np.array(STATE_ZERO),
    }
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def _gru_body(matrix: Quantized, new_bias: NDArray[np.float32]) -> onnx.GraphProto:
    """One step: h' = n + z (h - n), n = tanh(x_n + r (h R_n' + b))."""
    H = matrix.values.shape[1]
    nodes, constants = _recurrent_product(matrix)
    constants += [numpy_helper.from_array(new_bias, "b"), numpy_helper.from_array(np.array([H] * 3, np.int64), "parts")]
    make = helper.make_node
    nodes += [
        make("Split", ["hr", "parts"], ["hz", "hrr", "hn"], axis=1),
        make("Split", ["x", "parts"], ["xz", "xr", "xn"], axis=1),
        make("Add", ["hz", "xz"], ["sz"]),
        make("Add", ["hrr", "xr"], ["sr"]),
        make("Sigmoid", ["sz"], ["z"]),
        make("Sigmoid", ["sr"], ["r"]),
        make("Add", ["hn", "b"], ["hnb"]),
        make("Mul", ["r", "hnb"], ["reset"]),
        make("Add", ["reset", "xn"], ["sn"]),
        make("Tanh", ["sn"], ["n"]),
        make("Sub", ["h", "n"], ["difference"]),
        make("Mul", ["z", "difference"], ["kept"]),
        make("Add", ["n", "kept"], ["h_next"]),
        make("Identity", ["h_next"], ["y"]),
    ]
    return _body(nodes, constants, ["h"], ["h_next"], H, 3 * H)


def _lstm_body(matrix: Quantized) -> onnx.GraphProto:
    """One step: c' = f c + i tanh(g), h' = o tanh(c')."""
    H = matrix.values.shape[1]
    nodes, constants = _recurrent_product(matrix)
    constants.append(numpy_helper.from_array(np.array([H] * 4, np.int64), "parts"))
    make = helper.make_node
    nodes += [
        make("Add", ["hr", "x"], ["s"]),
        make("Split", ["s", "parts"], ["si", "so", "sf", "sg"], axis=1),
        make("Sigmoid", ["si"], ["i"]),
        make("Sigmoid", ["so"], ["o"]),
        make("Sigmoid", ["sf"], ["f"]),
        make("Tanh", ["sg"], ["g"]),
        make("Mul", ["f", "c"], ["fc"]),
        make("Mul", ["i", "g"], ["ig"]),
        make("Add", ["fc", "ig"], ["c_next"]),
        make("Tanh", ["c_next"], ["tc"]),
        make("Mul", ["o", "tc"], ["h_next"]),
        make("Identity", ["h_next"], ["y"]),
    ]
    return _body(nodes, constants, ["h", "c"], ["h_next", "c_next"], H, 4 * H)


def _body(
    nodes: list[onnx.NodeProto],
    constants: list[TensorProto],
    states: list[str],
    after: list[str],
    H: int,
    width: int,
) -> onnx.GraphProto:
    def value(name: str, size: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", size])

    inputs = [*(value(name, H) for name in states), value("x", width)]
    outputs = [*(value(name, H) for name in after), value("y", H)]
    return helper.make_graph(nodes, "step", inputs, outputs, constants)

"""Build an engine of TensorRT from an ONNX graph, and run one. Needs the package tensorrt (10 or newer) and a GPU."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt
import torch
from numpy.typing import NDArray

from videogru.errors import ConfigError, ModelFileError
from videogru.runtime.export_folder import EXPORT_AGAIN

MAX_BATCH, MAX_LENGTH = 32, 256  # an engine is built for a range of shapes


def build_engine(graph: bytes, *, half: bool, length: int) -> bytes:
    """An engine for 1 to MAX_BATCH clips of 1 to MAX_LENGTH steps, tuned for one clip of `length`.

    Raises ConfigError, with what TensorRT says, where it does not take the graph.
    """
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise ConfigError(f"TensorRT does not read this graph: {parser.get_error(0).desc()}", hint="Use --format onnx.")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    if half:
        config.set_flag(tensorrt.BuilderFlag.FP16)
    for place in range(network.num_inputs):
        given = network.get_input(place)
        rest = tuple(given.shape)[2:]
        # frames (B T C H W) and gaps (B T) have steps, lengths (B) have none
        sides = [(1, 1), (1, length), (MAX_BATCH, max(MAX_LENGTH, length))]
        shapes = [side[: len(given.shape)] + rest for side in sides]
        profile.set_shape(given.name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ConfigError("TensorRT could not build an engine of this graph", hint="Use --format onnx.")
    return bytes(engine)


def load_engine(path: Path) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """The engine as a function of arrays by name. Raises ModelFileError where it is of another GPU or version."""
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ModelFileError(
            "TensorRT cannot load this engine: it was built for another GPU or version", where=path, hint=EXPORT_AGAIN
        )
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.OUTPUT]

    def run(given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in given.items()}
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        said = {name: torch.empty(tuple(context.get_tensor_shape(name)), device="cuda") for name in outputs}
        for name, tensor in said.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not run {path}")
        stream.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in said.items()}

    return run

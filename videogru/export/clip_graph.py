"""A classifier as a graph: raw frames in, probabilities out, normalization inside, batch and length free."""

import contextlib
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videogru.errors import ConfigError
from videogru.export.scan_cells import scanned
from videogru.models.classifier import Classifier

# A graph is traced with these; ones would be taken for constants.
_BATCH, _LENGTH = 2, 5


class Served(nn.Module):
    """Clips, as `Classifier` takes them, to probabilities (B K) float32."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, frames: Tensor, lengths: Tensor, gaps: Tensor | None = None) -> Tensor:
        """Softmax of the logits."""
        probabilities: Tensor = self.classifier(frames, lengths, gaps).softmax(dim=-1)
        return probabilities


def input_names(classifier: Classifier) -> tuple[str, ...]:
    """What the graph reads."""
    return ("frames", "lengths", "gaps") if classifier.config.use_gaps else ("frames", "lengths")


def output_names(classifier: Classifier) -> tuple[str, ...]:
    """What the graph gives."""
    return ("probabilities",)


def to_onnx(classifier: Classifier, frame_type: torch.dtype) -> Any:
    """The graph as an ONNX model (onnx.ModelProto), fp32. Raises ConfigError where the model has none."""
    examples, shapes = _traced_with(classifier, frame_type)
    module = Served(scanned(classifier, torch_layers=False)).eval()
    return onnx_of(module, examples, shapes, input_names(classifier), ("probabilities",))


def onnx_of(
    module: nn.Module,
    examples: tuple[Any, ...],
    shapes: dict[str, Any] | tuple[Any, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> Any:
    """A module as an ONNX model. Raises ConfigError where it cannot be traced."""
    with _quiet(), _refusing("onnx"), _rnn_kernels_looked_up_anew(), torch.no_grad():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            dynamic_shapes=shapes or None,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _forget_origins(model.graph)
    for function in model.functions:
        _forget_origins(function)
    return model


def _forget_origins(graph: Any) -> None:
    """Without the lines of code (and the paths of this machine) that each node came from."""
    del graph.metadata_props[:]
    for value in (*graph.value_info, *getattr(graph, "initializer", ())):
        del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):  # touching it would make one
                _forget_origins(attribute.g)


def to_pt2(classifier: Classifier, frame_type: torch.dtype, path: Path, *, half: bool) -> None:
    """Write the graph as a program of torch.export.

    half: the encoder, in which nearly all the time goes, computes in float16; the recurrent part and the head stay in
    float32, as under autocast.
    """
    examples, shapes = _traced_with(classifier, frame_type)
    copy = scanned(classifier, torch_layers=True)
    if half:
        copy = with_half_encoder(copy)
    write_program(Served(copy).eval(), examples, shapes, path)


def with_half_encoder(classifier: Classifier) -> Classifier:
    """A copy whose encoder computes in float16."""
    copy = deepcopy(classifier)
    copy.normalize.half()
    copy.encoder.half()
    return copy


def write_program(
    module: nn.Module, examples: tuple[Any, ...], shapes: dict[str, Any] | tuple[Any, ...], path: Path
) -> None:
    """Write a module as a program of torch.export. Raises ConfigError where it cannot be traced."""
    # As the exporter to ONNX does: sizes of one are no constants.
    any_size = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with _quiet(), _refusing("pt2"), _without_autocast(), any_size, torch.no_grad():
        program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
        program.example_inputs = None  # they would be stored as a pickle
        for inner in program.graph_module.modules():
            for node in inner.graph.nodes if isinstance(inner, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, path)


def _traced_with(classifier: Classifier, frame_type: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs and which of their axes are free."""
    # With named dimensions an export may succeed and freeze the length; DYNAMIC raises where an axis is frozen.
    free = torch.export.Dim.DYNAMIC
    side = classifier.frame_size
    frames = torch.zeros(_BATCH, _LENGTH, classifier.in_channels, side, side, dtype=frame_type)
    examples: list[Any] = [frames, torch.tensor([_LENGTH, _LENGTH - 2])]
    shapes: dict[str, Any] = {"frames": {0: free, 1: free}, "lengths": {0: free}}
    if classifier.config.use_gaps:
        examples.append(torch.ones(_BATCH, _LENGTH))
        shapes["gaps"] = {0: free, 1: free}
    return tuple(examples), shapes


@contextlib.contextmanager
def _rnn_kernels_looked_up_anew() -> Iterator[None]:
    """The exporter to ONNX swaps how GRU and LSTM are traced, but which kernel an operation has is remembered.

    Without this, the first export of a process keeps the length free and the second freezes it.
    """
    operations = (torch.ops.aten.gru.input, torch.ops.aten.lstm.input)
    try:
        for operation in operations:
            operation._dispatch_cache.clear()
        yield
    finally:
        for operation in operations:
            operation._dispatch_cache.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _refusing(format: str) -> Iterator[None]:
    """What an exporter cannot trace, as an error that says so."""
    try:
        yield
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError) as error:
        # The exporter to ONNX wraps the reason.
        reason = error.__cause__ or error
        lines = [line for line in str(reason).splitlines() if line.strip()] or [type(reason).__name__]
        raise ConfigError(
            f"this model cannot be exported to {format}: {lines[0]}", hint="Please report it with the model's settings."
        ) from error


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """The layers switch autocast off around themselves, as a pair of calls with which a program cannot be saved."""
    kind = torch.autocast
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = lambda self: self, lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]

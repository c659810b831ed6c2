"""The graph of one step of a stream: a frame and the named states in, probabilities and the states after it out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from videogru.export import clip_graph as graph
from videogru.models.classifier import Classifier
from videogru.runtime.export_folder import NEXT
from videogru.sequence import SequenceBatch

_STREAMS = 2  # a graph is traced with these
_CALIBRATION_STEPS = 16  # of each clip


class Stepped(nn.Module):
    """`Classifier.step` with the states in the order of their names."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.names = state_names(classifier)

    def forward(self, frame: Tensor, states: list[Tensor], gap: Tensor | None = None) -> tuple[Tensor, ...]:
        """Probabilities (B K), then the states."""
        logits, after = self.classifier.step(frame, dict(zip(self.names, states, strict=True)), gap)
        return (logits.softmax(dim=-1), *(after[name] for name in self.names))


def state_names(classifier: Classifier) -> tuple[str, ...]:
    """What a stream keeps, in the order of the graph. Raises ConfigError where the model cannot stream."""
    return tuple(classifier.initial_state(1))


def input_names(classifier: Classifier) -> tuple[str, ...]:
    """What the graph reads."""
    return ("frame", *state_names(classifier), *["gap"] * classifier.config.use_gaps)


def output_names(classifier: Classifier) -> tuple[str, ...]:
    """What the graph gives."""
    return ("probabilities", *(name + NEXT for name in state_names(classifier)))


def states_of(classifier: Classifier) -> dict[str, dict[str, Any]]:
    """Shape without the batch, type and first value of each state, for the card."""
    return {
        name: {
            "shape": list(tensor.shape[1:]),
            "type": str(tensor.dtype).removeprefix("torch."),
            "fill": tensor.flatten()[0].item(),
        }
        for name, tensor in classifier.initial_state(1).items()
    }


def to_onnx(classifier: Classifier, frame_type: torch.dtype) -> Any:
    """The graph as an ONNX model, fp32. Raises ConfigError where the model cannot stream."""
    examples, shapes = _traced_with(classifier, frame_type)
    names = input_names(classifier), output_names(classifier)
    return graph.onnx_of(Stepped(classifier).eval(), examples, shapes, *names)


def to_pt2(classifier: Classifier, frame_type: torch.dtype, path: Path, *, half: bool) -> None:
    """Write the graph as a program of torch.export; half: as `graph.to_pt2`."""
    examples, shapes = _traced_with(classifier, frame_type)
    model = graph.with_half_encoder(classifier) if half else classifier
    graph.write_program(Flat(Stepped(model).eval()), *_flat(examples, shapes), path)


class Flat(nn.Module):
    """The same with the states as arguments of their own."""

    def __init__(self, stepped: Stepped) -> None:
        super().__init__()
        self.stepped = stepped

    def forward(self, frame: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Probabilities, then the states."""
        count = len(self.stepped.names)
        gap = rest[count] if len(rest) > count else None
        said: tuple[Tensor, ...] = self.stepped(frame, list(rest[:count]), gap)
        return said


def _flat(examples: tuple[Any, ...], shapes: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    frame, states, *gap = examples
    free = [*shapes["states"], *([shapes["gap"]] if gap else [])]
    return (frame, *states, *gap), (shapes["frame"], tuple(free))


def _traced_with(classifier: Classifier, frame_type: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    free = {0: torch.export.Dim.DYNAMIC}
    side = classifier.frame_size
    frame = torch.zeros(_STREAMS, classifier.in_channels, side, side, dtype=frame_type)
    states = list(classifier.initial_state(_STREAMS).values())
    examples: list[Any] = [frame, states]
    shapes: dict[str, Any] = {"frame": free, "states": [free for _ in states]}
    if classifier.config.use_gaps:
        examples.append(torch.ones(_STREAMS))
        shapes["gap"] = free
    return tuple(examples), shapes


def feeds_of(classifier: Classifier, clips: Sequence[SequenceBatch]) -> list[dict[str, NDArray[Any]]]:
    """The first steps of real clips as inputs of the graph, by name, with the states that PyTorch has there."""
    feeds = []
    for batch in clips:
        state = classifier.initial_state(len(batch))
        # Up to the shortest: padding is no frame of a stream.
        for place in range(min(_CALIBRATION_STEPS, int(batch.lengths.min()))):
            given: dict[str, Tensor] = {"frame": batch.frames[:, place].contiguous(), **state}
            if classifier.config.use_gaps:
                assert batch.gaps is not None
                given["gap"] = batch.gaps[:, place].contiguous()
            feeds.append({name: tensor.numpy() for name, tensor in given.items()})
            _, state = classifier.step(given["frame"], state, given.get("gap"))
    return feeds

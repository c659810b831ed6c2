"""What a classifier costs: the multiply-accumulates of one clip, by part."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from videogru.models.classifier import Classifier

_PARTS = {
    "encoder": "encoder",
    "gap_embedding": "gaps",
    "local_attention": "attention",
    "recurrent": "recurrent",
    "lookahead": "lookahead",
    "head": "head",
}


def count_macs(classifier: Classifier, num_frames: int = 1) -> dict[str, int]:
    """Multiply-accumulates of one clip of `num_frames` frames, batch 1: encoder, recurrent, head and their total.

    Local attention, the embedding of gaps and the lookahead are parts of their own: attention, gaps, lookahead. Counted
    are convolutions and matrix products (half of what torch's FlopCounterMode calls FLOPs) as they run on a CPU in eval
    mode; elementwise work (norms, activations, the gating of a recurrent cell, pooling) and biases are not. An LSTM
    runs as one fused operation that torch does not count; it costs steps * gates * hidden * (in + hidden). Raises
    ValueError where num_frames < 1.
    """
    if num_frames < 1:
        raise ValueError(f"a clip has at least one frame, not {num_frames}")
    twin = copy.deepcopy(classifier).to("cpu", torch.float32).eval()
    size = twin.frame_size
    frames = torch.zeros(1, num_frames, twin.in_channels, size, size, dtype=torch.uint8)
    with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter, torch.inference_mode():
        twin(frames, torch.tensor([num_frames]), torch.ones(1, num_frames))
    counted = {name: sum(by_op.values()) // 2 for name, by_op in counter.get_flop_counts().items()}
    root = type(twin).__name__
    present = {name: part for name, part in _PARTS.items() if getattr(twin, name) is not None}
    macs = {part: counted.get(f"{root}.{name}", 0) for name, part in present.items()}
    return {**macs, "total": counted["Global"]}


def _fused_layer(
    inputs: tuple[int, ...], weight_in: tuple[int, ...], weight_hidden: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """FLOPs of one fused layer: inputs (S B in), weights (gates * hidden, in) and (gates * hidden, hidden)."""
    steps, batch, _in = inputs
    return 2 * steps * batch * weight_in[0] * (weight_in[1] + weight_hidden[1])


_FUSED = {torch.ops.aten.mkldnn_rnn_layer: _fused_layer}

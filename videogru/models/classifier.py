"""The whole model: normalize, add what changes, encode frames, serialize, attend, read the steps, pool, classify."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videogru.config import ModelConfig
from videogru.errors import ConfigError
from videogru.models.attention import LocalAttention
from videogru.models.cells.conv_gru import ConvRecurrent
from videogru.models.differences import PLANES, add_difference, add_differences
from videogru.models.encoders.encoder import build_encoder
from videogru.models.head import Head
from videogru.models.lookahead import Lookahead
from videogru.models.recurrent import Recurrent
from videogru.models.serialize import serialize, step_size, steps_per_frame, valid_steps
from videogru.models.streaming import Slot, State, check_state, fresh_state, of_part, prefixed, what_reads_ahead
from videogru.models.time_deltas import GapEmbedding
from videogru.shapes import BatchFrames, FeatureMaps, Gaps, Lengths, Logits, StreamFrames


class Normalize(nn.Module):
    """Frames (N C H W), uint8 in 0..255 or float in 0..1, to float with `mean` and `std` (C each) taken out."""

    # Not in the state dict: mean and std are arguments of the Classifier, and a model file keeps them in its header.
    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std want one value per channel, std above 0; got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> Float[Tensor, "N C H W"]:
        """The same frames about zero, in the floating type of the model."""
        scale = 255 if frames.dtype == torch.uint8 else 1
        return (frames.to(self.mean.dtype) / scale - self.mean) / self.std


class Classifier(nn.Module):
    """Clips to logits: frames (B T C H W), uint8 in 0..255 or float in 0..1, and lengths (B,) int64 -> (B K) float32.

    frame_size: H = W in pixels; mean, std: one value per channel, of frames in 0..1. Steps past a clip's length are
    padding: in training they do not enter the encoder (BatchNorm would count them), in eval mode nothing of them
    reaches the result: the logits of a clip do not depend on its batch. Raises ConfigError where settings do not fit.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        in_channels: int,
        frame_size: int,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        if len(mean) != in_channels:
            raise ValueError(f"{in_channels} channels but {len(mean)} means")
        self.config = model
        self.in_channels = in_channels
        self.frame_size = frame_size
        self.num_classes = num_classes
        self.mean = mean
        self.std = std
        self.normalize = Normalize(mean, std)
        self.encoder = build_encoder(model, in_channels=in_channels, frame_size=frame_size)
        h, w = self.map_size = self.encoder.map_size(in_channels * PLANES[model.frame_differences], frame_size)
        self.steps_per_frame = steps_per_frame(model.seq, h, w)
        size = step_size(model.seq, self.encoder.out_channels, h, w)
        self.recurrent = (ConvRecurrent if model.cell == "convgru" else Recurrent)(model, size)
        self.head = Head(model, self.recurrent.out_size, num_classes)
        # Last, so that the other parts draw the same initial values with and without it.
        self.local_attention: LocalAttention | None = None
        if model.local_attention:
            causal, heads = model.temporal == "causal", model.attention_heads
            self.local_attention = LocalAttention(size, model.local_attention, heads, causal=causal)
        self.gap_embedding: GapEmbedding | None = None
        if model.use_gaps:
            self.gap_embedding = GapEmbedding(size, causal=model.temporal == "causal")
        self.lookahead: Lookahead | None = None
        if model.lookahead:
            self.lookahead = Lookahead(self.recurrent.out_size, model.lookahead)
        self.encoder.to(memory_format=torch.channels_last)

    def forward(self, frames: BatchFrames, lengths: Lengths, gaps: Gaps | None = None) -> Logits:
        """Unnormalized scores of the classes; float32 (float64 for a model in float64), also under autocast."""
        return self.logits_of(*self.features(frames, lengths, gaps))

    def logits_of(self, outputs: Float[Tensor, "B S F"], step_lengths: Lengths) -> Logits:
        """What the head makes of `features`."""
        with torch.autocast(outputs.device.type, enabled=False):
            logits: Tensor = self.head(outputs, step_lengths)
            return logits

    def features(
        self, frames: BatchFrames, lengths: Lengths, gaps: Gaps | None = None
    ) -> tuple[Float[Tensor, "B S F"], Lengths]:
        """What the head pools: states (B S F), zeros at padding, and the valid steps of each clip (B,).

        gaps: (B T), of `SequenceBatch`; only a model with use_gaps needs them, and raises ValueError without.
        """
        self._check_shape(frames, "B T")
        return self.features_of_maps(self._maps(frames, lengths), lengths, gaps)

    def maps(self, frames: BatchFrames, lengths: Lengths) -> Float[Tensor, "B T D h w"]:
        """What the encoder makes of each frame, beside its neighbors where the model reads differences."""
        return self._maps(frames, lengths)

    def from_maps(self, maps: FeatureMaps, lengths: Lengths, gaps: Gaps | None = None) -> Logits:
        """The logits that `forward` gives for frames with these `maps`."""
        return self.logits_of(*self.features_of_maps(maps, lengths, gaps))

    def features_of_maps(
        self, maps: FeatureMaps, lengths: Lengths, gaps: Gaps | None = None
    ) -> tuple[Float[Tensor, "B S F"], Lengths]:
        """What `features` gives for frames with these `maps`."""
        added = self._gap_vectors(gaps, lengths)
        if isinstance(self.recurrent, ConvRecurrent):
            if added is not None:
                maps = maps + added[:, :, :, None, None]
            states: Tensor = self.recurrent(maps, lengths)
            return self._look_ahead(states), lengths
        step_lengths = lengths * self.steps_per_frame
        steps = serialize(maps, self.config.seq)
        if added is not None:
            steps = steps + added.repeat_interleave(self.steps_per_frame, dim=1)
        if self.local_attention is not None:
            steps = self.local_attention(steps, step_lengths)
        outputs: Tensor = self.recurrent(steps, step_lengths)
        return self._look_ahead(outputs), step_lengths

    def _look_ahead(self, states: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        if self.lookahead is None:
            return states
        mixed: Tensor = self.lookahead(states)
        return mixed

    def _check_shape(self, frames: Tensor, axes: str) -> None:
        c, h, w = frames.shape[-3:]
        if c != self.in_channels or h != self.frame_size or w != self.frame_size:
            wanted = f"({axes} {self.in_channels} {self.frame_size} {self.frame_size})"
            raise ValueError(f"frames are ({axes} {c} {h} {w}), but this model takes {wanted}")

    def initial_state(self, batch: int) -> State:
        """The state of `batch` streams before their first frames, for `step`, on the device of the model.

        Raises ConfigError where the model needs frames that a stream does not have yet.
        """
        if batch < 1:
            raise ValueError(f"there is at least one stream, not {batch}")
        return fresh_state(self._slots(), batch, self.head.linear.weight)

    @torch.no_grad()
    def step(self, frame: StreamFrames, state: State, gap: Float[Tensor, " B"] | None = None) -> tuple[Logits, State]:
        """One more frame of each of B independent streams: the logits that `forward` gives for all of a stream so far.

        frame: (B C H W), uint8 in 0..255 or float in 0..1; state: of `initial_state` or of the step before, which stays
        as it is; gap: (B,) seconds or mm since the frame before, 0 for first frames; only a model with use_gaps needs
        them. A state is a dict of contiguous tensors, streams first: index, join, save and move it. Time and memory do
        not depend on how many frames came before. Without gradients, and only in eval mode. Raises ConfigError as
        `initial_state`, ValueError where frame, state or gap are not what this model takes.
        """
        if self.training:
            raise ValueError("step is for a model in eval mode: dropout and batch statistics have no place in a stream")
        self._check_shape(frame, "B")
        slots, batch = self._slots(), frame.shape[0]
        if not torch.compiler.is_exporting():
            check_state(state, slots, batch, self.head.linear.weight)
        seen = state["frames"]
        kept: State = {"frames": seen + 1}
        if self.config.frame_differences == "past":
            frame = self.normalize(frame)
            kept["previous"] = frame
            frame = add_difference(frame, state["previous"], seen == 0)
        maps = self._encode(frame).unsqueeze(1)
        added = self._gap_vectors(None if gap is None else gap.float().unsqueeze(1), torch.ones_like(seen))
        before = seen * self.steps_per_frame
        recurrent = of_part("recurrent", state)
        if isinstance(self.recurrent, ConvRecurrent):
            maps = maps if added is None else maps + added[:, :, :, None, None]
            outputs, recurrent = self.recurrent.step(maps, recurrent)
        else:
            steps = serialize(maps, self.config.seq)
            steps = steps if added is None else steps + added
            if self.local_attention is not None:
                steps, attention = self.local_attention.step(steps, of_part("attention", state), before)
                kept |= prefixed("attention", attention)
            outputs, recurrent = self.recurrent.step(steps, recurrent)
        kept |= prefixed("recurrent", recurrent)
        with torch.autocast(frame.device.type, enabled=False):
            new = outputs.shape[1]
            there = torch.ones(batch, new, dtype=torch.bool, device=outputs.device)
            if self.lookahead is not None:
                outputs, there, ahead = self.lookahead.step(outputs, of_part("lookahead", state), before)
                kept |= prefixed("lookahead", ahead)
            pooled = self.head.absorb(outputs[:, :new], there[:, :new], of_part("head", state))
            kept |= prefixed("head", pooled)
            if self.lookahead is not None:  # what will still change counts as it is now, and is not kept
                pooled = self.head.absorb(outputs[:, new:], there[:, new:], pooled)
            return self.head.answer(pooled), {name: tensor.contiguous() for name, tensor in kept.items()}

    def _slots(self) -> dict[str, Slot]:
        """Names and shapes of the tensors that a stream keeps."""
        obstacle = what_reads_ahead(self.config)
        if obstacle is not None:
            raise ConfigError(
                f"{obstacle} needs frames to come, which a stream does not have yet",
                hint="Train with --set model.temporal=causal (and model.frame_differences none or past).",
            )
        side, convolved = self.frame_size, isinstance(self.recurrent, ConvRecurrent)
        slots = {"frames": Slot((), counts=True)}
        if self.config.frame_differences == "past":
            slots["previous"] = Slot((self.in_channels, side, side))
        parts = {"recurrent": self.recurrent.slots(self.map_size if convolved else ()), "head": self.head.slots()}
        if self.local_attention is not None:
            parts["attention"] = self.local_attention.slots()
        if self.lookahead is not None:
            parts["lookahead"] = self.lookahead.slots()
        return slots | {f"{part}.{name}": slot for part, own in parts.items() for name, slot in own.items()}

    def _gap_vectors(self, gaps: Gaps | None, lengths: Lengths) -> Float[Tensor, "B T D"] | None:
        if self.gap_embedding is None:
            return None
        if gaps is None:
            raise ValueError("this model reads the gaps between steps (model.use_gaps): give them")
        added: Tensor = self.gap_embedding(gaps, lengths)
        return added

    def use_checkpointing(self, steps: int) -> None:
        """From now on, recompute in training: the encoder stage by stage, the recurrent part `steps` at a time.

        Losses and gradients stay the same; memory falls and time rises.
        """
        self.encoder.checkpointing = True
        self.recurrent.checkpoint_steps = steps

    def describe(self) -> dict[str, int]:
        """How many parameters each part has, and how many steps a frame gives."""
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "recurrent": self.recurrent, "head": self.head}
        if self.local_attention is not None:
            parts["attention"] = self.local_attention
        if self.gap_embedding is not None:
            parts["gaps"] = self.gap_embedding
        if self.lookahead is not None:
            parts["lookahead"] = self.lookahead
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        return {**counts, "total": sum(counts.values()), "steps_per_frame": self.steps_per_frame}

    def _maps(self, frames: BatchFrames, lengths: Lengths) -> Float[Tensor, "B T D h w"]:
        batch, steps = frames.shape[:2]
        mode = self.config.frame_differences
        if mode == "none":
            flat = frames.flatten(0, 1)
        else:
            normal = self.normalize(frames.flatten(0, 1)).unflatten(0, (batch, steps))
            flat = add_differences(normal, lengths, mode).flatten(0, 1)
        valid = valid_steps(lengths, steps).flatten()
        # Only in training: indexing by data would stop an export or a compiled graph.
        if self.training and steps > 1 and not bool(valid.all()):
            seen = self._encode(flat[valid])
            maps = seen.new_zeros(batch * steps, *seen.shape[1:])
            maps[valid] = seen
        else:
            maps = self._encode(flat)
        by_clip: Tensor = maps.unflatten(0, (batch, steps))
        return by_clip

    def _encode(self, frames: Tensor) -> Float[Tensor, "N D h w"]:
        if self.config.frame_differences == "none":  # else they are taken between normalized frames
            frames = self.normalize(frames)
        # Convolutions on a CPU, and in bf16 on a GPU, are faster with the channels innermost.
        maps: Tensor = self.encoder(frames.contiguous(memory_format=torch.channels_last))
        return maps

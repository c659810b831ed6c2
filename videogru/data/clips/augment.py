"""Random changes of training clips, pure functions of (seed, epoch, index): no worker count or order can alter them.

Mixing two clips (`mix_batch`) also depends on which clips share the batch.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from videogru.config import AugmentConfig
from videogru.sequence import FrameSequence, SequenceBatch
from videogru.shapes import BatchFrames, ClipFrames, Lengths

# Separate streams, so that switching one use off leaves the others as they were.
_SAMPLING, _PICTURE, _NOISE, _VOLUME, _MIX, _DROP = range(6)
_PICTURE_DRAWS, _MIX_DRAWS = 12, 4
_BLOCK = 1024  # rows whose draws are made at once


def sampling_draws(seed: int, epoch: int, index: int, count: int) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1) that place the frames of one clip inside their segments."""
    return np.random.default_rng((seed, epoch, index, _SAMPLING)).random(count)


def augment_batch(
    frames: BatchFrames, lengths: Lengths, *, config: AugmentConfig, seed: int, epoch: int, indices: list[int]
) -> BatchFrames:
    """Video and stills: one random change per clip of (B T C H W), as float32 in 0..1, on the frames' own device.

    lengths: (B,) steps that are no padding; a clip comes out the same in whatever batch it is padded.
    """
    if not _changes(config):
        return _unit_range(frames)
    draws = _batch_draws(seed, epoch, _PICTURE, indices, _PICTURE_DRAWS).to(frames.device, torch.float32)
    turned = config.rotate_degrees or config.scale
    frames = _move(_unit_range(frames), config, draws) if turned else _unit_range(_shift(frames, config, draws))
    if config.contrast or config.brightness:
        frames = _relight(frames, config, draws[:, 5:7], _means(frames, lengths))
    if config.noise:
        strength = draws[:, 7] * config.noise
        noise = torch.stack([_normal(seed, epoch, index, frames.shape[1:]) for index in indices]).to(frames.device)
        frames = (frames + noise * strength.view(-1, 1, 1, 1, 1)).clamp(0, 1)
    if config.erase:
        frames = _erase(frames, config.erase, draws[:, 8:12], _means(frames, lengths))
    if frames.shape[1] == 1:
        return frames  # no room for padding
    valid = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
    return frames * valid[:, :, None, None, None]


def _batch_draws(seed: int, epoch: int, stream: int, indices: list[int], count: int) -> torch.Tensor:
    """(B count) numbers in [0, 1), float64: a row for each index, whatever the others are.

    Not a generator for every clip: seeding one costs far more than drawing from it.
    """
    rows = [_block_draws(seed, epoch, stream, index // _BLOCK, count)[index % _BLOCK] for index in indices]
    return torch.from_numpy(np.stack(rows))


@lru_cache(maxsize=256)
def _block_draws(seed: int, epoch: int, stream: int, block: int, count: int) -> NDArray[np.float64]:
    return np.random.default_rng((seed, epoch, block, stream)).random((_BLOCK, count))


def _changes(config: AugmentConfig) -> bool:
    """Whether the pixels of a clip alone are changed; mixing clips and leaving steps out are other matters."""
    others = {"cutmix": 0.0, "drop_steps": 0.0, "flip_axes": "xyz"}
    return config.model_copy(update=others) != AugmentConfig()


def mix_batch(batch: SequenceBatch, *, probability: float, seed: int, epoch: int) -> SequenceBatch:
    """CutMix (Yun et al. 2019, arXiv:1905.04899, section 3.1): a box of each chosen clip comes from the clip after it.

    The box lies alike in all steps; `shares` is the part of the area that stays. Only clips of equal length are mixed.
    """
    frames, labels = batch.frames, batch.labels
    if not probability or labels is None or len(batch) < 2:
        return batch
    draws = _batch_draws(seed, epoch, _MIX, batch.indices.tolist(), _MIX_DRAWS).to(frames.device, torch.float32)
    height, width = frames.shape[-2:]
    chosen = (draws[:, 0] < probability) & (batch.lengths == batch.lengths.roll(-1))
    half = draws[:, 1].sqrt() / 2  # the area is uniform: Beta(1, 1)
    rows = (torch.arange(height, device=frames.device) + 0.5) / height
    cols = (torch.arange(width, device=frames.device) + 0.5) / width
    inside_rows = (rows - draws[:, 2:3]).abs() < half[:, None]
    inside_cols = (cols - draws[:, 3:4]).abs() < half[:, None]
    box = inside_rows[:, :, None] & inside_cols[:, None, :] & chosen[:, None, None]
    mixed = torch.where(box[:, None, None], frames.roll(-1, 0), frames)
    # Counted in pixels: boxes are cut at the edges.
    shares = 1 - box.float().mean(dim=(1, 2))
    return replace(batch, frames=mixed, others=labels.roll(-1), shares=shares)


def _means(frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean of each clip without its padding, (B 1 1 1 1)."""
    valid = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None])[:, :, None, None, None]
    each = frames.mean(dim=(2, 3, 4), keepdim=True)
    return torch.where(valid, each, 0).sum(dim=1, keepdim=True) / lengths.view(-1, 1, 1, 1, 1)


def _normal(seed: int, epoch: int, index: int, shape: torch.Size) -> torch.Tensor:
    generator = np.random.default_rng((seed, epoch, index, _NOISE))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def _unit_range(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames


def _whole_pixels(frames: torch.Tensor, config: AugmentConfig, draws: torch.Tensor) -> torch.Tensor:
    """Where the first pixel of each clip comes from, rows down and columns to the right of itself, (B 2)."""
    size = torch.tensor(frames.shape[-2:], device=frames.device, dtype=torch.float32)
    return torch.round((2 * draws[:, 3:5] - 1) * config.translate * size)


def _shift(frames: torch.Tensor, config: AugmentConfig, draws: torch.Tensor) -> torch.Tensor:
    """What `_move` does without turns and zooms, several times faster: pixels are copied, in their own dtype."""
    if not (config.flip or config.translate):
        return frames
    shift = _whole_pixels(frames, config, draws).long()
    moved = frames.flatten(1, 2)
    for axis, offset in ((2, shift[:, :1]), (3, shift[:, 1:])):
        side = moved.shape[axis]
        places = torch.arange(side, device=frames.device).expand(len(frames), -1)
        if axis == 3:
            places = torch.where(draws[:, :1] < config.flip, side - 1 - places, places)
        places = (places + offset) % (2 * side)
        places = torch.minimum(places, 2 * side - 1 - places)  # beyond an edge the frame is mirrored
        wanted = places.view(len(frames), 1, -1, 1) if axis == 2 else places.view(len(frames), 1, 1, -1)
        moved = moved.gather(axis, wanted.expand_as(moved))
    return moved.view_as(frames)


def _move(frames: torch.Tensor, config: AugmentConfig, draws: torch.Tensor) -> torch.Tensor:
    """Mirror, turn, zoom and shift with one resampling; all steps of a clip move together."""
    sides = 2 * draws - 1
    mirror = torch.where(draws[:, 0] < config.flip, -1.0, 1.0)
    angle = sides[:, 1] * math.radians(config.rotate_degrees)
    # Zooming in by s and out by s are equally likely and undo each other.
    zoom = torch.exp(sides[:, 2] * math.log1p(config.scale))
    size = torch.tensor(frames.shape[-2:], device=frames.device, dtype=torch.float32)
    shift = _whole_pixels(frames, config, draws) * 2 / size
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    theta = torch.stack(
        [
            torch.stack([cos * mirror, -sin, shift[:, 1]], dim=1),
            torch.stack([sin * mirror, cos, shift[:, 0]], dim=1),
        ],
        dim=1,
    )
    flat = frames.flatten(1, 2)
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).view_as(frames)


def _relight(frames: torch.Tensor, config: AugmentConfig, draws: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    sides = (2 * draws - 1).view(-1, 2, 1, 1, 1, 1)
    contrast = torch.exp(sides[:, 0] * math.log1p(config.contrast))
    return ((frames - mean) * contrast + mean + sides[:, 1] * config.brightness).clamp(0, 1)


def _erase(frames: torch.Tensor, probability: float, draws: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """One square, 1/4 to 1/2 of the side, becomes the clip's mean (Cutout: DeVries and Taylor 2017, section 3)."""
    height, width = frames.shape[-2:]
    side = 0.25 + 0.25 * draws[:, 1:2]
    rows = (torch.arange(height, device=frames.device) + 0.5) / height
    cols = (torch.arange(width, device=frames.device) + 0.5) / width
    inside_rows = (rows - draws[:, 2:3]).abs() < side / 2
    inside_cols = (cols - draws[:, 3:4]).abs() < side / 2
    hole = inside_rows[:, :, None] & inside_cols[:, None, :] & (draws[:, 0] < probability)[:, None, None]
    return torch.where(hole[:, None, None], mean, frames)


def drop_steps(clip: FrameSequence, *, largest: float, seed: int, epoch: int, index: int) -> FrameSequence:
    """The clip without a share of its steps, drawn from 0 to `largest`, at drawn places; at least one step stays."""
    if not largest or len(clip) == 1:
        return clip
    draws = np.random.default_rng((seed, epoch, index, _DROP)).random(len(clip) + 2)
    kept = draws[2:] >= draws[0] * largest
    kept[int(draws[1] * len(clip))] = True
    chosen = torch.from_numpy(np.flatnonzero(kept))
    return FrameSequence(clip.frames[chosen], clip.positions[chosen], clip.unit)


def augment_volume(
    frames: ClipFrames, *, config: AugmentConfig, order: str = "zyx", seed: int, epoch: int, index: int
) -> ClipFrames:
    """A volume's slices (T C H W) float32 in 0..1, changed in three dimensions by MONAI; same shape.

    order: the patient axes that T, H and W run along, for augment.flip_axes.
    """
    if not _changes(config):
        return frames
    pipeline = _volume_pipeline(config, tuple(frames.shape), order)
    pipeline.set_random_state(seed=int(np.random.SeedSequence((seed, epoch, index, _VOLUME)).generate_state(1)[0]))
    changed = pipeline(frames.transpose(0, 1).contiguous())
    return torch.as_tensor(changed).transpose(0, 1).clamp(0, 1).contiguous()


@lru_cache(maxsize=64)
def _volume_pipeline(config: AugmentConfig, shape: tuple[int, ...], order: str) -> Any:
    # MONAI takes seconds to import; only trainings on volumes pay for it.
    from monai import transforms

    depth, _, height, width = shape
    mirrored = [axis for axis in range(3) if config.flip and order[axis] in config.flip_axes]
    steps: list[Any] = [transforms.RandFlip(prob=config.flip, spatial_axis=axis) for axis in mirrored]
    if config.rotate_degrees or config.scale or config.translate:
        angle = math.radians(config.rotate_degrees)
        steps.append(
            transforms.RandAffine(
                prob=1.0,
                rotate_range=(angle, angle, angle),
                scale_range=(config.scale,) * 3,
                translate_range=[config.translate * side for side in (depth, height, width)],
                mode="bilinear",
                padding_mode="zeros",
            )
        )
    if config.bias_field:
        largest_coefficient = config.bias_field
        steps.append(transforms.RandBiasField(coeff_range=(-largest_coefficient, largest_coefficient), prob=1.0))
    if config.gamma:
        steps.append(transforms.RandAdjustContrast(gamma=(1 / (1 + config.gamma), 1 + config.gamma), prob=1.0))
    if config.contrast:
        steps.append(transforms.RandScaleIntensity(factors=config.contrast, prob=1.0))
    if config.brightness:
        steps.append(transforms.RandShiftIntensity(offsets=config.brightness, prob=1.0))
    if config.noise:
        steps.append(transforms.RandGaussianNoise(prob=1.0, std=config.noise))
    if config.erase:
        sides = [max(1, side // 4) for side in (depth, height, width)]
        largest = [max(1, side // 2) for side in (depth, height, width)]
        steps.append(
            transforms.RandCoarseDropout(
                holes=1, spatial_size=sides, max_spatial_size=largest, fill_value=0.0, prob=config.erase
            )
        )
    return transforms.Compose([*steps, transforms.ToTensor(track_meta=False)])

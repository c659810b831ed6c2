"""From the reader's pixels to the encoder's: channels, then a square; the same in training and inference."""

import torch
from torch.nn import functional as F

from videogru.config import DataConfig
from videogru.errors import SourceError
from videogru.sequence import FrameSequence
from videogru.shapes import ClipFrames, MadeFrames

# Rec. 601, as Pillow's convert("L").
_LUMA = (0.299, 0.587, 0.114)
_BLOCK = 4  # slices that are resized at a time


def prepare_clip(
    clip: FrameSequence, *, data: DataConfig, pixel_aspect: float = 1.0, place: float = 0.5
) -> FrameSequence:
    """The clip with `data.channels` channels and `data.frame_size` squared pixels.

    data: resolved for its kind (`DataConfig.for_kind`); pixel_aspect: height of a pixel over its width; place: of the
    square along the longer side where fit is crop, 0.5 the center. The type stays.
    """
    assert data.channels is not None and data.fit is not None, "resolve DataConfig.for_kind first"
    frames = to_channels(clip.frames, data.channels)
    return clip.with_frames(
        fit_frames(frames, size=data.frame_size, fit=data.fit, pixel_aspect=pixel_aspect, place=place)
    )


def to_channels(frames: ClipFrames, channels: int) -> MadeFrames:
    """(T C H W) with 1 or 3 channels: gray is repeated, color becomes luma."""
    given = frames.shape[1]
    if given == channels:
        return frames
    if given == 1:
        return frames.expand(-1, channels, -1, -1)
    weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
    gray = (frames.float() * weights).sum(dim=1, keepdim=True)
    return gray.round().clamp(0, 255).to(torch.uint8) if frames.dtype == torch.uint8 else gray


def fit_frames(frames: ClipFrames, *, size: int, fit: str, pixel_aspect: float = 1.0, place: float = 0.5) -> MadeFrames:
    """(T C H W) as (T C size size), antialiased (plain bilinear sampling would fold fine detail into noise).

    crop: short side to `size`, of the long one what lies at `place` (0 the start, 0.5 the center, 1 the end); pad: long
    side to `size`, rest black; stretch: both sides to `size`. Sides are compared as they look, that is with the height
    multiplied by `pixel_aspect`. Raises SourceError where a crop would have to blow a sliver up.
    """
    height, width = frames.shape[-2:]
    tall = height * pixel_aspect
    if fit == "stretch":
        rows, cols = size, size
    else:
        scale = size / (min(tall, width) if fit == "crop" else max(tall, width))
        rows, cols = max(1, round(tall * scale)), max(1, round(width * scale))
    if max(rows, cols) > size * 64:
        # A sliver would be blown up to gigabytes only to be cut again.
        raise SourceError(
            f"frames of {width}x{height} pixels are too long and thin to be cropped to a square",
            hint="Use --set data.fit=pad.",
        )
    frames = _resize(frames, rows, cols)
    if fit == "crop":
        top, left = int((rows - size) * place), int((cols - size) * place)
        return frames[..., top : top + size, left : left + size]
    if (rows, cols) == (size, size):
        return frames
    top, left = (size - rows) // 2, (size - cols) // 2
    return F.pad(frames, (left, size - cols - left, top, size - rows - top))


def _resize(frames: ClipFrames, rows: int, cols: int) -> MadeFrames:
    if frames.shape[-2:] == (rows, cols):
        return frames
    if frames.dtype == torch.uint8:
        return F.interpolate(frames, size=(rows, cols), mode="bilinear", antialias=True, align_corners=False)
    # A few at a time: what lies between the passes along rows and columns is as large as the clip.
    resized = frames.new_empty((*frames.shape[:2], rows, cols))
    for some, out in zip(frames.split(_BLOCK), resized.split(_BLOCK), strict=True):
        made = F.interpolate(some, size=(rows, cols), mode="bilinear", antialias=True, align_corners=False)
        torch.clamp(made, 0.0, 1.0, out=out)
    return resized

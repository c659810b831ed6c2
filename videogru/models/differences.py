"""What changes from frame to frame, as channels beside the frame itself, so that a 2-D CNN sees motion."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from videogru.config import FrameDifferences
from videogru.shapes import Lengths

# How often the channels of a frame come.
PLANES: dict[FrameDifferences, int] = {"none": 1, "past": 2, "both": 3}


def add_differences(
    frames: Float[Tensor, "B T C H W"], lengths: Lengths, mode: FrameDifferences
) -> Float[Tensor, "B T C2 H W"]:
    """Frames with their change since the frame before and, with mode both, to the one after: C2 = PLANES[mode] * C.

    The RGB difference of Wang et al. 2016 (arXiv:1608.00859, section 3.2), beside the frame instead of in its place.
    At the ends of a clip it is zero; padding changes nothing.

        frames        x0      x1      x2    | padding
        past          0       x1-x0   x2-x1 |
        both, also    x1-x0   x2-x1   0     |
    """
    if mode == "none":
        return frames
    steps = frames.shape[1]
    zero = frames.new_zeros(())
    inside = (torch.arange(1, steps, device=frames.device) < lengths.unsqueeze(1))[:, :, None, None, None]
    change = torch.where(inside, frames[:, 1:] - frames[:, :-1], zero)
    nothing = torch.zeros_like(frames[:, :1])
    planes = [frames, torch.cat([nothing, change], dim=1)]
    if mode == "both":
        planes.append(torch.cat([change, nothing], dim=1))
    return torch.cat(planes, dim=2)


def add_difference(
    frames: Float[Tensor, "B C H W"], previous: Float[Tensor, "B C H W"], is_first: Bool[Tensor, " B"]
) -> Float[Tensor, "B C2 H W"]:
    """The same with mode past for the next frame of each stream, which is the first where `is_first`."""
    change = (frames - previous).masked_fill(is_first[:, None, None, None], 0.0)
    return torch.cat((frames, change), dim=1)

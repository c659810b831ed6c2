"""How feature maps become the steps of a sequence: one einops pattern per `model.seq`."""

from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor, arange

from videogru.shapes import FeatureMaps, Lengths

# What a pattern drops (h and w of frames) is averaged.
PATTERNS = {
    "frames": "b t d h w -> b t d",
    "slices": "b t d h w -> b t d",
    "rows": "b t d h w -> b (t h) (d w)",
    "cols": "b t d h w -> b (t w) (d h)",
    "grid": "b t d h w -> b (t h w) d",
}


def serialize(maps: FeatureMaps, seq: str) -> Float[Tensor, "B S size"]:
    """Maps (B T D h w) as steps (B S size), frame by frame, then row by row (cols: column by column)."""
    steps: Tensor = reduce(maps, PATTERNS[seq], "mean")
    return steps


def steps_per_frame(seq: str, h: int, w: int) -> int:
    """How many steps one map of h by w gives."""
    return {"frames": 1, "slices": 1, "rows": h, "cols": w, "grid": h * w}[seq]


def step_size(seq: str, d: int, h: int, w: int) -> int:
    """How many features one step has, for maps of d channels and h by w cells."""
    return {"frames": d, "slices": d, "rows": d * w, "cols": d * h, "grid": d}[seq]


def valid_steps(lengths: Lengths, total: int) -> Bool[Tensor, "B S"]:
    """True where a step belongs to its clip, False where it is padding: (B,) valid steps of `total`."""
    return arange(total, device=lengths.device) < lengths.unsqueeze(1)

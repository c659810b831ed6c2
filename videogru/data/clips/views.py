"""Several views of one source, whose scores are averaged: clips along time times crops along the longer side."""

import re

from videogru.config import DataConfig
from videogru.errors import ConfigError
from videogru.kinds import KINDS, Kind

Views = tuple[int, int]
ONE_VIEW: Views = (1, 1)
_MOST = 1000


def parse_views(text: str) -> Views:
    """'10x3' as (10, 3): ten clips times three crops, the usual test of video nets. Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d{0,3})[xX]([1-9]\d{0,3})", text.strip())
    views = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < views[0] * views[1] <= _MOST:
        raise ConfigError(
            f"--views wants CLIPSxCROPS, at most {_MOST} in all, got {text!r}", hint="Example: --views 10x3"
        )
    return views


def check_views(views: Views, data: DataConfig, kind: Kind) -> None:
    """Raises ConfigError where several views would be one and the same."""
    clips, crops = views
    if clips > 1 and (not KINDS[kind].is_sequence or data.sampling == "all"):
        why = "a still has one" if not KINDS[kind].is_sequence else "data.sampling=all takes every step"
        raise ConfigError(f"{clips} clips of a source cannot differ: {why}", hint=f"Use --views 1x{crops}.")
    if crops > 1 and data.fit != "crop":
        raise ConfigError(
            f"{crops} crops cannot differ: data.fit={data.fit} shows whole frames", hint=f"Use --views {clips}x1."
        )


def crop_places(crops: int) -> list[float]:
    """Where the squares lie along the longer side, 0 its start, 1 its end: 1 -> the center, 3 -> start, center, end.

    crops=1   |    [#####]    |
    crops=3   [#####]         |
              |    [#####]    |
              |         [#####]
    """
    return [0.5] if crops == 1 else [crop / (crops - 1) for crop in range(crops)]

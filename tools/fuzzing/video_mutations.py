"""Small videos of many codecs and containers, and seeded ways to damage them; what `fuzz_videos.py` feeds on."""

import itertools
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

# Larger ones take too long to be decoded a hundred times.
LARGEST_BYTES = 150_000
HEADER_BYTES = 600
_X264 = {"threads": "1", "bf": "2", "x264-params": "log-level=none"}
_X265 = {"x265-params": "log-level=none:pools=none:frame-threads=1"}


class Recipe(NamedTuple):
    """How a video is made: FFmpeg's encoder, its pixel format and options."""

    encoder: str
    pixels: str = "yuv420p"
    options: dict[str, str] = {}  # noqa: RUF012


RECIPES = {
    "h264.mp4": Recipe("libx264", options=_X264),
    "h264.mkv": Recipe("libx264", options=_X264),
    "h264.ts": Recipe("libx264", options=_X264),
    "h264.avi": Recipe("libx264", options=_X264 | {"bf": "0"}),
    "h264-fragments.mp4": Recipe("libx264", options=_X264),
    "hevc.mp4": Recipe("libx265", options=_X265),
    "hevc.mkv": Recipe("libx265", options=_X265),
    "vp8.webm": Recipe("libvpx"),
    "vp9.webm": Recipe("libvpx-vp9", options={"threads": "1"}),
    "mpeg4.avi": Recipe("mpeg4"),
    "mpeg4.mp4": Recipe("mpeg4", options={"bf": "2"}),
    "mpeg2.mpg": Recipe("mpeg2video", options={"bf": "2"}),
    "mjpeg.avi": Recipe("mjpeg", "yuvj420p"),
    "gif.gif": Recipe("gif", "rgb8"),
    "flv1.flv": Recipe("flv"),
    "wmv2.wmv": Recipe("wmv2"),
}


def make_video(path: Path, recipe: Recipe, *, frames: int = 36, height: int = 64, width: int = 96) -> None:
    """A square that walks over moving stripes: every frame differs from every other."""
    fragments = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in path.name else {}
    with av.open(str(path), "w", options=fragments) as container:
        stream = container.add_stream(recipe.encoder, rate=25, options=recipe.options)
        stream.width, stream.height, stream.pix_fmt = width, height, recipe.pixels
        stream.codec_context.gop_size = 12
        rows, columns = np.mgrid[:height, :width]
        for step in range(frames):
            gray = (columns * 2 + rows + 7 * step) % 200
            picture = np.stack([gray, gray[::-1], 255 - gray], axis=-1).astype(np.uint8)
            picture[8 + step : 24 + step, 2 * step : 2 * step + 16] = (250, 20, 20)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def collect_bases(folder: Path, shared: Path | None) -> dict[str, bytes]:
    """Made and, where there are some, real small videos by name; the made ones are written to `folder` once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        if not (folder / name).exists():
            part = folder / f"part-{name}"
            make_video(part, recipe)
            part.replace(folder / name)
    real = sorted(shared.rglob("*.*")) if shared is not None else []
    real = [path for path in real if path.suffix in (".mp4", ".mov", ".mkv", ".webm", ".avi")]
    made = [folder / name for name in RECIPES]
    return {path.name: path.read_bytes() for path in made + real if path.stat().st_size <= LARGEST_BYTES}


MUTATIONS = ("flip", "flip-header", "field", "truncate", "zeros", "repeat", "delete", "swap", "noise")
_VALUES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF)


def mutate(data: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """The bytes of a video with one kind of damage; the header of an MP4 is its `moov` box, wherever it lies."""
    out = bytearray(data)
    size = len(out)
    header = max(data.find(b"moov"), 0)
    span = min(HEADER_BYTES if not header else size - header, size - header)

    def chunk() -> tuple[int, int]:
        length = int(generator.integers(1, max(2, size // 8)))
        start = int(generator.integers(0, max(1, size - length)))
        return start, start + length

    if kind in ("flip", "flip-header"):
        low, high = (0, size) if kind == "flip" else (header, header + span)
        for place in generator.integers(low, high, int(2 ** generator.integers(0, 7))):
            out[place] ^= 1 << int(generator.integers(0, 8))
    elif kind == "field":
        for _ in range(int(generator.integers(1, 4))):
            wide = int(generator.choice([1, 2, 4]))
            value = int(generator.choice(_VALUES)) & (1 << 8 * wide) - 1
            place = header + int(generator.integers(0, max(1, span - wide)))
            out[place : place + wide] = value.to_bytes(wide, str(generator.choice(["big", "little"])))  # type: ignore[arg-type]
    elif kind == "truncate":
        del out[int(generator.integers(0, size)) :]
    elif kind == "zeros":
        start, stop = chunk()
        out[start:stop] = bytes(stop - start)
    elif kind == "repeat":
        start, stop = chunk()
        place = int(generator.integers(0, size))
        out[place:place] = out[start:stop]
    elif kind == "delete":
        start, stop = chunk()
        del out[start:stop]
    elif kind == "swap":
        (start, stop), (other, _) = chunk(), chunk()
        taken = out[start:stop]
        del out[start:stop]
        out[other:other] = taken
    elif kind == "noise":
        start, stop = chunk()
        out[start:stop] = generator.bytes(stop - start)
    else:
        raise ValueError(f"unknown mutation {kind!r}")
    return bytes(out)


def plan(bases: dict[str, bytes], count: int) -> list[tuple[str, str]]:
    """(base, mutation) of each of `count` files: all pairs in turn."""
    return list(itertools.islice(itertools.cycle(itertools.product(bases, MUTATIONS)), count))

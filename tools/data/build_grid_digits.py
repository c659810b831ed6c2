"""Cut the bundled grid_digits clips out of a folder with the GRID corpus.

    python -m tools.data.build_grid_digits --grid GRID --out datasets/grid_digits

GRID holds digits.csv (source, label, split, group, start_seconds, end_seconds) and the videos it names. Each clip is
the spoken digit with some context on both sides: H.264 in Matroska (the smallest container), one key frame, no
B-frames, no metadata. Every clip is decoded again and compared with the source's frames, also shifted by one, before
it counts; clips of an earlier run that pass the comparison are kept.
"""

import argparse
import io
import math
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from videogru.data.manifests.columns import Text
from videogru.data.manifests.manifest import Manifest, read_manifest

FRAMES_PER_SECOND = 25
MIN_PSNR = 30.0  # dB, of the luma of each frame
X264 = "keyint=infinite:min-keyint=infinite:scenecut=0:bframes=0:threads=1"


def main() -> int:
    """Build, verify, and write manifest.csv; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--grid", type=Path, required=True, help="folder with digits.csv and videos/")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets clips/ and manifest.csv")
    parser.add_argument("--context", type=float, default=0.12, help="seconds kept before and after the digit")
    parser.add_argument("--crf", type=int, default=29, help="x264 quality, lower is better and larger")
    arguments = parser.parse_args()
    corpus = read_manifest(arguments.grid / "digits.csv")
    (arguments.out / "clips").mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    worst, total = math.inf, 0
    for row in range(len(corpus)):
        name = f"clips/{corpus.path(row).stem}.mkv"
        psnr = build_clip(corpus, row, arguments.out / name, context=arguments.context, crf=arguments.crf)
        names.append(name)
        worst, total = min(worst, psnr), total + (arguments.out / name).stat().st_size
        if (row + 1) % 100 == 0:
            sys.stderr.write(f"{row + 1}/{len(corpus)} clips, {total / 1e6:.2f} MB, worst frame {worst:.1f} dB\n")
    whole = np.full(len(corpus), np.nan)
    cut = replace(corpus, sources=Text.of(names), start_seconds=whole, end_seconds=whole)
    cut.to_csv(arguments.out / "manifest.csv")
    return 0


def build_clip(corpus: Manifest, row: int, target: Path, *, context: float, crf: int) -> float:
    """Make sure that `target` holds the clip of a row; returns its worst frame's PSNR in dB."""
    window = corpus.window(row)
    if window is None:
        raise SystemExit(f"row {row} of digits.csv has no window")
    video = decode(corpus.path(row).read_bytes())
    first = max(0, math.floor((window[0] - context) * FRAMES_PER_SECOND))
    last = min(len(video), math.ceil((window[1] + context) * FRAMES_PER_SECOND))
    if target.is_file() and (psnr := verify(target.read_bytes(), video, first, last)) is not None:
        return psnr
    clip = encode(video[first:last], crf=crf)
    psnr = verify(clip, video, first, last)
    if psnr is None:
        raise SystemExit(f"{target}: the clip's frames are not frames {first}..{last - 1} of {corpus.path(row)}")
    part = target.with_suffix(".part")
    part.write_bytes(clip)
    part.replace(target)
    return psnr


def decode(content: bytes) -> list[av.VideoFrame]:
    """All frames in the order they are shown."""
    with av.open(io.BytesIO(content)) as container:
        return list(container.decode(video=0))


def encode(frames: list[av.VideoFrame], *, crf: int) -> bytes:
    """One group of pictures in Matroska, without x264's note about itself (700 bytes, a third of a clip)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        options = {"crf": str(crf), "preset": "veryslow", "x264-params": X264}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        container.start_encoding()
        drop_sei = av.BitStreamFilterContext("filter_units=remove_types=6", stream, stream)
        for index, frame in enumerate(frames):
            copy = av.VideoFrame.from_ndarray(frame.to_ndarray(format="yuv420p"), format="yuv420p")
            copy.pts, copy.time_base = index, Fraction(1, FRAMES_PER_SECOND)
            for packet in stream.encode(copy):
                container.mux(drop_sei.filter(packet))
        for packet in stream.encode():
            container.mux(drop_sei.filter(packet))
        container.mux(drop_sei.filter(None))
    return buffer.getvalue()


def verify(clip: bytes, video: list[av.VideoFrame], first: int, last: int) -> float | None:
    """The worst frame's PSNR in dB, or None where the clip is not frames first..last-1 of the video."""
    try:
        frames = decode(clip)
    except av.FFmpegError:
        return None
    shown = [round((frame.time or 0.0) * FRAMES_PER_SECOND, 6) for frame in frames]
    if shown != list(range(last - first)):
        return None
    levels = luma(frames)
    aligned = psnr_of(levels, luma(video[first:last]))
    for shift in (-1, 1):
        if first + shift >= 0 and last + shift <= len(video):
            shifted = psnr_of(levels, luma(video[first + shift : last + shift]))
            if shifted.mean() >= aligned.mean():
                return None
    return float(aligned.min()) if aligned.min() > MIN_PSNR else None


def luma(frames: list[av.VideoFrame]) -> NDArray[np.float64]:
    """(T H W) luma of frames."""
    return np.stack([f.to_ndarray(format="gray").astype(np.float64) for f in frames])


def psnr_of(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T,) peak signal-to-noise ratio of each frame in dB."""
    error = np.square(one - other).mean(axis=(1, 2))
    decibels: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(error, 1e-9))
    return decibels


if __name__ == "__main__":
    raise SystemExit(main())

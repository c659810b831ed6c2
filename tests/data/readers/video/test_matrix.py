"""The default reader over the matrix of tools/data/make_video_matrix.py: what ffmpeg and ffprobe say of every frame.

The commands behind the truth stand at the top of that tool; tests/golden/video_matrix.json holds what they printed.
"""

import hashlib
import json
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from tools.data.frame_numbers import number_in, paint
from videogru.config import DataConfig
from videogru.data.clips import sampling
from videogru.data.clips.read_clip import read_clip
from videogru.data.readers.open import open_source
from videogru.data.readers.video.open import open_video
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.data_check.inspect import inspect_source

GOLDEN = Path(__file__).parents[3] / "golden"
TRUTH = json.loads((GOLDEN / "video_matrix.json").read_text(encoding="utf-8"))
RATE = 25
# The rest is decoded in order: time stamps are guessed, or frames after a cut or a refresh point cannot stand alone.
SOUGHT = [
    name
    for name in TRUTH["made"]
    if name not in {"cut_open.mkv", "intra_refresh.mp4", "refresh_cut.mkv", "equal_times.mkv", "packed.avi"}
    and name not in {"b_frames.avi", "h264.avi"}
    and Path(name).suffix not in {".ts", ".mpg", ".mpeg"}
]


def seconds(truth: dict[str, Any]) -> tuple[list[float], bool]:
    """When each frame shows, and whether FFmpeg knows it; else from its first time on at the rate of the input."""
    base, ticks = Fraction(truth["time_base"]), truth["ticks"]
    if None not in ticks and all(a < b for a, b in pairwise(ticks)):
        return [float(tick * base) for tick in ticks], True
    return [float(ticks[0] * base) + k / RATE for k in range(len(ticks))], False


def read_numbers(video: PyavVideo, indices: list[int]) -> list[int]:
    return [number_in(frame.permute(1, 2, 0).numpy()) for frame in video.read(indices)]


@pytest.mark.parametrize("name", sorted(set(TRUTH["made"]) - {"equal_times.mkv"}))
def test_every_frame_of_every_kind_is_the_one_asked_for(name: str) -> None:
    truth = TRUTH["made"][name]
    shown, (when, known) = truth["numbers"], seconds(truth)
    count = len(shown)
    assert -1 not in shown
    with open_video(GOLDEN / "videos" / name) as video:
        assert isinstance(video, PyavVideo)
        # ffprobe 5 and FFmpeg 8 disagree by one frame about when the first of an H.264 AVI with B-frames shows.
        start = 0.0 if known or name != "h264.avi" else when[0] - video.positions[0]
        assert start in (0.0, 0.04)
        np.testing.assert_allclose(video.positions + start, when, rtol=0, atol=2e-6)
        assert read_numbers(video, list(range(count))) == shown
        for k in reversed(range(0, count, 1 + count // 100)):  # each is a seek of its own
            assert read_numbers(video, [k]) == [shown[k]], k
        rng = np.random.default_rng(0)
        clips = [sorted(rng.choice(count, min(5, count), replace=False).tolist()) for _ in range(3)]
        for chosen in clips + [list(range(k, min(k + 3, count))) for k in reversed(range(0, count, 11))]:
            assert read_numbers(video, chosen) == [shown[k] for k in chosen]
        assert video.details["access"] == ("by seeking" if name in SOUGHT else "in order")


@pytest.mark.parametrize(
    "name", ["gop250.mp4", "vfr.mp4", "cut.mp4", "late.mkv", "uneven.gif", "h264.ts", "turn_90.mp4"]
)
@pytest.mark.parametrize("window", [None, (0.3, 0.95)])
def test_a_clip_holds_what_shows_at_the_asked_times(name: str, window: tuple[float, float] | None) -> None:
    truth = TRUTH["made"][name]
    when = np.array(seconds(truth)[0])
    with open_source(GOLDEN / "videos" / name, data=DataConfig()) as source:
        start, end = source.extent if window is None else (when[0] + window[0], when[0] + window[1])
        clip = read_clip(source, data=DataConfig(num_frames=8), window=window and (start, end))
    shows = [int(np.flatnonzero(when <= start + (k + 0.5) * (end - start) / 8)[-1]) for k in range(8)]
    wanted = sorted(set(shows))
    assert [number_in(frame.permute(1, 2, 0).numpy()) for frame in clip.frames] == [truth["numbers"][k] for k in wanted]
    np.testing.assert_allclose(clip.positions, when[wanted], rtol=0, atol=2e-6)


def test_frames_that_share_a_time_stamp_are_spread_until_the_next() -> None:
    truth = TRUTH["made"]["equal_times.mkv"]
    assert truth["ticks"][:6] == [0, 0, 40, 40, 80, 80]
    with PyavVideo(GOLDEN / "videos" / "equal_times.mkv") as video:
        np.testing.assert_allclose(video.positions, np.arange(48) / 50, rtol=0, atol=1e-9)
        assert video.extent == pytest.approx((0.0, 0.96))
        assert read_numbers(video, [0, 1, 2, 46, 47]) == [0, 1, 2, 46, 47]


def with_edits(source: Path, target: Path, parts: list[tuple[float, float]]) -> Path:
    """The MP4 with an edit list of (start, duration) in seconds of its media: ISO/IEC 14496-12, 8.6.5 and 8.6.6."""
    content = source.read_bytes()
    assert content.index(b"moov") > content.index(b"mdat")  # or the chunk offsets would have to move
    old = content.index(b"edts") - 4
    size = struct.unpack_from(">I", content, old)[0]
    # Movie scale 1000, media scale 12800; with B-frames the first frame shows at 1024.
    rows = b"".join(
        struct.pack(">IiI", round(1000 * duration), 1024 + round(12800 * start), 0x10000) for start, duration in parts
    )
    entries = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(parts)) + rows
    new = bytearray(content[:old] + struct.pack(">I4s", 8 + len(entries), b"edts") + entries + content[old + size :])
    for name in (b"moov", b"trak"):
        at = content.index(name) - 4
        struct.pack_into(">I", new, at, struct.unpack_from(">I", content, at)[0] + 8 + len(entries) - size)
    target.write_bytes(new)
    return target


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ([(0.4, 0.4)], range(10, 20)),
        ([(0.4, 0.4), (1.2, 0.4)], [*range(10, 20), *range(30, 40)]),
        ([(1.2, 0.4), (0.4, 0.4)], [*range(30, 40), *range(10, 20)]),
        ([(0.4, 0.4), (0.4, 0.4)], [*range(10, 20)] * 2),
    ],
)
def test_edit_lists_of_several_parts(tmp_path: Path, parts: list[tuple[float, float]], shown: list[int]) -> None:
    path = with_edits(GOLDEN / "videos" / "gop12.mp4", tmp_path / "edited.mp4", parts)
    with PyavVideo(path) as video:
        np.testing.assert_allclose(video.positions, np.arange(len(shown)) / RATE, rtol=0, atol=1e-6)
        assert read_numbers(video, list(range(len(shown)))) == list(shown)
        assert [read_numbers(video, [k])[0] for k in reversed(range(len(shown)))] == list(shown)[::-1]
    # Fewer frames than its tables count are no sign of damage here.
    assert inspect_source("edited.mp4", root=tmp_path, kind="video", data=DataConfig()).status == "ok"


MADE_HERE = {
    "av1": ("a.mp4", "libsvtav1", "yuv420p", {"preset": "8", "g": "12", "svtav1-params": "lp=1:rc=0:qp=20"}),
    "hevc, 10 bits": ("a.mkv", "libx265", "yuv420p10le", {"x265-params": "log-level=none:keyint=8:bframes=3"}),
    "4:4:4, odd size": ("a.mp4", "libx264", "yuv444p", {"g": "12", "bf": "2"}),
    "fragmented": ("a.mp4", "libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "mpeg-2": ("a.mpg", "mpeg2video", "yuv420p", {"g": "12", "bf": "2", "qmax": "6"}),
}


@pytest.mark.parametrize("encoding", MADE_HERE)
def test_files_of_the_installed_encoders(tmp_path: Path, encoding: str) -> None:
    name, codec, pixels, options = MADE_HERE[encoding]
    width, height = (97, 65) if pixels == "yuv444p" else (96, 64)
    extra = {"movflags": "frag_keyframe+empty_moov"} if encoding == "fragmented" else {}
    with av.open(str(tmp_path / name), "w", options=extra) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for number in range(40):
            gray = paint(number, width=width, height=height)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([gray] * 3, axis=2), format="rgb24")))
        container.mux(stream.encode(None))
    with PyavVideo(tmp_path / name) as video:
        np.testing.assert_allclose(video.positions - video.positions[0], np.arange(40) / RATE, atol=1.1e-3)
        assert read_numbers(video, list(range(40))) == list(range(40))
        assert [read_numbers(video, [k])[0] for k in reversed(range(40))] == list(reversed(range(40)))
        if encoding == "fragmented":
            assert "declared_frames" not in video.details


def check_sum(frame: Any) -> str:
    """As ffmpeg -f framemd5 has it: the visible part of every plane, without the padding of its lines."""
    digest = hashlib.md5(usedforsecurity=False)
    for plane, part in zip(frame.planes, frame.format.components, strict=True):
        lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        digest.update(lines[: plane.height, : plane.width * ((part.bits + 7) // 8)].tobytes())
    return digest.hexdigest()[:8]


@pytest.mark.parametrize("name", TRUTH["real"])
def test_real_videos(shared_data: Path, name: str) -> None:
    """Every frame's time and content by ffprobe and ffmpeg; what the reader gives is the one asked for.

    The reader's frames are RGB: they are compared with a plain decode, whose stored pixels have FFmpeg's check sums.
    """
    truth, path = TRUTH["real"][name], shared_data / "videos" / name
    count = len(truth["sums"])
    rng = np.random.default_rng(1)
    spread = sampling.uniform(positions=np.arange(count, dtype=float), extent=(0.0, float(count)), num_frames=16)
    wanted = {*rng.integers(0, count, 6).tolist(), 0, count - 1, *spread.tolist()}
    pictures: dict[int, np.ndarray] = {}
    sums = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(container.streams[truth["stream"]])):
            sums.append(check_sum(frame))
            if number in wanted:
                pictures[number] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    assert sums == truth["sums"]

    def right(clip: torch.Tensor, chosen: list[int]) -> list[bool]:
        return [np.array_equal(a.permute(1, 2, 0), pictures[k]) for a, k in zip(clip, chosen, strict=True)]

    with PyavVideo(path) as video:
        base = Fraction(truth["time_base"])
        times = [
            at if tick is None else float(tick * base) for tick, at in zip(truth["ticks"], video.positions, strict=True)
        ]
        assert truth["ticks"].count(None) <= 1  # ffprobe gives the last frame of an AVI none
        np.testing.assert_allclose(video.positions, times, rtol=0, atol=2e-6)
        assert all(right(video.read(spread.tolist()), spread.tolist()))
        for k in sorted(wanted, reverse=True)[::3]:
            assert all(right(video.read([k]), [k])), k
        for chosen in (
            sorted(rng.choice(sorted(wanted), min(4, len(wanted)), replace=False).tolist()) for _ in range(3)
        ):
            assert all(right(video.read(chosen), chosen))

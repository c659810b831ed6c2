"""decord and torchcodec through videogru, over the files of the decoder matrix: the right frames, or an error."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.data.frame_numbers import number_in
from videogru.data.readers.video.key_frames import starts_anew
from videogru.data.readers.video.open import open_video
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import SourceError

GOLDEN = Path(__file__).parents[3] / "golden"
MADE: dict[str, dict[str, Any]] = json.loads((GOLDEN / "video_matrix.json").read_text(encoding="utf-8"))["made"]
IN_ORDER = {
    *("cut_open.mkv", "cut.ts", "late.ts", "equal_times.mkv", "b_frames.avi", "h264.avi", "h264.ts", "mpeg2.ts"),
    *("mpeg2.mpg", "mpeg1.mpeg", "packed.avi", "wrap.ts", "hevc_cut.ts"),
}
OPEN_GROUPS = {
    *("open_gop.mp4", "open_gop.mkv", "intra_refresh.mp4", "refresh_cut.mkv", "cut_open.mp4", "cut_hevc.mp4"),
    *("hevc.mp4", "hevc_open.mkv", "hevc10.mp4"),
}
UNREADABLE = {"streamed.mkv", "av1.mp4", "av1.webm", "av1_cut.mkv", "theora.ogv", "uneven.gif"}
OTHER_TIMES = {"delayed.mp4", "late.mkv", "fragmented.mp4", "fragmented_cut.mp4", "h264.flv"}
REASONS = {
    "decord": dict.fromkeys(IN_ORDER, "decoded in order, which")
    | dict.fromkeys(OPEN_GROUPS, "need others before it")
    | dict.fromkeys(UNREADABLE, "decord cannot read it")
    | dict.fromkeys(OTHER_TIMES, "time stamps are not those of the file")
    | {"cut.mp4": "decord finds 48 frames, PyAV 39"},
    "torchcodec": dict.fromkeys(IN_ORDER, "decoded in order, which"),
}
# Of these, torchcodec reads some frames right; the other reads are errors.
PARTLY = {"intra_refresh.mp4", "refresh_cut.mkv", "cut_open.mp4"}


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", sorted(MADE))
def test_the_frames_asked_for_or_an_error(name: str, decoder: Any) -> None:
    pytest.importorskip(decoder, exc_type=Exception)
    path, shown = GOLDEN / "videos" / name, MADE[name]["numbers"]
    reason = REASONS[decoder].get(name)
    if reason is not None:
        with pytest.raises(SourceError, match=reason) as caught:
            open_video(path, decoder=decoder)
        assert caught.value.where == str(path) and "data.decoder=pyav" in str(caught.value.hint)
        return
    count = len(shown)
    calls = [list(range(count)), *([k] for k in reversed(range(0, count, 1 + count // 60)))]
    calls += [list(range(k, min(k + 3, count))) for k in reversed(range(0, count, 7))]
    refused = 0
    with open_video(path, decoder=decoder) as video:
        for chosen in calls:
            try:
                frames = video.read(chosen)
            except SourceError:
                refused += 1
                continue
            assert [number_in(frame.permute(1, 2, 0).numpy()) for frame in frames] == [shown[k] for k in chosen]
    assert (refused > 0) is (decoder == "torchcodec" and name in PARTLY)
    assert refused < len(calls)


@pytest.mark.parametrize("name", sorted({*IN_ORDER, *OPEN_GROUPS, *UNREADABLE, *OTHER_TIMES}))
def test_auto_never_takes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("decord", "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, module, None)
    with open_video(GOLDEN / "videos" / name, decoder="auto") as video:
        assert isinstance(video, PyavVideo)


AVCC = bytes([1, 100, 0, 31, 0xFF, *bytes(17)])
HVCC = bytes([1, *bytes(20), 0x0F, 0])


@pytest.mark.parametrize(
    ("codec", "packet", "extradata", "alone"),
    [
        ("h264", b"\0\0\0\2\x09\xf0" + b"\0\0\0\3\x65\x88\x80", AVCC, True),
        ("h264", b"\0\0\0\2\x06\x06" + b"\0\0\0\3\x41\x9a\x80", AVCC, False),
        ("h264", b"\0\0\0\1\x67\x64\0\0\1\x65\x88", None, True),
        ("h264", b"\0\0\0\1\x67\x64\0\0\1\x41\x88", b"\0\0\0\1\x67" + bytes(30), False),
        ("hevc", b"\0\0\0\3\x26\x01\xaf", HVCC, True),  # IDR_W_RADL
        ("hevc", b"\0\0\0\3\x2a\x01\xaf", HVCC, False),  # CRA
        ("hevc", b"\0\0\1\x28\x01\xaf", None, True),  # IDR_N_LP
        ("vp9", b"\x82", None, True),
        # Damaged: lengths beyond the packet, of nothing, and no unit at all.
        ("h264", b"\xff\xff\xff\xff\x41", AVCC, False),
        ("h264", bytes(40), AVCC, False),
        ("h264", b"", None, False),
        ("h264", b"\0\0\1", None, False),
    ],
)
def test_key_frames_that_start_anew(codec: str, packet: bytes, extradata: bytes | None, alone: bool) -> None:
    assert starts_anew(codec, packet, extradata) is alone

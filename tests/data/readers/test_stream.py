"""Files, addresses, cameras and raw bytes as streams: the same pixels and times by whatever way they come."""

import contextlib
import io
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.support.stream_sources import ffmpeg, rtp_of, rtsp_server, web_server
from videogru.config import DataConfig
from videogru.data.clips.pace import Pace
from videogru.data.readers.open import open_source
from videogru.data.readers.stream import FileVideo, RawVideo, open_stream
from videogru.data.readers.video import live as video_stream
from videogru.data.readers.video.live import NetworkVideo
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import ConfigError, SourceError

DATA = DataConfig().for_kind("video")
EVERY = Pace(None).takes


def opened(source: object, **more):
    return open_stream(str(source), data=DATA, stdin=io.BytesIO(), **more)


def whole(stream, takes=EVERY) -> tuple[np.ndarray, list[float]]:
    frames = [(frame.pixels.copy(), frame.seconds) for frame in stream.frames(takes)]
    stream.close()
    return np.stack([pixels for pixels, _ in frames]), [seconds for _, seconds in frames]


@pytest.fixture(scope="session")
def clip(shared_data: Path) -> Path:
    return sorted((shared_data / "grid/videos").glob("*.mp4"))[0]


@pytest.mark.parametrize(
    "name",
    [
        *("decord/unordered.mov", "decord/video_90.mov", "torchcodec/test_non_zero_start.mp4"),
        *("torchcodec/testsrc2_vp8.webm", "torchcodec/testsrc2_mpeg4.avi", "torchcodec/discard_first_keyframe.mp4"),
        *("kinetics_style/flipping_a_pancake.mkv",),
    ],
)
def test_one_pass_gives_the_frames_that_seeking_gives(shared_data: Path, name: str) -> None:
    with PyavVideo(shared_data / "videos" / name) as video:
        indices = list(range(0, len(video.positions), max(1, len(video.positions) // 7)))
        expected = video.read(indices).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack(list(video.one_by_one(indices))), expected)


def test_a_file_gives_its_frames_and_times(clip: Path) -> None:
    with open_source(clip, data=DATA) as source:
        expected = source.read([1, 3, 6, 8]).permute(0, 2, 3, 1).numpy()
        positions = source.positions
    stream = opened(clip)
    assert isinstance(stream, FileVideo) and not stream.is_live and stream.count == len(positions) == 75
    pixels, seconds = whole(stream, Pace(0.1).takes)
    assert np.array_equal(pixels[:4], expected) and seconds[:4] == positions[[1, 3, 6, 8]].tolist()


def test_a_file_that_is_cut_off_gives_what_it_has_and_then_says_so(clip: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.mkv"
    ffmpeg("-i", clip, "-c:v", "copy", "-an", short)
    short.write_bytes(short.read_bytes()[:-9000])
    stream, seen = opened(short), 0
    stream.count = 75
    with PyavVideo(short) as video:
        promised = len(video.positions)
    for _ in stream.frames(EVERY):
        seen += 1
    assert 10 < seen == promised < 75


def test_a_frame_that_is_promised_and_missing(clip: Path) -> None:
    with PyavVideo(clip) as video:
        frames = video._frames_in_order
        video._frames_in_order = lambda: (f for n, f in enumerate(frames()) if n != 30)
        shown = video.one_by_one(range(75))
        assert len([next(shown) for _ in range(30)]) == 30
        with pytest.raises(SourceError, match="declares 75 frames, 30 can be decoded; frame 30 is not among them"):
            next(shown)


def test_a_folder_of_images(clip: Path, tmp_path: Path) -> None:
    ffmpeg("-i", clip, "-frames:v", "10", tmp_path / "%03d.png")
    with open_source(tmp_path, data=DATA) as source:
        expected = source.read(range(10)).permute(0, 2, 3, 1).numpy()
    pixels, seconds = whole(opened(tmp_path))
    assert np.array_equal(pixels, expected) and seconds == (np.arange(10) / 25).tolist()


def test_raw_frames_are_those_of_the_same_pixels_in_a_file(tmp_path: Path) -> None:
    source = ("-f", "lavfi", "-i", "testsrc2=size=40x24:rate=25:duration=1", "-pix_fmt")
    raw = ffmpeg(*source, "rgb24", "-f", "rawvideo", "-")
    ffmpeg(*source, "rgb24", "-c:v", "png", tmp_path / "same.mkv")
    expected, times = whole(opened(tmp_path / "same.mkv"))
    stream = open_stream("-", data=DATA, stdin=io.BytesIO(raw), size=(40, 24), fps=25.0)
    pixels, seconds = whole(stream)
    assert expected.shape == (25, 24, 40, 3) and np.array_equal(pixels, expected)
    np.testing.assert_allclose(seconds, times, atol=1e-9)


def test_raw_frames_that_end_too_early() -> None:
    stream = RawVideo(io.BytesIO(bytes(2 * 24 + 5)), size=(4, 2), fps=10.0)
    frames = stream.frames(EVERY)
    assert [next(frames).seconds for _ in range(2)] == [0.0, 0.1]
    with pytest.raises(SourceError, match="frame 2 ends after 5 of 24 bytes(.|\n)*4x2 rgb24: check --size"):
        next(frames)
    with pytest.raises(SourceError, match="standard input: is empty"):
        next(RawVideo(io.BytesIO(), size=(4, 2), fps=10.0).frames(EVERY))


def test_a_clip_by_http_is_the_file(clip: Path) -> None:
    expected, times = whole(opened(clip))
    with web_server(clip.parent) as address:
        stream = opened(f"{address}/{clip.name}")
        assert isinstance(stream, NetworkVideo) and not stream.is_live
        assert stream.extent == pytest.approx((0.0, 3.0), abs=0.05)
        pixels, seconds = whole(stream)
        some = whole(opened(f"{address}/{clip.name}"), Pace(0.1).takes)[1]
    assert np.array_equal(pixels, expected) and seconds == times
    assert some == whole(opened(clip), Pace(0.1).takes)[1]


def test_what_has_no_end_is_live_and_counts_from_zero(clip: Path, tmp_path: Path) -> None:
    ffmpeg("-i", clip, "-an", "-c:v", "mpeg2video", "-q:v", "2", tmp_path / "camera.ts")
    with web_server(tmp_path) as address:
        stream = opened(f"{address}/endless/camera.ts")
        assert stream.is_live and stream.extent is None
        pixels, seconds = whole(stream)
    assert len(pixels) == 75
    np.testing.assert_allclose(seconds, np.arange(75) / 25, atol=1e-6)
    assert np.array_equal(pixels, whole(opened(tmp_path / "camera.ts"))[0])


def test_a_camera_by_rtsp(tmp_path: Path) -> None:
    video = tmp_path / "camera.mp4"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=10:duration=2", "-c:v", "libx264", "-pix_fmt", "yuv420p", video
    )
    expected, _ = whole(opened(video))
    with rtsp_server(*rtp_of(video, tmp_path / "camera.sdp")) as address:
        stream = opened(address)
        assert stream.is_live and stream.extent is None
        frames = []
        with contextlib.suppress(SourceError):  # how FFmpeg takes the end of the connection differs
            for frame in stream.frames(EVERY):
                frames.append(frame)
        stream.close()
    assert 18 <= len(frames) <= 20  # who joins late misses what comes before the first key frame
    for frame in frames:
        assert any(np.array_equal(frame.pixels, picture) for picture in expected)
    np.testing.assert_allclose(np.diff([frame.seconds for frame in frames]), 0.1, atol=0.01)
    assert frames[0].seconds == 0


def test_time_that_jumps_goes_on(tmp_path: Path) -> None:
    source = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=10:duration=1", "-c:v", "mpeg2video")
    for name, offset in (("a", 100), ("b", 3000), ("c", 5)):
        ffmpeg(*source, "-output_ts_offset", offset, tmp_path / f"{name}.ts")
    joined = b"".join((tmp_path / f"{name}.ts").read_bytes() for name in "abc")
    (tmp_path / "all.ts").write_bytes(joined)
    with web_server(tmp_path) as address:
        seconds = whole(opened(f"{address}/endless/all.ts"))[1]
    assert len(seconds) >= 28 and seconds[0] == 0
    steps = np.diff(seconds)
    assert float(steps.min()) > 0.01 and float(steps.max()) < 0.35


def test_addresses_that_give_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("<html>" + "no video " * 500)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.wav")
    monkeypatch.setattr(video_stream, "TIMEOUT_SECONDS", 0.5)
    with web_server(tmp_path) as address:
        for name, words in (
            ("missing.mp4", "404 Not Found|Not Found"),
            ("page.html", "cannot be read"),
            ("sound.wav", "holds no video stream"),
            ("silent", "nothing came for 0.5 seconds"),
        ):
            with pytest.raises(SourceError, match=words) as caught:
                opened(f"{address}/{name}")
            assert caught.value.where == f"{address}/{name}" and caught.value.hint
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for scheme in ("http", "rtsp"):
        with pytest.raises(SourceError, match="refused") as caught:
            opened(f"{scheme}://user:secret@127.0.0.1:{port}/live")
        assert "secret" not in str(caught.value) and f"{scheme}://127.0.0.1:{port}/live" in str(caught.value)
    with pytest.raises(ConfigError, match="begin with rtsp, rtsps, http, https, not ftp"):
        opened("ftp://127.0.0.1/a.mp4")


def test_a_camera_that_falls_silent(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg("-i", clip, "-an", "-c:v", "mpeg2video", "-q:v", "2", tmp_path / "camera.ts")
    monkeypatch.setattr(video_stream, "TIMEOUT_SECONDS", 1.0)
    seen: list = []
    with web_server(tmp_path) as address:
        stream = opened(f"{address}/stalls/camera.ts")
        with pytest.raises(SourceError, match="stalls/camera.ts: nothing came for 1 seconds"):
            seen.extend(stream.frames(EVERY))
        stream.close()
    assert 20 < len(seen) < 75


def test_an_address_opens_no_file_of_this_machine(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{clip}\n#EXT-X-ENDLIST\n"
    )
    with web_server(tmp_path) as address, pytest.raises(SourceError):
        whole(opened(f"{address}/list.m3u8"))


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_stream, "CAMERAS", {})
    with pytest.raises(ConfigError, match="camera 0: a camera cannot be read here(.|\n)*ffmpeg -i CAMERA"):
        opened("0")
    monkeypatch.setattr(video_stream, "CAMERAS", {video_stream.sys.platform: ("no_such_device", "/dev/video{}")})
    with pytest.raises(ConfigError, match="no_such_device is not in this build of PyAV(.|\n)*-i /dev/video3"):
        opened("3")
    # FFmpeg's test picture stands for a camera, whose numbers are then frame rates.
    monkeypatch.setattr(
        video_stream, "CAMERAS", {video_stream.sys.platform: ("lavfi", "testsrc2=size=64x48:rate={}:duration=1")}
    )
    stream = opened("5")
    assert stream.is_live and stream.name == "camera 5"
    pixels, seconds = whole(stream)
    assert pixels.shape == (5, 48, 64, 3)
    np.testing.assert_allclose(seconds, np.arange(5) / 5, atol=1e-6)
    with pytest.raises(SourceError, match="camera 0: cannot be read"):
        opened("0")


def test_sources_and_flags_that_do_not_go_together(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--size and --fps are for raw frames"):
        opened(clip, size=(4, 4))
    for more in ({}, {"size": (4, 4)}, {"fps": 5.0}):
        with pytest.raises(ConfigError, match="raw frames do not say(.|\n)*--size WIDTHxHEIGHT and --fps"):
            opened("-", **more)
    with pytest.raises(ConfigError, match="60000x60000 is more than 64 megapixels"):
        opened("-", size=(60_000, 60_000), fps=5.0)
    with pytest.raises(SourceError, match="no such file"):
        opened(tmp_path / "missing.mp4")
    (tmp_path / "a.mp3").write_bytes(b"x")
    with pytest.raises(SourceError, match="unknown suffix"):
        opened(tmp_path / "a.mp3")

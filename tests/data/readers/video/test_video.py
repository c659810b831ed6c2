"""Video readers: frames against frame numbers written in the pixels, and a plain sequential decode."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from videogru.data.readers.video import pyav_reader as video_pyav
from videogru.data.readers.video.open import open_video
from videogru.data.readers.video.packet_index import PacketTable
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import ConfigError, SourceError

SIZE = 64
STEP = 4  # gray levels between two frames


def make_video(
    path: Path,
    ticks: Sequence[int],
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    base: Fraction = Fraction(1, 1000),
    format: str | None = None,
    rate: int = 25,
    aspect: Fraction | None = None,
    rotation: int = 0,
) -> Path:
    """Frame k is gray 20 + STEP * k, with a white upper left quarter; ticks[k] is its time in `base`."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.bit_rate = 4_000_000
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE // 2, "yuv420p"
        stream.codec_context.time_base = base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number, tick in enumerate(ticks):
            pixels = np.full((SIZE // 2, SIZE, 3), 20 + STEP * number, np.uint8)
            pixels[: SIZE // 4, : SIZE // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(clip: torch.Tensor) -> list[int]:
    """The frame numbers written in the lower right quarter."""
    corner = clip[:, :, SIZE // 4 + 2 :, SIZE // 2 + 2 :].float().mean((1, 2, 3))
    return ((corner - 20) / STEP).round().int().tolist()


def plain_decode(path: Path) -> list[np.ndarray]:
    """All frames in order, turned by their rotation: no seek, no index."""
    with av.open(str(path)) as container:
        frames = container.decode(container.streams.video[0])
        return [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)) for frame in frames]


ENCODINGS = {
    "b-frames": ("a.mp4", "libx264", {"bf": "3", "g": "12"}),
    "open gop": ("a.mkv", "libx264", {"bf": "3", "g": "8", "x264-params": "open-gop=1:scenecut=0"}),
    "one key frame": ("a.mp4", "libx264", {"g": "999"}),
    "hevc": ("a.mp4", "libx265", {"x265-params": "log-level=none:keyint=8:bframes=3:open-gop=1"}),
    "mpeg4 avi": ("a.avi", "mpeg4", {"g": "10"}),
    "mpeg4 avi b-frames": ("a.avi", "mpeg4", {"g": "10", "bf": "2"}),
    "h264 avi b-frames": ("a.avi", "libx264", {"g": "10", "bf": "2"}),
    "mpeg-ts": ("a.ts", "libx264", {"bf": "2", "g": "10"}),
    "vp8": ("a.webm", "libvpx", {"g": "15"}),
    "vp9": ("a.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "15", "cpu-used": "8"}),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_frame_is_the_one_asked_for(tmp_path: Path, encoding: str) -> None:
    name, codec, options = ENCODINGS[encoding]
    base = Fraction(1, 25)
    path = make_video(tmp_path / name, range(40), codec=codec, options=options, base=base)
    with PyavVideo(path) as video:
        assert len(video.positions) == 40
        np.testing.assert_allclose(np.diff(video.positions), 0.04, atol=1.1e-3)
        assert video.extent[1] - video.positions[-1] == pytest.approx(0.04, abs=2e-3)
        assert numbers(video.read(range(40))) == list(range(40))
        rng = np.random.default_rng(0)
        for _ in range(4):
            chosen = sorted(rng.choice(40, 5, replace=False).tolist())
            assert numbers(video.read(chosen)) == chosen


def test_each_single_frame_by_a_fresh_seek(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", range(30), options={"bf": "3", "g": "7"}, base=Fraction(1, 25))
    with PyavVideo(path) as video:
        assert video.details["access"] == "by seeking"
        assert [numbers(video.read([k]))[0] for k in reversed(range(30))] == list(reversed(range(30)))


def test_variable_rate_and_a_start_that_is_not_zero(tmp_path: Path) -> None:
    ticks = [5000, 5010, 5500, 5540, 5580, 6900, 6901, 7000]
    with PyavVideo(make_video(tmp_path / "a.mkv", ticks, options={"bf": "2"})) as video:
        np.testing.assert_allclose(video.positions, np.array(ticks) / 1000, atol=1e-9)
        assert numbers(video.read([1, 5, 6])) == [1, 5, 6]


def test_neighbors_are_decoded_without_a_second_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(
        tmp_path / "a.mp4", range(40), options={"g": "20", "bf": "0", "sc_threshold": "0"}, base=Fraction(1, 25)
    )
    seeks: list[int] = []
    original = video_pyav.decode_run
    monkeypatch.setattr(
        video_pyav,
        "decode_run",
        lambda container, stream, table, key, *rest, **how: (
            seeks.append(key.place) or original(container, stream, table, key, *rest, **how)
        ),
    )
    with PyavVideo(path) as video:
        assert numbers(video.read([1, 2, 9, 18, 21, 22])) == [1, 2, 9, 18, 21, 22]
        assert seeks == [0, 20]
        # The key frame comes next anyway.
        assert numbers(video.read(range(40))) == list(range(40))
    assert seeks == [0, 20, 0]


def test_a_seek_that_lands_wrong_falls_back_to_decoding_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", range(30), options={"g": "10"}, base=Fraction(1, 25))
    with PyavVideo(path) as video:
        monkeypatch.setattr(PacketTable, "place_of", lambda *_: None)
        assert numbers(video.read([3, 14, 29])) == [3, 14, 29]
        assert video.details["access"] == "in order"
        assert numbers(video.read([0, 28])) == [0, 28]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_and_pixel_aspect(tmp_path: Path, rotation: int) -> None:
    path = make_video(tmp_path / "a.mp4", range(3), aspect=Fraction(4, 3), rotation=rotation)
    with PyavVideo(path) as video:
        clip = video.read([0, 1, 2])
    truth = np.stack(plain_decode(path)).transpose(0, 3, 1, 2)
    assert clip.shape == truth.shape
    assert np.array_equal(clip.numpy(), truth)
    # Pixels stored 4:3 wide; lying on their side they are 4:3 high.
    assert video.pixel_aspect == pytest.approx(4 / 3 if rotation in (90, 270) else 3 / 4)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.ts", "libx264")])
def test_a_file_cut_in_the_middle_tells_its_real_length(tmp_path: Path, name: str, codec: str) -> None:
    path = make_video(tmp_path / name, range(40), codec=codec, options={"g": "8"}, base=Fraction(1, 25))
    with av.open(str(path)) as container:
        places = sorted(packet.pos for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: places[20] + 9])
    with PyavVideo(path) as video:
        count = len(video.positions)
        assert 17 <= count <= 21
        assert numbers(video.read(range(count))) == list(range(count))


def test_a_cut_mp4_has_no_index_left(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", range(40))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SourceError, match="cannot be read as a video"):
        PyavVideo(path)


def test_a_video_whose_index_stands_first_is_known_to_be_cut(tmp_path: Path) -> None:
    for name, options in (("a.mp4", {"movflags": "faststart"}), ("a.avi", {})):
        path = tmp_path / name
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = SIZE
            for step in range(40):
                picture = np.random.default_rng(step).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        with PyavVideo(path) as video:
            assert len(video.positions) == 40
        whole = path.read_bytes()
        for lost in (1 if name == "a.mp4" else 1025, 9000, len(whole) // 2):
            path.write_bytes(whole[:-lost])
            with pytest.raises(SourceError, match="is cut off: ") as caught, PyavVideo(path):
                pass
            assert caught.value.hint


def test_frames_that_are_promised_but_gone_are_an_error(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", range(40), options={"g": "10", "bf": "0"}, base=Fraction(1, 25))
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    content[places[20] : places[30]] = bytes(places[30] - places[20])
    path.write_bytes(content)
    with PyavVideo(path) as video:
        assert len(video.positions) == 40
        with pytest.raises(SourceError, match=r"declares 40 frames, \d+ can be decoded") as caught:
            video.read([2, 25, 39])
        assert caught.value.hint
        # Now it knows better.
        assert len(video.positions) < 40
        assert len(video.read([0, len(video.positions) - 1])) == 2


@pytest.mark.parametrize("indices", [[], [3, 3], [4, 2], [-1, 2], [40]])
def test_bad_indices_are_refused(tmp_path: Path, indices: list[int]) -> None:
    with PyavVideo(make_video(tmp_path / "a.mp4", range(5))) as video, pytest.raises(ValueError):
        video.read(indices)


def test_a_clip_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_pyav, "MAX_CLIP_BYTES", 3 * SIZE * SIZE // 2 * 2)
    with PyavVideo(make_video(tmp_path / "a.mp4", range(5))) as video:
        assert len(video.read([0, 1])) == 2
        with pytest.raises(SourceError, match="3 frames of 64x32"):
            video.read([0, 1, 2])


def test_files_without_a_video_are_refused(tmp_path: Path) -> None:
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{make_video(tmp_path / 'a.ts', range(5))}\n#EXT-X-ENDLIST\n")
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for path in (playlist, sound):
        with pytest.raises(SourceError):
            PyavVideo(path)


def test_close_twice_and_read_after(tmp_path: Path) -> None:
    video = PyavVideo(make_video(tmp_path / "a.mp4", range(5)))
    video.close()
    video.close()
    with pytest.raises(ValueError, match="closed"):
        video.read([0])


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("torchcodec_sine_stereo_mp2.mpg", 100),
        ("truncated_middle.avi", "is cut off: it has 400,000 bytes, and its header speaks of 795,426"),
        ("truncated_no_moov_or_tail.mp4", "is cut off: it has 60,000 bytes, and its header speaks of 680,196"),
        ("mmaction2_nonmonotonic_pts.avi", 164),
        ("text.mp4", "cannot be read"),
        ("torchcodec_frame_exceeds_screen.gif", 1),
        ("zero_bytes.mp4", "cannot be read"),
        ("decord_corrupted.mp4", "declares 50 frames, 48 can be decoded"),
    ],
)
def test_hostile_videos_end_in_an_error_or_an_honest_read(shared_data: Path, name: str, outcome: int | str) -> None:
    path = shared_data / "hostile" / "video" / name
    if isinstance(outcome, str):
        with pytest.raises(SourceError, match=outcome), PyavVideo(path) as video:
            video.read(range(len(video.positions)))
    else:
        with PyavVideo(path) as video:
            assert len(video.positions) == outcome
            assert len(video.read(range(outcome))) == outcome


def test_auto_is_pyav(tmp_path: Path) -> None:
    with open_video(make_video(tmp_path / "a.mp4", range(4))) as video:
        assert isinstance(video, PyavVideo)


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_the_other_decoders_agree(tmp_path: Path, decoder: str) -> None:
    pytest.importorskip(decoder, exc_type=Exception)
    path = make_video(tmp_path / "a.mp4", range(30), options={"bf": "2", "g": "10"}, base=Fraction(1, 25))
    with open_video(path, decoder=decoder) as video, open_video(path, decoder="pyav") as reference:
        assert numbers(video.read([0, 7, 8, 29])) == [0, 7, 8, 29]
        assert np.array_equal(video.positions, reference.positions)
        difference = video.read([3, 20]).int() - reference.read([3, 20]).int()
        assert float(difference.abs().float().mean()) < 2
    video.close()
    with pytest.raises(ValueError, match="closed"):
        video.read([0])


def test_decord_refuses_mpeg_ts(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.ts", range(10), base=Fraction(1, 25))
    with pytest.raises(SourceError, match="MPEG-TS") as caught:
        open_video(path, decoder="decord")
    assert "pyav" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("decoder", "module", "install"),
    [
        ("torchcodec", "torchcodec.decoders", 'pip install "videogru[torchcodec]"'),
        ("decord", "decord", "pip install decord"),
    ],
)
def test_a_missing_decoder_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, module: str, install: str
) -> None:
    path = make_video(tmp_path / "a.mp4", range(4))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        open_video(path, decoder=decoder)
    assert install in str(caught.value)


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_other_decoders_refuse_avi_with_b_frames(tmp_path: Path, decoder: str) -> None:
    path = make_video(tmp_path / "a.avi", range(10), codec="mpeg4", options={"bf": "2"}, base=Fraction(1, 25))
    with pytest.raises(SourceError, match="time stamps") as caught:
        open_video(path, decoder=decoder)
    assert "pyav" in str(caught.value.hint)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg for a two-pass encoding")
def test_hidden_reference_frames_of_vp8_are_no_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    command = "ffmpeg -v error -f lavfi -i testsrc2=s=128x96:r=25:d=4 -c:v libvpx -b:v 300k -auto-alt-ref 1"
    command += " -lag-in-frames 16 -g 40 -passlogfile log -pass"
    for rest in (["1", "-f", "null", "-"], ["2", str(path)]):
        subprocess.run([*command.split(), *rest], cwd=tmp_path, check=True, timeout=60)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > 100
    truth = plain_decode(path)
    with PyavVideo(path) as video:
        assert len(video.positions) == len(truth) == 100
        assert np.array_equal(video.read(range(100)).permute(0, 2, 3, 1), np.stack(truth))
        assert video.details["access"] == "by seeking"

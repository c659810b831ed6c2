"""`videogru stream` as a user types it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.command_line import videogru
from tests.support.stream_sources import ffmpeg, web_server, write_stream_model
from videogru.inference.stream import StreamClassifier


@pytest.fixture(scope="module")
def clip(shared_data: Path) -> Path:
    return sorted((shared_data / "grid/videos").glob("*.mp4"))[0]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_stream_model(tmp_path / "model.safetensors", data={"sampling": "dense", "stride_seconds": 0.08})


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_clip_from_the_disk_and_from_the_web(clip: Path, model: Path, tmp_path: Path) -> None:
    done = videogru("stream", clip, "--model", model)
    assert done.code == 0, done.err
    local = records(done.out)
    assert [record["seconds"] for record in local] == [round(k / 25, 6) for k in range(1, 75, 2)]
    assert {record["predicted"] for record in local} <= {"one", "two", "three"}
    assert all(record["confidence"] == record["top"][0]["probability"] for record in local)
    assert f"{clip}: {len(local)} frames read, 0 dropped, " in done.err and " ms a frame" in done.err
    with web_server(clip.parent) as address:
        out = tmp_path / "web.jsonl"
        done = videogru("stream", f"{address}/{clip.name}", "--model", model, "--out", out, "--top-k", 2, "--every", 1)
    assert (done.code, done.out) == (0, "")
    web = records(out.read_text())
    assert [record["seconds"] for record in web] == [0.04, 1.08, 2.04, 2.92]
    by_time = {record["seconds"]: record for record in local}
    for record in web:
        assert len(record["top"]) == 2
        assert {**record, "top": record["top"][:1]} == by_time[record["seconds"]]


def test_raw_frames_from_ffmpeg_by_a_pipe(clip: Path, model: Path) -> None:
    """From FFmpeg itself: its conversion to RGB may round otherwise than PyAV's, not more."""
    raw = ffmpeg("-i", clip, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    size = ("--model", model, "--size", "112x96", "--fps", 25)
    done = piped(raw, *size)
    assert done.code == 0, done.err
    found, local = records(done.out), records(videogru("stream", clip, "--model", model).out)
    assert [record["seconds"] for record in found] == [record["seconds"] for record in local]
    assert max(abs(a["confidence"] - b["confidence"]) for a, b in zip(found, local, strict=True)) < 0.02
    cut = piped(raw[: 112 * 96 * 3 * 4 + 7], *size)
    assert cut.code == 3 and records(cut.out) == found[:2]
    assert "frame 4 ends after 7 of 32,256 bytes" in cut.err


def piped(stdin: bytes, *arguments: object) -> SimpleNamespace:
    """`videogru stream -` with these bytes on its standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return videogru("stream", "-", *arguments)


@pytest.mark.parametrize("stop", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_it_with_all_written(model: Path, tmp_path: Path, stop: signal.Signals) -> None:
    out, frame = tmp_path / "answers.jsonl", os.urandom(32 * 24 * 3)
    command = [sys.executable, "-m", "videogru", "stream", "-", "--model", str(model), "--size", "32x24", "--fps", "25"]
    with subprocess.Popen(
        [*command, "--out", str(out), "--every", "0.5"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    ) as process:
        for _ in range(40):
            process.stdin.write(frame)
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while (not out.exists() or len(out.read_text().splitlines()) < 4) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(stop)  # it waits for the 41st frame
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted after 20 frames read, 0 dropped" in said and b"Traceback" not in said
    # 20 frames: 0.04, 0.12, ..., 1.56 seconds; the last is written although its half second was not over.
    assert [record["seconds"] for record in records(out.read_text())] == [0.04, 0.6, 1.08, 1.56]


def test_an_interrupt_of_what_is_live(clip: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg("-i", clip, "-an", "-c:v", "mpeg2video", tmp_path / "camera.ts")
    read, times = StreamClassifier.read, []

    def interrupted(self, pixels, seconds, **more):
        times.append(seconds)
        if len(times) == 2:
            raise KeyboardInterrupt
        return read(self, pixels, seconds, **more)

    monkeypatch.setattr(StreamClassifier, "read", interrupted)
    with web_server(tmp_path) as address:
        done = videogru("stream", f"{address}/endless/camera.ts", "--model", model)
    assert done.code == 130 and "interrupted after 1 frames read" in done.err
    assert [record["seconds"] for record in records(done.out)] == [round(times[0], 6)]


def test_who_reads_may_stop_reading(clip: Path, model: Path) -> None:
    command = [sys.executable, "-m", "videogru", "stream", str(clip), "--model", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        process.wait(60)
    assert process.returncode == 0 and b"Traceback" not in said and b"Exception" not in said, said


def test_errors_say_what_to_do(clip: Path, model: Path, tmp_path: Path) -> None:
    bi = write_stream_model(tmp_path / "bi.safetensors", temporal="bi")
    whole = write_stream_model(tmp_path / "whole.safetensors")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-f", "mp4", tmp_path / "sound.mp4")
    raw = ("--size", "4x4", "--fps", "5")
    for arguments, code, words in (
        (("missing.mp4", "--model", model), 3, "no such file"),
        ((tmp_path / "sound.mp4", "--model", model), 3, "no video stream"),
        ((clip, "--model", bi), 2, "model.temporal=causal"),
        ((clip,), 2, "videogru train"),
        (("http://127.0.0.1:9/x.mp4", "--model", model), 3, "refused"),
        (("gopher://127.0.0.1/x.mp4", "--model", model), 2, "gopher"),
        ((clip, "--model", model, *raw), 2, "--size and --fps are for raw frames"),
        ((clip, "--model", model, "--size", "4"), 2, "--size '4' is no size"),
        ((clip, "--model", model, "--every", "0"), 2, "--every wants a number above 0"),
        ((clip, "--model", model, "--step-seconds", "nan"), 2, "--step-seconds wants"),
        ((clip, "--model", model, "--step-seconds", "60"), 3, "ends before the first frame"),
        ((clip, "--model", model, "--out", "no/such/folder.jsonl"), 2, "folder of --out does not exist"),
        ((clip, "--model", model, "--device", "warp"), 2, "warp"),
    ):
        done = videogru("stream", *arguments)
        assert done.code == code and words in done.err, (arguments, done.err)
        assert "Traceback" not in done.err and done.out == ""
    done = piped(bytes(48), "--model", whole, *raw)
    assert done.code == 2 and "--step-seconds 0.2" in done.err
    assert piped(bytes(48), "--model", whole, *raw, "--step-seconds", "0.2").code == 0
    done = piped(b"", "--model", model, *raw)
    assert done.code == 3 and "standard input: is empty" in done.err


def test_restart(clip: Path, model: Path) -> None:
    kept = records(videogru("stream", clip, "--model", model).out)
    anew = records(videogru("stream", clip, "--model", model, "--restart", "1").out)
    first = [record for record in kept if record["seconds"] < 1]
    assert anew[: len(first)] == first and anew[len(first) + 3] != kept[len(first) + 3]


def test_a_terminal_sees_one_line(clip: Path, model: Path) -> None:
    """On a pseudo terminal: the line is drawn over and over, and no record is mixed into it."""
    pty = pytest.importorskip("pty")
    main, side = pty.openpty()
    command = [sys.executable, "-m", "videogru", "stream", str(clip), "--model", str(model)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=side, stderr=subprocess.PIPE) as process:
        os.close(side)
        text = b""
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # Linux: the other side was closed
                break
            if not piece:
                break
            text += piece
        process.wait(60)
    os.close(main)
    assert process.returncode == 0
    lines = text.decode().replace("\r\n", "\n").strip("\n").split("\r")
    assert len(lines) > 1 and "{" not in text.decode()
    assert lines[-1].startswith("2.92 s  ") and "ms  dropped 0" in lines[-1]

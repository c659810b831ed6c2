"""A model that follows a video: against `infer` and passes over the frames so far; and what a slow one drops."""

import io
import json
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.stream_sources import CLASSES, web_server, write_stream_model
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.readers.open import open_source
from videogru.data.readers.stream import open_stream
from videogru.data.readers.video.live import StreamFrame
from videogru.errors import ConfigError, DataError, SourceError
from videogru.inference import live_frames as live
from videogru.inference.live_frames import NewestFrames
from videogru.inference.predictor import Predictor
from videogru.inference.stream import Progress, StreamClassifier, follow, step_seconds_of
from videogru.workflows.stream import parse_size
from videogru.workflows.stream_output import LiveLine, RecordWriter


@pytest.fixture(scope="session")
def clip(shared_data: Path) -> Path:
    return sorted((shared_data / "grid/videos").glob("*.mp4"))[0]


def make(path: Path, **how) -> Predictor:
    return Predictor.from_file(write_stream_model(path / "model.safetensors", **how), device="cpu")


def followed(predictor: Predictor, source: object, *, step: float | None = None, restart: float | None = None):
    """(seconds (N,), probabilities (N K)) of a stream."""
    classifier = StreamClassifier(predictor, restart_seconds=restart)
    stream = open_stream(str(source), data=predictor.data)
    step = step if step is not None else step_seconds_of(predictor.card, predictor.data, stream)
    said = list(follow(stream, classifier, step_seconds=step, progress=Progress()))
    stream.close()
    return np.array([seconds for seconds, _ in said]), np.stack([scores for _, scores in said])


@pytest.mark.parametrize(
    "how",
    [
        {"data": {"sampling": "uniform"}},
        {"data": {"sampling": "random", "num_frames": 200}},
        {"data": {"sampling": "all"}, "use_gaps": True, "lookahead": 3},
        {"data": {"fit": "pad", "frame_size": 16}, "frame_differences": "past", "pooling": "attention"},
    ],
    ids=str,
)
def test_at_the_end_of_a_file_it_says_what_infer_says(clip: Path, tmp_path: Path, how) -> None:
    predictor = make(tmp_path, **how)
    expected = predictor.predict_paths([clip], num_workers=0).probabilities[0]
    seconds, said = followed(predictor, clip)
    np.testing.assert_allclose(said[-1], expected, atol=1e-5)
    assert len(seconds) == (75 if how["data"].get("sampling", "all") != "uniform" and "fit" not in how["data"] else 6)
    assert len({tuple(row.round(9)) for row in said}) == len(said)  # every frame changed the answer


@pytest.mark.parametrize(
    "name",
    ["decord/video_90.mov", "torchcodec/test_non_zero_start.mp4", "torchcodec/testsrc2_odd_height_and_width_444.mp4"],
)
def test_other_files_end_as_infer_does(shared_data: Path, tmp_path: Path, name: str) -> None:
    predictor, path = make(tmp_path), shared_data / "videos" / name
    expected = predictor.predict_paths([path], num_workers=0).probabilities[0]
    np.testing.assert_allclose(followed(predictor, path)[1][-1], expected, atol=1e-5)


def test_a_folder_of_images_ends_as_infer_does(clip: Path, tmp_path: Path) -> None:
    from PIL import Image

    with open_source(clip, data=DataConfig().for_kind("video")) as source:
        for number, frame in enumerate(source.read(range(9))):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    models = tmp_path.parent / f"{tmp_path.name}-model"
    models.mkdir()
    predictor = make(models)
    expected = predictor.predict_paths([tmp_path], num_workers=0).probabilities[0]
    np.testing.assert_allclose(followed(predictor, tmp_path)[1][-1], expected, atol=1e-5)


def test_every_answer_is_that_of_a_pass_over_the_frames_so_far(clip: Path, tmp_path: Path) -> None:
    predictor = make(tmp_path, data={"sampling": "dense", "stride_seconds": 0.1}, use_gaps=True)
    seconds, said = followed(predictor, clip)
    every = DataConfig(frame_size=16, num_frames=30, sampling="dense", stride_seconds=0.1).for_kind("video")
    with open_source(clip, data=every) as source:
        frames = prepare_clip(read_clip(source, data=every), data=every, pixel_aspect=source.pixel_aspect)
    assert seconds.tolist() == frames.positions.tolist() and len(seconds) == 30
    gaps = torch.cat((torch.zeros(1), frames.positions.diff().float()))
    for t in (1, 2, 17, 30):
        with torch.no_grad():
            logits = predictor.classifier(frames.frames[None, :t], torch.tensor([t]), gaps[None, :t])
        np.testing.assert_allclose(said[t - 1], logits[0].double().softmax(0).numpy(), atol=1e-5)


def test_a_restart_forgets(clip: Path, tmp_path: Path) -> None:
    predictor = make(tmp_path, data={"sampling": "all"}, use_gaps=True, frame_differences="past")
    seconds, said = followed(predictor, clip, restart=1.0)
    for start in (25, 50):
        again = StreamClassifier(predictor)
        with open_source(clip, data=predictor.data) as source:
            for place in range(start, start + 3):
                pixels = source.read([place])[0].permute(1, 2, 0).numpy()
                expected = again.read(pixels, float(seconds[place]))
                np.testing.assert_allclose(said[place], expected, atol=1e-6)
    assert not np.allclose(said[25], followed(predictor, clip)[1][25], atol=1e-3)


@pytest.mark.parametrize(
    ("data", "windows", "extent", "count", "step"),
    [
        ({"sampling": "all"}, (), None, None, None),
        ({"sampling": "dense", "stride_seconds": 0.3}, (2.0,), None, None, 0.3),
        ({"num_frames": 8}, (1.0, 2.0, 9.0), None, None, 0.25),
        ({"num_frames": 8, "context_seconds": 0.4}, (1.0, 2.0, 9.0), (0.0, 100.0), 2500, 0.35),
        ({"num_frames": 8}, (), (1.0, 5.0), 100, 0.5),
        ({"num_frames": 8}, (), (1.0, 5.0), None, 0.5),
        ({"num_frames": 8}, (), (1.0, 5.0), 8, None),
    ],
)
def test_how_far_apart_steps_lie(data, windows, extent, count, step) -> None:
    card = SimpleNamespace(window_seconds=windows)
    stream = SimpleNamespace(extent=extent, count=count, name="a")
    found = step_seconds_of.__wrapped__(card, DataConfig(**data), stream)
    assert found == step if step is None else found == pytest.approx(step)


def test_a_model_of_whole_videos_cannot_tell_how_far_apart_live_frames_lie(tmp_path: Path, clip: Path) -> None:
    predictor = make(tmp_path)
    raw = open_stream("-", data=predictor.data, stdin=io.BytesIO(), size=(4, 4), fps=5.0)
    with pytest.raises(
        ConfigError, match="standard input: the model was trained on 6 frames of whole(.|\n)*--step-seco"
    ):
        step_seconds_of(predictor.card, predictor.data, raw)


def test_models_that_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.temporal=bi needs frames to come(.|\n)*model.temporal=causal"):
        StreamClassifier(make(tmp_path, temporal="bi"))
    with pytest.raises(ConfigError, match="reads volumes, not videos"):
        StreamClassifier(make(tmp_path, kind="volume"))


def test_no_finite_score_is_an_error(tmp_path: Path) -> None:
    predictor = make(tmp_path)
    predictor.classifier.head.linear.bias.data.fill_(math.nan)
    with pytest.raises(SourceError, match="no finite score at 0.5 seconds"):
        StreamClassifier(predictor).read(np.zeros((20, 30, 3), np.uint8), 0.5)


class Scripted:
    """A live stream that gives its next frame when it is told to."""

    name, is_live, extent, count, pixel_aspect = "script", True, None, None, 1.0

    def __init__(self, frames: int, error: Exception | None = None) -> None:
        self.total, self.error, self.closed = frames, error, False
        self.go, self.given = threading.Semaphore(0), threading.Semaphore(0)

    def frames(self, takes) -> Iterator[StreamFrame]:
        for number in range(self.total):
            self.go.acquire()
            if takes(number / 10, (number + 1) / 10):
                yield StreamFrame(np.full((2, 2, 3), number, np.uint8), number / 10)
            self.given.release()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed = True

    def give(self, count: int) -> None:
        for _ in range(count):
            self.go.release()
            assert self.given.acquire(timeout=60)


def test_a_slow_reader_gets_the_newest_frame_and_the_others_are_counted() -> None:
    stream = Scripted(10)
    with NewestFrames(stream, lambda begins, ends: True) as newest:
        frames = iter(newest)
        stream.give(1)
        assert next(frames).seconds == 0.0 and newest.dropped == 0
        stream.give(4)  # 1, 2, 3, 4 come while 0 is being read
        assert next(frames).seconds == 0.4 and newest.dropped == 3
        stream.give(1)
        assert next(frames).seconds == 0.5 and newest.dropped == 3
        stream.give(4)
        assert [frame.seconds for frame in frames] == [0.9] and newest.dropped == 6
    assert stream.closed


def test_frames_that_are_not_wanted_do_not_count_as_dropped() -> None:
    stream = Scripted(10)
    with NewestFrames(stream, lambda begins, ends: begins == 0.2) as newest:
        stream.give(10)
        assert [frame.seconds for frame in newest] == [0.2] and newest.dropped == 0


def test_an_error_of_the_source_comes_after_its_last_frame() -> None:
    stream = Scripted(2, SourceError("the camera is gone"))
    with NewestFrames(stream, lambda begins, ends: True) as newest:
        stream.give(2)
        frames = iter(newest)
        assert next(frames).seconds == 0.1
        with pytest.raises(SourceError, match="gone"):
            next(frames)
    assert stream.closed


def test_who_leaves_early_does_not_wait_for_the_source() -> None:
    stream = Scripted(5)
    with NewestFrames(stream, lambda begins, ends: True) as newest:
        stream.give(1)
        next(iter(newest))
        stream.go.release()
    assert stream.closed


def test_who_leaves_while_the_source_is_silent_leaves_it_to_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_JOIN_SECONDS", 0.1)
    stream = Scripted(5)
    with NewestFrames(stream, lambda begins, ends: True) as newest:
        stream.give(1)
        next(iter(newest))
    assert not stream.closed  # a read is under way
    stream.go.release()  # the thread sees that nobody waits, and ends
    newest._thread.join(30)
    assert not newest._thread.is_alive()


def test_a_slow_model_drops_frames_of_what_is_live_only(clip: Path, tmp_path: Path) -> None:
    """A real endless stream; and the same frames from a file are all read, however slow the model is."""
    from tests.support.stream_sources import ffmpeg

    predictor = make(tmp_path, data={"sampling": "all"})
    ffmpeg("-i", clip, "-an", "-c:v", "mpeg2video", tmp_path / "a.ts")
    classifier = StreamClassifier(predictor)
    read = classifier.read

    def slow(*arguments, **more):
        threading.Event().wait(0.01)
        return read(*arguments, **more)

    classifier.read = slow
    with web_server(tmp_path) as address:
        for source, is_live in ((f"{address}/endless/a.ts", True), (tmp_path / "a.ts", False)):
            stream, progress = open_stream(str(source), data=predictor.data), Progress()
            seconds = [at for at, _ in follow(stream, classifier, step_seconds=None, progress=progress)]
            assert np.diff(seconds).min() > 0 and len(seconds) == progress.read
            if is_live:
                assert progress.dropped > 10 and progress.read + progress.dropped == 75
            else:
                assert (progress.read, progress.dropped) == (75, 0)


def written(path: Path, times: list[float], **how) -> list[dict]:
    with RecordWriter(path, CLASSES, **{"every_seconds": None, "top_k": 1, **how}) as writer:
        for number, seconds in enumerate(times):
            writer.add(seconds, np.array([0.1, 0.2 + number / 100, 0.7 - number / 100]), dropped=number)
            lines = path.read_text().splitlines()  # at once, and whole
    assert all(json.loads(line) for line in lines)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records(tmp_path: Path) -> None:
    records = written(tmp_path / "a.jsonl", [0.0, 0.04], top_k=2)
    assert records[1] == {
        **{"seconds": 0.04, "predicted": "three", "confidence": 0.69},
        "top": [{"class": "three", "probability": 0.69}, {"class": "two", "probability": 0.21}],
        "dropped": 1,
    }
    assert len(written(tmp_path / "a.jsonl", [0.0], top_k=9)[0]["top"]) == 3


def test_every_so_often_and_the_last(tmp_path: Path) -> None:
    def times(given: list[float]) -> list[float]:
        return [record["seconds"] for record in written(tmp_path / "a.jsonl", given, every_seconds=1.0)]

    assert times([k / 10 for k in range(25)]) == [0.0, 1.0, 2.0, 2.4]
    assert times([k / 10 for k in range(21)]) == [0.0, 1.0, 2.0]
    assert times([0.0, 0.95, 1.05, 1.9, 2.1]) == [0.0, 1.05, 2.1]
    assert times([3.0, 3.5, 20.0, 20.1, 21.2]) == [3.0, 20.0, 21.2]


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(DataError, match="/dev/full: cannot be written: No space left"),
        RecordWriter(Path("/dev/full"), CLASSES, every_seconds=None, top_k=1) as writer,
    ):
        writer.add(0.0, np.array([0.1, 0.2, 0.7]), dropped=0)


def test_the_line_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    record = {"seconds": 1.5, "predicted": "a\nb", "confidence": 0.91234, "dropped": 3}
    with LiveLine(file) as line:
        line.show(record, milliseconds=7.25)
        line.show({**record, "seconds": 1.6}, milliseconds=8.0)  # too soon after, so only at the end
    first, last = file.buffer.getvalue().decode().split("\r")[1:]
    assert first.removesuffix("\x1b[K") == "1.50 s  a?b  0.912  7.2 ms  dropped 3"
    assert last == "1.60 s  a?b  0.912  8.0 ms  dropped 3\x1b[K\n"
    with LiveLine(None) as line:
        line.show(record, milliseconds=7.25)


@pytest.mark.parametrize("text", ["", "320", "320x", "0x5", "-3x5", "3x5x7", "axb", "٣x4", "99999x4"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no size in pixels"):
        parse_size(text)


def test_sizes() -> None:
    assert parse_size("320x240") == parse_size("320X240") == (320, 240)
    assert sys.modules["videogru.workflows.stream"]

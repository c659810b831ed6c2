"""Timelines against a video whose content is known second by second, and the choice against all choices."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from videogru.checkpoint.model_file import make_card, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.readers.open import open_source
from videogru.errors import ConfigError, SourceError
from videogru.inference.predictor import Predictor
from videogru.inference.timeline.figure import draw_timeline
from videogru.inference.timeline.timeline import Segment, choose, join, read_timeline, slide
from videogru.models.classifier import Classifier
from videogru.workflows import timeline as timeline_answers

CLASSES = ("dark", "gray", "bright")
LEVELS = {"dark": 30, "gray": 170, "bright": 220}
STORY = (("dark", 1.0), ("bright", 2.0), ("gray", 1.0))  # seconds


class ByBrightness(nn.Module):
    """Sure of the class whose level the mean of the frames has; unsure between two."""

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, gaps: torch.Tensor | None = None) -> torch.Tensor:
        valid = (torch.arange(frames.shape[1]) < lengths[:, None])[:, :, None, None, None]
        mean = (frames.float() * valid).sum((1, 2, 3, 4)) / (lengths * frames[0, 0].numel())
        levels = torch.tensor([float(LEVELS[name]) for name in CLASSES])
        away = (mean[:, None] - levels).abs()
        return torch.where(away.min(dim=1, keepdim=True).values > 20, 0.0, -(away / 12).square())


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for name, seconds in STORY:
            for _ in range(round(seconds * 25)):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), LEVELS[name], np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def real_model() -> tuple[Classifier, DataConfig]:
    data = DataConfig(frame_size=16, num_frames=6, channels=1).for_kind("video")
    torch.manual_seed(0)
    model = ModelConfig(encoder_width=4, hidden_size=6)
    return Classifier(model, in_channels=1, frame_size=16, num_classes=3, mean=(0.5,), std=(0.2,)).eval(), data


def predictor(window_seconds: tuple[float, ...] = (1.0,)) -> Predictor:
    classifier, data = real_model()
    card = make_card(classifier, kind="video", classes=CLASSES, data=data, window_seconds=window_seconds)
    made = Predictor(classifier, card, device="cpu")
    made._model = ByBrightness()  # type: ignore[assignment]
    return made


def test_the_story_is_told(story: Path) -> None:
    ticks = []
    timeline = read_timeline(predictor(), story, num_workers=0, tick=lambda done, total: ticks.append((done, total)))
    told = [(s.start_seconds, s.end_seconds, s.label) for s in timeline.segments]
    assert told == [(0.0, 1.0, "dark"), (1.0, 3.0, "bright"), (3.0, 4.0, "gray")]
    assert all(segment.confidence > 0.9 for segment in timeline.segments)
    assert timeline.extent == (0.0, 4.0)
    assert sum(done for done, _ in ticks) == len(timeline.windows) == ticks[0][1]


def test_windows_of_several_lengths_tell_the_same_story(story: Path) -> None:
    timeline = read_timeline(predictor(), story, window_seconds=(1.0, 2.0), num_workers=0)
    told = [(s.start_seconds, s.end_seconds, s.label) for s in timeline.segments]
    assert told == [(0.0, 1.0, "dark"), (1.0, 3.0, "bright"), (3.0, 4.0, "gray")]


def test_only_what_touches_and_is_the_same_is_joined() -> None:
    parts = [
        Segment(0.0, 1.0, "dark", 0.7),
        Segment(1.0, 3.0, "dark", 1.0),
        Segment(3.0, 4.0, "gray", 0.8),
        Segment(4.1, 5.0, "gray", 0.9),
    ]
    assert join(iter(parts)) == (Segment(0.0, 3.0, "dark", 0.9), *parts[2:])
    assert join(()) == ()


def test_scores_of_windows_are_those_of_each_window_alone(story: Path) -> None:
    classifier, data = real_model()
    card = make_card(classifier, kind="video", classes=CLASSES, data=data, window_seconds=(0.7,))
    made = Predictor(classifier, card, device="cpu")
    timeline = read_timeline(made, story, num_workers=0)
    for window, mine in zip(timeline.windows[::5], timeline.probabilities[::5], strict=True):
        with open_source(story, data=data) as source:
            clip = prepare_clip(read_clip(source, data=data, window=(window[0], window[1])), data=data)
        with torch.inference_mode():
            alone = classifier(clip.frames[None], torch.tensor([len(clip)])).softmax(dim=1)[0].numpy()
        np.testing.assert_allclose(mine, alone, atol=1e-5)


def test_what_has_no_timeline(story: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole videos") as caught:
        read_timeline(predictor(()), story)
    assert "--window-seconds" in str(caught.value.hint)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="above 0"):
            read_timeline(predictor(), story, window_seconds=(bad,))
    with pytest.raises(SourceError, match="no such file"):
        read_timeline(predictor(), tmp_path / "absent.mp4")
    with pytest.raises(SourceError, match="more than 1,000,000"):
        read_timeline(predictor(), story, window_seconds=(1e-6,))


def test_windows_cover_the_whole_extent_and_stay_in_it() -> None:
    for extent, lengths in (((0.0, 10.0), (2.0,)), ((3.0, 5.1), (0.3, 0.9)), ((0.0, 1.0), (7.0,))):
        windows = slide(extent, lengths)
        assert windows.min() == extent[0]
        assert windows[:, 1].max() == pytest.approx(extent[1], abs=1e-9)
        for length in lengths:
            mine = windows[np.isclose(windows[:, 1] - windows[:, 0], min(length, extent[1] - extent[0]))]
            hop = min(min(lengths), extent[1] - extent[0]) / 4
            assert np.diff(mine[:, 0]).max(initial=0) <= hop + 1e-9
            assert mine[-1, 1] >= extent[1] - hop
    assert slide((0.0, 1.0), (7.0,)).tolist() == [[0.0, 1.0]]


def test_the_choice_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        starts = rng.integers(0, 12, 9) / 4
        windows = np.stack([starts, starts + rng.integers(1, 5, 9) / 4], axis=1)
        confidence = rng.random(9)
        confidence[rng.integers(9)] = np.nan
        kept = choose(windows, confidence, min_confidence=0.3)
        worth = (confidence - 0.3) * np.sqrt(windows[:, 1] - windows[:, 0])
        best = 0.0
        usable = [k for k in range(9) if confidence[k] > 0.3]
        for size in range(1, len(usable) + 1):
            for chosen in combinations(usable, size):
                ordered = sorted(chosen, key=lambda k: windows[k, 0])
                if all(windows[a, 1] <= windows[b, 0] for a, b in pairwise(ordered)):
                    best = max(best, worth[list(chosen)].sum())
        assert worth[kept].sum() == pytest.approx(best)
        assert all(windows[a, 1] <= windows[b, 0] for a, b in pairwise(kept))
        assert (np.diff(windows[kept, 0]) > 0).all()


def test_a_sure_word_beats_the_unsure_window_around_it_and_halves_do_not_beat_the_whole() -> None:
    windows = np.array([[0.0, 0.4], [0.1, 0.2], [0.0, 0.2], [0.2, 0.4]])
    assert choose(windows, np.array([0.72, 0.95, 0.0, 0.0]), min_confidence=0.7).tolist() == [1]
    assert choose(windows, np.array([0.95, 0.0, 0.85, 0.85]), min_confidence=0.7).tolist() == [0]


def test_nothing_sure_enough_gives_no_segment() -> None:
    assert choose(np.array([[0.0, 1.0]]), np.array([0.4]), min_confidence=0.5).tolist() == []
    assert choose(np.zeros((0, 2)), np.zeros(0), min_confidence=0.5).tolist() == []


def test_the_picture_shows_frames_and_segments(story: Path, tmp_path: Path) -> None:
    timeline = read_timeline(predictor(), story, num_workers=0)
    frames = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (30, 220, 220, 170)])
    content = draw_timeline(timeline, frames, np.array([0.5, 1.5, 2.5, 3.5]))
    (tmp_path / "a.png").write_bytes(content)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 1000
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for level in (30, 220, 170):
        assert (pixels == level).all(axis=1).sum() > 1000  # each frame stands in it
    classifier, data = real_model()  # untrained: sure of nothing
    card = make_card(classifier, kind="video", classes=CLASSES, data=data, window_seconds=(1.0,))
    empty = read_timeline(Predictor(classifier, card, device="cpu"), story, min_confidence=0.9, num_workers=0)
    assert empty.segments == ()
    assert draw_timeline(empty, frames, np.array([0.5, 1.5, 2.5, 3.5])).startswith(b"\x89PNG")


def answer(
    videos: list[str],
    model: Path,
    said: list[str],
    *,
    out: Path | None = None,
    form: str = "jsonl",
    min_confidence: float = 0.5,
) -> int:
    return timeline_answers.answer_windows(
        videos,
        model=model,
        out=out,
        form=form,
        window_seconds=(),
        min_confidence=min_confidence,
        device="cpu",
        settings={},
        progress=False,
        say=said.append,
    )


def test_answers_with_a_failing_input(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, data = real_model()
    card = make_card(classifier, kind="video", classes=CLASSES, data=data, window_seconds=(1.0,))
    write_model(tmp_path / "model.safetensors", classifier, card)
    monkeypatch.setattr(timeline_answers.Predictor, "from_file", lambda *_, **__: predictor())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.mp4").write_bytes(story.read_bytes()[:300])
    said: list[str] = []

    def ask(out: Path | None, form: str) -> int:
        return answer(["story.mp4", "cut.mp4"], tmp_path / "model.safetensors", said, out=out, form=form)

    assert ask(None, "jsonl") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["predicted"] for row in rows] == ["dark", "bright", "gray", None]
    assert rows[1]["start_seconds"] == 1.0
    assert "cut.mp4" in rows[3]["error"]
    assert (tmp_path / "timelines" / "story.png").is_file()
    assert not list((tmp_path / "timelines").glob("cut*"))
    assert ask(tmp_path / "t.csv", "csv") == 1
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 5
    assert (tmp_path / "t-story.png").is_file()
    assert ask(None, "table") == 1
    table = capsys.readouterr().out
    assert "1.00 to 3.00" in table
    assert "error: " in table
    assert any("1 input failed" in line for line in said)


def test_a_video_without_a_picture_keeps_its_rows_and_those_of_others(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, data = real_model()
    card = make_card(classifier, kind="video", classes=CLASSES, data=data, window_seconds=(1.0,))
    write_model(tmp_path / "model.safetensors", classifier, card)
    monkeypatch.setattr(timeline_answers.Predictor, "from_file", lambda *_, **__: predictor())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.mp4").write_bytes(story.read_bytes())
    strip = timeline_answers._strip

    def of_sound_ones(reader: DataConfig, path: Path) -> tuple[np.ndarray, np.ndarray]:
        if path.stem == "damaged":  # some windows can be read; a frame of the strip cannot
            raise SourceError("declares 100 frames, 79 can be decoded", where=path)
        return strip(reader, path)

    monkeypatch.setattr(timeline_answers, "_strip", of_sound_ones)
    said: list[str] = []
    failed = answer(["damaged.mp4", "story.mp4"], tmp_path / "model.safetensors", said, min_confidence=0.5)
    assert failed == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["predicted"] for row in rows] == ["dark", "bright", "gray"] * 2
    assert [path.name for path in (tmp_path / "timelines").iterdir()] == ["story.png"]
    assert any("damaged.mp4" in line and "no picture: declares 100 frames" in line for line in said)


def test_windows_that_cannot_be_read_are_told(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = story.read_bytes()
    start = content.index(b"mdat")
    size = int.from_bytes(content[start - 4 : start], "big")
    hole = slice(start + size // 2, start + 3 * size // 4)
    (tmp_path / "hole.mp4").write_bytes(content[: hole.start] + bytes(hole.stop - hole.start) + content[hole.stop :])
    classifier, data = real_model()
    card = make_card(classifier, kind="video", classes=CLASSES, data=data, window_seconds=(0.5,))
    write_model(tmp_path / "model.safetensors", classifier, card)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    failed = answer(["hole.mp4"], tmp_path / "model.safetensors", said, min_confidence=0.0)
    assert failed == 0
    assert capsys.readouterr().out
    (line,) = (line for line in said if "windows cannot be read" in line)
    lost, total = (int(word) for word in line.split(": ")[1].split()[:3:2])
    assert 0 < lost < total
    assert "can be decoded" in line

"""How sure a model must be to stop early: against hand-written loops, on simulated videos, and through the commands."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.command_line import QUICK, videogru, write_video
from tests.support.small_models import rewrite
from tests.support.stream_sources import web_server, with_exits, write_stream_model
from videogru.checkpoint.describe import describe_model
from videogru.checkpoint.golden_sample import add_golden_sample, verify_model
from videogru.checkpoint.model_file import FORMAT_VERSION, ExitTable, read_card
from videogru.config import DataConfig
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.manifests.corpus import open_corpus
from videogru.data.readers.stream import open_stream
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import ConfigError, DataError, ModelFileError
from videogru.inference import early_exit
from videogru.inference.early_exit import (
    calibrate,
    critical_confidence,
    critical_confidences,
    data_of_streams,
    exit_rows,
    exit_table,
    least_risk,
    stepwise,
    threshold_for,
)
from videogru.inference.predictor import Predictor
from videogru.inference.stream import Progress, StreamClassifier, follow, step_seconds_of
from videogru.workflows.stream import check_has_end


def walk(seed: int, steps: int = 12, classes: int = 3) -> np.ndarray:
    """(T K) probabilities of a made video: evidence adds up, at first of nothing; surer and less sure ones."""
    generator = np.random.default_rng(seed)
    drift = np.zeros(classes)
    drift[generator.integers(classes)] = generator.uniform(0, 0.8)
    logits = np.cumsum(generator.normal(0, 0.7, (steps, classes)) + drift, axis=0)
    return torch.from_numpy(logits).softmax(1).numpy()


def changes(probabilities: np.ndarray, threshold: float) -> bool:
    """Whether reading that stops above the threshold gives another answer than the whole video: step by step."""
    for step in probabilities:
        if step.max() > threshold:
            return int(step.argmax()) != int(probabilities[-1].argmax())
    return False


def worst(probabilities: np.ndarray, threshold: float) -> bool:
    """The same for this threshold or any higher one."""
    higher = [float(max(step)) for step in probabilities if max(step) >= threshold]
    return any(changes(probabilities, level) for level in [threshold, *higher])


def test_the_critical_confidence_by_every_threshold() -> None:
    some = 0
    for seed in range(200):
        probabilities = walk(seed)
        critical = critical_confidence(probabilities)
        some += critical > 0
        for level in (0.0, *probabilities.max(axis=1), *np.linspace(0.3, 1, 29)):
            assert worst(probabilities, float(level)) == (critical > level), (seed, level)
    assert 50 < some < 190  # neither all videos nor none change their mind


def test_the_drawing_in_the_docstring() -> None:
    answers, confidences = "ababbb", (0.3, 0.5, 0.7, 0.6, 0.8, 0.9)
    steps = [[c, (1 - c) / 9] if a == "a" else [(1 - c) / 9, c] for a, c in zip(answers, confidences, strict=True)]
    assert critical_confidence(np.array(steps)) == 0.7
    assert critical_confidence(np.array([[0.2, 0.8]])) == 0.0


def test_the_threshold_is_the_lowest_that_the_paper_allows() -> None:
    """Angelopoulos et al. 2022: inf of those with (n R(threshold) + 1) / (n + 1) <= risk, by a search over all."""
    clips = [walk(seed) for seed in range(60)]
    table = exit_table(np.array([critical_confidence(clip) for clip in clips]), dataset="made", split="val")
    levels = sorted({0.0, *(float(confidence) for clip in clips for confidence in clip.max(axis=1))})
    changed_at, ever = {}, np.zeros(60, bool)
    for level in reversed(levels):  # at this threshold or any higher one
        ever |= [changes(clip, level) for clip in clips]
        changed_at[level] = int(ever.sum())
    assert table.changed == tuple(changed_at[threshold] for threshold in table.thresholds)
    found = set()
    for risk in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7):
        allowed = [level for level, changed in changed_at.items() if (changed + 1) / 61 <= risk]
        assert threshold_for(table, risk) == min(allowed)
        found.add(min(allowed))
    assert len(found) > 3


@pytest.mark.parametrize("risk", [0.05, 0.2])
def test_the_promise_holds_for_exchangeable_videos(risk: float) -> None:
    """Averaged over calibration sets of 40 and one more video each; without the +1 of the paper it would not hold."""
    clips = [walk(seed) for seed in range(1500)]
    critical = np.array([critical_confidence(clip) for clip in clips])
    generator = np.random.default_rng(1)
    lost, worse, naive = [], [], []
    for _ in range(3000):
        *drawn, further = generator.choice(len(clips), 41, replace=False)
        table = exit_table(critical[drawn], dataset="made", split="val")
        threshold = threshold_for(table, risk)
        lost.append(changes(clips[further], threshold))
        worse.append(critical[further] > threshold)
        plain = next(t for t, changed in zip(table.thresholds, table.changed, strict=True) if changed / 40 <= risk)
        naive.append(critical[further] > plain)
    error = 3 * np.sqrt(risk / 3000)
    assert np.mean(lost) <= np.mean(worse) <= risk + error
    assert np.mean(worse) >= risk - 1 / 41 - error  # and no more cautious than the paper says
    assert np.mean(naive) > risk


def test_few_videos_promise_little() -> None:
    none = exit_table(np.zeros(98), dataset="made", split="val")
    with pytest.raises(ConfigError, match="98 videos, which promise no risk below 0.011(.|\n)*on 99 videos or more"):
        threshold_for(none, 0.01)
    assert threshold_for(none, least_risk(none)) == 0.0
    assert threshold_for(exit_table(np.zeros(99), dataset="made", split="val"), 0.01) == 0.0
    one = exit_table(np.array([0.8, *np.zeros(98)]), dataset="made", split="val")
    assert (threshold_for(one, 0.01), threshold_for(one, 0.02)) == (0.8, 0.0)


def test_of_many_thresholds_some_stay_and_hold() -> None:
    critical = np.random.default_rng(0).uniform(0, 1, 5000)
    table = exit_table(critical, dataset="made", split="val")
    assert len(table.thresholds) == early_exit.MAX_THRESHOLDS
    for risk in (0.001, 0.0123, 0.3):
        threshold = threshold_for(table, risk)
        exact = np.sort(critical)[::-1][int(risk * 5001) - 1]  # of so many, the one with changed + 1 = risk * 5001
        assert exact <= threshold < exact + 0.002
        assert (np.sum(critical > threshold) + 1) / 5001 <= risk


# Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos of two classes, of 9 to 17 frames at 12 a second, as a table with splits and groups."""
    place = tmp_path_factory.mktemp("videos")
    lines = ["source,label,split,group"]
    for number in range(9):
        write_video(place / f"{number}.mp4", bright=number % 2 == 0, seed=number, frames=9 + number)
        split = ("train", "val", "val", "val", "val", "val", "val", "test", "train")[number]
        lines.append(f"{number}.mp4,{('one', 'two')[number % 2]},{split},{'pair' if number in (1, 2) else number}")
    (place / "table.csv").write_text("\n".join(lines) + "\n")
    return place


def corpus_of(videos: Path):
    return open_corpus(DataConfig(dataset=str(videos / "table.csv")))


@pytest.mark.parametrize(
    "how",
    [
        {"data": {"num_frames": 5}},
        {"data": {"sampling": "all"}, "use_gaps": True},
        {"data": {"sampling": "dense", "stride_seconds": 0.2, "num_frames": 2}, "use_gaps": True, "cell": "lstm"},
        {"data": {"num_frames": 200}, "frame_differences": "past", "pooling": "attention"},
    ],
    ids=str,
)
def test_it_is_calibrated_on_what_stream_says(videos: Path, tmp_path: Path, how) -> None:
    predictor = Predictor.from_file(write_stream_model(tmp_path / "model.safetensors", **how), device="cpu")
    corpus = corpus_of(videos)
    expected, whole = [], []
    for row in (1, 6):
        stream = open_stream(str(corpus.manifest.path(row)), data=predictor.data)
        step = step_seconds_of(predictor.card, predictor.data, stream)
        classifier = StreamClassifier(predictor)
        said = np.stack([p for _, p in follow(stream, classifier, step_seconds=step, progress=Progress())])
        stream.close()
        whole.append(said)
        expected.append(critical_confidence(said))
    together = ClipDataset(corpus, data=data_of_streams(predictor.data)).__getitems__([(0, 1), (0, 6)]).batch
    for found, said in zip(stepwise(predictor, together), whole, strict=True):
        np.testing.assert_allclose(found, said, atol=1e-6)
    found, failed = critical_confidences(predictor, corpus, np.array([1, 6]), num_workers=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not failed


def test_one_of_each_group_is_read(videos: Path) -> None:
    corpus = corpus_of(videos)
    rows = exit_rows(corpus, "val").tolist()
    assert len(rows) == 5 and len(set(rows) & {1, 2}) == 1 and set(rows) <= {1, 2, 3, 4, 5, 6}
    assert rows == exit_rows(corpus, "val").tolist()


def test_nothing_else_of_a_model_file_changes(videos: Path, tmp_path: Path) -> None:
    path = write_stream_model(tmp_path / "model.safetensors", data={"sampling": "all"})
    add_golden_sample(path)
    before, tensors = read_card(path), load_file(path)
    rewrite(path, format_version=3)  # as it was written before, but for the key
    table, failed = calibrate(path, corpus_of(videos), before.data, split="val", device="cpu", num_workers=0)
    after = read_card(path)
    assert after == before.model_copy(update={"exits": table}) and after.format_version == FORMAT_VERSION
    assert (table.dataset, table.split, table.clips, failed) == ("table", "val", 5, [])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert verify_model(path).holds
    assert describe_model(path)["early_exit"] == {"calibrated_on": "5 val videos of table", "least_risk": "1 / 6"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_read_is_told(videos: Path, tmp_path: Path) -> None:
    path = write_stream_model(tmp_path / "model.safetensors")
    lines = ["source,label,split", "0.mp4,one,train", "1.mp4,two,val", "gone.mp4,two,val"]
    (videos / "gone.csv").write_text("\n".join(lines) + "\n")
    corpus = open_corpus(DataConfig(dataset=str(videos / "gone.csv")))
    data = read_card(path).data
    table, failed = calibrate(path, corpus, data, split="val", device="cpu", num_workers=0)
    assert table.clips == 1 and len(failed) == 1 and "gone.mp4" in failed[0]
    lines[2] = "missing.mp4,two,val"
    (videos / "gone.csv").write_text("\n".join(lines) + "\n")
    corpus = open_corpus(DataConfig(dataset=str(videos / "gone.csv")))
    with pytest.raises(DataError, match="none of 2 videos can be read: .*no such file"):
        calibrate(path, corpus, data, split="val", device="cpu", num_workers=0)
    assert read_card(path).exits == table


@pytest.mark.parametrize(
    "exits",
    [
        {"clips": 0},
        {"changed": [3, 1]},
        {"changed": [3, 1, 1]},
        {"changed": [8, 1, 0]},
        {"changed": [3, 2, 1]},
        {"thresholds": [0.0, 0.9, 0.5]},
        {"thresholds": [0.0, 0.5, 1.5]},
        {"split": "all"},
        {"thresholds": [], "changed": []},
    ],
    ids=str,
)
def test_tables_that_cannot_be_are_refused(tmp_path: Path, exits: dict) -> None:
    path = with_exits(tmp_path, [0.0, 0.5, 0.9], [3, 1, 0], clips=7)
    assert read_card(path).exits == ExitTable(
        dataset="made", split="val", clips=7, thresholds=(0.0, 0.5, 0.9), changed=(3, 1, 0)
    )
    rewrite(path, exits={**read_card(path).exits.model_dump(), **exits})
    with pytest.raises(ModelFileError, match="the card in the header does not hold: exits"):
        read_card(path)


# Commands ---------------------------------------------------------------------------------------------------------


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each frame that the decoder of a file gives."""
    given, frames_in_order = [], PyavVideo._frames_in_order

    def counted(self):
        for frame in frames_in_order(self):
            given.append(frame.pts)
            yield frame

    monkeypatch.setattr(PyavVideo, "_frames_in_order", counted)
    return given


def test_reading_stops_where_it_is_sure(videos: Path, tmp_path: Path, decoded: list[int]) -> None:
    video = videos / "8.mp4"
    path = with_exits(tmp_path, [0.0], [0])
    whole = records(videogru("stream", video, "--model", path).out)
    assert len(whole) == len(decoded) == 17 and not any("exit" in record for record in whole)
    confidences = [record["confidence"] for record in whole]
    stop = next(k for k in range(2, 16) if confidences[k] > max(confidences[:k]))
    level = (confidences[stop] + max(confidences[:stop])) / 2
    with_exits(tmp_path, [0.0, level, 0.999999], [30, 4, 0])
    decoded.clear()
    done = videogru("stream", video, "--model", path, "--exit-risk", "0.05")
    assert done.code == 0, done.err
    left = round(17 / 12 - stop / 12, 6)
    exit = {"risk": 0.05, "surer_than": level, "frames": stop + 1, "seconds_left": left}
    assert records(done.out) == [*whole[:stop], {**whole[stop], "exit": exit}]
    assert len(decoded) == stop + 1
    assert f"{stop + 1} frames read, 0 dropped, " in done.err and "stopped before the end" in done.err
    # Fewer records: the last is written nevertheless, and says so.
    done = videogru("stream", video, "--model", path, "--exit-risk", "0.05", "--every", "60")
    assert records(done.out) == [whole[0], {**whole[stop], "exit": exit}]
    # From the web, as far as from the disk.
    with web_server(videos) as address:
        done = videogru("stream", f"{address}/8.mp4", "--model", path, "--exit-risk", "0.05", "--every", "60")
    assert done.code == 0 and records(done.out)[-1]["exit"]["frames"] == stop + 1
    # A smaller risk asks for more than the model ever is: to the end, as without.
    done = videogru("stream", video, "--model", path, "--exit-risk", "0.01")
    assert records(done.out) == whole and "stopped" not in done.err


class Camera:
    """A live stream."""

    name, is_live, extent, count, pixel_aspect = "camera 0", True, None, None, 1.0

    def frames(self, takes):
        raise AssertionError

    def close(self) -> None:
        pass


def test_values_that_cannot_be(videos: Path, tmp_path: Path) -> None:
    video, path = videos / "8.mp4", with_exits(tmp_path, [0.0], [0], clips=98)
    (tmp_path / "other").mkdir()
    bare = write_stream_model(tmp_path / "other/model.safetensors")
    for arguments, words in (
        (("--exit-risk", "0"), "--exit-risk wants a number between 0 and 1, got 0"),
        (("--exit-risk", "1"), "got 1"),
        (("--exit-risk", "-1"), "got -1"),
        (("--exit-risk", "nan"), "got nan"),
        (
            ("--exit-risk", "0.01"),
            "--exit-risk 0.01: the model was calibrated on 98 videos, which promise no risk below",
        ),
        (("--exit-risk", "0.05", "--restart", "1"), "--restart reads otherwise"),
        (("--exit-risk", "0.05", "--step-seconds", "1"), "--step-seconds reads otherwise"),
        (("--exit-risk", "0.05", "--model", bare), f"videogru model calibrate {bare}"),
    ):
        done = videogru("stream", video, *(() if "--model" in arguments else ("--model", path)), *arguments)
        assert done.code == 2 and words in done.err, (arguments, done.err)
        assert done.out == "" and "Traceback" not in done.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(48))))
        done = videogru("stream", "-", "--size", "4x4", "--fps", "5", "--model", path, "--exit-risk", "0.05")
    assert done.code == 2 and "standard input: --exit-risk is about the answer at the end" in done.err
    with pytest.raises(ConfigError, match="camera 0: --exit-risk"):
        check_has_end(Camera())


def test_a_training_calibrates_and_a_command_does_it_anew(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--set", "data.frame_size=16", "--set", "data.num_frames=6", "--set", "model.temporal=causal")
    done = videogru("train", "--dataset", videos / "table.csv", *QUICK, *small, "--out", "run")
    assert done.code == 0, done.err
    assert "stream --exit-risk: calibrated on 5 val videos, for 0.17 and above, in" in done.err
    model = tmp_path / "run/model.safetensors"
    first = read_card(model).exits
    assert (first.dataset, first.split, first.clips) == ("table", "val", 5)
    stopped = videogru("stream", videos / "7.mp4", "--model", "run", "--exit-risk", "0.99")
    assert stopped.code == 0 and records(stopped.out)[-1]["exit"]["frames"] < 6
    rewrite(model, exits=None)
    bare = videogru("stream", videos / "7.mp4", "--model", "run", "--exit-risk", "0.2")
    assert bare.code == 2 and bare.err.rstrip().endswith("videogru model calibrate run")
    done = videogru("model", "calibrate", "run")
    assert done.code == 0 and f"for 0.17 and above; written into {Path('run/model.safetensors')}" in done.err
    assert read_card(model).exits == first
    assert "calibrated on  5 val videos of table" in videogru("model", "show", "run").out
    done = videogru("model", "calibrate", "run", "--split", "test")
    assert done.code == 0 and read_card(model).exits.clips == 1
    done = videogru("model", "calibrate", "run", "--split", "train")
    assert done.code == 2 and "--split train: a model is surer of what it was trained on" in done.err


def test_models_and_data_that_cannot_be_calibrated(videos: Path, tmp_path: Path) -> None:
    windows = ["source,label,split,start_seconds,end_seconds", "0.mp4,one,train,0,0.5", "1.mp4,two,val,0,0.5"]
    (videos / "windows.csv").write_text("\n".join(windows) + "\n")
    (videos / "whole.csv").write_text("source,label,split\n0.mp4,one,train\n1.mp4,two,test\n")
    for how, table, words in (
        ({"temporal": "bi"}, "table", "model.temporal=bi needs frames to come, so there is nothing to stop early"),
        ({}, "windows", "a stream reads whole videos"),
        ({"window_seconds": (0.5,)}, "table", "a stream reads whole videos"),
        ({}, "whole", "whole: no rows in the split val"),
    ):
        path = write_stream_model(tmp_path / "model.safetensors", **how)
        before = path.read_bytes()
        done = videogru("model", "calibrate", path, "--dataset", videos / f"{table}.csv")
        assert done.code == 2 and words in done.err, (how, table, done.err)
        assert path.read_bytes() == before

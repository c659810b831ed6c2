"""Killed with SIGKILL at awkward moments, a training goes on to the same bits; an unusable state is refused."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.thinning import thinned
from tests.training.test_fit import same, settings, train
from videogru.errors import DataError, VideogruError
from videogru.training import callbacks, state
from videogru.training import fit as fitting
from videogru.training.callbacks import BadFiles
from videogru.training.state import STATE_FILE
from videogru.training.task import SequenceTask

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
    # Python 3.12 warns of forks beside threads; the child does nothing with them.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every step, whatever saving costs."""
    monkeypatch.setattr(state, "_SHARE_OF_TIME", 0)


CONFIG = {"train__save_every_minutes": 1e-9, "train__ema_decay": 0.9, "model__encoder": "conv2", "train__epochs": 2}


def killed(work: Callable[[], Any]) -> bool:
    """Do it in a forked process; whether SIGKILL ended that."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die_in(module: Any, name: str, call: int, *, after: bool = False) -> None:
    """End this process in so many calls of a function, before or after it did its work."""
    real, calls = getattr(module, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


# Two epochs of five steps: ten saved steps, of which two are at the end of an epoch.
MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the first state": (SequenceTask, "training_step", 1, False),
    "in a step": (SequenceTask, "training_step", 8, False),
    "before a state is on the disk": (state.os, "fsync", 7, False),
    "before it has its name": (state.os, "fsync", 9, True),
    "in a validation": (SequenceTask, "validation_step", 2, True),
    "after the model, before the state": (fitting, "write_model", 2, True),
    "before metrics.csv": (callbacks, "_replace", 2, False),
    "after metrics.csv": (callbacks, "_replace", 2, True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    run = tmp_path_factory.mktemp("whole")
    train(run, settings(**CONFIG))
    return run


def curves(run: Path) -> list[list[str]]:
    """metrics.csv without the seconds."""
    return [line.split(",")[:-1] for line in (run / "metrics.csv").read_text().splitlines()]


@pytest.mark.parametrize("moment", thinned(list(MOMENTS), every=2))
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, whole: Path, moment: str) -> None:
    module, name, call, after = MOMENTS[moment]

    def work() -> None:
        die_in(module, name, call, after=after)
        train(tmp_path, settings(**CONFIG))

    assert killed(work)
    begun = (tmp_path / STATE_FILE).exists()
    assert begun == (moment != "before the first state")
    resumed = train(tmp_path, settings(**CONFIG), resume=begun)
    assert same(load_file(whole / "model.safetensors"), resumed)
    assert curves(whole) == curves(tmp_path)


@pytest.mark.parametrize("step", [5, 6, 7])
def test_readers_begin_in_the_right_epoch(tmp_path: Path, whole: Path, step: int) -> None:
    """Five steps an epoch; readers ask for what comes next before the step that goes before it."""

    def work() -> None:
        die_in(SequenceTask, "training_step", step)
        train(tmp_path, settings(**CONFIG, train__num_workers=1))

    assert killed(work)
    resumed = train(tmp_path, settings(**CONFIG, train__num_workers=1), resume=True)
    assert same(load_file(whole / "model.safetensors"), resumed)


def test_killed_at_random_moments_again_and_again(tmp_path: Path, whole: Path) -> None:
    moments = random.Random(4)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                train(tmp_path, settings(**CONFIG), resume=(tmp_path / STATE_FILE).exists())
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    resumed = train(tmp_path, settings(**CONFIG), resume=(tmp_path / STATE_FILE).exists())
    assert same(load_file(whole / "model.safetensors"), resumed)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_killed_after_its_last_epoch_is_finished(tmp_path: Path, keep: str) -> None:
    """The averaged weights of the last epoch are in the state, and early stopping stays stopped."""
    wild = {"train__lr": 0.5, "train__epochs": 9, "train__early_stopping": 1, "model__encoder": "pixels"}
    config = settings(**{**CONFIG, **wild, "train__keep": keep})
    said: list[str] = []
    uncut = train(tmp_path, config)
    rows = (tmp_path / "metrics.csv").read_text()
    assert 2 < len(rows.splitlines()) < 10
    if keep == "last":
        (tmp_path / "model.safetensors").unlink()  # it was killed before that
    assert same(uncut, train(tmp_path, config, resume=True, say=said.append))
    assert said == ["the training is finished already"]
    assert (tmp_path / "metrics.csv").read_text() == rows


def test_more_epochs_go_on_from_a_finished_run(tmp_path: Path) -> None:
    train(tmp_path, settings(**CONFIG))
    train(tmp_path, settings(**{**CONFIG, "train__epochs": 3}), resume=True)
    assert len(curves(tmp_path)) == 1 + 3


def test_states_that_cannot_be_used_are_refused(tmp_path: Path, whole: Path) -> None:
    good = (whole / STATE_FILE).read_bytes()
    path = tmp_path / STATE_FILE
    for content, changes, words in [
        (good[: len(good) // 2], {}, "damaged"),
        (b"", {}, "damaged"),
        (b"\0" * len(good), {}, "damaged"),
        (b"no state", {}, "damaged"),
        (good, {"train__seed": 1}, "seed 0, not 1"),
        (good, {"train__batch_size": 4}, "batch size 8, not 4"),
        (good, {"model__hidden_size": 9}, "model settings"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=words) as caught:
            train(tmp_path, settings(**{**CONFIG, **changes}), resume=True)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == content
    torch.save({"state_dict": {}}, path)
    with pytest.raises(DataError, match="parts are missing"):
        train(tmp_path, settings(**CONFIG), resume=True)


def test_a_state_of_the_version_before_has_no_facts_and_is_checked_by_its_tensors(tmp_path: Path, whole: Path) -> None:
    older = torch.load(whole / STATE_FILE, weights_only=True)
    del older["facts"], older["callbacks"]["Scores"]["stopped"]
    torch.save(older, tmp_path / STATE_FILE)
    assert same(load_file(whole / "model.safetensors"), train(whole, settings(**CONFIG), resume=True))
    with pytest.raises(DataError, match="another model"):
        train(tmp_path, settings(**{**CONFIG, "model__hidden_size": 9}), resume=True)


def test_a_full_disk_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(state.os, "fsync", full)
        with pytest.raises(VideogruError, match="No space left") as caught:
            train(tmp_path, settings(**CONFIG))
    assert "state saved before" in str(caught.value)
    assert not list(tmp_path.glob(".*"))
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["global_step"] > 0


def test_saving_takes_a_bounded_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SHARE_OF_TIME", 1e6)
    saved: list[str] = []
    real = state.StateFile.save_checkpoint
    monkeypatch.setattr(
        state.StateFile, "save_checkpoint", lambda *args, **more: (saved.append(""), real(*args, **more))[1]
    )
    train(tmp_path / "seldom", settings(**CONFIG))
    # Once to learn what it costs, and after every epoch.
    assert len(saved) == 1 + 2
    saved.clear()
    train(tmp_path / "never", settings(**{**CONFIG, "train__save_every_minutes": 0}))
    assert len(saved) == 2


def test_a_line_that_was_being_written_when_the_run_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    path.write_text('row,source,reason,found_by\n3,a.mp4,cut short,training\n5,b.mp4,"em')
    bad = BadFiles(tmp_path, lambda row: f"{row}.mp4", limit=9, say=lambda text: None)
    assert bad.reasons == {3: "cut short"}
    bad.add(5, "empty\n  mend it")
    assert path.read_text().splitlines() == [
        "row,source,reason,found_by",
        "3,a.mp4,cut short,training",
        "5,5.mp4,empty mend it,training",
    ]

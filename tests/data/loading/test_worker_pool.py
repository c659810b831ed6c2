"""Rows that hang (holding the interpreter lock), crash or leave, in workers of every kind."""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from videogru.config import DataConfig
from videogru.data.loading.batching import EpochBatches, Loaded, OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader
from videogru.data.loading.worker_pool import Crew, Watch, watched_map
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.data.readers.array_source import ArraySource
from videogru.errors import DataError, SourceError

TIMEOUT = 1.0  # on a busy machine the other rows need some of it


def misbehave(how: str) -> None:
    """Do what the name says; 'hang' keeps the interpreter lock, so that no thread of Python's runs meanwhile."""
    if how == "hang":
        ctypes.PyDLL(None).sleep(1000)
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "leave":
        os._exit(7)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "refuse":
        raise SourceError("is no good")


REASONS = {
    "hang": "decoding took longer than 1 s",
    "segfault": "the reader process died (signal 11, SIGSEGV)",
    "abort": "the reader process died (signal 6, SIGABRT)",
    "leave": "the reader process died (exit code 7)",
    "kill": "the reader process died (signal 9, SIGKILL)",
    "refuse": "is no good",
}


def read(row: str) -> tuple[str, np.ndarray]:
    """A record of a row; its name says how it ends."""
    misbehave(row.partition(" ")[0])
    return row.upper(), np.full(1000, len(row))


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_way_to_end_costs_one_row(workers: int) -> None:
    rows = [f"{how} {number}" for number, how in enumerate(["good", *REASONS, "good", "hang", "good", "leave"])]
    answers = list(watched_map(read, rows, num_workers=workers, timeout_seconds=TIMEOUT))
    assert [row for row, _ in answers] == rows
    for row, record in answers:
        how = row.partition(" ")[0]
        if how == "good":
            assert not isinstance(record, SourceError)
            assert record[0] == row.upper()
            assert record[1].tolist() == [len(row)] * 1000
        else:
            assert isinstance(record, SourceError)
            assert record.what == REASONS[how]


def test_as_finished_does_not_wait_for_a_hanging_row() -> None:
    rows = ["hang", *(f"good {number}" for number in range(20))]
    answers = [row for row, _ in watched_map(read, rows, num_workers=2, timeout_seconds=TIMEOUT, in_order=False)]
    assert sorted(answers) == sorted(rows)
    assert answers[-1] == "hang"


def test_unwatched_in_this_process() -> None:
    answers = dict(watched_map(read, ["good", "refuse"], num_workers=0))
    assert answers["good"][0] == "GOOD"  # type: ignore[index]
    assert isinstance(answers["refuse"], SourceError)


def fails(row: int) -> int:
    if row == 2:
        raise ZeroDivisionError("a mistake of ours")
    return row


def test_other_errors_reach_the_parent_in_their_turn() -> None:
    answers = watched_map(fails, range(5), num_workers=2)
    assert [next(answers), next(answers)] == [(0, 0), (1, 1)]
    with pytest.raises(ZeroDivisionError, match="a mistake of ours") as caught:
        next(answers)
    assert "in fails" in caught.value.__notes__[0]


class Windows:
    """Reads (file, window) rows, and notes down which it has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, keys: list[tuple[str, int]], watch: Watch) -> list[str]:
        said = []
        for place, (name, window) in enumerate(keys):
            try:
                with watch.reading(place):
                    (self.folder / f"{name} {window}").touch()
                    misbehave(name)
                    said.append("read")
            except SourceError as error:
                said.append(error.what)
        return said


@pytest.mark.parametrize("way", ["hang", "segfault"])
def test_a_file_that_hangs_costs_the_timeout_once_whatever_its_windows(tmp_path: Path, way: str) -> None:
    """A crash may be the system's doing: there each window is tried."""
    tasks = [[(name, window + k) for k in range(2) for name in ("good", way)] for window in range(0, 6, 2)]
    crew = Crew(Windows(tmp_path), num_workers=1, timeout_seconds=TIMEOUT, file_of=lambda key: key[0])
    said = [word for answer in crew.run(tasks) for word in answer]
    crew.close()
    assert said == ["read", REASONS[way]] * 6
    begun = sorted(path.name for path in tmp_path.iterdir())
    assert begun == [f"good {k}" for k in range(6)] + [f"{way} {k}" for k in range(1 if way == "hang" else 6)]


class Innocent:
    """Kills its process the first time it reads a row, as a lack of memory might."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, row: int) -> int:
        mark = self.folder / str(row)
        if row % 3 == 0 and not mark.exists():
            mark.touch()
            misbehave("kill")
        return row


def test_a_row_gets_a_second_chance_after_a_crash(tmp_path: Path) -> None:
    answers = list(watched_map(Innocent(tmp_path), range(9), num_workers=2))
    assert answers == [(row, row) for row in range(9)]


def dies_between_rows(keys: list[int], watch: Watch) -> list[int]:
    if 5 in keys:
        misbehave("leave")
    return keys


def test_deaths_that_no_row_is_to_blame_for_end_it() -> None:
    crew = Crew(dies_between_rows, num_workers=2, timeout_seconds=1.0)
    run = crew.run([key] for key in range(9))
    with pytest.raises(DataError, match="die between two rows \\(exit code 7\\), 3 times"):
        list(run)


def echo(keys: list[int], watch: Watch) -> tuple[int, str]:
    return len(keys), "x" * 300_000


@pytest.mark.parametrize("count", [10, 50_000])
def test_large_tasks_and_answers_do_not_lock_up(count: int) -> None:
    """A worker waits until its answer is taken, and the parent must not wait until its task is."""
    crew = Crew(echo, num_workers=2, timeout_seconds=1.0)
    run = crew.run(list(range(count)) for _ in range(12))
    first = next(run)
    time.sleep(0.2)
    assert [first[0], *(answer[0] for answer in run)] == [count] * 12
    crew.close()


class Clips(ClipDataset):
    """Reads arrays, but some rows end as `ways` says."""

    ways: dict[int, str]

    def _open(self, row: int):  # type: ignore[no-untyped-def]
        misbehave(self.ways.get(row, "good"))
        return super()._open(row)


def clips(ways: dict[int, str], count: int = 23) -> Clips:
    arrays = np.random.default_rng(0).integers(0, 256, (count, 5, 1, 8, 8), dtype=np.uint8)
    manifest = build_manifest(Path(), ("a", "b"), [f"x/{row}" for row in range(count)], np.arange(count) % 2)
    corpus = Corpus("x", "volume", ("a", "b"), manifest, arrays, None, 0, ())
    settings = {"frame_size": 8, "num_frames": 3, "decode_timeout_seconds": TIMEOUT, "augment": {"noise": 0.1}}
    dataset = Clips(corpus, data=DataConfig.model_validate(settings).for_kind("volume"), training=True)
    dataset.ways = ways
    return dataset


def shuffled(epoch: int = 3) -> EpochBatches:
    return EpochBatches(np.arange(23, dtype=np.int64), batch_size=4, seed=1, epoch=lambda: epoch)


def assert_same(ones: list[Loaded], others: list[Loaded]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert (one.epoch, [row for row, _ in one.failures]) == (other.epoch, [row for row, _ in other.failures])
        assert (one.batch is None) == (other.batch is None)
        if one.batch is not None and other.batch is not None:
            for name in ("frames", "lengths", "indices", "labels"):
                assert torch.equal(getattr(one.batch, name), getattr(other.batch, name)), name


@pytest.mark.parametrize(
    ("workers", "method"),
    [
        (1, "fork"),
        (2, "fork"),
        (8, "fork"),
        pytest.param(1, "spawn", marks=pytest.mark.slow),
        pytest.param(8, "spawn", marks=pytest.mark.slow),
        pytest.param(2, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_batches_with_killed_rows_are_those_with_ordinary_failures(workers: int, method: str) -> None:
    """Nor do they depend on the number of workers, or on how these start."""
    bad = (2, 3, 11, 22)
    wanted = list(ClipLoader(clips(dict.fromkeys(bad, "refuse")), shuffled(), num_workers=0))
    ways = dict(zip(bad, ("hang", "segfault", "leave", "kill"), strict=True))
    loader = ClipLoader(clips(ways), shuffled(), num_workers=workers, method=method)
    found = list(loader)
    assert_same(found, wanted)
    reasons = {row: reason for loaded in found for row, reason in loaded.failures}
    assert {row: reason.splitlines()[0] for row, reason in reasons.items()} == {
        row: f"x/{row}: {REASONS[way]}" for row, way in ways.items()
    }


def test_a_refused_row_is_not_opened_again_in_the_next_epoch() -> None:
    loader = ClipLoader(clips({5: "hang"}), shuffled(), num_workers=2, persistent=True)
    first = list(loader)
    pids = loader._crew.pids  # type: ignore[union-attr]
    second = list(loader)
    assert pids == loader._crew.pids  # type: ignore[union-attr]
    assert_same(first, second)
    loader.close()


def test_windows_of_a_file_that_hangs_fail_at_once() -> None:
    dataset = clips({0: "hang", 1: "hang", 2: "hang"}, count=6)
    dataset.training = False  # augmenting would import MONAI first
    manifest = build_manifest(Path(), ("a", "b"), ["x"] * 3 + ["y"] * 3, [0, 1] * 3)
    dataset.corpus = replace(dataset.corpus, manifest=manifest, arrays=None)
    arrays = np.zeros((5, 1, 8, 8), np.uint8)
    dataset._open = partial(open_slowly, dataset.ways, arrays)  # type: ignore[method-assign, assignment]
    rows = np.arange(6, dtype=np.int64)
    started = time.monotonic()
    (loaded,) = ClipLoader(dataset, OrderedBatches(rows, batch_size=6), num_workers=1)
    assert time.monotonic() < started + 2.5 * TIMEOUT
    assert [row for row, _ in loaded.failures] == [0, 1, 2]
    assert all(REASONS["hang"] in reason for _, reason in loaded.failures)


def open_slowly(ways: dict[int, str], array: np.ndarray, row: int) -> ArraySource:
    misbehave(ways.get(row, "good"))
    return ArraySource(array, Path("y"), "volume", DataConfig(frame_size=8, num_frames=3))


def test_a_pass_that_is_left_early_leaves_nothing_behind() -> None:
    loader = ClipLoader(clips({}), shuffled(), num_workers=2, persistent=True)
    for _ in loader:
        break
    whole = list(loader)
    assert_same(whole, list(ClipLoader(clips({}), shuffled(), num_workers=0)))
    loader.close()


def test_batches_are_resumed_inside_an_epoch() -> None:
    whole = list(ClipLoader(clips({4: "leave"}), shuffled(), num_workers=2))
    batches = shuffled()
    batches.skip = 3
    assert_same(list(ClipLoader(clips({4: "leave"}), batches, num_workers=2)), whole[3:])


def test_validation_keeps_the_order_of_its_rows() -> None:
    rows = np.array([8, 2, 5, 1, 0], dtype=np.int64)
    loader = ClipLoader(clips({2: "segfault", 0: "hang"}), OrderedBatches(rows, batch_size=2), num_workers=2)
    seen = [([] if it.batch is None else it.batch.indices.tolist(), [row for row, _ in it.failures]) for it in loader]
    assert seen == [([8], [2]), ([5, 1], []), ([], [0])]


def a_parent(told: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loader = ClipLoader(clips({}), shuffled(), num_workers=3, persistent=True)
    running = iter(loader)
    next(running)
    told.send(loader._crew.pids)  # type: ignore[union-attr]
    time.sleep(1000)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGKILL))]
)
def test_workers_go_with_their_parent(number: int) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=a_parent, args=(theirs,))
    parent.start()
    pids = ours.recv()
    os.kill(parent.pid, number)  # type: ignore[arg-type]
    parent.join(20)
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

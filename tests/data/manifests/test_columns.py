import copy
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from videogru.data.manifests.columns import Coded, Text

TEXTS = ["b/ä.mp4", "a", "", "a", "\udc80x", "z" * 300, "𝄞", "\uffff"]


def test_text_reads_like_a_list() -> None:
    text = Text.of(TEXTS)
    assert text.tolist() == list(text) == TEXTS
    assert [text[row] for row in range(-8, 8)] == TEXTS + TEXTS
    assert text[2:7:2].tolist() == TEXTS[2:7:2]
    assert text[np.array([6, 0, -1, 0])].tolist() == [TEXTS[6], TEXTS[0], TEXTS[-1], TEXTS[0]]
    assert text[np.array([True, *[False] * 6, True])].tolist() == [TEXTS[0], TEXTS[7]]
    assert text[np.array([], np.int64)].tolist() == text[[]].tolist() == []
    assert np.asarray(text[:2]).tolist() == TEXTS[:2]
    assert Text.of(np.asarray(TEXTS[:4])).same(text[:4])
    for beyond in (8, -9):
        with pytest.raises(IndexError):
            text[beyond]
        with pytest.raises(IndexError):
            text[np.array([0, beyond])]
    with pytest.raises(ValueError, match="offsets"):
        Text(np.zeros(3, np.uint8), np.array([0, 2]))


def test_coded_reads_like_a_list_and_ranks_as_numpy_sorts() -> None:
    coded = Coded.of(TEXTS)
    assert (coded.tolist(), coded[3], len(coded.names), coded.distinct()) == (TEXTS, "a", 7, 7)
    assert coded.is_column(Text.of(TEXTS))
    assert not coded.is_column(Text.of([*TEXTS[:-1], "other"]))
    ranks, count = coded.ranks()
    assert (ranks.tolist(), count) == ([sorted(set(TEXTS)).index(text) for text in TEXTS], 7)
    part = coded[np.array([5, 1, 3])]
    assert (part.distinct(), part.ranks()[0].tolist(), part.ranks()[1]) == (2, [1, 0, 0], 2)
    with pytest.raises(ValueError, match="codes"):
        Coded(np.array([2], np.int32), Text.of(["a", "b"]))


def test_texts_that_all_differ_are_held_once() -> None:
    text = Text.of(["b", "a", "c"])
    coded = Coded.of(text)
    assert coded.names is text
    assert coded.is_column(text)


def test_copies_and_pickles_are_whole() -> None:
    coded = Coded.of(TEXTS)
    for other in (pickle.loads(pickle.dumps(coded)), copy.deepcopy(coded), copy.copy(coded)):
        assert other.tolist() == TEXTS


def _seen(coded: Coded, answers: "multiprocessing.Queue[tuple[int, bool, int]]") -> None:
    """What a spawned process sees: sum of all values, whether they can be changed, number of mapped files."""
    total = sum(int(array.sum(dtype=np.int64)) for array in (coded.codes, coded.names.blob, coded.names.offsets))
    maps = Path("/proc/self/maps").read_text()
    lines = [line for line in maps.splitlines() if "(deleted)" in line and line.split()[1].startswith("r--s")]
    answers.put((total, coded.names.blob.flags.writeable, len(lines)))


def test_a_spawned_process_maps_large_columns() -> None:
    coded = Coded.of([f"{row:09d}" for row in range(300_000)])
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[tuple[int, bool, int]] = context.Queue()
    process = context.Process(target=_seen, args=(coded, answers))
    process.start()
    total, writeable, mapped = answers.get(timeout=120)
    process.join()
    expected = sum(int(array.sum(dtype=np.int64)) for array in (coded.codes, coded.names.blob, coded.names.offsets))
    assert (total, writeable, mapped, process.exitcode) == (expected, False, 3, 0)

"""Indexes that are kept: used only for the very file they were made of, within their bound, and never a reason for
other frames.
"""

import os
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.data.readers.video.test_video import make_video, numbers, plain_decode
from videogru.data.readers.video import pyav_reader as video_pyav
from videogru.data.readers.video.packet_index import KeptIndexes, Picture, VideoIndex, facts_of
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import SourceError

BASE = Fraction(1, 25)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptIndexes:
    """Nothing was opened before."""
    indexes = KeptIndexes(2**20)
    monkeypatch.setattr(video_pyav, "kept_indexes", indexes)
    return indexes


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose packets were looked through."""
    seen: list[Path] = []
    original = PyavVideo._make_index
    monkeypatch.setattr(PyavVideo, "_make_index", lambda self: seen.append(self.path) or original(self))
    return seen


FILES = {
    "seeking": ("a.mp4", "libx264", {"bf": "3", "g": "12"}),
    "open groups": ("a.mkv", "libx264", {"bf": "3", "g": "8", "x264-params": "open-gop=1:scenecut=0"}),
    "in order": ("a.avi", "mpeg4", {"g": "10", "bf": "2"}),
    "transport stream": ("a.ts", "libx264", {"bf": "2", "g": "10"}),
    "hevc": ("a.mp4", "libx265", {"x265-params": "log-level=none:keyint=8:bframes=3"}),
}


@pytest.mark.parametrize("encoding", FILES)
def test_a_file_opened_again_gives_the_same(tmp_path: Path, passes: list[Path], encoding: str) -> None:
    name, codec, options = FILES[encoding]
    path = make_video(tmp_path / name, range(40), codec=codec, options=options, base=BASE)
    truth = np.stack(plain_decode(path)).transpose(0, 3, 1, 2)
    with PyavVideo(path) as first:
        pass
    for _ in range(2):
        with PyavVideo(path) as again:
            assert np.array_equal(again.positions, first.positions)
            assert (again.extent, again.pixel_aspect, again.details) == (
                first.extent,
                first.pixel_aspect,
                first.details,
            )
            for chosen in ([0], [5, 6, 17, 39], list(range(40))):
                assert np.array_equal(again.read(chosen), truth[chosen])
            again.details["mine"] = 1  # of this reader alone
    assert passes == [path]


def swap(path: Path, other: Path) -> None:
    other.replace(path)


def overwrite(path: Path, other: Path) -> None:
    """In place, with the old times: same inode, same time of change."""
    times = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [swap, overwrite])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_that_changed_is_indexed_anew(
    tmp_path: Path, passes: list[Path], change: object, same_size: bool
) -> None:
    path = make_video(tmp_path / "a.mp4", range(30), options={"g": "10"}, base=BASE)
    other = make_video(tmp_path / "b.mp4", range(0, 40, 2), options={"g": "5", "bf": "2"}, base=BASE)
    if same_size:
        sizes = [file.stat().st_size for file in (path, other)]
        for file, size in zip((path, other), sizes, strict=True):  # an MP4 may end in padding
            with file.open("ab") as end:
                rest = max(sizes) + 16 - size
                end.write(rest.to_bytes(4, "big") + b"free" + bytes(rest - 8))
        assert path.stat().st_size == other.stat().st_size
    with PyavVideo(path) as video:
        assert numbers(video.read([3, 29])) == [3, 29]
    truth = np.stack(plain_decode(other)).transpose(0, 3, 1, 2)
    change(path, other)  # type: ignore[operator]
    with PyavVideo(path) as video:
        assert len(video.positions) == len(truth) == 20
        assert video.positions[1] == pytest.approx(0.08)
        assert np.array_equal(video.read(range(20)), truth)
    assert passes == [path, path]


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", range(5))
    PyavVideo(path).close()
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        PyavVideo(path)


def test_a_file_that_changes_while_it_is_indexed_is_not_kept(
    tmp_path: Path, kept: KeptIndexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", range(5))
    original = PyavVideo._make_index
    monkeypatch.setattr(PyavVideo, "_make_index", lambda self: (original(self), os.utime(path, ns=(1, 1))))
    PyavVideo(path).close()
    assert not len(kept)


def test_what_a_read_corrects_is_not_kept(tmp_path: Path, passes: list[Path]) -> None:
    """Else the frames of a clip would depend on whether this process had read the file before."""
    path = make_video(tmp_path / "a.mp4", range(40), options={"g": "10", "bf": "0"}, base=BASE)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    content[places[20] : places[30]] = bytes(places[30] - places[20])
    path.write_bytes(content)
    for _ in range(2):
        with PyavVideo(path) as video:
            assert len(video.positions) == 40
            assert video.details["access"] == "by seeking"
            with pytest.raises(SourceError, match="declares 40 frames"):
                video.read([2, 25, 39])
            assert len(video.positions) < 40
    assert passes == [path]


def test_a_file_that_cannot_be_read_is_not_kept(tmp_path: Path, kept: KeptIndexes, passes: list[Path]) -> None:
    path = make_video(tmp_path / "a.mp4", range(40))
    path.write_bytes(path.read_bytes()[:-200])
    for _ in range(2):
        with pytest.raises(SourceError):
            PyavVideo(path)
    assert not len(kept)


def test_nobody_can_change_what_is_kept(tmp_path: Path) -> None:
    with PyavVideo(make_video(tmp_path / "a.mp4", range(5))) as video, pytest.raises(ValueError, match="read-only"):
        video.positions[0] = 1


def an_index(count: int) -> VideoIndex:
    picture = Picture((64, 32), False, False, False, True, 1.0)
    return VideoIndex(None, picture, np.arange(count, dtype=np.float64), (0.0, 1.0), {"codec": "h264"})


def test_the_bound_holds_and_nothing_is_thrown_out() -> None:
    indexes = KeptIndexes(100_000)
    facts = (1, 2, 3, 4, 5)
    for number in range(100):
        indexes.keep(Path(f"/{number}.mp4"), facts, an_index(1000))
        assert indexes.used_bytes <= 100_000
    count = len(indexes)
    assert 0 < count < 12
    assert indexes.find(Path("/0.mp4"), facts) is not None
    assert indexes.find(Path("/99.mp4"), facts) is None
    assert indexes.find(Path("/0.mp4"), (1, 2, 3, 4, 6)) is None
    used = indexes.used_bytes
    indexes.keep(Path("/0.mp4"), (9,), an_index(1000))  # in the place of the old one
    assert (len(indexes), indexes.used_bytes) == (count, used)
    assert indexes.find(Path("/0.mp4"), (9,)) is not None
    indexes.keep(Path("/0.mp4"), (9,), an_index(100_000))
    assert len(indexes) == count - 1
    indexes.clear()
    assert (len(indexes), indexes.used_bytes) == (0, 0)


def test_what_is_counted_is_what_is_used(tmp_path: Path, kept: KeptIndexes) -> None:
    paths = [make_video(tmp_path / f"{number}.mp4", range(55), base=BASE) for number in range(20)]
    PyavVideo(paths[0]).close()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        counted = kept.used_bytes
        for path in paths[1:]:
            PyavVideo(path).close()
        grown, counted = tracemalloc.get_traced_memory()[0] - before, kept.used_bytes - counted
    finally:
        tracemalloc.stop()
    assert len(kept) == 20
    assert grown < 1.2 * counted


def test_threads_keep_the_count(kept: KeptIndexes) -> None:
    def work(thread: int) -> None:
        for number in range(200):
            kept.keep(Path(f"/{number % 50}.mp4"), (thread, number), an_index(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 50
    used = kept.used_bytes
    for number in range(50):
        kept.keep(Path(f"/{number}.mp4"), (), an_index(0))
    assert kept.used_bytes < used
    kept.clear()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # a fork beside threads, from Python 3.12 on
def test_a_process_forked_while_the_lock_is_held_does_not_wait(kept: KeptIndexes) -> None:
    with kept._lock:
        child = os.fork()
        if not child:
            kept.keep(Path("/a.mp4"), (1,), an_index(3))
            os._exit(len(kept))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_facts_of_what_is_not_there(tmp_path: Path) -> None:
    assert facts_of(tmp_path / "none") is None
    assert facts_of(tmp_path / "bad\0name") is None


@pytest.fixture
def turned() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 66, 97, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(32, 48), (100, 40), (66, 30)])
def test_resizing_does_not_depend_on_the_order_in_memory(turned: torch.Tensor, size: tuple[int, int]) -> None:
    """Readers give channels last; the cache, and other decoders, channels first."""
    resize = torch.nn.functional.interpolate
    one, other = (
        resize(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
        for frames in (turned, turned.contiguous())
    )
    assert torch.equal(one, other)

import errno
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from videogru.config import DataConfig
from videogru.data.manifests.corpus import open_corpus
from videogru.data.manifests.dataset_card import load_card
from videogru.data.readers.file_types import SUFFIXES, kind_of_name
from videogru.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def opened(dataset: object, data_dir: Path | None = None, **settings: object):
    return open_corpus(DataConfig(dataset=str(dataset), data_dir=data_dir, **settings))


# Names and folders


@pytest.mark.parametrize(
    ("kind", "suffix"), [(kind, s) for kind, suffixes in SUFFIXES.items() for s in sorted(suffixes)]
)
def test_suffixes_mean_what_the_readers_say(kind: str, suffix: str) -> None:
    assert kind_of_name("Some.Name" + suffix.upper()) == kind


def test_other_suffixes_have_no_kind() -> None:
    assert [kind_of_name(name) for name in ("notes.txt", "x.gz", "x.tar.gz", "mp4", "")] == [None] * 5


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{label}/{k}.mp4" for label in ("dog", "cat") for k in range(10)))
    touch(tmp_path, "cat/.hidden.mp4", "cat/deep/x.MKV", "cat/notes.txt", ".git/a.mp4", "loose.mp4")
    corpus = opened(tmp_path, val_fraction=0.2, test_fraction=0.2)
    assert (corpus.kind, corpus.classes, len(corpus.manifest), corpus.card) == ("video", ("cat", "dog"), 21, None)
    assert corpus.manifest.sources[10] == "cat/deep/x.MKV"
    assert corpus.manifest.path(10).is_file()
    assert all(
        str(corpus.manifest.sources[row]).startswith(corpus.classes[corpus.manifest.labels[row]]) for row in range(21)
    )
    assert [len(corpus.manifest.rows(split)) for split in ("train", "val", "test")] == [13, 4, 4]
    assert corpus.notes == ("ignored 1 files with suffix .txt",)
    assert corpus.arrays is None


def test_split_folders(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("test", 3)):
        touch(tmp_path, *(f"{split}/{label}/{k}.png" for label in "ab" for k in range(count)))
    corpus = opened(tmp_path, val_fraction=0.3)
    manifest = corpus.manifest
    assert corpus.kind == "image"
    assert [len(manifest.rows(split)) for split in ("train", "val", "test")] == [14, 6, 6]
    assert all(str(source).startswith("test/") for source in manifest.sources[manifest.rows("test")])
    assert len(opened(tmp_path, val_fraction=0.0).manifest.rows("val")) == 0


def test_of_a_header_and_image_pair_one_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.hdr", "a/x.img", "b/y.img", "b/z.nii.gz")
    corpus = opened(tmp_path)
    assert corpus.kind == "volume"
    assert corpus.manifest.sources.tolist() == ["a/x.hdr", "b/y.img", "b/z.nii.gz"]


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "a/more/2.png", "b/1.png")
    scan = os.scandir

    def scandir(place: str) -> object:
        if Path(place).name == "more":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"a/more: cannot be listed: Permission denied"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/x.mp4", "b/y.nii"], "one kind.*a/x.mp4.*b/y.nii"),
        (["x.mp4"], "no subfolders"),
        (["a/x.txt", "b/y.txt"], "no videos"),
        (["a/x.mp4", "b/.keep"], "no files of class b"),
        (["a/x.mp4"], "1 class"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, names: list[str], words: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=words):
        opened(tmp_path)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="(?s)no data set 'kinetics40'.*kinetics400"):
        opened("kinetics40")
    with pytest.raises(ConfigError, match="no data set is named"):
        opened("")
    with pytest.raises(ConfigError, match="--data-dir"):
        opened(tmp_path, data_dir=tmp_path)
    touch(tmp_path, "x.mp4")
    with pytest.raises(DataError, match=r"not a manifest"):
        opened(tmp_path / "x.mp4")
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path / "absent.csv")


# Manifests


def test_manifest_counts_what_is_absent(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    table = tmp_path / "scans.csv"
    table.write_text("source,label,split\na.nii.gz,x,train\nb.nii.gz,y,train\nc.nii.gz,y,test\nd.nii.gz,y,test\n")
    corpus = opened(table)
    assert (corpus.name, corpus.kind, corpus.missing, len(corpus.manifest)) == ("scans", "volume", 1, 4)
    assert corpus.notes[0] == "1 of 4 rows name a file that is absent"


def test_manifest_elsewhere_needs_data_dir(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.mp4", "data/b.mp4", "lists/none")
    table = tmp_path / "lists" / "set.csv"
    table.write_text("source,label\na.mp4,x\nb.mp4,y\n")
    with pytest.raises(DataError, match="none of the 2 files"):
        opened(table)
    assert opened(table, data_dir=tmp_path / "data").missing == 0


@pytest.mark.parametrize(
    ("rows", "words"), [("a.mp4,x\nb.png,y\n", "one kind"), ("a.mp4,x\nb.doc,y\n", "b.doc: no known suffix")]
)
def test_manifest_of_one_kind(tmp_path: Path, rows: str, words: str) -> None:
    table = tmp_path / "set.csv"
    table.write_text("source,label\n" + rows)
    with pytest.raises(DataError, match=words):
        opened(table)


def test_evaluation_needs_no_training_rows(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "set.csv"
    table.write_text("source,label,split\na.mp4,x,test\nb.mp4,y,test\n")
    with pytest.raises(DataError, match="no training row"):
        opened(table)
    corpus = open_corpus(DataConfig(dataset=str(table)), for_training=False)
    assert len(corpus.manifest.rows("test")) == 2


def test_bundled_digits() -> None:
    corpus = opened("grid_digits")
    assert corpus.classes[:3] == ("zero", "one", "two")
    assert (corpus.kind, corpus.missing, corpus.notes) == ("video", 0, ())
    assert [len(corpus.manifest.rows(split)) for split in ("train", "val", "test")] == [700, 100, 200]
    # GRID names end in command, color, preposition, letter, digit, adverb: bbaf2n says "two".
    digit = {"z": "zero", **{str(k): corpus.classes[k] for k in range(1, 10)}}
    for source, label in zip(corpus.manifest.sources.tolist(), corpus.manifest.labels.tolist(), strict=True):
        assert digit[Path(source).stem[4]] == corpus.classes[label]


# Kinetics

TABLE = "label,youtube_id,time_start,time_end,split\n"


def kinetics(root: Path, tables: dict[str, list[tuple[str, str, int]]]) -> None:
    for name, rows in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TABLE + "".join(f"{label},{video},{at},{at + 10},?\n" for label, video, at in rows))


def test_kinetics_flat_and_by_class(tmp_path: Path) -> None:
    train = [("abseiling", f"-_abs{k:06d}", k) for k in range(3)] + [
        ("air drumming", f"drum{k:07d}", 100 + k) for k in range(3)
    ]
    kinetics(tmp_path, {"train.csv": train, "val.csv": [("abseiling", "valvalvalva", 7)]})
    touch(tmp_path, *(f"train/{video}_{at:06d}_{at + 10:06d}.mp4" for label, video, at in train[:2]))
    touch(
        tmp_path,
        "train/air_drumming/drum0000000_000100_000110.mkv",
        "train/air drumming/drum0000001_000101_000111.webm",
    )
    touch(tmp_path, "train/air drumming/drum0000002_000102_000112.txt", "val/abseiling/valvalvalva_000007_000017.avi")
    corpus = opened("kinetics400", tmp_path)
    assert corpus.manifest.sources.tolist() == [
        "train/-_abs000000_000000_000010.mp4",
        "train/-_abs000001_000001_000011.mp4",
        "train/air_drumming/drum0000000_000100_000110.mkv",
        "train/air drumming/drum0000001_000101_000111.webm",
        "val/abseiling/valvalvalva_000007_000017.avi",
    ]
    names = [corpus.classes[label] for label in corpus.manifest.labels]
    assert names == ["abseiling"] * 2 + ["air drumming"] * 2 + ["abseiling"]
    assert corpus.manifest.splits.tolist() == [0, 0, 0, 0, 1]
    assert corpus.manifest.window(0) is None
    assert corpus.manifest.groups[0] == "-_abs000000"
    assert (corpus.missing, len(corpus.classes)) == (2, 400)
    assert corpus.notes[0] == "train: 2 of 6 clips are absent"


def test_kinetics_other_names(tmp_path: Path) -> None:
    rows = [("yoga", f"yoga{k:07d}", 0) for k in range(2)] + [("zumba", f"zumb{k:07d}", 0) for k in range(2)]
    kinetics(tmp_path, {"annotations/kinetics-400_train.csv": rows, "annotations/validate.csv": rows[:1]})
    (tmp_path / "annotations" / "test.csv").write_text("youtube_id,time_start,time_end\nyoga0000001,0,10\n")
    touch(tmp_path, *(f"train/{video}_000000_000010.mp4" for _, video, _ in rows))
    touch(tmp_path, "validate/yoga0000000_000000_000010.mp4", "test/yoga0000001_000000_000010.mp4")
    corpus = opened("kinetics400", tmp_path)
    assert corpus.manifest.splits.tolist() == [0, 0, 0, 0, 1, 2]  # ids in two tables stay in both
    assert corpus.manifest.labels[-1] == -1
    assert corpus.missing == 0


def test_kinetics_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="(?s)no train.csv.*CVD Foundation"):
        opened("kinetics400", tmp_path)
    kinetics(tmp_path, {"train.csv": [("yoga", "yoga0000000", 0)]})
    with pytest.raises(DataError, match="(?s)train: 1 of 1 clips are absent.*CVD Foundation"):
        opened("kinetics400", tmp_path)
    kinetics(tmp_path, {"train.csv": [("yogaa", "yoga0000000", 0)]})
    with pytest.raises(DataError, match=r"train.csv:2: unknown class 'yogaa'"):
        opened("kinetics400", tmp_path)
    (tmp_path / "train.csv").write_text(TABLE + "yoga,yoga0000000,soon,10,train\n")
    with pytest.raises(DataError, match=r"train.csv:2: time_start 'soon'"):
        opened("kinetics400", tmp_path)
    (tmp_path / "train.csv").write_text("label,id\nyoga,yoga0000000\n")
    with pytest.raises(DataError, match="expected the columns youtube_id"):
        opened("kinetics400", tmp_path)
    monkeypatch.setenv("VIDEOGRU_DATA", str(tmp_path))
    with pytest.raises(DataError, match="(?s)kinetics400 are not here.*CVD Foundation"):
        opened("kinetics400")


# CIFAR-100


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of CIFAR-100's form with 200 train and 100 test images, accepted by its checksums."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums: dict[str, str] = {}
    classes = list(load_card("cifar100").classes)
    for name, count in (("train", 200), ("test", 100), ("meta", 0)):
        content: dict[str, object] = {"fine_label_names": classes}
        if count:
            data = rng.integers(0, 256, (count, 3072)).astype(np.uint8)
            content = {"data": data, "fine_labels": [row % 100 for row in range(count)]}
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw).hexdigest()
    for key in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{key}_list", [[key, sums[key]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path


@pytest.mark.parametrize("below", ["", "cifar-100-python"])
def test_cifar_arrays_are_the_rows_of_the_pickles(tiny_cifar: Path, below: str) -> None:
    corpus = opened("cifar100", tiny_cifar / below, val_fraction=0.5)
    assert corpus.arrays is not None
    assert corpus.arrays.shape == (300, 1, 3, 32, 32)
    assert [len(corpus.manifest.rows(split)) for split in ("train", "val", "test")] == [100, 100, 100]
    with (tiny_cifar / "cifar-100-python" / "test").open("rb") as file:
        expected = pickle.load(file)
    np.testing.assert_array_equal(corpus.arrays[207].reshape(-1), expected["data"][7])
    assert corpus.manifest.sources[207] == "cifar-100-python/test/7"
    assert corpus.manifest.labels[207] == expected["fine_labels"][7]


def test_cifar_changed_pickles_are_never_opened(tiny_cifar: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tiny_cifar / "opened",)

    (tiny_cifar / "cifar-100-python" / "train").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="corrupted"):
        opened("cifar100", tiny_cifar)
    assert not (tiny_cifar / "opened").exists()


def test_cifar_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    with pytest.raises(DataError, match="(?s)no folder cifar-100-python.*--data-dir"):
        opened("cifar100", tmp_path)
    # A port nobody listens on: the download fails as without a network.
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    monkeypatch.setenv("VIDEOGRU_DATA", str(tmp_path))
    with pytest.raises(DataError, match="(?s)downloaded.*By hand"):
        opened("cifar100")


@pytest.mark.slow
def test_the_whole_of_cifar100(shared_data: Path, tmp_path: Path) -> None:
    import runpy
    import sys

    path, argv = sys.path[:], sys.argv
    sys.path.insert(0, str(shared_data / "cifar100"))
    sys.argv = ["unpack.py", str(tmp_path)]
    try:
        runpy.run_path(str(shared_data / "cifar100" / "unpack.py"), run_name="__main__")
    finally:
        sys.path[:], sys.argv = path, argv
    corpus = opened("cifar100", tmp_path, val_fraction=0.1)
    assert corpus.arrays is not None
    assert corpus.arrays.shape == (60000, 1, 3, 32, 32)
    assert [len(corpus.manifest.rows(split)) for split in ("train", "val", "test")] == [45000, 5000, 10000]
    assert np.bincount(corpus.manifest.labels[corpus.manifest.rows("val")]).tolist() == [50] * 100
    # Published channel means of the training set: 0.5071, 0.4865, 0.4409.
    means = corpus.arrays[:50000].mean(axis=(0, 1, 3, 4)) / 255
    np.testing.assert_allclose(means, [0.5071, 0.4865, 0.4409], atol=1e-4)

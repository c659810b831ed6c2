"""DICOM folders as sources of a data set: class folders, manifests, `infer`, `data check`."""

import json
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.support.command_line import QUICK, videogru
from tests.support.dicom_series import changed, slices_of, write
from videogru.config import DataConfig
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.readers.file_types import kind_of_source, media_files
from videogru.data.readers.volume.dicom import read_dicom
from videogru.errors import ConfigError, DataError

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def series(folder: Path, bright: bool, seed: int) -> Path:
    array = np.random.default_rng(seed).integers(0, 200, (12, 12, 6)).astype(np.int16)
    array[3:9, 3:9] += 800 if bright else 0
    return write(folder, slices_of(array, AFFINE), seed=seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scans/<a|b>/p<number>/<series>/*.dcm, two series for each of six patients of a class."""
    root = tmp_path_factory.mktemp("dicom")
    for label in ("a", "b"):
        for patient in range(6):
            for number in (1, 2):
                series(root / "scans" / label / f"p{patient}" / f"s{number}", label == "a", 10 * patient + number)
    return root


def opened(dataset: Path, **data: object) -> Corpus:
    return open_corpus(DataConfig(dataset=str(dataset), **data))


def test_class_folders_of_series(place: Path) -> None:
    corpus = opened(place / "scans")
    assert (corpus.kind, corpus.classes, len(corpus.manifest)) == ("volume", ("a", "b"), 24)
    assert corpus.manifest.sources[0] == "a/p0/s1"
    # Equal names below two classes are one patient, all of whose series are in one split.
    assert Counter(corpus.manifest.groups.tolist())["p0"] == 4
    by_patient: dict[str, set[int]] = {}
    for group, split in zip(corpus.manifest.groups.tolist(), corpus.manifest.splits.tolist(), strict=True):
        by_patient.setdefault(group, set()).add(split)
    assert len(by_patient) == 6 and all(len(splits) == 1 for splits in by_patient.values())
    assert any("24 folders of DICOM" in note for note in corpus.notes)
    assert any("6 patients; 6 of them lie below several classes" in note for note in corpus.notes)


def test_scans_below_a_folder_of_their_class_are_one_patients(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(5):
            for visit in ("pre/scan.nii.gz", "post/scan.nii.gz"):
                path = tmp_path / "x" / label / f"{label}{number}" / visit
                path.parent.mkdir(parents=True)
                nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), path)
        nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), tmp_path / "x" / label / "alone.nii.gz")
    corpus = opened(tmp_path / "x")
    counts = Counter(corpus.manifest.groups.tolist())
    assert counts == {f"{label}{number}": 2 for label in "ab" for number in range(5)} | {
        "a/alone.nii.gz": 1,
        "b/alone.nii.gz": 1,
    }
    splits = dict(zip(corpus.manifest.groups.tolist(), corpus.manifest.splits.tolist(), strict=True))
    for group, split in zip(corpus.manifest.groups.tolist(), corpus.manifest.splits.tolist(), strict=True):
        assert splits[group] == split
    assert any("10 patients" in note and "several classes" not in note for note in corpus.notes)
    # Where folders set the split, equal names in two of them are left to who made the folders.
    (tmp_path / "y").mkdir()
    (tmp_path / "x").rename(tmp_path / "y" / "train")
    corpus = opened(tmp_path / "y")
    assert "train/a0" in corpus.manifest.groups.tolist()


def test_slices_directly_in_a_class_folder_are_refused(tmp_path: Path) -> None:
    series(tmp_path / "x" / "a", True, 0)
    series(tmp_path / "x" / "b", False, 1)
    with pytest.raises(DataError, match="nothing says which are one scan"):
        opened(tmp_path / "x")


def test_nifti_and_dicom_go_together_but_not_with_videos(tmp_path: Path) -> None:
    series(tmp_path / "x" / "a" / "p", True, 0)
    (tmp_path / "x" / "b").mkdir()
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), tmp_path / "x" / "b" / "n.nii.gz")
    corpus = open_corpus(DataConfig(dataset=str(tmp_path / "x")), for_training=False)
    assert corpus.kind == "volume"
    assert corpus.manifest.groups.tolist() == ["p", "b/n.nii.gz"]
    (tmp_path / "x" / "b" / "v.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"there are volume: a/p; video: b/v.mp4"):
        opened(tmp_path / "x")


def test_a_manifest_names_folders(place: Path, tmp_path: Path) -> None:
    rows = ["source,label,group", "scans/a/gone,a,g"]
    rows += [f"scans/{label}/p{n}/s1,{label},{label}{n}" for label in "ab" for n in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    corpus = opened(tmp_path / "t.csv", data_dir=place)
    assert (corpus.kind, corpus.missing, len(corpus.manifest)) == ("volume", 1, 13)


def test_kinds_of_folders(place: Path, tmp_path: Path) -> None:
    assert kind_of_source(place / "scans" / "a" / "p0" / "s1") == "volume"
    assert kind_of_source(place / "scans" / "a" / "p0") == "video"  # may be one of frames
    assert kind_of_source(tmp_path / "gone") is None
    nameless = slices_of(np.zeros((4, 4, 2), np.int16), AFFINE)
    write(tmp_path / "s", nameless, names=["IM1", "IM2"])
    assert kind_of_source(tmp_path / "s") == kind_of_source(tmp_path / "s" / "IM1") == "volume"
    (tmp_path / "s" / "notes").write_text("none")
    assert kind_of_source(tmp_path / "s" / "notes") is None
    assert media_files(tmp_path / "s") == [tmp_path / "s"]
    assert media_files(tmp_path) == [tmp_path / "s"]


def test_series_are_for_volumes() -> None:
    with pytest.raises(ConfigError, match="data.series is for volumes, not for videos"):
        DataConfig(series="3").for_kind("video")
    assert DataConfig.model_validate({"series": 3}).series == "3"


def test_from_training_to_answers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A second series in one folder, so that one has to be chosen.
    scans = tmp_path / "scans"
    for label in ("a", "b"):
        for patient in range(6):
            series(scans / label / f"p{patient}", label == "a", patient)
    other = slices_of(np.zeros((6, 6, 3), np.int16), AFFINE)
    other = [changed(one, SeriesInstanceUID="1.2.9", SeriesNumber=9) for one in other]
    write(scans / "a" / "p0", other, names=[f"z{i}.dcm" for i in range(3)])
    size = ("--set", "data.frame_size=16", "--set", "data.num_frames=4", "--batch-size", "4")
    done = videogru("train", "--dataset", scans, *QUICK, *size, "--series", "3", "--out", "run")
    assert done.code == 0, done.err
    assert not (tmp_path / "run" / "bad_files.csv").exists()

    # The same voxels as NIfTI give the same answer.
    one, several = place / "scans" / "a" / "p1" / "s1", scans / "a" / "p0"
    scan = read_dicom(one, data=DataConfig())
    nib.save(nib.Nifti1Image(scan.voxels, scan.affine), tmp_path / "one.nii.gz")
    asked = (one, several, place / "scans" / "b", "one.nii.gz")
    done = videogru("infer", *asked, "--model", "run", "--format", "jsonl", "--top-k", "2")
    records = {record["source"]: record for record in map(json.loads, done.out.splitlines())}
    assert done.code == 3
    assert records[str(one)]["top"] == records["one.nii.gz"]["top"]
    assert "holds 2 series" in records[str(several)]["error"] and "--series" in records[str(several)]["error"]
    # A folder of folders: each series is an input.
    assert len(records) == 15
    assert sum(record["error"] is not None for record in records.values()) == 1
    done = videogru("infer", several, "--model", "run", "--series", "9", "--format", "jsonl")
    assert done.code == 0, done.err

    done = videogru("data", "check", scans, "--set", "data.series=3", "--set", "train.num_workers=0")
    assert "12" in done.out and done.code in (0, 3), done.err
    table = (tmp_path / "checks" / "scans" / "check.csv").read_text()
    assert table.count(",ok,") == 12


def test_data_info_shows_a_series(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = place / "scans/a/p0/s1"
    done = videogru("data", "info", str(folder))
    assert done.code == 0, done.err
    assert "slices          6" in done.out and "step mm         3" in done.out
    assert (tmp_path / "scan-info/s1.png").stat().st_size > 1000
    alone = videogru("data", "info", str(next(folder.iterdir())))
    assert alone.code == 0 and "slices          1" in alone.out
    # A folder of classes is a data set, as before.
    assert "classes" in videogru("data", "info", str(place / "scans")).out
    gone = videogru("data", "info", "nowhere.nii.gz")
    assert gone.code == 3 and "no such file" in gone.err

"""BIDS folders: which scans become rows, which column their labels, and what is told."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.support.command_line import QUICK, videogru
from videogru.config import DataConfig
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.errors import ConfigError, DataError

PEOPLE = [f"{n:02d}" for n in range(1, 11)]


def scan(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(level).integers(0, 100, (8, 8, 6)).astype(np.int16)
    array[2:6, 2:6] += 300 * (level % 2)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), path)
    return path


def table(root: Path, *rows: str) -> None:
    (root / "participants.tsv").write_text("\n".join(row.replace(" ", "\t") for row in rows) + "\n")


def bids(root: Path) -> Path:
    """Ten participants, the odd ones patients; the first has two sessions, one T2w and one bold."""
    root.mkdir(exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "made", "BIDSVersion": "1.10.0"}')
    for place, person in enumerate(PEOPLE):
        sub = f"sub-{person}"
        if person == "01":
            for session in ("ses-A", "ses-B"):
                scan(root / sub / session / "anat" / f"{sub}_{session}_run-1_T1w.nii.gz", place)
        else:
            scan(root / sub / "anat" / f"{sub}_T1w.nii.gz", place)
    scan(root / "sub-01" / "ses-A" / "func" / "sub-01_ses-A_task-rest_bold.nii.gz")
    scan(root / "sub-02" / "anat" / "sub-02_T2w.nii")
    (root / "sub-02" / "anat" / "sub-02_T1w.json").write_text("{}")
    scan(root / "derivatives" / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    rows = [
        f"sub-{person} {20 + place} {'MF'[place // 5]} {('patient', 'control')[place % 2]}"
        for place, person in enumerate(PEOPLE)
    ]
    table(root, "participant_id age sex group", *rows)
    return root


def opened(root: Path, **data: object) -> Corpus:
    return open_corpus(DataConfig(dataset=str(root), **data))


def test_rows_labels_and_groups(tmp_path: Path) -> None:
    corpus = opened(bids(tmp_path / "b"), suffix="T1w")
    manifest = corpus.manifest
    assert (corpus.name, corpus.kind, corpus.classes, corpus.missing) == ("b", "volume", ("control", "patient"), 0)
    found = {
        source: (corpus.classes[label], group)
        for source, label, group in zip(manifest.sources, manifest.labels, manifest.groups.tolist(), strict=True)
    }
    expected = {
        f"sub-{person}/anat/sub-{person}_T1w.nii.gz": (("patient", "control")[place % 2], f"sub-{person}")
        for place, person in enumerate(PEOPLE)
        if place
    }
    for session in ("ses-A", "ses-B"):
        expected[f"sub-01/{session}/anat/sub-01_{session}_run-1_T1w.nii.gz"] = ("patient", "sub-01")
    assert found == expected
    assert any("column group" in note for note in corpus.notes)
    sessions = [split for source, split in zip(manifest.sources, manifest.splits, strict=True) if "/ses-" in source]
    assert len(set(sessions)) == 1


def test_a_column_that_is_named(tmp_path: Path) -> None:
    corpus = opened(bids(tmp_path / "b"), suffix="T1w", label_column="sex")
    assert corpus.classes == ("F", "M")
    assert not any("column" in note for note in corpus.notes)


def test_the_only_suffix_is_taken_and_told(tmp_path: Path) -> None:
    root = bids(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"several suffixes: T1w \(11\), T2w \(1\), bold \(1\)"):
        opened(root)
    with pytest.raises(ConfigError, match="no scans with suffix T1") as caught:
        opened(root, suffix="T1")
    assert "Did you mean T1w?" in str(caught.value) and "T2w (1)" in str(caught.value)
    (root / "sub-02" / "anat" / "sub-02_T2w.nii").unlink()
    shutil.rmtree(root / "sub-01" / "ses-A" / "func")
    corpus = opened(root)
    assert len(corpus.manifest) == 11
    assert any("suffix T1w, the only one" in note for note in corpus.notes)


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    root = bids(tmp_path / "b")
    shutil.rmtree(root / "sub-10")
    scan(root / "sub-99" / "anat" / "sub-99_T1w.nii.gz")
    (root / "sub-03" / "anat" / "sub-03_run-2_T1w.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    text = (root / "participants.tsv").read_text().replace("sub-02\t21\tM\tcontrol", "02\t21\tM\tn/a")
    (root / "participants.tsv").write_text(text + "\n")
    corpus = opened(root, suffix="T1w")
    notes = "\n".join(corpus.notes)
    assert "1 participants without a T1w scan" in notes
    assert "1 scans of 1 subjects that participants.tsv does not name: left out" in notes
    assert "1 participants without a group (n/a): their scans have no label" in notes
    assert "1 scans that are links" in notes
    manifest = corpus.manifest
    row = list(manifest.sources).index("sub-02/anat/sub-02_T1w.nii.gz")
    assert manifest.labels[row] == -1
    # Not to be trained on.
    assert row in manifest.rows("test")
    assert all(len(manifest.rows(split)) for split in ("train", "val", "test"))
    assert len(manifest.rows("test")) > 1
    # The same without training.
    assert "\n".join(open_corpus(DataConfig(dataset=str(root), suffix="T1w"), for_training=False).notes) == notes


def test_a_column_of_splits_is_kept_to(tmp_path: Path) -> None:
    root = bids(tmp_path / "b")
    words = ["train"] * 6 + ["val", "val", "test", "n/a"]
    rows = [f"sub-{person} {'xy'[place % 2]} {words[place]}" for place, person in enumerate(PEOPLE)]
    table(root, "participant_id dx split", *rows)
    manifest = opened(root, suffix="T1w").manifest
    groups = manifest.groups.tolist()
    assert {groups[row] for row in manifest.rows("val")} == {"sub-07", "sub-08"}
    assert {groups[row] for row in manifest.rows("test")} == {"sub-09"}
    table(root, "participant_id dx split", "sub-01 x train", "sub-02 y teset")
    with pytest.raises(DataError, match="sub-02: unknown split 'teset'"):
        opened(root, suffix="T1w", label_column="dx")


def test_a_measure_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'age' has 10 values in 10 participants: too many to be classes"):
        opened(bids(tmp_path / "b"), suffix="T1w", label_column="age")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("age 30 31 40 41", "no column looks like a label"),
        ("score 0.5 0.25 0.5 0.25", "no column looks like a label"),
        ("sex M F M F", "no column looks like a label"),
        ("group x x x x", "no column looks like a label"),
        ("group a b a b;dx x x y y", "several columns may be the label: group, dx"),
    ],
)
def test_columns_that_cannot_be_chosen(tmp_path: Path, columns: str, words: str) -> None:
    root = bids(tmp_path / "b")
    named = [column.split(" ") for column in columns.split(";")]
    rows = [" ".join([f"sub-{PEOPLE[n]}", *(column[n + 1] for column in named)]) for n in range(4)]
    table(root, " ".join(["participant_id", *(column[0] for column in named)]), *rows)
    with pytest.raises(ConfigError, match=words) as caught:
        opened(root, suffix="T1w")
    assert f"--label COLUMN. Columns: {', '.join(column[0] for column in named)}" in str(caught.value)
    with pytest.raises(ConfigError, match="no column 'grupo'"):
        opened(root, suffix="T1w", label_column="grupo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column participant_id, found nothing"),
        ("id\tgroup\n01\tx\n", "no column participant_id, found id, group"),
        ("participant_id\tgroup\n", "has a header but no rows"),
        ("participant_id\tgroup\n01\n", r":2: 1 cells, the header has 2"),
        ("participant_id\tgroup\n01\tx\nsub-01\ty\n", r":3: sub-01 a second time"),
        ("participant_id\tgroup\n\tx\n", r":2: an empty participant_id"),
        ("participant_id\tgroup\tgroup\n01\tx\ty\n", "two columns 'group'"),
        ("participant_id\tgroup\n77\tx\n78\tx\n79\ty\n80\ty\n", "no scan of a participant"),
        (b"\xff\xfe\x00", "cannot be read as a UTF-8 table"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str | bytes, words: str) -> None:
    root = bids(tmp_path / "b")
    (root / "participants.tsv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=words):
        opened(root, suffix="T1w")


def test_suffix_and_label_are_for_bids(tmp_path: Path) -> None:
    for key in ("suffix", "label_column"):
        for dataset in (tmp_path, tmp_path / "t.csv", "adrenalmnist3d"):
            with pytest.raises(ConfigError, match="go with a BIDS folder"):
                open_corpus(DataConfig.model_validate({"dataset": str(dataset), key: "T1w"}))
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\n01\tx\n")
    with pytest.raises(DataError, match="no scans sub-"):
        opened(tmp_path, suffix="T1w")


def test_real_scans_train_and_evaluate(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = sorted((shared_data / "volumes" / "nibabel").glob("*anatom*.nii*"))
    assert len(real) == 2
    root = tmp_path / "b"
    for person in range(1, 13):
        source = real[person % 2]
        suffix = "".join(source.suffixes)
        target = root / f"sub-{person:02d}" / "anat" / f"sub-{person:02d}_T1w{suffix}"
        target.parent.mkdir(parents=True)
        shutil.copyfile(source, target)
    rows = [f"sub-{person:02d} {('one', 'other')[person % 2]}" for person in range(1, 13)]
    table(root, "participant_id diagnosis", *rows[:-1], "sub-12 n/a")
    size = ("--set", "data.frame_size=32", "--set", "data.num_frames=4", "--batch-size", "4")
    done = videogru("train", "--dataset", root, "--suffix", "T1w", *QUICK, *size, "--out", "run")
    assert done.code == 0, done.err
    assert "labels are the column diagnosis" in done.err
    assert (tmp_path / "run" / "evaluation-test.json").is_file()
    assert videogru("eval", "run").code == 0
    # Other data need not be in BIDS.
    files = [f"b/sub-{person:02d}/anat/*T1w*" for person in (1, 2)]
    found = [next(tmp_path.glob(pattern)).relative_to(tmp_path) for pattern in files]
    (tmp_path / "t.csv").write_text(f"source,label\n{found[0]},other\n{found[1]},one\n")
    done = videogru("eval", "run", "--dataset", "t.csv", "--out", "scores")
    assert done.code == 0, done.err
    done = videogru("train", "--dataset", root, "--suffix", "bold", *QUICK)
    assert done.code == 2 and "T1w (12)" in done.err
    done = videogru("train", "--dataset", root, "--label", "dx", *QUICK)
    assert done.code == 2 and "Columns: diagnosis" in done.err

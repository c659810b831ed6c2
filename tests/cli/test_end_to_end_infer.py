"""`infer` through the command line: good, bad and hostile inputs, formats and outputs."""

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import KINDS, QUICK, videogru
from videogru.data.manifests.dataset_card import load_card
from videogru.inference.predictions import read_csv


@pytest.mark.parametrize("kind", KINDS)
def test_infer_says_what_evaluation_wrote(there: Path, kind: str) -> None:
    """The same files give the same probabilities through `infer` as in the run's predictions."""
    written = read_csv(there / "runs" / f"{kind}s-0001" / "predictions-test.csv")
    files = [f"{kind}s/{source}" for source in written.sources]
    done = videogru("infer", *files, "--format", "jsonl", "--top-k", "2")
    assert done.code == 0, done.err
    assert f"runs/{kind}s-0001" in done.err
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["source"] for record in records] == files
    for record, probabilities in zip(records, written.probabilities, strict=True):
        said = {entry["class"]: entry["probability"] for entry in record["top"]}
        assert [said["a"], said["b"]] == pytest.approx(probabilities.tolist(), abs=2e-5)


def test_folders_globs_formats_and_out(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    assert videogru("infer", "videos", "--out", out).code == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert {row["predicted"] for row in rows} <= {"a", "b"}
    globbed = videogru("infer", "videos/a/[0-3].mp4", "--format", "csv").out
    assert globbed.splitlines()[1:] == [
        ",".join(row.values()) for row in rows if row["source"][7:] in {f"a/{n}.mp4" for n in range(4)}
    ]
    table = videogru("infer", "videos/a/0.mp4").out
    assert "videos/a/0.mp4" in table
    assert "probability" in table


def test_bad_inputs_get_their_rows_and_the_others_are_done(there: Path, tmp_path: Path) -> None:
    good = "videos/a/0.mp4"
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video")
    whole = Path(good).read_bytes()
    (tmp_path / "short.mp4").write_bytes(whole[: len(whole) // 2])
    shutil.copy("volumes/a/0.nii.gz", tmp_path / "scan.nii.gz")
    bad = [tmp_path / name for name in ("empty.mp4", "text.mp4", "short.mp4", "scan.nii.gz", "absent.mp4")]
    done = videogru("infer", *bad, good, "--model", "runs/videos-0001", "--format", "jsonl")
    assert done.code == 3
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["source"] for record in records] == [*map(str, bad), good]
    for record in records[:-1]:
        assert record["predicted"] is None
        assert record["source"] in record["error"]
    assert records[-1]["predicted"] in {"a", "b"}
    assert "Traceback" not in done.err


def test_volumes_that_cannot_be_used(there: Path, tmp_path: Path) -> None:
    four = tmp_path / "four.nii.gz"
    nibabel.Nifti1Image(np.zeros((5, 5, 5, 7), np.int16), np.eye(4)).to_filename(four)
    holes = tmp_path / "nan.nii.gz"
    voxels = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    voxels[2:4] = np.nan
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(holes)
    nothing = tmp_path / "allnan.nii.gz"
    nibabel.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), np.eye(4)).to_filename(nothing)
    done = videogru("infer", four, holes, nothing, "--format", "jsonl")
    assert done.code == 3
    first, second, third = (json.loads(line) for line in done.out.splitlines())
    assert "5 x 5 x 5 x 7" in first["error"]
    assert second["error"] is None
    assert third["predicted"] is None


def test_a_folder_without_media(there: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    done = videogru("infer", tmp_path, "videos/a/0.mp4", "--model", "runs/videos-0001", "--format", "jsonl")
    assert done.code == 3
    empty, good = (json.loads(line) for line in done.out.splitlines())
    assert "no video files" in empty["error"]
    assert good["predicted"] in {"a", "b"}


def test_a_sliver_is_one_bad_row(there: Path, tmp_path: Path) -> None:
    Image.new("RGB", (10_000, 10)).save(tmp_path / "sliver.png")
    done = videogru("infer", tmp_path / "sliver.png", "images/a/0.png", "--format", "jsonl")
    assert done.code == 3
    sliver, good = (json.loads(line) for line in done.out.splitlines())
    assert "sliver.png" in sliver["error"]
    assert good["error"] is None


def test_a_model_of_another_kind(there: Path) -> None:
    done = videogru("infer", "videos/a/0.mp4", "--model", "runs/volumes-0001")
    assert done.code == 3
    assert "volume" in done.out
    done = videogru("eval", "runs/volumes-0001", "--dataset", "videos", "--out", there / "nowhere")
    assert done.code == 2
    assert "volumes" in done.err


@pytest.mark.parametrize("size", [0, 7, 200, 5000])
def test_a_truncated_model_file(there: Path, tmp_path: Path, size: int) -> None:
    broken = tmp_path / "model.safetensors"
    broken.write_bytes((there / "runs/videos-0001/model.safetensors").read_bytes()[:size])
    done = videogru("infer", "videos/a/0.mp4", "--model", broken)
    assert done.code == 2
    assert str(broken) in done.err


def test_infer_changes_reading_but_not_the_model(there: Path) -> None:
    done = videogru("infer", "videos/a/0.mp4", "--set", "data.num_frames=3", "--set", "data.decoder=pyav")
    assert done.code == 0, done.err
    done = videogru("infer", "videos/a/0.mp4", "--set", "data.frame_size=64")
    assert done.code == 2
    assert "32" in done.err
    assert videogru("infer", "videos/a/0.mp4", "--set", "train.epochs=3").code == 2


def test_a_damaged_gzip_is_an_error_even_where_its_voxels_can_be_read(there: Path, tmp_path: Path) -> None:
    whole = Path("volumes/a/0.nii.gz").read_bytes()
    (tmp_path / "trailer.nii.gz").write_bytes(whole[:-8] + b"\0" * 8)
    done = videogru("infer", tmp_path / "trailer.nii.gz", "volumes/a/0.nii.gz", "--format", "jsonl")
    assert done.code == 3
    damaged, good = (json.loads(line) for line in done.out.splitlines())
    assert damaged["predicted"] is None
    assert good["error"] is None


def test_intensities_beyond_numbers(there: Path, tmp_path: Path) -> None:
    voxels = np.zeros((6, 6, 6))
    voxels[::2] = 1.7e308
    voxels[1::2] = -1.7e308
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "huge.nii")
    done = videogru("infer", tmp_path / "huge.nii", "volumes/a/0.nii.gz", "--format", "jsonl")
    assert done.code == 3
    assert [json.loads(line)["error"] is None for line in done.out.splitlines()] == [False, True]


def test_a_model_with_nan_weights(there: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open("runs/images-0001/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    next(tensor for tensor in tensors.values() if tensor.is_floating_point())[0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", metadata=header)
    done = videogru("infer", "images/a/0.png", "--model", tmp_path / "nan.safetensors")
    assert done.code == 2
    assert "not finite" in done.err


def test_out_writes_through_links_and_into_devices(there: Path, tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert videogru("infer", "images/a/0.png", "--out", tmp_path / "link.csv").code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert "images/a/0.png" in (tmp_path / "real.csv").read_text()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert videogru("infer", "images/a/0.png", "--out", pipe, "--format", "jsonl").code == 0
        assert b"images/a/0.png" in os.read(reader, 10_000)
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_file_names_that_are_no_text(there: Path, tmp_path: Path) -> None:
    shutil.copytree("images", tmp_path / "pictures")
    odd = os.fsencode(tmp_path / "pictures" / "a") + b"/caf\xe9.png"
    shutil.copy("images/a/0.png", odd)
    done = videogru("infer", os.fsdecode(odd), "images/a/0.png", "--out", tmp_path / "out.jsonl")
    assert done.code == 0, done.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    done = videogru("train", "--dataset", tmp_path / "pictures", "--out", tmp_path / "run", *QUICK)
    assert done.code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_array_row_and_its_nifti_file_are_one_source(there: Path, tmp_path: Path) -> None:
    """A bundled volume, saved as NIfTI, gets the probabilities that evaluation wrote for it."""
    run = tmp_path / "run"
    done = videogru(
        "train",
        "--dataset",
        "adrenalmnist3d",
        *QUICK,
        "--set",
        "data.num_frames=10",
        "--batch-size",
        "256",
        "--out",
        run,
    )
    assert done.code == 0, done.err
    predictions = read_csv(run / "predictions-test.csv")
    card = load_card("adrenalmnist3d")
    with np.load(card.home / "adrenalmnist3d.npz", allow_pickle=False) as arrays:
        volumes = arrays["test_images"][:3]
    files = []
    for row, volume in enumerate(volumes):
        files.append(tmp_path / f"{row}.nii.gz")
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(files[-1])
    done = videogru("infer", *files, "--model", run, "--format", "jsonl", "--top-k", "2")
    for line, probabilities in zip(done.out.splitlines(), predictions.probabilities[:3], strict=True):
        said = {entry["class"]: entry["probability"] for entry in json.loads(line)["top"]}
        assert [said[name] for name in card.classes] == pytest.approx(probabilities.tolist(), abs=2e-5)


def test_hostile_files_end_as_rows(there: Path, shared_data: Path) -> None:
    """Nothing in the hostile set ends the program; each file gets a prediction or an error."""
    for folder, model in (("video", "videos"), ("nifti", "volumes"), ("dicom", "volumes")):
        files = sorted(p for p in (shared_data / "hostile" / folder).iterdir() if p.is_file())
        done = videogru("infer", *files, "--model", f"runs/{model}-0001", "--format", "jsonl")
        assert done.code in (0, 3)
        records = [json.loads(line) for line in done.out.splitlines()]
        assert [record["source"] for record in records] == [str(path) for path in files]
        assert all((record["predicted"] is None) == bool(record["error"]) for record in records)
        assert "Traceback" not in done.err

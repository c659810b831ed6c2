"""What a new user does in the first hour, through the command line, on small real or made data."""

import contextlib
import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image

from videogru import cli
from videogru.data.card import load_card
from videogru.inference.predictions import read_csv

QUICK = [
    *("--epochs", "1"),
    *("--set", "model.encoder_width=8", "--set", "model.hidden_size=8", "--set", "train.num_workers=0"),
]


def videogru(*arguments: object) -> SimpleNamespace:
    """Type a command in the current folder."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    argv, sys.argv = sys.argv, ["videogru", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = argv
    text = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return SimpleNamespace(code=caught.value.code, out=text[0], err=text[1])


def write_video(path: Path, *, bright: bool, seed: int, frames: int = 12) -> None:
    """A bar that moves right (bright) or left."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for step in range(frames):
            picture = generator.integers(0, 40, (32, 48, 3), dtype=np.uint8)
            place = step * 3 if bright else 44 - step * 3
            picture[:, place : place + 4] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_volume(path: Path, *, large: bool, seed: int) -> None:
    """A ball in noise."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 18, 12)), indexing="ij"))
    center = np.array([10, 9, 6]).reshape(3, 1, 1, 1)
    ball = ((grid - center) ** 2).sum(axis=0) < (25 if large else 8)
    voxels = generator.normal(100, 10, ball.shape) + 300 * ball
    nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 2.5, 1.0])).to_filename(path)


def write_picture(path: Path, *, bright: bool, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 100, (24, 30, 3)) + (120 if bright else 0)
    Image.fromarray(noise.astype(np.uint8)).save(path)


KINDS = {
    "video": (".mp4", lambda path, flag, seed: write_video(path, bright=flag, seed=seed)),
    "volume": (".nii.gz", lambda path, flag, seed: write_volume(path, large=flag, seed=seed)),
    "image": (".png", lambda path, flag, seed: write_picture(path, bright=flag, seed=seed)),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three class folders of small sources, and a trained run of each kind."""
    place = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for kind, (suffix, write) in KINDS.items():
            for label, flag in (("a", True), ("b", False)):
                folder = place / f"{kind}s" / label
                folder.mkdir(parents=True)
                for number in range(10):
                    write(folder / f"{number}{suffix}", flag, number + 100 * flag)
            size = ("--set", "data.frame_size=32", "--set", "data.num_frames=6", "--batch-size", "6")
            done = videogru("train", "--dataset", f"{kind}s", *QUICK, *size)
            assert done.code == 0, done.err
    return place


@pytest.fixture
def there(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workshop)
    return workshop


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_folder_holds_what_was_promised(there: Path, kind: str) -> None:
    run = there / "runs" / f"{kind}s-0001"
    for name in ("config.yaml", "splits.csv", "metrics.csv", "last.ckpt", "model.safetensors", "report.html"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    predictions = read_csv(run / "predictions-test.csv")
    scores = json.loads((run / "evaluation-test.json").read_text())
    right = float(np.mean(predictions.predicted == predictions.labels))
    assert scores["metrics"]["top1"]["value"] == pytest.approx(right)
    with (run / "splits.csv").open() as file:
        splits = {row["source"]: row["split"] for row in csv.DictReader(file)}
    assert len(splits) == 20
    assert set(splits.values()) == {"train", "val", "test"}
    assert {s for s in splits if splits[s] == "test"} == {str(source) for source in predictions.sources}


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


def test_eval_repeats_the_evaluation(there: Path, tmp_path: Path) -> None:
    first = (there / "runs/images-0001/predictions-test.csv").read_text()
    assert videogru("eval", "runs/images-0001", "--out", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "predictions-test.csv").read_text() == first
    alone = tmp_path / "alone.safetensors"
    shutil.copy("runs/images-0001/model.safetensors", alone)
    done = videogru("eval", alone, "--out", tmp_path / "alone")
    assert done.code == 0, done.err
    assert (tmp_path / "alone" / "predictions-test.csv").read_text() == first


def test_eval_on_other_data_with_fewer_classes_in_another_order(there: Path, tmp_path: Path) -> None:
    """Labels are matched by name: a table with class b alone is scored as class b."""
    shutil.copytree("images/b", tmp_path / "pictures")
    table = tmp_path / "only-b.csv"
    table.write_text("source,label,split\n" + "".join(f"pictures/{n}.png,b,test\n" for n in range(10)))
    one_class = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    assert one_class.code == 0, one_class.err
    assert set(read_csv(tmp_path / "scores" / "predictions-test.csv").labels.tolist()) == {1}
    table.write_text(table.read_text() + "pictures/0.png,a,test\n")
    done = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    written = read_csv(tmp_path / "scores" / "predictions-test.csv")
    assert written.labels.tolist() == [1] * 10 + [0]
    table.write_text("source,label,split\npictures/0.png,c,test\npictures/1.png,b,test\n")
    strange = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    assert strange.code == 2
    assert "c" in strange.err


def test_config_of_a_run_repeats_it(there: Path, tmp_path: Path) -> None:
    done = videogru("train", "--config", "runs/images-0001/config.yaml", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    ours, theirs = (p / "predictions-test.csv" for p in (tmp_path / "again", there / "runs/images-0001"))
    assert ours.read_text() == theirs.read_text()
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["data"]["channels"] == 3


def test_a_run_folder_is_never_overwritten(there: Path) -> None:
    done = videogru("train", "--dataset", "images", "--out", "runs/images-0001", *QUICK)
    assert done.code == 2
    assert "--resume" in done.err


def test_resume_wants_the_same_data(there: Path, tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    shutil.copytree("images", data)
    size = ("--set", "data.frame_size=16", "--batch-size", "8")
    assert videogru("train", "--dataset", data, "--out", tmp_path / "run", *QUICK, *size).code == 0
    shutil.copy(data / "a" / "0.png", data / "a" / "zz.png")
    done = videogru("train", "--resume", tmp_path / "run")
    assert done.code == 2
    assert "splits" in done.err


def test_eval_wants_the_splits_of_the_run(there: Path, tmp_path: Path) -> None:
    """One more file would deal the rows anew, and training rows would be scored as test rows."""
    data = tmp_path / "pictures"
    shutil.copytree("images", data)
    size = ("--set", "data.frame_size=16", "--batch-size", "8")
    assert videogru("train", "--dataset", data, "--out", tmp_path / "run", *QUICK, *size).code == 0
    shutil.copy(data / "a" / "0.png", data / "a" / "zz.png")
    done = videogru("eval", tmp_path / "run")
    assert done.code == 2
    assert "splits" in done.err
    assert videogru("eval", tmp_path / "run", "--dataset", data).code == 2
    assert videogru("eval", tmp_path / "run", "--dataset", data, "--out", tmp_path / "all").code == 0
    assert len(read_csv(tmp_path / "all" / "predictions-test.csv")) == 21


def test_eval_of_another_split_leaves_the_runs_own_report(there: Path) -> None:
    run = there / "runs" / "images-0001"
    before = (run / "report.html").read_bytes()
    assert videogru("eval", run, "--split", "val").code == 0
    assert (run / "report.html").read_bytes() == before
    assert (run / "eval-val" / "report.html").is_file()


def test_unreadable_rows_show_in_eval(there: Path, tmp_path: Path) -> None:
    shutil.copytree("images", tmp_path / "pictures")
    (tmp_path / "pictures" / "a" / "3.png").write_bytes(b"broken")
    done = videogru("eval", "runs/images-0001", "--dataset", tmp_path / "pictures", "--out", tmp_path / "scores")
    assert done.code == 3
    assert "1 of 20 could not be read" in done.err


def test_split_folders(there: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        shutil.copytree("images", tmp_path / "sets" / split)
    size = ("--set", "data.frame_size=16", "--batch-size", "8")
    done = videogru("train", "--dataset", tmp_path / "sets", "--out", tmp_path / "run", *QUICK, *size)
    assert done.code == 0, done.err
    assert "2 classes, 20 train, 20 val, 20 test" in done.err
    (tmp_path / "sets" / "more").mkdir()
    done = videogru("train", "--dataset", tmp_path / "sets", *QUICK, *size)
    assert done.code == 2
    assert "more" in done.err


def test_a_damaged_state_cannot_be_resumed(there: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/images-0001", tmp_path / "run")
    state = tmp_path / "run" / "last.ckpt"
    state.write_bytes(state.read_bytes()[:1000])
    done = videogru("train", "--resume", tmp_path / "run")
    assert done.code == 2
    assert "last.ckpt" in done.err


def test_several_processes_are_refused(there: Path) -> None:
    done = videogru("train", "--dataset", "images", "--devices", "2")
    assert done.code == 2
    assert "not supported yet" in done.err


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


def test_training_without_one_readable_clip_leaves_no_model(there: Path, tmp_path: Path) -> None:
    shutil.copytree("videos", tmp_path / "clips")
    rows = ["source,label,split,start_seconds,end_seconds"]
    rows += [f"clips/{c}/{n}.mp4,{c},{'train' if n < 7 else 'test'},100,200" for c in "ab" for n in range(10)]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    done = videogru("train", "--dataset", tmp_path / "table.csv", "--out", tmp_path / "run", *QUICK)
    assert done.code == 2
    assert "not one training clip" in done.err
    assert not (tmp_path / "run" / "model.safetensors").exists()


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


def test_training_skips_and_lists_bad_files(there: Path, tmp_path: Path) -> None:
    data = tmp_path / "clips"
    shutil.copytree("videos", data)
    for number in range(3):
        (data / "a" / f"{number}.mp4").write_bytes(b"broken")
    arguments = ("--dataset", data, *QUICK, "--set", "data.frame_size=32", "--set", "data.num_frames=4")
    done = videogru("train", *arguments, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    with (tmp_path / "run" / "bad_files.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    evaluated = [read_csv(tmp_path / "run" / f"predictions-{split}.csv") for split in ("val", "test")]
    failed = sum(int(predictions.failed.sum()) for predictions in evaluated)
    assert {row["source"] for row in listed} <= {f"a/{number}.mp4" for number in range(3)}
    assert len(listed) + failed == 3
    done = videogru("train", *arguments, "--out", tmp_path / "strict", "--set", "data.max_bad=0")
    assert done.code == 2
    assert "max_bad" in done.err


def test_manifest_windows_and_splits(there: Path, tmp_path: Path) -> None:
    rows = ["source,label,split,group,start_seconds,end_seconds"]
    for number in range(6):
        shutil.copy(f"videos/a/{number}.mp4", tmp_path / f"{number}.mp4")
        split = "train" if number < 4 else "test"
        rows += [f"{number}.mp4,early,{split},{number},0.0,0.5", f"{number}.mp4,late,{split},{number},0.5,1.0"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows))
    done = videogru(
        "train", "--dataset", table, *QUICK, "--set", "data.frame_size=32", "--set", "data.num_frames=4",
        "--set", "data.val_fraction=0.25", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(read_csv(tmp_path / "run" / "predictions-test.csv")) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,label\n0.png,a\n", ["source", "file"]),
        ("source,label\n0.png,a\n1.png,\n", [":3", "label"]),
        ("source,label,split,group\n0.png,a,train,x\n1.png,b,test,x\n", ["x", "split"]),
        ("source,label,split\n0.png,a,training\n1.png,b,test\n", [":2", "training"]),
        ("source,label\n../0.png,a\n1.png,b\n", [":2"]),
        ("source,label\n0.png,a\n1.png,a\n", ["class"]),
        ("", []),
    ],
)
def test_wrong_manifests(there: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    for number in range(2):
        shutil.copy("images/a/0.png", tmp_path / f"{number}.png")
    (tmp_path / "table.csv").write_text(content)
    done = videogru("train", "--dataset", tmp_path / "table.csv", *QUICK)
    assert done.code == 2
    assert str(tmp_path) in done.err
    for word in words:
        assert word in done.err


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

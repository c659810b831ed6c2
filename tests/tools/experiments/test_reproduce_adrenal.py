"""The benchmark's queue and table, on a small set of the same form; nothing of what it measures is judged here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.experiments import adrenal_rows, adrenal_table, reproduce_adrenal, training_jobs
from tools.experiments.article import flat_settings
from videogru.errors import DataError
from videogru.sequence import SequenceBatch


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """Eight volumes a split; those of class 1 are brighter."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        labels = np.arange(8, dtype=np.uint8)[:, None] % 2
        dark = draw.integers(0, 120, (8, 28, 28, 28), dtype=np.uint8)
        arrays |= {f"{split}_images": dark + 100 * labels[:, :, None, None], f"{split}_labels": labels}
    path = tmp_path / "small.npz"
    np.savez_compressed(path, **arrays)
    return path


def test_thinning_keeps_every_nth_step_and_the_distances_between_them():
    frames = torch.arange(2 * 7.0).view(2, 7, 1, 1, 1)
    gaps = torch.tensor([[0, 1, 2, 3, 4, 5, 6.0], [0, 2, 2, 2, 0, 0, 0]])
    batch = SequenceBatch(frames, torch.tensor([7, 4]), torch.arange(2), gaps=gaps)
    for every, kept, lengths, distances in (
        (2, [0, 2, 4, 6], [4, 2], [[0, 3, 7, 11], [0, 4, 0, 0]]),
        (3, [0, 3, 6], [3, 2], [[0, 6, 15], [0, 6, 0]]),
    ):
        thinned = adrenal_table.thin(batch, every)
        assert torch.equal(thinned.frames, frames[:, kept])
        assert thinned.lengths.tolist() == lengths
        assert thinned.gaps is not None and thinned.gaps.tolist() == distances


def test_shifted_copies_follow_each_other():
    batch = SequenceBatch(torch.rand(2, 3, 1, 5, 5), torch.tensor([3, 2]), torch.tensor([7, 9]), torch.tensor([0, 1]))
    moved = adrenal_table._shifts(batch)
    assert moved.indices.tolist() == [7] * 5 + [9] * 5
    assert torch.equal(moved.frames[0], batch.frames[0])
    assert torch.equal(moved.frames[7, :, :, :4], batch.frames[1].roll(1, -2)[:, :, :4])
    for place in range(5):
        assert torch.allclose(moved.frames[5 + place].sum(), batch.frames[1].sum())


def test_every_row_holds_and_differs_from_the_default():
    wanted = {name: flat_settings(reproduce_adrenal.wanted_config(28, name, 3, None)) for name in adrenal_rows.ROWS}
    for name, row in adrenal_rows.rows_of_size(28).items():
        differing = {key for key, value in wanted[name].items() if value != wanted["default"][key]}
        assert differing - {"data.channels"} <= set(row.settings), name
        assert bool(differing) == (name != "default" and not row.peer), name
        assert wanted[name]["train.seed"] == 3
    assert set(adrenal_rows.THINNED) <= set(adrenal_rows.ROWS)
    for size, name in adrenal_rows.DEFAULT_IS.items():
        recipe, named = (
            flat_settings(reproduce_adrenal.wanted_config(size, row, 3, None)) for row in ("default", name)
        )
        assert recipe == named, "the recipe is not what DEFAULT_IS says"


def test_peers_read_what_our_run_of_the_same_seed_read(tmp_path: Path):
    found = reproduce_adrenal.jobs(tmp_path, 28, None, ("plain", "r3d_18"), (0, 1), (1,))
    assert [job.run.name for job in found] == ["28-plain-seed0", "28-plain-seed1", "28-r3d_18-seed1"]
    command = found[2].command()
    assert command[3] == str(tmp_path / "28-plain-seed1") and command[-4:-2] == ["--net", "r3d_18"]


@pytest.mark.slow
def test_trained_measured_and_shown(
    tmp_path: Path, small_set: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recipe = Path("configs/adrenalmnist3d.yaml").read_text().replace("epochs: 12", "epochs: 2, num_workers: 0")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.setitem(reproduce_adrenal.RECIPES, 28, str(tmp_path / "recipe.yaml"))
    monkeypatch.setattr(adrenal_table, "RESAMPLES", 20)
    monkeypatch.setattr(adrenal_table, "ROUNDS", 1)
    work, out = tmp_path / "work", tmp_path / "out"
    words = ["--data-dir", str(small_set), "--work", str(work), "--out", str(out), "--rows", "default", "--seeds", "1"]
    with training_jobs.locked(work / "28-default-seed1"):
        assert reproduce_adrenal.main([*words, "--only", "train"]) == 0
    assert "another run of this tool is at work here" in capfd.readouterr().out
    assert reproduce_adrenal.main([*words, "--only", "measure"]) == 2
    assert "no finished run" in capfd.readouterr().err
    assert reproduce_adrenal.main(words) == 0
    found = json.loads((out / "adrenal-28.json").read_text())
    assert found["rows"]["default"]["seeds"] == [1]
    assert found["rows"]["r3d_18"]["seeds"] == []
    said = json.loads((work / "28-default-seed1/evaluation-test.json").read_text())["metrics"]["auroc"]["value"]
    assert found["rows"]["default"]["test_auc"]["value"] == pytest.approx(said)
    assert found["thinned"]["default"]["auc"]["every slice"] == [pytest.approx(said)]
    assert str(tmp_path) not in (out / "adrenal-28.json").read_text() + (out / "adrenal-28.md").read_text()
    assert "| ConvGRU on the maps | 0 | not run |" in (out / "adrenal-28.md").read_text()
    assert (out / "adrenal-28.png").stat().st_size > 5000


def test_the_race_to_a_peers_best_epoch(tmp_path: Path):
    header = "epoch,step,train_loss,train_accuracy,val_loss,val_accuracy,val_auroc,lr,seconds\n"
    for name, scores in (("default", (0.6, 0.85, 0.9)), ("r3d_18", (0.7, 0.8, 0.8))):
        run = adrenal_rows.run_folder(tmp_path, 28, name, 0)
        run.mkdir()
        lines = [f"{epoch},1,1,1,1,1,{score},1,1\n" for epoch, score in enumerate(scores)]
        (run / "metrics.csv").write_text(header + "".join(lines))
    race = adrenal_table._race(tmp_path, 28, "r3d_18", 0, {"default": 2.0, "r3d_18": 30.0})
    expected = {"seed": 0, "val_auc": 0.8, "epoch": 2, "seconds": 60.0, "our_epoch": 2, "ours": 4.0}
    assert race == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "64"], "adrenalmnist3d_64.npz"),
        (["--size", "30"], "invalid choice: 30"),
        (["--rows", "default,foo"], "--rows"),
        (["--rows", "default,drop"], "drop is what default does"),
        (["--minutes", "nan"], "--minutes"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        reproduce_adrenal.main(words)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1


def test_a_folder_that_is_no_npz_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert reproduce_adrenal.main(["--work", str(tmp_path), "--only", "measure"]) == 2
    assert str(DataError("no finished run of the default", where=tmp_path).what) in capsys.readouterr().err

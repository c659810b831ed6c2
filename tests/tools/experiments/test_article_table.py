import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.experiments.test_reproduce_article import ORDER, called, prepare, train_tiny
from tools.experiments import article, article_table, reproduce_article
from videogru.workflows.run_folder import run_config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three nets with seeds 2 and 4, trained for an epoch; seed 2 of the LSTM-CNN is not there."""
    place = tmp_path_factory.mktemp("article")
    with pytest.MonkeyPatch.context() as patch:
        prepare(place, patch)
        patch.setattr(article_table, "ROUNDS", 2)
        patch.setattr(article_table, "TURN_SECONDS", 1e-4)
        train_tiny(place, [name for name in ORDER if name != "lstm-cnn-seed2"])
        yield place


@pytest.fixture
def trained(models: Path, tmp_path: Path) -> Path:
    """A copy of them to be spoiled."""
    for name in ("work", "data"):
        shutil.copytree(models / name, tmp_path / name)
    return tmp_path


def test_the_table(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "out"
    assert reproduce_article.main([*called(trained), "--only", "measure", "--out", str(out)]) == 0
    table = json.loads((out / "table-cpu.json").read_text())
    for net, seeds in (("resnet", [4, 2]), ("lstm-cnn", [4]), ("gru-cnn", [4, 2])):
        found = table["nets"][net]
        assert (found["seeds"], found["not_run"]) == (seeds, [seed for seed in (4, 2) if seed not in seeds])
        saved = [json.loads((trained / f"work/{net}-seed{s}/evaluation-test.json").read_text()) for s in seeds]
        assert found["accuracy"]["per_seed"] == pytest.approx([one["metrics"]["top1"]["value"] for one in saved])
        assert found["accuracy"]["value"] == pytest.approx(np.mean(found["accuracy"]["per_seed"]))
    one, other = table["nets"]["gru-cnn"]["accuracy"]["per_seed"], table["nets"]["resnet"]["accuracy"]["per_seed"]
    assert table["differences"]["resnet"]["value"] == pytest.approx(np.mean(one) - np.mean(other))
    assert table["nets"]["resnet"]["accuracy"]["sd"] == pytest.approx(np.std(other, ddof=1))
    assert table["differences"]["lstm-cnn"]["seeds"] == [4]
    assert table["nets"]["lstm-cnn"]["accuracy"]["sd"] is None
    assert table["nets"]["resnet"]["macs"]["recurrent"] == 0
    # Two layers of two directions, 16 steps of 16 features.
    assert table["nets"]["gru-cnn"]["macs"]["recurrent"] == 16 * 3 * 4 * 2 * ((16 + 4) + (8 + 4))
    assert set(table["latency"]["128"]["ratio"]) == {"lstm-cnn / resnet", "gru-cnn / resnet", "gru-cnn / lstm-cnn"}
    text = (out / "table-cpu.md").read_text()
    assert text.count("not run (GPU)") == 3
    assert "2: not run" in text and "| 78.1 |" in text
    assert "data-dir DIR" in text and "--out out" in text and str(trained) not in text
    # The LSTM-CNN has one seed, and so has its difference.
    assert text.count(", images alone)") == 2
    assert table["nets"]["lstm-cnn"]["accuracy"]["over"] == table["differences"]["lstm-cnn"]["over"] == "images alone"
    assert table["differences"]["resnet"]["over"] == "seeds and images"
    gap = np.subtract(one, other)
    half = 12.7062 * gap.std(ddof=1) / np.sqrt(2)
    assert table["differences"]["resnet"]["high"] >= gap.mean() + half - 1e-9
    assert table["latency"]["1"]["mode"].startswith("float32")
    assert (out / "accuracy-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*"))
    # The other budget's table, once it is there, is shown beside.
    (out / "table-gpu.json").write_text((out / "table-cpu.json").read_text())
    assert reproduce_article.main([*called(trained), "--only", "measure", "--out", str(out)]) == 0
    assert "not run (GPU)" not in (out / "table-cpu.md").read_text()


def told(trained: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the tool says where it does not measure."""
    capsys.readouterr()
    assert reproduce_article.main([*called(trained), "--only", "measure", "--out", str(trained / "out")]) == 2
    assert not (trained / "out").exists()
    return capsys.readouterr().err


def test_runs_that_do_not_compare(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained / "work/resnet-seed2/config.yaml"
    kept = config.read_text()
    config.write_text(re.sub("lr: .*", "lr: 0.5", kept))
    assert "train.lr=0.5, but" in told(trained, capsys)
    config.write_text(kept.replace("layer_norm: false", "layer_norm: true"))
    assert "model.layer_norm=True, but a ResNet has False" in told(trained, capsys)
    config.write_text(kept)
    (trained / "work/gru-cnn-seed2").rename(trained / "work/lstm-cnn-seed2")
    assert "lstm-cnn-seed2: model.cell=gru, but a LSTM-CNN has lstm" in told(trained, capsys)


def test_what_may_differ_between_runs(trained: Path) -> None:
    runs_there = {(net, seed): trained / f"work/{net}-seed{seed}" for net, seed in (("resnet", 2), ("gru-cnn", 4))}
    config = trained / "work/gru-cnn-seed4/config.yaml"
    config.write_text(re.sub("data_dir: .*", "data_dir: /elsewhere", config.read_text()))
    shared = article.shared_settings(runs_there)
    assert shared["train.lr"] == 0.02 and shared["model.num_layers"] == 2
    free = {"train.seed", "data.data_dir", "model.cell", "model.pooling", "model.layer_norm"}
    assert set(article.flat_settings(run_config(config.parent))) - set(shared) == free


def test_predictions_that_do_not_pair(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "work/gru-cnn-seed2/predictions-test.csv"
    kept = file.read_text().splitlines(keepends=True)
    cells = kept[7].split(",")
    other = "bed" if cells[2] != "bed" else "bear"
    for lines, said in (
        ([*kept[:7], ",".join([*cells[:2], other, *cells[3:]]), *kept[8:]], "other test rows or labels"),
        ([*kept[:7], *kept[8:]], "not the whole test split of 100 in its order"),
        ([*kept[:7], kept[8], kept[7], *kept[9:]], "not the whole test split of 100 in its order"),
        ([*kept[:8], *kept[7:-1]], "not the whole test split of 100 in its order"),
        (kept[:1], "not the whole test split of 100 in its order"),
        ([*kept[:7], ",".join([*cells[:3], "", "", "unread", *[""] * 100]) + "\n", *kept[8:]], "not the whole test"),
    ):
        file.write_text("".join(lines))
        error = told(trained, capsys)
        assert said in error and "gru-cnn-seed2" in error
    file.write_text("".join(kept))
    hits, seen = article_table._hits(file.parent)
    assert hits.tolist() == [line.split(",")[2] == line.split(",")[3] for line in kept[1:]]
    assert seen[0].tolist() == [int(line.split(",")[0]) for line in kept[1:]] and seen.shape == (2, 100)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation-test.json", "no json"),
        ("evaluation-test.json", "[]"),
        ("metrics.csv", None),
        ("metrics.csv", "epoch,seconds\n"),
        ("metrics.csv", "epoch,step\n1,2\n"),
        ("metrics.csv", "epoch,seconds\n1,soon\n"),
    ],
)
def test_damaged_run_folders(trained: Path, name: str, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "work/gru-cnn-seed2" / name
    file.unlink() if content is None else file.write_text(content)
    error = told(trained, capsys)
    assert str(file) in error and error.count("\n") == 1


@pytest.mark.parametrize("allowed", [True, False])
def test_a_gpu_tells_what_its_float32_is(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    said = article_table.arithmetic(torch.device("cuda"))
    assert f"TF32 {'' if allowed else 'not '}allowed in cuDNN" in said and "'medium'" in said
    assert article_table.arithmetic(torch.device("cpu")) == "float32"

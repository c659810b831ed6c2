"""The queue and the table of the distillation benchmark, on runs made by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.experiments import distillation_table, reproduce_distillation
from tools.experiments.article import flat_settings
from tools.experiments.distillation_rows import ROWS, TASKS, run_folder, wanted_config
from videogru.checkpoint.model_file import MODEL_FILE_NAME, make_card, write_model
from videogru.inference.predictions import Predictions
from videogru.training.fit import build_classifier

COUNT = 400


def make_run(work: Path, task: str, row: str, seed: int, *, accuracy: float) -> None:
    """A finished run as far as the table looks: a model, and predictions of which a share is right."""
    run = run_folder(work, task, row, seed)
    run.mkdir(parents=True)
    config = wanted_config(work, task, row, seed, None)
    small = config.model.model_copy(update={"encoder": "small", "encoder_width": 16 if row == "teacher" else 2})
    config = config.model_copy(update={"model": small})
    kind = "image" if task == "cifar100" else "video"
    classifier = build_classifier(config, 2)
    write_model(
        run / MODEL_FILE_NAME, classifier, make_card(classifier, kind=kind, classes=("a", "b"), data=config.data)
    )
    right = np.random.default_rng(seed).permutation(COUNT) < accuracy * COUNT
    labels = np.arange(COUNT) % 2
    said = np.where(right, labels, 1 - labels)
    probabilities = np.where(np.arange(2) == said[:, None], 0.9, 0.1).astype(np.float32)
    rows, names = np.arange(COUNT), np.array([f"{i}" for i in range(COUNT)])
    Predictions(("a", "b"), names, labels, probabilities, np.full(COUNT, "", "U1"), rows).write_csv(
        run / "predictions-test.csv"
    )
    (run / "evaluation-test.json").write_text("{}")


def test_every_training_is_its_recipe_and_what_its_row_says(tmp_path: Path) -> None:
    for task in TASKS:
        flat = {row: flat_settings(wanted_config(tmp_path, task, row, 2, None)) for row in ROWS}
        assert all(one["train.seed"] == 2 for one in flat.values())
        differing = {key for key, value in flat["distilled"].items() if value != flat["alone"][key]}
        assert differing == {"train.teacher"}
        assert flat["distilled"]["train.teacher"] == str(run_folder(tmp_path, task, "teacher", 2))
        differing = {key for key, value in flat["matched"].items() if value != flat["distilled"][key]}
        assert differing == {"train.distill_features"}
        # One net against another: the same data and optimizer; the recipes say what else.
        differing = {key for key, value in flat["teacher"].items() if value != flat["alone"][key]}
        besides = {key for key in differing if not key.startswith("model.")}
        augmented = {f"data.augment.{name}" for name in ("flip", "translate", "cutmix")}
        assert differing > besides == {"grid_digits": {"train.epochs"}, "cifar100": augmented}[task]
        assert flat["alone"]["train.teacher"] is None


def test_states_of_teacher_and_student_can_be_matched(tmp_path: Path) -> None:
    for task in TASKS:
        nets = [build_classifier(wanted_config(tmp_path, task, row, 0, None), 10) for row in ("teacher", "alone")]
        assert nets[0].steps_per_frame == nets[1].steps_per_frame


def test_a_student_waits_for_its_teacher(tmp_path: Path) -> None:
    found = reproduce_distillation.jobs(tmp_path, {"grid_digits": None}, tuple(ROWS), (0, 1))
    assert [job.run.name for job in found[:3]] == [
        "grid_digits-teacher-seed0",
        "grid_digits-teacher-seed1",
        "grid_digits-alone-seed0",
    ]
    make_run(tmp_path, "grid_digits", "teacher", 1, accuracy=0.9)
    waits = [job.run.name for job in found if reproduce_distillation.waiting(job, tmp_path)]
    assert waits == ["grid_digits-distilled-seed0", "grid_digits-matched-seed0"]
    command = found[5].command()
    assert command[3:6] == ["train", "--config", "grid_digits-student"]
    assert f"train.teacher={tmp_path / 'grid_digits-teacher-seed1'}" in command


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_table, "ROUNDS", 2)
    monkeypatch.setattr(distillation_table, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(distillation_table, "BATCH", 2)
    torch.set_num_threads(1)
    for seed in (0, 1, 2):
        make_run(tmp_path, "grid_digits", "teacher", seed, accuracy=0.90 + 0.01 * seed)
        make_run(tmp_path, "grid_digits", "alone", seed, accuracy=0.60 + 0.01 * seed)
        if seed:
            make_run(tmp_path, "grid_digits", "distilled", seed, accuracy=0.89 + 0.01 * seed)
    found = distillation_table.measure(tmp_path, ("grid_digits", "cifar100"), ["python"])
    rows = found["tasks"]["grid_digits"]["rows"]
    assert rows["teacher"]["accuracy"]["value"] == pytest.approx(0.91)
    # Over seeds 1 and 2 alone, which both have.
    assert rows["distilled"]["share_of_teacher"]["value"] == pytest.approx((0.90 + 0.91) / (0.91 + 0.92))
    ahead = rows["distilled"]["minus_alone"]
    assert ahead["value"] == pytest.approx(0.905 - 0.615) and ahead["low"] > 0
    assert rows["matched"]["seeds"] == [] and rows["teacher"]["parameters"] > 4 * rows["alone"]["parameters"]
    text = distillation_table.markdown(found)
    assert "97% of the teacher's accuracy is kept" in text and "better than alone, beyond the interval" in text
    assert "| student, distilled, states matched | 0 | not run |" in text
    assert text.count("not run") == 1 + 4
    distillation_table.write_table(tmp_path / "out", found)
    assert (tmp_path / "out" / "distillation.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--what", "digits"], "grid_digits"), (["--rows", "x"], "teacher"), (["--minutes", "nan"], "--minutes")],
)
def test_bad_usage_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        reproduce_distillation.main(words)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1


def test_nothing_trained_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce_distillation.main(["--only", "measure", "--work", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err

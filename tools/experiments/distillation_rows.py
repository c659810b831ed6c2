"""The trainings of reproduce_distillation.py: data sets, rows of the table, and the command of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.experiments.training_jobs import VIDEOGRU, train_command
from videogru.config import Config
from videogru.data.manifests.dataset_card import load_card
from videogru.settings import parse_assignments
from videogru.workflows.settings import settings_for_training


@dataclass(frozen=True)
class Task:
    """A data set: recipes of teacher and student (over its own; None: its own as it is), and what both set."""

    title: str
    teacher: str | None
    student: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table; taught: by the teacher of the same seed; settings: over the recipe."""

    title: str
    taught: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


TASKS = {
    "grid_digits": Task("GRID digits", "grid_digits-teacher", "grid_digits-student"),
    "cifar100": Task("CIFAR-100, 5 epochs", None, "cifar100-student", {"train.epochs": "5"}),
}
ROWS = {
    "teacher": Row("teacher"),
    "alone": Row("student alone"),
    "distilled": Row("student, distilled", taught=True),
    "matched": Row("student, distilled, states matched", taught=True, settings={"train.distill_features": "0.5"}),
}


def run_folder(work: Path, task: str, row: str, seed: int) -> Path:
    """Where one training lies."""
    return work / f"{task}-{row}-seed{seed}"


def words_of(work: Path, task: str, row: str, seed: int, data: Path | None) -> tuple[str | None, dict[str, str]]:
    """(recipe, settings) of one training, data set and teacher included."""
    what, one = TASKS[task], ROWS[row]
    settings = {"data.dataset": task, "train.seed": str(seed), **what.settings, **one.settings}
    if data is not None:
        settings["data.data_dir"] = str(data)
    if one.taught:
        settings["train.teacher"] = str(run_folder(work, task, "teacher", seed))
    return (what.teacher if row == "teacher" else what.student), settings


def wanted_config(work: Path, task: str, row: str, seed: int, data: Path | None) -> Config:
    """The settings of one training, resolved."""
    recipe, settings = words_of(work, task, row, seed, data)
    assigned = parse_assignments(f"{key}={value}" for key, value in settings.items())
    config = settings_for_training(recipe, {}, assigned)
    return config.model_copy(update={"data": config.data.for_kind(load_card(task).kind)})


def own_command(work: Path, task: str, row: str, seed: int, data: Path | None) -> list[str]:
    """The command of one training, which goes on where a state was saved."""
    recipe, settings = words_of(work, task, row, seed, data)
    flags = [] if recipe is None else ["--config", recipe]
    for key, value in settings.items():
        flags += ["--dataset", value] if key == "data.dataset" else ["--set", f"{key}={value}"]
    return train_command(VIDEOGRU, run_folder(work, task, row, seed), flags)

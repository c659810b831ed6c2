"""`videogru model calibrate`: how sure a model must be to stop a stream early, by the videos of a split."""

import sys
from collections.abc import Callable
from pathlib import Path

from videogru.config import Split
from videogru.errors import ConfigError
from videogru.inference.early_exit import calibrate, exit_rows, told
from videogru.progress import Progress
from videogru.workflows.evaluate import open_run
from videogru.workflows.run_folder import note_on_training

Say = Callable[[str], None]


def calibrate_run(
    path: Path, *, split: Split, dataset: str | None, data_dir: Path | None, device: str, say: Say
) -> list[str]:
    """Calibrate the model file of a run, in place; returns why some videos could not be read.

    dataset: another data set than the model's own. Raises ConfigError for training rows of its own, and what
    `early_exit.calibrate` raises.
    """
    if split == "train" and dataset is None:
        raise ConfigError(
            "a model is surer of what it was trained on, so that nothing would be promised for other videos",
            where="--split train",
            hint="Leave --split out, or use --split test.",
        )
    model, settings, corpus = open_run(path, dataset=dataset, data_dir=data_dir)
    if dataset is not None and (note := note_on_training(path if path.is_dir() else path.parent, corpus, split)):
        say(note)
    with Progress(len(exit_rows(corpus, split)), shown=sys.stderr.isatty()) as tick:
        table, failed = calibrate(
            model,
            corpus,
            settings.data,
            split=split,
            device=device,
            num_workers=settings.train.num_workers,
            tick=tick,
        )
    for reason in failed:
        say(f"left out, cannot be read: {reason}")
    say(f"{told(table, failed)}; written into {model}")
    return failed

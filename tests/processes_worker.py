"""One of the processes that test_processes.py starts with torchrun: trains each scenario and notes what it saw.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/processes_worker.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fit import bars, settings

from videogru.config import Config
from videogru.data import datamodule
from videogru.data.batching import Item, Loaded, collate
from videogru.data.layouts import Corpus
from videogru.errors import VideogruError
from videogru.training.fit import fit
from videogru.training.processes import ALONE, Group, joined, this_group
from videogru.training.task import SequenceTask

# No dropout: its masks depend on the process. Pixels have no BatchNorm, small has.
SAME = {"model__input_dropout": 0.0, "model__dropout": 0.0, "train__epochs": 2, "train__batch_size": 10}
SCENARIOS: dict[str, dict[str, Any]] = {
    "adam": {},
    "norms": {"model__encoder": "small", "train__optimizer": "sgd", "train__lr": 0.1, "train__save_every_minutes": 1e-6},
    "weighted": {"train__class_weights": "balanced", "train__ema_decay": 0.9, "train__keep": "last"},
    "muon": {"model__encoder": "conv2", "train__optimizer": "muon"},
    "bad": {"model__encoder": "small", "train__optimizer": "sgd", "train__lr": 0.1},
}
# 41 training rows, three steps an epoch, of which one process reads 6 or 7 in each: parts are not equal.
ROWS, STOPPED_AT = 62, 5
BAD_IN_STEP = 1


def scenario(name: str, *, processes: int) -> Config:
    """Its settings for so many processes: the batch of all of them is the same."""
    changes = {**SAME, **SCENARIOS[name]}
    changes["train__batch_size"] = changes["train__batch_size"] * 2 // processes
    return settings(**changes)


def bad_rows() -> set[int]:
    """All that the second of two processes reads in one step, and one row of the first."""
    from videogru.data.batching import EpochBatches

    parts = [
        list(EpochBatches(bars(ROWS).manifest.rows("train"), batch_size=10, seed=0, epoch=lambda: 0, rank=r, world=2))
        for r in range(2)
    ]
    return {row for _, row in parts[1][BAD_IN_STEP]} | {parts[0][BAD_IN_STEP][0][1]}


class Notes:
    """What this process trains and validates on."""

    def __init__(self, patch: pytest.MonkeyPatch, bad: set[int]) -> None:
        self.trained: list[tuple[int, int]] = []
        self.validated: list[int] = []
        self.scores: list[dict[str, float]] = []
        train, validate, score = SequenceTask.training_step, SequenceTask.validation_step, SequenceTask.validation_scores

        def training_step(task: SequenceTask, loaded: Loaded, index: int) -> Any:
            assert loaded.batch is None or loaded.batch.indices is not None
            rows = [] if loaded.batch is None else loaded.batch.indices.tolist()
            self.trained += [(loaded.epoch, row) for row in rows]
            return train(task, without(loaded, bad), index)

        def validation_step(task: SequenceTask, loaded: Loaded, index: int) -> None:
            self.validated += [] if loaded.batch is None else loaded.batch.indices.tolist()
            validate(task, loaded, index)

        def validation_scores(task: SequenceTask) -> dict[str, float]:
            self.scores.append(score(task))
            return dict(self.scores[-1])

        patch.setattr(SequenceTask, "training_step", training_step)
        patch.setattr(SequenceTask, "validation_step", validation_step)
        patch.setattr(SequenceTask, "validation_scores", validation_scores)


def without(loaded: Loaded, bad: set[int]) -> Loaded:
    """The batch as if these rows could not be read."""
    batch = loaded.batch
    assert batch is not None
    if not bad & set(batch.indices.tolist()):
        return loaded
    keep = torch.tensor([row not in bad for row in batch.indices.tolist()])
    failures = tuple((row, "cannot be read") for row in batch.indices.tolist() if row in bad)
    if not keep.any():
        return Loaded(loaded.epoch, None, failures)
    assert batch.labels is not None
    left = type(batch)(batch.frames[keep], batch.lengths[keep], batch.indices[keep], batch.labels[keep])
    return Loaded(loaded.epoch, left, failures)


def train(name: str, folder: Path, group: Group = ALONE, *, resume: bool = False, **more: Any) -> dict[str, Any]:
    """Train a scenario into folder/name; what was noted."""
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        notes = Notes(patch, bad_rows() if name == "bad" else set())
        config = scenario(name, processes=group.world)
        config = config.model_copy(update={"data": config.data.model_copy(update=more)})
        try:
            fit(config, bars(ROWS), run, resume=resume, progress=False, say=lambda text: None, group=group)
            error = ""
        except VideogruError as raised:
            error = str(raised)
    return {"trained": notes.trained, "validated": notes.validated, "scores": notes.scores, "error": error}


def main() -> None:
    """Train all scenarios, then one of them stopped by a signal to one process and resumed, and one with too many bad."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    with joined(this_group(settings().train)) as group:
        for name in SCENARIOS:
            seen[name] = train(name, folder, group)
        seen["stopped"] = stopped(folder / "stopped", group)
        seen["resumed"] = train("norms", folder / "stopped", group, resume=True)
        seen["too many bad"] = train("bad", folder / "strict", group, max_bad=1)
        (folder / f"seen-{group.rank}.json").write_text(json.dumps(seen))


def stopped(folder: Path, group: Group) -> dict[str, Any]:
    """Train until the second process is told to stop, in the middle of an epoch."""
    import os
    import signal

    real, calls = datamodule.augment_batch, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == STOPPED_AT and group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "augment_batch", counted)
        return train("norms", folder, group)


if __name__ == "__main__":
    main()

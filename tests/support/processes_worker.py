"""One of the processes that test_processes.py starts with torchrun: trains each scenario and notes what it saw.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/support/processes_worker.py FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.test_fit import bars, settings
from videogru.config import Config
from videogru.data.loading import datamodule
from videogru.data.loading.batching import EpochBatches, Loaded
from videogru.data.manifests.corpus import Corpus
from videogru.errors import VideogruError
from videogru.training.fit import fit
from videogru.training.processes import ALONE, Group, joined, this_group
from videogru.training.task import SequenceTask

# No dropout: its masks depend on the process. Pixels have no BatchNorm, small has.
SAME = {"model__input_dropout": 0.0, "model__dropout": 0.0, "train__epochs": 2, "train__batch_size": 10}
SCENARIOS: dict[str, dict[str, Any]] = {
    "adam": {},
    "norms": {
        "model__encoder": "small",
        "train__optimizer": "sgd",
        "train__lr": 0.1,
        "train__save_every_minutes": 1e-6,
    },
    "weighted": {"train__class_weights": "balanced", "train__ema_decay": 0.9, "train__keep": "last"},
    "muon": {"model__encoder": "conv2", "train__optimizer": "muon"},
    "recomputed": {
        **{"model__encoder": "small", "train__optimizer": "sgd", "train__lr": 0.1},
        **{"train__gradient_checkpointing": True, "train__checkpoint_steps": 3},
    },
    "bad": {"model__encoder": "small", "train__optimizer": "sgd", "train__lr": 0.1},
    "one validation row": {},
    "taught": {
        **{"data__augment__cutmix": 0.0, "model__seq": "frames", "train__class_weights": "balanced"},
        **{"train__optimizer": "sgd", "train__lr": 0.1, "train__distill_features": 0.5},
    },
    "taught once": {"data__augment__flip": 0.0, "data__augment__noise": 0.0},
}
# 41 training rows, three steps an epoch, of which one process reads 6 or 7 in each: parts are not equal.
ROWS, STOPPED_AT = 62, 5
BAD_IN_STEP = 1
# Written by test_processes.py, which then starts the processes in that folder.
TEACHER = Path("teacher.safetensors")


def scenario(name: str, *, processes: int) -> Config:
    """Its settings for so many processes: the batch of all of them is the same."""
    changes = {**SAME, **SCENARIOS[name]}
    changes["train__batch_size"] = changes["train__batch_size"] * 2 // processes
    if name.startswith("taught"):
        changes["train__teacher"] = str(TEACHER)
    return settings(**changes)


def bad_rows() -> set[int]:
    """One row of the first process and all of the second in one step, and all that both read in the next."""
    parts = [
        list(EpochBatches(bars(ROWS).manifest.rows("train"), batch_size=10, seed=0, epoch=lambda: 0, rank=r, world=2))
        for r in range(2)
    ]
    keys = [*parts[1][BAD_IN_STEP], parts[0][BAD_IN_STEP][0], *parts[0][BAD_IN_STEP + 1], *parts[1][BAD_IN_STEP + 1]]
    return {row for _, row in keys}


def corpus_of(name: str) -> Corpus:
    """Bars; in one scenario with fewer validation rows than processes."""
    corpus = bars(ROWS)
    if name != "one validation row":
        return corpus
    rows = np.concatenate([corpus.manifest.rows("train"), corpus.manifest.rows("val")[:1]])
    assert corpus.arrays is not None
    return replace(corpus, manifest=corpus.manifest.take(rows), arrays=corpus.arrays[rows])


class Notes:
    """What this process trains and validates on."""

    def __init__(self, patch: pytest.MonkeyPatch, bad: set[int]) -> None:
        self.trained: list[tuple[int, int]] = []
        self.validated: list[int] = []
        self.scores: list[dict[str, float]] = []
        train, validate, score = (
            SequenceTask.training_step,
            SequenceTask.validation_step,
            SequenceTask.validation_scores,
        )

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
            fit(config, corpus_of(name), run, resume=resume, progress=False, say=lambda text: None, group=group)
            error = ""
        except VideogruError as raised:
            error = str(raised)
    return {"trained": notes.trained, "validated": notes.validated, "scores": notes.scores, "error": error}


def main() -> None:
    """Train all scenarios, one of them once more with a stop, and one with too many bad files."""
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

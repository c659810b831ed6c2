"""Does a model use the order of its steps? The same clips with their order changed or taken away."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, DataError
from videogru.files import atomic_text
from videogru.inference.evaluation import METRIC_NAMES, usable_rows
from videogru.inference.metrics import Interval, paired_difference
from videogru.inference.predictor import Change, Predictor
from videogru.kinds import KINDS, Kind
from videogru.models.serialize import valid_steps
from videogru.sequence import SequenceBatch

AS_IT_IS = "as it is"


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """One way to show the clips: the score, and the score minus that of the clips as they are (paired interval)."""

    name: str
    score: Interval
    difference: Interval


@dataclass(frozen=True, slots=True)
class Probe:
    """All rows, on `evaluated` clips; metric: key of METRIC_NAMES; verdict: what follows, in one sentence."""

    metric: str
    evaluated: int
    seed: int
    rows: tuple[ProbeRow, ...]
    verdict: str

    def to_json(self, path: Path) -> None:
        """Write all of it or nothing. Raises DataError where it cannot be written."""
        content: dict[str, Any] = asdict(self)
        with atomic_text(path) as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")

    def table_rows(self) -> list[tuple[str, str, str, str]]:
        """(frames, score, 95 % interval, difference with its interval) as text for a terminal table."""
        found = []
        for row in self.rows:
            between, difference = row.score, row.difference
            gap = f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
            shown = "" if row.name == AS_IT_IS else gap
            found.append((row.name, f"{between.value:.3f}", f"{between.low:.3f} to {between.high:.3f}", shown))
        return found


def probe(
    predictor: Predictor,
    corpus: Corpus,
    rows: NDArray[np.int64],
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> Probe:
    """Score `rows` with their steps in order, shuffled (by seed and row), reversed, one alone, and one by one.

    One by one, each step goes through the whole model as a clip of its own and the probabilities are averaged, which
    no order can change. Raises ConfigError for stills, DataError where no row can be judged.
    """
    if not KINDS[predictor.card.kind].is_sequence:
        raise ConfigError(
            "a still has one frame: there is no order to take away", hint="Probe a video or volume model."
        )
    changes: dict[str, Change] = {
        AS_IT_IS: lambda batch: batch,
        "shuffled": lambda batch: _reordered(batch, _shuffle(seed)),
        "reversed": lambda batch: _reordered(batch, lambda steps, row: steps.flip(0)),
        "the middle one alone": lambda batch: _picked(batch, lambda length: [length // 2]),
        "one by one, averaged": lambda batch: _picked(batch, lambda length: list(range(length))),
    }
    said = predictor.predict_changed(corpus, rows, changes, batch_size=batch_size, num_workers=num_workers, tick=tick)
    plain = said[AS_IT_IS]
    usable = np.logical_and.reduce([usable_rows(predictions) for predictions in said.values()])
    if not usable.any():
        raise DataError(f"nothing to probe: none of the {len(rows)} rows has a label and could be read")
    labels = plain.labels[usable]
    found, metric = [], ""
    for name, predictions in said.items():
        metric, score, difference = paired_difference(
            predictions.probabilities[usable], plain.probabilities[usable], labels, seed=seed
        )
        found.append(ProbeRow(name, score, difference))
    return Probe(metric, len(labels), seed, tuple(found), _verdict(metric, found, predictor.card.kind))


def _verdict(metric: str, rows: list[ProbeRow], kind: Kind) -> str:
    """One sentence on order: what a shuffle costs, and whether looking at steps one by one does as well."""
    by_name = {row.name: row.difference for row in rows}
    shuffled, single = by_name["shuffled"], by_name["one by one, averaged"]
    steps = KINDS[kind].steps
    score = METRIC_NAMES[metric].lower() if metric != "auroc" else METRIC_NAMES[metric]
    if shuffled.high < 0:
        return (
            f"The order of the {steps} matters to this model: shuffling them changes its {score} by "
            f"{shuffled.value:+.3f} ({shuffled.low:+.3f} to {shuffled.high:+.3f})."
        )
    if single.high < 0:
        return (
            f"This model needs several {steps} together but not their order: shuffled it loses nothing that is certain "
            f"({shuffled.low:+.3f} to {shuffled.high:+.3f}), one by one it loses {-single.value:.3f}."
        )
    return (
        f"Nothing shows that this model uses the order of the {steps}: shuffled, its {score} changes by "
        f"{shuffled.value:+.3f} ({shuffled.low:+.3f} to {shuffled.high:+.3f}), one by one by {single.value:+.3f}."
    )


def _shuffle(seed: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def shuffle(steps: torch.Tensor, row: int) -> torch.Tensor:
        return steps[torch.from_numpy(np.random.default_rng((seed, row)).permutation(len(steps)))]

    return shuffle


def _reordered(batch: SequenceBatch, order: Callable[[torch.Tensor, int], torch.Tensor]) -> SequenceBatch:
    """The valid steps of each clip in another order: order(places (length,), row) -> places; the gaps stay in place."""
    frames = batch.frames.clone()
    for clip, (length, row) in enumerate(zip(batch.lengths.tolist(), batch.indices.tolist(), strict=True)):
        frames[clip, :length] = batch.frames[clip, order(torch.arange(length), row)]
    return replace(batch, frames=frames)


def _picked(batch: SequenceBatch, places: Callable[[int], list[int]]) -> SequenceBatch:
    """Single steps as clips of their own, those of a row after each other."""
    picked = torch.zeros(batch.frames.shape[:2], dtype=torch.bool)
    for clip, length in enumerate(batch.lengths.tolist()):
        picked[clip, places(length)] = True
    picked &= valid_steps(batch.lengths, batch.frames.shape[1])
    rows = batch.indices.unsqueeze(1).expand(picked.shape)[picked]
    labels = None if batch.labels is None else batch.labels.unsqueeze(1).expand(picked.shape)[picked]
    gaps = torch.zeros(len(rows), 1)
    return SequenceBatch(batch.frames[picked].unsqueeze(1), torch.ones_like(rows), rows, labels, gaps=gaps)

"""What an exported model must pass before it is kept: shapes in a fresh process, then the validation split."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import Split
from videogru.data.manifests.corpus import Corpus
from videogru.errors import DataError, GateRefused
from videogru.export.subprocess_run import Arrays, ReplayFailed, replay
from videogru.inference.evaluation import evaluate
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Classifier
from videogru.sequence import SequenceBatch

# (clips, steps) that an export is asked for, none of them the one it was traced with.
SHAPES = ((1, 7), (3, 4), (2, 1), (4, 11), (1, 32))
# Largest difference of a probability from PyTorch's. Rounded weights move probabilities near a boundary between
# classes far; whether that costs accuracy is for the validation split to say.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.3}
# The same on average over all classes and clips.
MEAN_TOLERANCE = {"fp32": 1e-5, "fp16": 0.01, "int8": 0.05}
# What padding may change: in float32 nothing but the order of sums; below, a value may round the other way.
PADDING_TOLERANCE = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.05}

_RESAMPLES = 100  # of intervals, which are not used here


@dataclass(frozen=True, slots=True)
class Checked:
    """Figures of the checks: differences of probabilities, and scores on a split in 0..1.

    auroc: nan where only one class occurs; flips: samples of another class than PyTorch's.
    """

    shapes: tuple[tuple[int, int], ...]
    largest_difference: float
    mean_difference: float
    padding_difference: float
    split: Split
    samples: int
    flips: int
    accuracy: float
    accuracy_of_pytorch: float
    auroc: float
    auroc_of_pytorch: float

    @property
    def drop_points(self) -> float:
        """Percentage points of accuracy that are lost."""
        return 100 * (self.accuracy_of_pytorch - self.accuracy)

    @property
    def auroc_drop(self) -> float:
        """AUROC that is lost."""
        return self.auroc_of_pytorch - self.auroc

    def to_dict(self) -> dict[str, Any]:
        """Plain values for card.json; what is not a number becomes None."""
        content = asdict(self) | {"accuracy_drop_points": self.drop_points, "auroc_drop": self.auroc_drop}
        return {key: None if value != value else value for key, value in content.items()}


def cases_of(
    clips: Sequence[SequenceBatch], uses_gaps: bool, shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[Arrays]:
    """Real clips, repeated or cut to each of `shapes`; of several clips all but the first are padded with noise."""
    cases = []
    draw = np.random.default_rng(0)
    frames = [batch.frames[i, : int(batch.lengths[i])].numpy() for batch in clips for i in range(len(batch))]
    for count, steps in shapes:
        chosen = [frames[(count + place) % len(frames)] for place in range(count)]
        made = np.stack([clip[np.arange(steps) % len(clip)] for clip in chosen])
        lengths = np.array([max(1, steps - 2 * place) for place in range(count)], dtype=np.int64)
        for place, length in enumerate(lengths):
            # What padding holds must not matter, so it holds something.
            made[place, length:] = draw.permutation(made[place, length:].ravel()).reshape(made[place, length:].shape)
        case: Arrays = {"frames": made, "lengths": lengths}
        if uses_gaps:
            gaps = draw.uniform(0.5, 2, (count, steps)).astype(np.float32)
            gaps[:, 0] = 0
            gaps[np.arange(steps) >= lengths[:, None]] = 0
            case["gaps"] = gaps
        cases.append(case)
    return cases


def answers_of(classifier: Classifier, cases: Sequence[Arrays]) -> list[NDArray[np.float32]]:
    """Probabilities (B K) that PyTorch gives to each case, on the CPU in float32."""
    said = []
    with torch.inference_mode():
        for case in cases:
            tensors = {name: torch.from_numpy(array) for name, array in case.items()}
            said.append(classifier(**tensors).softmax(dim=-1).numpy())
    return said


def check_shapes(folder: Path, classifier: Classifier, cases: Sequence[Arrays], precision: str) -> tuple[float, ...]:
    """Largest and mean difference from PyTorch, and what padding changes, in a fresh process.

    Raises GateRefused where the export cannot take a shape or answers otherwise.
    """
    alone = [(n, place) for n, case in enumerate(cases) for place in (0, -1) if len(case["lengths"]) > 1]
    try:
        answered = [
            said["probabilities"] for said in replay(folder, [*cases, *(_alone(cases[n], k) for n, k in alone)])
        ]
    except ReplayFailed as error:
        raise _refused(f"it does not run in a fresh process at {_shapes(cases)}: {error}") from error
    wanted = answers_of(classifier, cases)
    for case, said, meant in zip(cases, answered, wanted, strict=False):
        if said.shape != meant.shape or not np.isfinite(said).all():
            raise _refused(f"it answers {said.shape} with {case['frames'].shape[:2]} clips and steps")
    differences = [np.abs(said - meant) for said, meant in zip(answered, wanted, strict=False)]
    largest = float(max(one.max() for one in differences))
    mean = float(np.concatenate([one.ravel() for one in differences]).mean())
    if largest > TOLERANCE[precision] or mean > MEAN_TOLERANCE[precision]:
        raise _refused(
            f"its probabilities differ from PyTorch's by up to {largest:.2g} ({mean:.2g} on average) at "
            f"{_shapes(cases)}; allowed are {TOLERANCE[precision]:g} and {MEAN_TOLERANCE[precision]:g}"
        )
    apart = zip(answered[len(cases) :], alone, strict=True)
    padding = max((float(np.abs(one[0] - answered[n][place]).max()) for one, (n, place) in apart), default=0.0)
    if padding > PADDING_TOLERANCE[precision]:
        raise _refused(f"padding changes its probabilities by up to {padding:.2g}")
    return largest, mean, padding


def _alone(case: Arrays, place: int) -> Arrays:
    """One clip of a case without its padding."""
    length = int(case["lengths"][place])
    return {name: array[[place]] if name == "lengths" else array[[place], :length] for name, array in case.items()}


def split_to_check(corpus: Corpus) -> Split:
    """val, else test, as data sets such as CIFAR-100 come without val. Raises DataError where both are empty."""
    for split in ("val", "test"):
        if len(corpus.manifest.rows(split)):
            return split
    raise DataError("an export is compared on the split val or test, and this data set has neither", where=corpus.name)


def check_split(
    predictor: Predictor,
    exported: Predictor,
    corpus: Corpus,
    *,
    split: Split,
    batch_size: int,
    num_workers: int | None,
    max_drop: float,
    precision: str,
) -> dict[str, Any]:
    """Scores of both on a split. Raises GateRefused where the export loses too much.

    fp32: every sample must get the same class; otherwise accuracy may fall by `max_drop` percentage points. Raises
    DataError where no row has a label or can be read.
    """
    rows = corpus.manifest.rows(split)
    reading = {"batch_size": batch_size, "num_workers": num_workers}
    said, wanted = (one.predict(corpus, rows, **reading) for one in (exported, predictor))  # type: ignore[arg-type]
    flips = int((said.predicted != wanted.predicted).sum())
    judged, judged_wanted = (evaluate(one, resamples=_RESAMPLES) for one in (said, wanted))
    scores: dict[str, Any] = {
        "split": split,
        "samples": judged.evaluated,
        "flips": flips,
        "accuracy": judged.metrics["top1"].value,
        "accuracy_of_pytorch": judged_wanted.metrics["top1"].value,
        "auroc": judged.metrics["auroc"].value,
        "auroc_of_pytorch": judged_wanted.metrics["auroc"].value,
    }
    if judged.failed != judged_wanted.failed:
        raise _refused(f"{judged.failed} {split} samples fail, {judged_wanted.failed} do in PyTorch")
    if precision == "fp32" and flips:
        raise _refused(f"{flips} of {len(rows)} {split} samples get another class than from PyTorch")
    drop = 100 * (scores["accuracy_of_pytorch"] - scores["accuracy"])
    if drop > max_drop:
        raise GateRefused(
            f"refused: accuracy on {judged.evaluated} {split} samples falls by {drop:.2f} points, from "
            f"{scores['accuracy_of_pytorch']:.4f} to {scores['accuracy']:.4f}; allowed are {max_drop:g}, "
            f"and one sample is {100 / judged.evaluated:.2f}",
            hint="Nothing was written. Use --precision fp16, or allow more with --max-drop.",
        )
    return scores


def _shapes(cases: Sequence[Arrays]) -> str:
    shown = ", ".join("x".join(map(str, case["frames"].shape[:2])) for case in cases)
    return f"(clips x steps) {shown}"


def _refused(why: str) -> GateRefused:
    return GateRefused(f"refused: {why}", hint="Nothing was written.")

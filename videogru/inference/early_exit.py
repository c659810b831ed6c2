"""When a causal model may answer before the end of a video: how sure it must be, for a risk that is promised.

Reading stops at the first step whose confidence, the largest probability, lies above a threshold; the last step answers
in any case. The risk is how often that answer differs from the one at the end of the same video. It needs no labels.
That is the early exit of deep nets with prediction consistency under risk control (Schuster et al. 2021,
arXiv:2104.08803; Jazbec et al. 2024, arXiv:2405.20915), with steps of a video in the place of layers.

The threshold for a risk is that of conformal risk control (Angelopoulos et al. 2022, arXiv:2208.02814, theorem 1): the
lowest one with (changed + 1) / (clips + 1) <= risk on held-out videos. For one more video of where these come from, the
expected risk is then no larger, whatever the model and the data are. The loss must not rise with the threshold, as
"another answer" may; so the worst at a threshold or any above it counts, as is proposed there. That makes one number of
a video, its `critical_confidence`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64

from videogru.checkpoint.model_file import (
    FORMAT_VERSION,
    ExitTable,
    ModelCard,
    find_model,
    read_card,
    read_model,
    write_model,
)
from videogru.config import Config, DataConfig, Split
from videogru.data.loading.batching import OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, DataError, ModelFileError
from videogru.inference.predictor import Predictor
from videogru.kinds import KINDS
from videogru.models.streaming import what_reads_ahead
from videogru.sequence import SequenceBatch

MAX_CLIPS = 2000  # promise risks down to 1 / 2001; more would only take time
MAX_THRESHOLDS = 1000
_BATCH = 8
_ANY_LENGTH = 100_000  # steps that data.sampling=dense reads of a video

Say = Callable[[str], None]


def critical_confidence(probabilities: Float64[np.ndarray, "T K"]) -> float:
    """The highest confidence at which some threshold stops a video for another answer than its last; 0: there is none.

    probabilities: (T, K), float64, after each step. Only a step that is surer than all before it can be the first above
    a threshold:

      step          1     2     3     4     5     6
      answer        a     b     a     b     b     b
      confidence   0.3   0.5   0.7   0.6   0.8   0.9
      can stop      x     x     x           x     x
      changed       x           x                         0.7: above it, no threshold changes the answer
    """
    confidences, answers = probabilities.max(axis=1), probabilities.argmax(axis=1)
    before = np.maximum.accumulate(np.concatenate(([0.0], confidences[:-1])))
    changed = (confidences > before) & (answers != answers[-1])
    return float(confidences[changed].max(initial=0.0))


def exit_table(critical: Float64[np.ndarray, " N"], *, dataset: str, split: Split) -> ExitTable:
    """For each threshold of which there is any use, how many videos it may change; critical: (N,), one per video.

    Of more than MAX_THRESHOLDS some are left out, evenly; what stays, holds.
    """
    thresholds = np.unique(np.concatenate(([0.0], critical)))
    places = np.linspace(0, len(thresholds) - 1, min(len(thresholds), MAX_THRESHOLDS)).round().astype(np.int64)
    thresholds = thresholds[places]
    changed = len(critical) - np.searchsorted(np.sort(critical), thresholds, side="right")
    return ExitTable(
        dataset=dataset,
        split=split,
        clips=len(critical),
        thresholds=tuple(thresholds.tolist()),
        changed=tuple(changed.tolist()),
    )


def threshold_for(table: ExitTable, risk: float) -> float:
    """The confidence above which reading may stop, for a risk in (0, 1).

    Raises ConfigError where so few videos promise no such risk.
    """
    promised = (np.array(table.changed) + 1) / (table.clips + 1)
    kept = np.flatnonzero(promised <= risk)
    if not len(kept):
        count = np.ceil(1 / risk - 1e-9) - 1
        needed = f"{count:,.0f}" if count < 1e9 else f"{count:.0e}"
        raise ConfigError(
            f"the model was calibrated on {table.clips:,} videos, which promise no risk below {least_risk(table):g}",
            where=f"--exit-risk {risk:g}",
            hint=f"Give --exit-risk {least_risk(table):g}, or calibrate on {needed} videos or more: "
            "videogru model calibrate --help",
        )
    return table.thresholds[int(kept[0])]


def least_risk(table: ExitTable) -> float:
    """1 / (clips + 1), the smallest that can be asked for, rounded up to two digits."""
    risk = 1 / (table.clips + 1)
    unit = 10.0 ** (np.floor(np.log10(risk)) - 1)
    return float(f"{np.ceil(risk / unit - 1e-9) * unit:.3g}")


def exit_rows(corpus: Corpus, split: Split) -> Int64[np.ndarray, " N"]:
    """The rows of a split that are read to calibrate: one of each group, as its rows are no independent examples; at
    most MAX_CLIPS, in an order drawn from a fixed seed.
    """
    rows = np.random.default_rng(0).permutation(corpus.training_rows(split))
    groups = corpus.manifest.groups[rows].codes
    return np.asarray(rows[np.sort(np.unique(groups, return_index=True)[1])][:MAX_CLIPS], np.int64)


def check_exits(card: ModelCard, corpus: Corpus, split: Split) -> None:
    """Raises ConfigError where a stream of this model has no answer at the end of such videos, or there are none."""
    if not KINDS[card.kind].has_times:
        raise ConfigError(f"this model reads {KINDS[card.kind].plural}, and streams are of videos")
    obstacle = what_reads_ahead(card.model)
    if obstacle is not None:
        raise ConfigError(
            f"{obstacle} needs frames to come, so there is nothing to stop early",
            hint="Train with --set model.temporal=causal (and model.frame_differences none or past).",
        )
    rows = corpus.training_rows(split)
    if not len(rows):
        raise ConfigError(f"no rows in the split {split}, which would be read to calibrate", where=corpus.name)
    if card.window_seconds or not np.isnan(corpus.manifest.start_seconds[rows]).all():
        raise ConfigError(
            "windows of videos (start_seconds, end_seconds) have answers of their own, and a stream reads whole videos",
            where=corpus.name,
            hint="Train and calibrate on whole videos: a table without these two columns.",
        )


def stepwise(predictor: Predictor, batch: SequenceBatch) -> list[Float64[np.ndarray, "T K"]]:
    """Probabilities after each frame of each video of a batch, as `stream` gives them."""
    assert batch.gaps is not None, "loaded clips have gaps"
    state, said = predictor.initial_state(len(batch)), []
    for step in range(batch.frames.shape[1]):
        answer, state = predictor.step(batch.frames[:, step], state, batch.gaps[:, step])
        said.append(answer)
    probabilities = torch.stack(said, dim=1).numpy()
    return [rows[:length] for rows, length in zip(probabilities, batch.lengths.tolist(), strict=True)]


def critical_confidences(
    predictor: Predictor,
    corpus: Corpus,
    rows: Int64[np.ndarray, " N"],
    *,
    num_workers: int | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Float64[np.ndarray, " M"], list[str]]:
    """(M,) of the videos that can be read, and the reasons why the others cannot; each is read to its end.

    num_workers, tick: as of `Predictor.predict`.
    """
    data = data_of_streams(predictor.data)
    # Videos of any length are read one by one, to be held one by one.
    size = _BATCH if data.sampling in ("random", "uniform") else 1
    workers = default_workers(corpus, num_workers, rows=len(rows))
    found: list[float] = []
    failed: list[str] = []
    for loaded in ClipLoader(
        ClipDataset(corpus, data=data), OrderedBatches(rows, batch_size=size), num_workers=workers
    ):
        failed += [reason for _, reason in loaded.failures]
        if loaded.batch is not None:
            said = stepwise(predictor, loaded.batch)
            for row, probabilities in zip(loaded.batch.indices.tolist(), said, strict=True):
                if np.isfinite(probabilities).all():
                    found.append(critical_confidence(probabilities))
                else:
                    failed.append(f"{corpus.manifest.sources[row]}: the model gives no finite score")
        tick(len(loaded.failures) + (0 if loaded.batch is None else len(loaded.batch)))
    return np.array(found, np.float64), failed


def data_of_streams(data: DataConfig) -> DataConfig:
    """The settings with which a clip has the frames that `stream` reads of the whole file."""
    update: dict[str, object] = {"decoder": "auto", "cache": "none" if data.cache == "jpeg" else data.cache}
    if data.sampling == "dense":
        update["num_frames"] = _ANY_LENGTH
    return data.model_copy(update=update)


def calibrate(
    model: Path,
    corpus: Corpus,
    data: DataConfig,
    *,
    split: Split,
    device: str = "auto",
    num_workers: int | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[ExitTable, list[str]]:
    """Write into a model file how sure it must be to stop early; returns that, and why some videos were not read.

    data: how they are read; split: rows that the model was not trained on. Weights and all else stay. Raises what
    `check_exits` raises, DataError where no video can be read, ModelFileError and VideogruError of the file.
    """
    model = find_model(model)
    check_exits(read_card(model), corpus, split)
    predictor = Predictor.from_file(model, device=device, data=data)
    rows = exit_rows(corpus, split)
    critical, failed = critical_confidences(predictor, corpus, rows, num_workers=num_workers, tick=tick)
    if not len(critical):
        raise DataError(f"none of {len(rows)} videos can be read: {failed[0]}", where=corpus.name)
    table = exit_table(critical, dataset=corpus.name, split=split)
    classifier, card = read_model(model)
    write_model(model, classifier, card.model_copy(update={"exits": table, "format_version": FORMAT_VERSION}))
    return table, failed


def calibrate_trained(model: Path, config: Config, corpus: Corpus, *, say: Say) -> None:
    """The same at the end of a training, on its validation rows, where the model can stream; why not is said."""
    card = read_card(model)
    if not KINDS[card.kind].has_times or what_reads_ahead(card.model) is not None:
        return
    began = time.monotonic()
    try:
        workers = config.train.num_workers
        table, failed = calibrate(model, corpus, config.data, split="val", num_workers=workers)
    except (ConfigError, DataError) as error:
        say(f"note: when to stop a stream early is not known (--exit-risk): {error}")
        return
    say(f"{told(table, failed)}, in {time.monotonic() - began:.0f} s")


def told(table: ExitTable, failed: list[str]) -> str:
    """What was calibrated, in a line."""
    unread = f" ({len(failed)} could not be read)" if failed else ""
    return (
        f"stream --exit-risk: calibrated on {table.clips:,} {table.split} videos{unread}, "
        f"for {least_risk(table):g} and above"
    )


def known_exits(card: ModelCard, model: Path) -> ExitTable:
    """The table of a model. Raises ModelFileError where it has none, with the command that makes it."""
    if card.exits is not None:
        return card.exits
    run = model.parent if (model.parent / "config.yaml").is_file() else model
    raise ModelFileError(
        "the model does not know how sure it must be to stop early: it was not calibrated",
        where=model,
        hint=f"videogru model calibrate {run}",
    )

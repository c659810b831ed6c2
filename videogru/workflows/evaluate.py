"""A trained model on the rows of a split: predictions, metrics, the report; what `eval` and `probe` do.

Runs, model files and exports are opened here with the data they were trained on, or with others.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from videogru.checkpoint.model_file import find_model, read_card
from videogru.config import SPLITS, Config, DataConfig, Split
from videogru.data.clips.views import ONE_VIEW, Views, check_views
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.feature_store import FeatureRows
from videogru.data.manifests.bids import is_bids
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.errors import ConfigError, DataError, ModelFileError
from videogru.inference.evaluation import Evaluation, evaluate
from videogru.inference.order_test import Probe, probe
from videogru.inference.predictions import Predictions, read_csv
from videogru.inference.predictor import Predictor
from videogru.inference.report.report import read_curves, write_report
from videogru.kinds import KINDS
from videogru.runtime.export_folder import is_exported
from videogru.training.fit import Trained
from videogru.workflows.run_folder import check_splits, note_on_training, run_config

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a command leaves; evaluations by split."""

    run: Path
    evaluations: dict[str, Evaluation]
    report: Path | None
    trained: Trained | None = None


def assess(
    model: Path,
    config: Config,
    corpus: Corpus,
    run: Path,
    *,
    splits: list[Split],
    commands: list[str],
    device: str = "auto",
    views: Views = ONE_VIEW,
    features: FeatureRows | None = None,
    say: Say,
) -> Outcome:
    """Predict the splits, write predictions, evaluations and the report (of the last split) into `run`.

    commands: what repeats this, for the report; features: of the rows, read in place of their sources. Raises
    DataError where the corpus has classes that the model does not know, or a split has no rows; a split without one
    usable row is told and left out, unless it is the only one.
    """
    # JPEG is near the file's frames, but what is reported must be what `infer` says of the file.
    cache = "none" if config.data.cache == "jpeg" else config.data.cache
    data = config.data.model_copy(update={"cache": cache})
    predictor = Predictor.from_file(model, device=device, data=data, features=features)
    corpus = with_classes_of(corpus, predictor.card.classes, model)
    predictions: dict[str, Predictions] = {}
    evaluations: dict[str, Evaluation] = {}
    for split in splits:
        rows = corpus.manifest.rows(split)
        if not len(rows):
            raise _no_rows(corpus, split)
        written = run / f"predictions-{split}.csv"
        predictor.predict(
            corpus, rows, batch_size=config.train.batch_size, num_workers=config.train.num_workers, views=views
        ).write_csv(written)
        # What is reported is what was written.
        said = read_csv(written)
        try:
            evaluations[split] = evaluate(said)
        except DataError as error:
            if len(splits) == 1:
                raise
            say(f"{split}: {error}")
            continue
        predictions[split] = said
        evaluations[split].to_json(run / f"evaluation-{split}.json")
        if evaluations[split].failed:
            say(f"{split}: {evaluations[split].failed} of {evaluations[split].total} could not be read; see {written}")
    if not evaluations:
        say("no validation or test rows: nothing to evaluate")
        return Outcome(run, {}, None)
    last = list(evaluations)[-1]
    report = write_report(
        run,
        title=f"{corpus.name}: {config.model.encoder} + {config.model.cell}, {last} split",
        evaluation=evaluations[last],
        predictions=predictions[last],
        curves=read_curves(run / "metrics.csv") if (run / "metrics.csv").is_file() else [],
        config_yaml=config.to_yaml(),
        strips=lambda i: _strip(corpus, predictor.data, int(predictions[last].rows[i])),
        facts=_facts(predictor, model, corpus, evaluations, last),
        commands=[*commands, command_line("infer", KINDS[corpus.kind].example_file, "--model", model)],
        step_name=KINDS[corpus.kind].steps,
    )
    return Outcome(run, evaluations, report)


def with_classes_of(corpus: Corpus, classes: tuple[str, ...], model: Path) -> Corpus:
    """The corpus with labels in the model's class order; it may lack classes, but not have others."""
    strangers = tuple(name for name in corpus.classes if name not in classes)
    if strangers:
        raise DataError(
            f"the model does not know the classes {_some(strangers)}; it knows {_some(classes)}",
            where=model,
            hint="Evaluate a model on the data set it was trained for, or name the labels as the model does.",
        )
    # The last entry serves the label -1, unknown.
    codes = np.array([*(classes.index(name) for name in corpus.classes), -1], dtype=np.int64)
    manifest = replace(corpus.manifest, classes=classes, labels=codes[corpus.manifest.labels])
    return replace(corpus, classes=classes, manifest=manifest)


def _facts(
    predictor: Predictor, model: Path, corpus: Corpus, evaluations: dict[str, Evaluation], shown: str
) -> dict[str, str]:
    facts: dict[str, str] = {}
    if not is_exported(model):
        parts = predictor.classifier.describe()
        facts |= {f"{part} parameters": f"{count:,}" for part, count in parts.items() if part != "steps_per_frame"}
        facts["steps per frame"] = str(parts["steps_per_frame"])
    facts |= {"data set": corpus.name, "kind": corpus.kind}
    facts |= {f"rows in {split}": f"{len(corpus.manifest.rows(split)):,}" for split in SPLITS}
    for split, evaluation in evaluations.items():
        if split != shown:
            name, value, between = evaluation.summary_rows()[0]
            facts[f"{name} on {split}"] = f"{value} ({between})"
    kept = predictor.card.metrics
    if "epoch" in kept:
        facts["kept epoch"] = str(int(kept["epoch"]) + 1)
    names = {"val_auroc": "validation AUROC", "val_accuracy": "validation accuracy", "val_loss": "validation loss"}
    facts |= {f"{name}, while training": f"{kept[key]:.3f}" for key, name in names.items() if key in kept}
    return facts


def command_line(*words: object) -> str:
    """What a user types for this, quoted where a shell needs it."""
    return shlex.join(["videogru", *map(str, words)])


def evaluate_run(
    path: Path,
    *,
    split: Split,
    dataset: str | None,
    data_dir: Path | None,
    views: Views,
    device: str,
    out: Path | None,
    say: Say,
) -> Outcome:
    """Evaluate a run or a model file on a split; results go to `out`, else into the run (or beside the model).

    views: clips times crops of each source, whose probabilities are averaged.
    """
    model, settings, corpus = open_run(path, dataset=dataset, data_dir=data_dir)
    if dataset is not None and out is None:
        raise ConfigError("results on another data set do not belong into the run", hint="Name a folder: --out FOLDER")
    check_views(views, settings.data.for_kind(corpus.kind), corpus.kind)
    run = path if path.is_dir() else path.parent
    # The run's own files and report are those of the test split, or of val where there is none.
    usual = "test" if len(corpus.manifest.rows("test")) else "val"
    plain = split == usual and views == ONE_VIEW and not is_exported(path)
    suffix = "" if views == ONE_VIEW else f"-{views[0]}x{views[1]}"
    target = out or (run if plain else run / f"eval-{split}{suffix}")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the output folder cannot be made: {error}", where=target) from error
    words: list[object] = ["eval", path, "--split", split]
    words += [] if views == ONE_VIEW else ["--views", suffix[1:]]
    for flag, value in (("--dataset", dataset), ("--data-dir", data_dir), ("--out", out)):
        words += [] if value is None else [flag, value]
    commands = [command_line(*words)]
    if dataset is not None and (note := note_on_training(run, corpus, split)):
        say(note)
    return assess(
        model, settings, corpus, target, splits=[split], commands=commands, device=device, views=views, say=say
    )


def open_run(path: Path, *, dataset: str | None, data_dir: Path | None) -> tuple[Path, Config, Corpus]:
    """Model, settings and data of a run folder, model file or export; `dataset` names another data set than its own."""
    model = find_model(path)
    card = read_card(model)
    run = path if path.is_dir() else path.parent
    saved = run / "config.yaml"
    settings = run_config(run) if saved.is_file() else Config(data=card.data, model=card.model)
    update: dict[str, object] = {}
    if dataset is not None:
        update = {"dataset": dataset, "data_dir": None}
        if not is_bids(Path(dataset)):
            update |= {"suffix": None, "label_column": None}
    if data_dir is not None:
        update["data_dir"] = data_dir
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=update)})
    corpus = open_corpus(settings.data, seed=settings.data.split_seed, for_training=dataset is None)
    if corpus.kind != card.kind:
        raise ModelFileError(f"this model reads {card.kind}s, the data set holds {corpus.kind}s", where=model)
    if dataset is None and saved.is_file():
        check_splits(corpus, run)
    return model, settings, corpus


def probe_run(path: Path, *, split: Split, data_dir: Path | None, device: str, say: Say) -> Probe:
    """Whether the model of a run uses the order of its steps; also written to probe-<split>.json in the run."""
    model, settings, corpus = open_run(path, dataset=None, data_dir=data_dir)
    predictor = Predictor.from_file(model, device=device, data=settings.data)
    corpus = with_classes_of(corpus, predictor.card.classes, model)
    rows = corpus.manifest.rows(split)
    if not len(rows):
        raise _no_rows(corpus, split)
    say(f"probing {model} on {len(rows)} {split} rows of {corpus.name}")
    train = settings.train
    found = probe(predictor, corpus, rows, batch_size=train.batch_size, num_workers=train.num_workers, seed=train.seed)
    written = (model if is_exported(model) else model.parent) / f"probe-{split}.json"
    found.to_json(written)
    say(f"written to {written}")
    return found


def _no_rows(corpus: Corpus, split: Split) -> DataError:
    filled = [name for name in SPLITS if len(corpus.manifest.rows(name))]
    return DataError(f"no rows in the split {split}", where=corpus.name, hint=f"Use --split {' or '.join(filled)}.")


def _strip(corpus: Corpus, data: DataConfig, row: int) -> np.ndarray | None:
    """Frames of a row for the report, (T H W 3) uint8; None where it cannot be read."""
    loaded = ClipDataset(corpus, data=data).__getitems__([(0, row)])
    if loaded.batch is None:
        return None
    frames = loaded.batch.frames[0]
    if frames.is_floating_point():
        frames = (frames * 255).round()
    if frames.shape[1] != 3 or data.slab != 1:
        frames = frames[:, [frames.shape[1] // 2]]  # of a slab the slice itself
    return frames.byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def _some(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:4])
    return shown if len(classes) <= 4 else f"{shown}, ... ({len(classes)} in all)"

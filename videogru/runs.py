"""The run folder: made, trained, evaluated and reported on.

config.yaml · splits.csv · metrics.csv · tensorboard/ · last.ckpt · model.safetensors · predictions-SPLIT.csv ·
evaluation-SPLIT.json · bad_files.csv · report.html
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from videogru.checking.skipping import bad_rows
from videogru.config import SPLITS, Config, DataConfig, Kind, Split
from videogru.data.bids import is_bids
from videogru.data.cache import check_cache
from videogru.data.card import load_card
from videogru.data.dataset import ClipDataset
from videogru.data.describe import describe_corpus
from videogru.data.feature_store import FeatureRows
from videogru.data.layouts import Corpus, open_corpus
from videogru.data.video import check_decoder
from videogru.data.views import ONE_VIEW, Views, check_views
from videogru.encoded import settings_over_features
from videogru.errors import ConfigError, DataError, ModelFileError
from videogru.exported.folder import is_exported
from videogru.inference.early_exit import calibrate_trained
from videogru.inference.evaluate import Evaluation, evaluate
from videogru.inference.predict import Predictor
from videogru.inference.predictions import Predictions, read_csv
from videogru.inference.probe import Probe, probe
from videogru.inference.report import read_curves, write_report
from videogru.modelfile import find_model, read_card
from videogru.resources import card_names, recipe_path, resource_dir
from videogru.runfolder import (
    begun_run,
    check_names,
    check_same_rows,
    check_splits,
    note_on_training,
    remove_unfinished,
    run_config,
)
from videogru.settings import parse_assignments, read_settings_file, resolve_config
from videogru.training.callbacks import rows_left_out
from videogru.training.fit import Trained, fit, trainable_classifier
from videogru.training.processes import Group, check_gpus, is_started, joined, this_group
from videogru.training.state import STATE_FILE

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a command leaves; evaluations by split."""

    run: Path
    evaluations: dict[str, Evaluation]
    report: Path | None
    trained: Trained | None = None


def settings_for_training(name: str | None, flags: Mapping[str, Any], assigned: Mapping[str, Any]) -> Config:
    """Defaults < recipe of the data set < --config (a file, or a recipe's name) < flags < --set.

    With train.features the settings of the features stand in place of defaults and recipe.

    Raises ConfigError where no data set is named, or a key or value does not hold.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if name is not None:
        path = Path(name)
        if not path.suffix and not path.exists():
            found = recipe_path(name)
            if found is None:
                recipes = sorted(p.stem for p in resource_dir("configs").glob("*.yaml"))
                raise ConfigError(f"no recipe {name!r}", hint=f"Recipes: {', '.join(recipes)}; or name a file")
            path = found
        layers.append((str(path), read_settings_file(path)))
    top = [*layers, ("flags", flags), ("--set", assigned)]
    if (features := resolve_config(*top).train.features) is not None:
        return settings_over_features(features, top)
    dataset = resolve_config(*top).data.dataset
    if not dataset:
        raise ConfigError(
            "no data set named", hint="Example: videogru train --dataset adrenalmnist3d   (see videogru data list)"
        )
    recipe = recipe_path(dataset) if dataset in card_names() else None
    recipe = recipe or recipe_path(_kind(resolve_config(*top).data))
    base = [(str(recipe), read_settings_file(recipe))] if recipe else []
    return resolve_config(*base, *top)


def _kind(data: DataConfig) -> str:
    if data.dataset in card_names():
        return load_card(data.dataset).kind
    return open_corpus(data, seed=data.split_seed, for_training=False).kind


def train(config: Config, *, out: Path | None, progress: bool, say: Say) -> Outcome:
    """Train, evaluate and report into a new run folder.

    As one of several processes (torchrun, --devices): all train, the first writes, evaluates and says, and the others'
    outcome has the run alone.
    """
    with joined(this_group(config.train)) as group:
        say = say if group.is_first else _silent
        config, corpus = group.agreed(lambda: _prepared(config, group))
        check_same_rows(corpus, group)
        left_out, told = group.by_first(lambda: bad_rows(corpus, config.data))
        corpus = replace(corpus, left_out=left_out)
        for note in (*corpus.notes, *told):
            say(f"note: {note}")
        run = group.by_first(lambda: begun_run(config, corpus, out))
        counts = ", ".join(f"{len(corpus.manifest.rows(split))} {split}" for split in SPLITS)
        say(f"{corpus.name}: {corpus.kind}s, {len(corpus.classes)} classes, {counts}; run folder {run}")
        trained = fit(config, corpus, run, resume=False, progress=progress and group.is_first, say=say, group=group)
    return _assess_trained(trained, config, corpus, run, say=say) if group.is_first else Outcome(run, {}, None)


def resume(run: Path, *, progress: bool, say: Say) -> Outcome:
    """Go on with an interrupted or killed run; it must find the data and as many processes as it began with.

    Where no state was saved yet it begins anew, where the training is finished it only evaluates.
    """
    with joined(this_group(run_config(run).train)) as group:
        say = say if group.is_first else _silent
        config = group.by_first(lambda: run_config(run))
        corpus = group.agreed(lambda: open_corpus(config.data, seed=config.data.split_seed))
        check_same_rows(corpus, group)
        group.by_first(lambda: check_splits(corpus, run))
        corpus = replace(corpus, left_out=group.by_first(lambda: rows_left_out(run)))
        saved = group.by_first((run / STATE_FILE).is_file)
        if group.is_first:
            remove_unfinished(run)
        if saved:
            say(f"going on with {run}, from its last saved step")
        else:
            say(f"no state was saved in {run} yet: beginning anew, with its settings")
        trained = fit(config, corpus, run, resume=saved, progress=progress and group.is_first, say=say, group=group)
    return _assess_trained(trained, config, corpus, run, say=say) if group.is_first else Outcome(run, {}, None)


def _silent(text: str) -> None:
    """What a process says that is not the first."""


def _prepared(config: Config, group: Group) -> tuple[Config, Corpus]:
    """The settings with what data and processes decide, and the data; refuses what does not fit together."""
    corpus = open_corpus(config.data, seed=config.data.split_seed)
    config.data.check_read(corpus.kind)
    processes = {"devices": group.local_world, "nodes": group.nodes}
    train = config.train.model_copy(update=processes)
    config = config.model_copy(update={"data": config.data.for_kind(corpus.kind), "train": train})
    # Settings that do not fit together must not leave a run folder behind.
    trainable_classifier(config, corpus, processes=group.world)
    if corpus.kind == "video":
        check_decoder(config.data.decoder)
        check_cache(config.data)
    check_names(corpus)
    return config, corpus


def processes_to_start(config: Config) -> tuple[int, int] | None:
    """(devices, nodes) where the settings want several processes and nobody started them yet.

    Raises what all of them would raise before they train.
    """
    devices, nodes = config.train.devices, config.train.nodes
    if devices * nodes == 1 or is_started():
        return None
    check_gpus(devices)
    _prepared(config, Group(world=devices * nodes, local_world=devices))
    return devices, nodes


def _assess_trained(trained: Trained, config: Config, corpus: Corpus, run: Path, *, say: Say) -> Outcome:
    calibrate_trained(trained.model, config, corpus, say=say)
    labels = corpus.manifest.labels
    splits: list[Split] = [split for split in ("val", "test") if (labels[corpus.manifest.rows(split)] >= 0).any()]
    commands = [_typed("train", "--config", run / "config.yaml"), _typed("eval", run)]
    read = trained.features
    outcome = assess(trained.model, config, corpus, run, splits=splits, commands=commands, features=read, say=say)
    return Outcome(run, outcome.evaluations, outcome.report, trained)


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
        commands=[*commands, _typed("infer", _EXAMPLE[corpus.kind], "--model", model)],
        step_name={"video": "frames", "volume": "slices", "image": "image"}[corpus.kind],
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


_EXAMPLE: dict[Kind, str] = {"video": "clip.mp4", "volume": "scan.nii.gz", "image": "picture.png"}


def _typed(*words: object) -> str:
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
    commands = [_typed(*words)]
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


def describe(name: str, data_dir: Path | None, assignments: list[str]) -> dict[str, Any]:
    """What `videogru data info` shows of a data set."""
    flags = {"data.dataset": name, "data.data_dir": None if data_dir is None else str(data_dir)}
    settings = settings_for_training(None, flags, parse_assignments(assignments))
    corpus = open_corpus(settings.data, seed=settings.data.split_seed)
    settings.data.check_read(corpus.kind)
    return describe_corpus(corpus, data=settings.data.for_kind(corpus.kind))

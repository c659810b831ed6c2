"""A run: its settings, its folder, trained or gone on with, then assessed.

config.yaml · splits.csv · metrics.csv · tensorboard/ · last.ckpt · model.safetensors · predictions-SPLIT.csv ·
evaluation-SPLIT.json · bad_files.csv · report.html
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from videogru.config import SPLITS, Config, DataConfig, Split
from videogru.data.loading.frame_cache import check_cache
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.readers.video.open import check_decoder
from videogru.data_check.excluded_rows import bad_rows
from videogru.inference.early_exit import calibrate_trained
from videogru.training.callbacks import rows_left_out
from videogru.training.fit import Trained, fit, trainable_classifier
from videogru.training.processes import Group, check_gpus, is_started, joined, this_group
from videogru.training.state import STATE_FILE
from videogru.workflows.evaluate import Outcome, assess, command_line
from videogru.workflows.run_folder import (
    begun_run,
    check_names,
    check_same_rows,
    check_splits,
    remove_unfinished,
    run_config,
)

Say = Callable[[str], None]
_SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)


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
        for note in (*corpus.notes, *told, *_note_on_mirrors(config.data, corpus)):
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


def _note_on_mirrors(data: DataConfig, corpus: Corpus) -> list[str]:
    """A flip gives clips of one side to the other's class; names of classes are all that can tell."""
    sides = [name for name in corpus.classes if _SIDE.search(name)]
    mirrored = data.augment.flip and (corpus.kind != "volume" or "x" in data.augment.flip_axes)
    if not sides or not mirrored:
        return []
    others = data.augment.flip_axes.replace("x", "") if corpus.kind == "volume" else ""
    less = f"flip_axes={others}" if others else "flip=0"
    told = " and ".join(map(repr, sides[:2]))
    return [f"training mirrors left and right, as if {told} were no sides; if they are: --set data.augment.{less}"]


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
    commands = [command_line("train", "--config", run / "config.yaml"), command_line("eval", run)]
    read = trained.features
    outcome = assess(trained.model, config, corpus, run, splits=splits, commands=commands, features=read, say=say)
    return Outcome(run, outcome.evaluations, outcome.report, trained)

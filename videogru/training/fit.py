"""One training, from a corpus and a config to a model file."""

import inspect
import logging
import os
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from videogru.checkpoint.golden_sample import add_golden_sample
from videogru.checkpoint.model_file import MODEL_FILE_NAME, ModelCard, TeacherFacts, make_card, write_model
from videogru.config import SPLITS, Config
from videogru.data.loading.batching import EpochBatches
from videogru.data.loading.datamodule import CorpusModule
from videogru.data.loading.feature_store import FeatureRows
from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, DataError, Interrupted
from videogru.kinds import KINDS
from videogru.models.classifier import Classifier
from videogru.training.averaging import weight_average
from videogru.training.callbacks import BadFiles, Scores, StepNews
from videogru.training.compiling import check_compiles
from videogru.training.features import classifier_over, features_of, open_features
from videogru.training.groups import muon_groups
from videogru.training.memory import keep_freed_memory
from videogru.training.norms import share_norms
from videogru.training.processes import ALONE, Group
from videogru.training.state import STATE_FILE, SaveState, StateFile, load_classifier, read_state
from videogru.training.task import SequenceTask
from videogru.training.teacher import (
    Teacher,
    TeachFirst,
    gives_same_frames,
    projection_of,
    read_teacher,
    teacher_facts,
)

# Of ImageNet for color; gray volumes arrive in 0..1 with much background.
_COLOR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GRAY = ((0.25,), (0.25,))


@dataclass(frozen=True)
class Trained:
    """What a training ends with.

    best: scores of the kept epoch, empty where the last epoch was kept; features: what it read in place of sources.
    """

    model: Path
    best: dict[str, float]
    epochs: int
    seconds: float
    bad_files: int
    features: FeatureRows | None = None


def build_classifier(config: Config, num_classes: int) -> Classifier:
    """A fresh classifier for a resolved config, its weights drawn from config.train.seed."""
    channels = config.data.channels
    assert channels is not None, "resolve DataConfig.for_kind first"
    # The channels of a slab are gray, three of them too.
    color = channels == 3 and config.data.slab == 1
    mean, std = _COLOR if color else (_GRAY[0] * channels, _GRAY[1] * channels)
    torch.manual_seed(config.train.seed)
    return Classifier(
        config.model,
        in_channels=channels,
        frame_size=config.data.frame_size,
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def trainable_classifier(config: Config, corpus: Corpus, *, processes: int = 1) -> Classifier:
    """A fresh classifier, after all that can be refused before a run folder is made and an hour spent.

    Raises DataError where there are no training rows, ConfigError where the settings do not fit together, the data or
    the machine.
    """
    train = config.train
    rows = len(corpus.training_rows("train"))
    if not rows:
        raise DataError("no training rows", where=corpus.name)
    if rows < processes:
        raise ConfigError(
            f"{rows} training rows cannot be shared by {processes} processes",
            where="train.devices, train.nodes",
            hint="Train with fewer: --devices 1",
        )
    if train.early_stopping and not len(corpus.training_rows("val")):
        raise ConfigError(
            "train.early_stopping needs validation rows, and there are none",
            hint="Hold some out: --set data.val_fraction=0.1",
        )
    kind = KINDS[corpus.kind]
    if not kind.is_sequence and config.model.frame_differences != "none":
        raise ConfigError(
            "an image has one frame, so nothing changes in it",
            where="model.frame_differences",
            hint="Use model.frame_differences=none.",
        )
    if not kind.is_sequence and config.model.use_gaps:
        raise ConfigError("an image is one step, without gaps", where="model.use_gaps", hint="Leave it at false.")
    if train.features is None:
        classifier = build_classifier(config, len(corpus.classes))
    else:
        classifier = classifier_over(open_features(train.features), config, len(corpus.classes))
        read_features(config, corpus)
    if train.optimizer == "muon":
        muon_groups(classifier, train)
    if train.teacher is not None:
        teacher = read_teacher(config, corpus)
        if teacher.wants_states:
            projection_of(teacher, classifier, train.seed)
    if train.compile and processes > 1:
        raise ConfigError(
            "is not supported with several processes",
            where="train.compile",
            hint="Train without it (--set train.compile=false), or in one process.",
        )
    if train.compile:
        check_compiles(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    return classifier


def read_features(config: Config, corpus: Corpus) -> FeatureRows:
    """The features of all rows, which are trained, validated and scored on. Raises DataError where some are stale."""
    assert config.train.features is not None
    rows = np.concatenate([corpus.manifest.rows(split) for split in SPLITS])
    return features_of(open_features(config.train.features), corpus, rows)


def fit(
    config: Config,
    corpus: Corpus,
    run: Path,
    *,
    resume: bool,
    progress: bool,
    say: Callable[[str], None],
    group: Group = ALONE,
) -> Trained:
    """Train and leave model.safetensors, metrics.csv, last.ckpt and TensorBoard logs in `run`.

    config: resolved for the corpus's kind; resume: go on from last.ckpt; progress: draw a bar; group: the processes
    that all call this and train together, of which the first writes. Ctrl-C and SIGTERM save and raise Interrupted.
    Raises DataError where too many files are bad or the saved state cannot be used, and what `trainable_classifier`
    raises.
    """
    train = config.train
    rows = corpus.training_rows("train")
    random.seed(train.seed)
    np.random.seed(train.seed % 2**32)
    classifier = group.agreed(lambda: trainable_classifier(config, corpus, processes=group.world))
    features = None if train.features is None else group.agreed(lambda: read_features(config, corpus))
    teacher = None if train.teacher is None else group.agreed(lambda: read_teacher(config, corpus, say=say))
    if train.gradient_checkpointing:
        classifier.use_checkpointing(train.checkpoint_steps)
    if group.world > 1:
        share_norms(classifier)
    steps = len(EpochBatches(rows, batch_size=train.batch_size, seed=0, epoch=lambda: 0, world=group.world))
    sources = corpus.manifest.sources
    limit = config.data.max_bad
    left_out, writes = corpus.left_out, group.is_first
    bad = BadFiles(run, lambda row: str(sources[row]), limit=limit, say=say, writes=writes, left_out=left_out)
    bad.reasons = group.by_first(lambda: bad.reasons)
    counts = np.bincount(corpus.manifest.labels[rows], minlength=len(corpus.classes)).tolist()
    total = steps * train.epochs
    task = SequenceTask(
        classifier,
        train,
        class_counts=counts,
        total_steps=total,
        failed=bad.add,
        group=group,
        teacher=teacher,
        maps=None if features is None else features.step,
    )
    facts = _facts(config, corpus, group, teacher)
    state = group.by_first(lambda: read_state(run / STATE_FILE, task, facts)) if resume else None

    def save(scores: dict[str, float]) -> None:
        card = _card(classifier, config, corpus, scores, None if teacher is None else teacher_facts(teacher, config))
        write_model(run / MODEL_FILE_NAME, classifier, card)

    scores = Scores(run, train, say=say, save=save)
    if state is not None:
        scores.load_state_dict(state["callbacks"]["Scores"])
    started = time.monotonic()
    if state is not None and scores.finished:
        say("the training is finished already")
        load_classifier(classifier, state)
    else:
        module = CorpusModule(corpus, config, features)
        _optimize(task, config, module, run, scores, state, facts, steps=steps, progress=progress, say=say)
    if group.is_first and (train.keep == "last" or not scores.best):
        save({"epoch": float(len(scores.history) - 1), **_last_scores(scores)})
    if group.is_first:
        add_golden_sample(run / MODEL_FILE_NAME)
    seconds = scores.seconds or time.monotonic() - started
    return Trained(run / MODEL_FILE_NAME, scores.best, len(scores.history), seconds, len(bad.reasons), features)


def _optimize(
    task: SequenceTask,
    config: Config,
    module: CorpusModule,
    run: Path,
    scores: Scores,
    state: dict[str, Any] | None,
    facts: dict[str, Any],
    *,
    steps: int,
    progress: bool,
    say: Callable[[str], None],
) -> None:
    train, group, corpus = config.train, task.group, module.corpus
    # Scores first: see its docstring.
    callbacks: list[Callback] = [scores]
    if train.ema_decay:
        callbacks.append(weight_average(train.ema_decay))
    callbacks.append(TQDMProgressBar(leave=False) if progress else StepNews(say, steps))
    file = StateFile(state)
    saving = SaveState(run, file, every_minutes=train.save_every_minutes, facts=facts, say=say, group=group)
    callbacks.append(saving)
    teacher = task.teacher
    if teacher is not None and not teacher.wants_states and gives_same_frames(config.data, corpus.kind):
        stopped = partial(_is_stopped, saving)
        callbacks.append(TeachFirst(teacher, corpus, config, run, group=group, stopped=stopped, say=say))
    if train.compile:
        task.classifier.encoder.compile()  # in place: names of tensors and the model file stay as they are
    if not torch.cuda.is_available():
        keep_freed_memory()
    several: dict[str, Any] = {}
    plugins: list[Any] = [file]
    if group.world > 1:
        # The norms' running statistics are equal everywhere, and validation has no collective operations.
        several = {"strategy": DDPStrategy(**{_buffers_option(): False}), "num_nodes": group.nodes}
        plugins.append(TorchElasticEnvironment())
    with warnings.catch_warnings():
        quiet_lightning()
        trainer = pl.Trainer(
            max_epochs=train.epochs,
            accelerator="auto",
            devices=group.local_world,
            precision=precision(train.precision),
            gradient_clip_val=train.clip_norm or None,
            logger=TensorBoardLogger(run, name="tensorboard", version=""),
            callbacks=callbacks,
            plugins=plugins,
            enable_checkpointing=True,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if len(corpus.training_rows("val")) else 0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            default_root_dir=run,
            **several,
        )
        # Its handler of SIGTERM would leave in mid-validation, and send to the other processes unasked.
        trainer._signal_connector.register_signal_handlers = lambda: None
        count = f"{steps} step{'s' * (steps != 1)}"
        among = f", {group.world} processes" if group.world > 1 else ""
        say(f"training on {trainer.strategy.root_device}{among}, {trainer.precision} precision, {count} an epoch")
        try:
            with saving.listen():
                checkpoint = None if state is None else run / STATE_FILE
                trainer.fit(task, module, ckpt_path=checkpoint, weights_only=True)
            if group.total(saving.stop is not None)[0]:
                raise Interrupted("interrupted; the training is finished", where=run)
        except Interrupted as error:
            hint = f"Go on with: videogru train --resume {run}"
            raise Interrupted(error.what, where=error.where, hint=hint) from error
        finally:
            module.close()


def _is_stopped(saving: SaveState) -> bool:
    return saving.stop is not None


def _buffers_option() -> str:
    """DDP's option to send buffers before each step, under its new name or the one before."""
    known = inspect.signature(DistributedDataParallel).parameters
    return "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"


def _facts(config: Config, corpus: Corpus, group: Group, teacher: Teacher | None) -> dict[str, Any]:
    """What a saved state and the run that goes on from it must share, in words for an error."""
    return {
        "processes": group.world,
        "batch size": config.train.batch_size,
        "seed": config.train.seed,
        "training rows": len(corpus.training_rows("train")),
        "model settings": config.model.model_dump_json(exclude={"weights"}),
        "classes": list(corpus.classes),
        "teacher": None if teacher is None else teacher.digest,
    }


def _last_scores(scores: Scores) -> dict[str, float]:
    return {k: v for k, v in scores.history[-1].items() if k.startswith(("val_", "train_"))} if scores.history else {}


def _card(
    classifier: Classifier, config: Config, corpus: Corpus, scores: dict[str, float], teacher: TeacherFacts | None
) -> ModelCard:
    return make_card(
        classifier,
        kind=corpus.kind,
        classes=corpus.classes,
        data=config.data,
        dataset=corpus.name,
        license="" if corpus.card is None else corpus.card.license,
        window_seconds=_window_seconds(corpus),
        metrics=scores,
        teacher=teacher,
    )


def _window_seconds(corpus: Corpus) -> tuple[float, ...]:
    """10th, 50th and 90th percentile of the lengths of the training windows; none for whole sources."""
    rows = corpus.training_rows("train")
    lengths = corpus.manifest.end_seconds[rows] - corpus.manifest.start_seconds[rows]
    lengths = lengths[np.isfinite(lengths)]
    if not len(lengths):
        return ()
    return tuple(round(float(length), 6) for length in np.quantile(lengths, (0.1, 0.5, 0.9)))


def precision(asked: str) -> str:
    """Lightning's name for the precision; auto takes bf16 where the GPU or the CPU multiplies it in hardware."""
    if asked == "fp32":
        return "32-true"
    if asked == "bf16":
        return "bf16-mixed"
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    # Emulated bf16 is slower than fp32. Without the query (it is young) the answer is no.
    query = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(query()) if query else False


def quiet_lightning() -> None:
    """Hide Lightning's banner and the advice that does not apply here; everything else still shows."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*training_step.*returned.*None.*",
        ".*Trying to infer the `batch_size`.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*weights_only.*",
        ".*recommended to use.*sync_dist=True.*",  # the scores are those of all processes
        ".*Checkpoint directory.*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

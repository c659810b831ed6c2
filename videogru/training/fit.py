"""One training, from a corpus and a config to a model file."""

import logging
import os
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from videogru.config import Config
from videogru.data.batching import EpochBatches
from videogru.data.datamodule import CorpusModule
from videogru.data.layouts import Corpus
from videogru.errors import ConfigError, DataError, Interrupted
from videogru.modelfile import MODEL_FILE_NAME, ModelCard, make_card, write_model
from videogru.models.classifier import Classifier
from videogru.training.callbacks import STATE_FILE, BadFiles, SaveState, Scores
from videogru.training.compiling import check_compiles
from videogru.training.groups import muon_groups
from videogru.training.memory import keep_freed_memory
from videogru.training.task import SequenceTask

# Of ImageNet for color; gray volumes arrive in 0..1 with much background.
_COLOR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GRAY = ((0.25,), (0.25,))


@dataclass(frozen=True)
class Trained:
    """What a training ends with; best: scores of the kept epoch, empty where the last epoch was kept."""

    model: Path
    best: dict[str, float]
    epochs: int
    seconds: float
    bad_files: int


def build_classifier(config: Config, num_classes: int) -> Classifier:
    """A fresh classifier for a resolved config, its weights drawn from config.train.seed."""
    channels = config.data.channels
    assert channels is not None, "resolve DataConfig.for_kind first"
    mean, std = _COLOR if channels == 3 else _GRAY
    torch.manual_seed(config.train.seed)
    return Classifier(
        config.model,
        in_channels=channels,
        frame_size=config.data.frame_size,
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def trainable_classifier(config: Config, corpus: Corpus) -> Classifier:
    """A fresh classifier, after all that can be refused before a run folder is made and an hour spent.

    Raises DataError where there are no training rows, ConfigError where the settings do not fit together, the data or
    the machine.
    """
    train = config.train
    if not len(corpus.training_rows("train")):
        raise DataError("no training rows", where=corpus.name)
    if train.early_stopping and not len(corpus.training_rows("val")):
        raise ConfigError(
            "train.early_stopping needs validation rows, and there are none",
            hint="Hold some out: --set data.val_fraction=0.1",
        )
    classifier = build_classifier(config, len(corpus.classes))
    if train.optimizer == "muon":
        muon_groups(classifier, train)
    if train.compile:
        check_compiles(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    return classifier


def fit(
    config: Config, corpus: Corpus, run: Path, *, resume: bool, progress: bool, say: Callable[[str], None]
) -> Trained:
    """Train and leave model.safetensors, metrics.csv, last.ckpt and TensorBoard logs in `run`.

    config: resolved for the corpus's kind; resume: go on from last.ckpt; progress: draw a bar. Ctrl-C and SIGTERM save
    and raise Interrupted. Raises DataError where too many files are bad, and what `trainable_classifier` raises.
    """
    train = config.train
    rows = corpus.training_rows("train")
    random.seed(train.seed)
    np.random.seed(train.seed % 2**32)
    classifier = trainable_classifier(config, corpus)
    if train.gradient_checkpointing:
        classifier.use_checkpointing(train.checkpoint_steps)
    steps = len(EpochBatches(rows, batch_size=train.batch_size, seed=0, epoch=lambda: 0))
    sources = corpus.manifest.sources
    bad = BadFiles(run, lambda row: str(sources[row]), limit=config.data.max_bad, say=say, left_out=corpus.left_out)
    counts = np.bincount(corpus.manifest.labels[rows], minlength=len(corpus.classes)).tolist()
    task = SequenceTask(classifier, train, class_counts=counts, total_steps=steps * train.epochs, failed=bad.add)

    def save(scores: dict[str, float]) -> None:
        write_model(run / MODEL_FILE_NAME, classifier, _card(classifier, config, corpus, scores))

    scores = Scores(run, train, say=say, save=save)
    # Scores first: see its docstring.
    callbacks: list[Callback] = [scores]
    if train.ema_decay:
        callbacks.append(EMAWeightAveraging(decay=train.ema_decay, use_buffers=True))
    if progress:
        callbacks.append(TQDMProgressBar(leave=False))
    state = SaveState(run, say=say)
    callbacks.append(state)
    if train.compile:
        classifier.encoder.compile()  # in place: names of tensors and the model file stay as they are
    if not torch.cuda.is_available():
        keep_freed_memory()
    started = time.monotonic()
    with warnings.catch_warnings():
        _quiet_lightning()
        trainer = pl.Trainer(
            max_epochs=train.epochs,
            accelerator="auto",
            devices=1,
            precision=precision(train.precision),
            gradient_clip_val=train.clip_norm or None,
            logger=TensorBoardLogger(run, name="tensorboard", version=""),
            callbacks=callbacks,
            enable_checkpointing=True,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if len(corpus.training_rows("val")) else 0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            default_root_dir=run,
        )
        say(f"training on {trainer.strategy.root_device}, {trainer.precision} precision, {steps} steps an epoch")
        checkpoint = run / STATE_FILE if resume else None
        try:
            with state.listen():
                trainer.fit(task, CorpusModule(corpus, config), ckpt_path=checkpoint, weights_only=True)
        except Interrupted as error:
            raise Interrupted(
                error.what, where=error.where, hint=f"Go on with: videogru train --resume {run}"
            ) from error
    if train.keep == "last" or not scores.best:
        save({"epoch": float(trainer.current_epoch - 1), **_last_scores(scores)})
    seconds = scores.seconds or time.monotonic() - started
    return Trained(run / MODEL_FILE_NAME, scores.best, len(scores.history), seconds, len(bad.reasons))


def _last_scores(scores: Scores) -> dict[str, float]:
    return {k: v for k, v in scores.history[-1].items() if k.startswith(("val_", "train_"))} if scores.history else {}


def _card(classifier: Classifier, config: Config, corpus: Corpus, scores: dict[str, float]) -> ModelCard:
    return make_card(
        classifier,
        kind=corpus.kind,
        classes=corpus.classes,
        data=config.data,
        dataset=corpus.name,
        license="" if corpus.card is None else corpus.card.license,
        metrics=scores,
    )


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


def _quiet_lightning() -> None:
    """Hide Lightning's banner and the advice that does not apply here; everything else still shows."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*training_step.*returned.*None.*",
        ".*Trying to infer the `batch_size`.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*weights_only.*",
        ".*Checkpoint directory.*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

"""Training loops that benchmarks time: Lightning's, a plain one, loading alone, and a step on a batch of noise."""

import time
import warnings
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from videogru.config import Config
from videogru.data.loading.batching import Loaded
from videogru.models.classifier import Classifier
from videogru.sequence import SequenceBatch
from videogru.training.fit import precision
from videogru.training.task import SequenceTask

OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")


class Counts(NamedTuple):
    """Uncounted and counted steps of a turn, and turns of each contender."""

    warmup: int
    steps: int
    rounds: int


class Clock(pl.Callback):
    """Counts the images and the time of `steps` steps after `warmup`, and how much of it was waiting for data.

    sync: wait for the GPU at both ends of each step, which tells the waiting for data apart from the GPU's work; that
    slows training, so that rates come from a clock without.
    """

    def __init__(self, counts: Counts, *, sync: bool = False) -> None:
        self.counts, self.sync = counts, sync
        self.seen = self.images = 0
        self.waiting = self.started = self.last = 0.0

    @property
    def done(self) -> bool:
        """Whether all steps were counted."""
        return self.seen == self.counts.warmup + self.counts.steps

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / (self.last - self.started)

    @property
    def data_share(self) -> float:
        """Share of the time from the end of a step to the next batch, on its device and augmented."""
        return self.waiting / (self.last - self.started)

    def end(self, images: int) -> None:
        """The step is over."""
        self.seen += 1
        self.last = self._now(self.sync or self.seen == self.counts.warmup or self.done)
        if self.seen <= self.counts.warmup:
            self.started, images = self.last, 0
        self.images += images

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch is on the device, augmented."""
        if self.seen >= self.counts.warmup:
            self.waiting += self._now(self.sync) - self.last

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Loaded, batch_idx: int) -> None:
        """Lightning stepped the optimizer and the schedule."""
        self.end(0 if batch.batch is None else len(batch.batch))
        trainer.should_stop = self.done

    def _now(self, sync: bool) -> float:
        if sync and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class LoadingAlone(pl.LightningModule):
    """Takes batches and does nothing with them."""

    automatic_optimization = False

    def training_step(self, loaded: Loaded, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> None:
        """No optimizer."""


class TorchvisionModule(pl.LightningDataModule):
    """(image, label) pairs of a torchvision data set with its transforms, through torch's DataLoader."""

    def __init__(self, pictures: Any, batch_size: int, workers: int) -> None:
        super().__init__()
        self.pictures, self.batch_size, self.workers = pictures, batch_size, workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs of images (B C H W) and labels (B,)."""
        how: dict[str, Any] = {"pin_memory": torch.cuda.is_available(), "persistent_workers": self.workers > 0}
        return DataLoader(self.pictures, self.batch_size, shuffle=True, num_workers=self.workers, **how)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Loaded:
        """Stills as clips of one frame, as the classifier takes them."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        ones = torch.ones_like(labels)
        return Loaded(0, SequenceBatch(images.unsqueeze(1), ones, ones, labels), ())


def make_task(classifier: Classifier, config: Config) -> SequenceTask:
    """The task as `fit` makes it, with a schedule that is long enough for any benchmark."""
    counts = [1] * classifier.num_classes
    return SequenceTask(classifier, config.train, class_counts=counts, total_steps=100_000, failed=lambda *_: None)


class Step:
    """One training step on its device: forward, backward, clipping, optimizer, schedule."""

    def __init__(self, classifier: Classifier, config: Config, *, bf16: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier, self.config, self.bf16 = classifier.to(self.device).train(), config, bf16
        made = make_task(classifier, config).configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def __call__(self, frames: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss before the step; frames (B 1 C H W), labels (B,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.classifier(frames, torch.ones_like(labels))
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.train.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), self.config.train.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch as augmentation leaves it: float32 frames (B 1 C H W) in 0..1, and labels (B,)."""
        generator = torch.Generator().manual_seed(0)
        side, batch = self.classifier.frame_size, self.config.train.batch_size
        frames = torch.rand(batch, 1, self.classifier.in_channels, side, side, generator=generator)
        labels = torch.randint(0, self.classifier.num_classes, (batch,), generator=generator)
        return frames.to(self.device), labels.to(self.device)

    def rate(self, counts: Counts) -> float:
        """Images per second, on the same batch again and again."""
        clock, batch = Clock(counts), self.noise()
        while not clock.done:
            self(*batch)
            clock.end(len(batch[1]))
        return clock.rate


def train(task: pl.LightningModule, module: pl.LightningDataModule, config: Config, clock: Clock) -> None:
    """Lightning's loop, as `fit` runs it but without logs, scores, checkpoints and progress bar, until clock.done."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        trainer = pl.Trainer(
            max_epochs=-1,
            devices=1,
            precision=precision(config.train.precision),
            gradient_clip_val=(config.train.clip_norm or None) if task.automatic_optimization else None,
            callbacks=[clock],
            limit_val_batches=0,
            **dict.fromkeys(OFF, False),
        )
        trainer.fit(task, module)


def plain_train(task: SequenceTask, module: TorchvisionModule, config: Config, clock: Clock) -> None:
    """The loop of a script without Lightning, until clock.done."""
    step = Step(task.classifier, config, bf16=precision(config.train.precision) == "bf16-mixed")
    loader = module.train_dataloader()
    while not clock.done:
        for batch in loader:
            images, labels = (tensor.to(step.device, non_blocking=True) for tensor in batch)
            clock.on_train_batch_start()
            step(images.unsqueeze(1), labels)
            clock.end(len(labels))
            if clock.done:
                break

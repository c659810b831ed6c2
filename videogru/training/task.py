"""What Lightning optimizes: the classifier, its loss, its optimizer and the scores that choose the best epoch."""

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from videogru.config import TrainConfig
from videogru.data.loading.batching import Loaded
from videogru.models.classifier import Classifier
from videogru.sequence import SequenceBatch
from videogru.shapes import Labels, Lengths, Logits
from videogru.training.groups import decay_groups, muon_groups
from videogru.training.muon import Muon
from videogru.training.norms import count_maps
from videogru.training.processes import ALONE, Group
from videogru.training.teacher import Teacher, projection_of, soft_loss, state_loss


class SequenceTask(pl.LightningModule):
    """The article's recipe with options: label smoothing, class weights, warm-up and cosine or constant rate.

    class_counts: training rows per class; total_steps: of the whole training, for the schedule; failed: called with
    (row, reason) of every training clip that could not be read; group: the processes that share each batch; teacher:
    of a distillation; maps: (D h w) of what it reads in place of frames, feature maps with a frozen encoder.
    """

    def __init__(
        self,
        classifier: Classifier,
        config: TrainConfig,
        *,
        class_counts: list[int],
        total_steps: int,
        failed: Callable[[int, str], None],
        group: Group = ALONE,
        teacher: Teacher | None = None,
        maps: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.classifier, self.config, self.failed, self.group = classifier, config, failed, group
        self.teacher, self.maps = teacher, maps
        # Trained and saved with the state, but no part of the classifier and its file.
        wants = teacher is not None and config.distill_features > 0
        self.projection = projection_of(teacher, classifier, config.seed) if wants else None  # type: ignore[arg-type]
        self.total_steps = total_steps
        weights = class_weights(class_counts) if config.class_weights == "balanced" else None
        self.register_buffer("class_weights", weights, persistent=False)
        self._nothing_read = False
        self._train = _Running()
        self._val_probabilities: list[torch.Tensor] = []
        self._val_labels: list[torch.Tensor] = []
        self._val_rows: list[torch.Tensor] = []

    def training_step(self, loaded: Loaded, batch_idx: int) -> torch.Tensor | None:
        """The loss of one batch; None (no step) where not one of its clips could be read.

        With several processes the loss is the process's part of the mean over all their clips, times their number: the
        gradients, of which DDP takes the mean, then are those of one process with the whole batch.
        """
        clips = 0 if loaded.batch is None else len(loaded.batch)
        all_clips, failures = self.group.total(clips, len(loaded.failures))
        if failures:
            for row, reason in (failure for part in self.group.gather(loaded.failures) for failure in part):
                self.failed(row, reason)
        self._nothing_read = not all_clips
        if not all_clips:
            # Lightning takes no None from one of several processes, and DDP waits for every gradient.
            return None if self.group.world == 1 else self._zero()
        # Dropout then depends on (seed, step) alone, so that a resumed run repeats the uninterrupted one.
        torch.manual_seed((self.config.seed * 1_000_003 + self.global_step) * 4096 + self.global_rank)
        if self.group.world > 1:
            count_maps(self.classifier, counted=clips > 0)
        batch = loaded.batch or self._stand_in()
        labels = batch.labels
        assert labels is not None
        states, step_lengths, logits = self._read(batch)
        loss = self._loss(logits, batch)
        part = 1.0 if self.group.world == 1 else self._part(batch, clips, int(all_clips))
        if self.group.world > 1:
            loss = loss * part
        if self.teacher is not None:
            share = 1.0 if self.group.world == 1 else clips / all_clips
            loss = (1 - self.config.distill_alpha) * loss + share * self._taught(batch, states, step_lengths, logits)
        if self.trainer.progress_bar_callback is not None:
            shown = loss.detach() * (all_clips / max(1, clips))
            self.log("loss", shown, prog_bar=True, batch_size=len(labels), logger=False)
        total = loss.detach() * all_clips
        loss = loss if self.group.world == 1 else loss * self.group.world
        if clips:
            self._train.add(total, (logits.detach().argmax(dim=1) == labels).sum(), clips)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """No gradient, and no step, where no process could read a clip: with one process there is none either."""
        if self._nothing_read:
            optimizer.zero_grad(set_to_none=True)

    def _zero(self) -> torch.Tensor:
        """A loss of zero that has a gradient for every parameter."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return 0 * torch.stack([p.sum() for p in parameters]).sum()

    def _read(self, batch: SequenceBatch) -> tuple[torch.Tensor, Lengths, Logits]:
        """States (B S F) of all steps, how many are valid, and the logits (B K) of a batch of frames or of maps."""
        read = self.classifier.features if self.maps is None else self.classifier.features_of_maps
        states, step_lengths = read(batch.frames, batch.lengths, batch.gaps)
        return states, step_lengths, self.classifier.logits_of(states, step_lengths)

    def _taught(self, batch: SequenceBatch, states: torch.Tensor, lengths: Lengths, logits: Logits) -> torch.Tensor:
        """The teacher's part of the loss, the mean over the clips."""
        assert self.teacher is not None
        lesson, config = self.teacher(batch), self.config
        loss = config.distill_alpha * soft_loss(logits, lesson.logits, config.distill_temperature)
        if self.projection is not None:
            assert lesson.states is not None
            with torch.autocast(states.device.type, enabled=False):
                mine = self.projection(states.float())
                loss = loss + config.distill_features * state_loss(mine, lesson.states, lengths)
        return loss

    def _loss(self, logits: Logits, batch: SequenceBatch) -> torch.Tensor:
        weights, smoothing, labels = self.class_weights, self.config.label_smoothing, batch.labels
        assert labels is not None
        if batch.others is None or batch.shares is None:
            return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
        return mixed_cross_entropy(
            logits, labels, batch.others, batch.shares, weight=weights, label_smoothing=smoothing
        )

    def _part(self, batch: SequenceBatch, clips: int, all_clips: int) -> torch.Tensor | float:
        """What this process's mean loss counts in the mean over all: by clips, or by the weights of their classes."""
        weights, labels = self.class_weights, batch.labels
        if weights is None or labels is None:
            return clips / all_clips
        own = weights[labels]
        if batch.others is not None and batch.shares is not None:
            own = batch.shares * own + (1 - batch.shares) * weights[batch.others]
        mine = own.sum() if clips else own.new_zeros(())
        total = mine.clone()
        dist.all_reduce(total)
        share: torch.Tensor = mine / total
        return share

    def _stand_in(self) -> SequenceBatch:
        """One black frame, for a process that could read nothing while others could: it must not stay behind."""
        net = self.classifier
        one = torch.ones(1, dtype=torch.int64, device=self.device)
        # A class without rows weighs nothing, and its mean loss would be 0 / 0.
        label = one - 1 if self.class_weights is None else self.class_weights.argmax().view(1)
        shape = self.maps or (net.in_channels, net.frame_size, net.frame_size)
        frames = torch.zeros(1, 1, *shape, device=self.device)
        return SequenceBatch(frames, one, one - 1, label, gaps=torch.zeros(1, 1, device=self.device))

    def validation_step(self, loaded: Loaded, batch_idx: int) -> None:
        """Collect probabilities; scores are computed over the whole split, never averaged over batches."""
        if loaded.batch is None or loaded.batch.labels is None:
            return
        logits = self._read(loaded.batch)[2]
        self._val_probabilities.append(logits.float().softmax(dim=1))
        self._val_labels.append(loaded.batch.labels)
        self._val_rows.append(loaded.batch.indices)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was summed over the epoch in progress, by all processes."""
        checkpoint["running"] = tuple(self.group.total(*self._train.state()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from it, in the first process."""
        self._train = _Running(*checkpoint.get("running", ())) if self.group.is_first else _Running()

    def training_scores(self) -> dict[str, float]:
        """Loss and accuracy over the epoch so far, of all processes; clears them."""
        loss, hits, clips = self.group.total(*self._train.state())
        self._train = _Running()
        return {"train_loss": loss / clips, "train_accuracy": hits / clips} if clips else {}

    def validation_scores(self) -> dict[str, float]:
        """Loss, accuracy and (two classes) AUROC over all of the validation split; clears what was collected.

        Every process scores what all of them predicted, in the order of the rows.
        """
        mine = [torch.cat(part) for part in (self._val_rows, self._val_labels, self._val_probabilities) if part]
        self._val_rows, self._val_labels, self._val_probabilities = [], [], []
        if self.group.world > 1:
            parts = [part for part in self.group.gather([tensor.cpu() for tensor in mine]) if part]
            mine = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        if not mine:
            return {}
        rows, labels, probabilities = mine
        order = rows.argsort()
        labels, probabilities = labels[order], probabilities[order]
        scores = {
            "val_loss": float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)),
            "val_accuracy": float((probabilities.argmax(dim=1) == labels).float().mean()),
        }
        if probabilities.shape[1] == 2 and 0 < int(labels.sum()) < len(labels):
            scores["val_auroc"] = float(binary_auroc(probabilities[:, 1], labels))
        return scores

    def configure_optimizers(self) -> Any:
        """Adam, AdamW, SGD with Nesterov momentum, or Muon; no decay on biases and norms for AdamW and Muon."""
        config = self.config
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
            )
        elif config.optimizer == "muon":
            optimizer = Muon([*muon_groups(self.classifier, config), *self._projection_groups()])
        elif config.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        else:
            groups = decay_groups(self.classifier, lr=config.lr, weight_decay=config.weight_decay)
            groups += self._projection_groups()
            optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999))
        # A plain function: of a method, LambdaLR would save the attributes into the checkpoint.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _projection_groups(self) -> list[dict[str, Any]]:
        if self.projection is None:
            return []
        return decay_groups(self.projection, lr=self.config.lr, weight_decay=self.config.weight_decay)

    def _rate(self, step: int) -> float:
        """Share of the peak rate: linear warm-up, then constant or half a cosine (Loshchilov and Hutter 2017)."""
        warmup = round(self.config.warmup * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.config.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, self.total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def mixed_cross_entropy(
    logits: Logits,
    labels: Labels,
    others: Labels,
    shares: Float[torch.Tensor, " B"],
    *,
    weight: torch.Tensor | None,
    label_smoothing: float,
) -> Float[torch.Tensor, ""]:
    """Cross entropy with two labels a clip, `shares` (B,) of the first; with class weights a weighted mean."""

    def each(targets: Labels) -> torch.Tensor:
        return F.cross_entropy(logits, targets, weight=weight, label_smoothing=label_smoothing, reduction="none")

    losses = shares * each(labels) + (1 - shares) * each(others)
    if weight is None:
        return losses.mean()
    return losses.sum() / (shares * weight[labels] + (1 - shares) * weight[others]).sum()


class _Running:
    """Sums on the device; reading them would wait for the GPU, so that happens once an epoch."""

    def __init__(self, loss: float = 0.0, hits: float = 0.0, clips: float = 0.0) -> None:
        self.loss: torch.Tensor | float = loss
        self.hits: torch.Tensor | float = hits
        self.clips = clips

    def state(self) -> tuple[float, float, float]:
        return float(self.loss), float(self.hits), float(self.clips)

    def add(self, loss: torch.Tensor, hits: torch.Tensor, clips: int) -> None:
        self.loss, self.hits, self.clips = self.loss + loss, self.hits + hits, self.clips + clips


def class_weights(counts: list[int]) -> torch.Tensor:
    """Inverse class frequencies, (K,), with a mean of one over the training rows; 0 for a class without rows."""
    present = sum(count > 0 for count in counts)
    total = sum(counts)
    return torch.tensor([total / (present * count) if count else 0.0 for count in counts])

"""What Lightning optimizes: the classifier, its loss, its optimizer and the scores that choose the best epoch."""

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from videogru.config import TrainConfig
from videogru.data.batching import Loaded
from videogru.models.classifier import Classifier
from videogru.shapes import Labels, Logits
from videogru.training.groups import decay_groups, muon_groups
from videogru.training.muon import Muon


class SequenceTask(pl.LightningModule):
    """The article's recipe with options: label smoothing, class weights, warm-up and cosine or constant rate.

    class_counts: training rows per class; total_steps: of the whole training, for the schedule; failed: called with
    (row, reason) of every training clip that could not be read.
    """

    def __init__(
        self,
        classifier: Classifier,
        config: TrainConfig,
        *,
        class_counts: list[int],
        total_steps: int,
        failed: Callable[[int, str], None],
    ) -> None:
        super().__init__()
        self.classifier, self.config, self.failed = classifier, config, failed
        self.total_steps = total_steps
        weights = class_weights(class_counts) if config.class_weights == "balanced" else None
        self.register_buffer("class_weights", weights, persistent=False)
        self._train = _Running()
        self._val_probabilities: list[torch.Tensor] = []
        self._val_labels: list[torch.Tensor] = []

    def training_step(self, loaded: Loaded, batch_idx: int) -> torch.Tensor | None:
        """The loss of one batch; None (no step) where not one of its clips could be read."""
        for row, reason in loaded.failures:
            self.failed(row, reason)
        if loaded.batch is None or loaded.batch.labels is None:
            return None
        # Dropout then depends on (seed, step) alone, so that a resumed run repeats the uninterrupted one.
        torch.manual_seed((self.config.seed * 1_000_003 + self.global_step) * 4096 + self.global_rank)
        batch, labels = loaded.batch, loaded.batch.labels
        logits = self.classifier(batch.frames, batch.lengths)
        weights, smoothing = self.class_weights, self.config.label_smoothing
        if batch.others is None or batch.shares is None:
            loss = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
        else:
            loss = mixed_cross_entropy(
                logits, labels, batch.others, batch.shares, weight=weights, label_smoothing=smoothing
            )
        if self.trainer.progress_bar_callback is not None:
            self.log("loss", loss.detach(), prog_bar=True, batch_size=len(labels), logger=False)
        self._train.add(loss.detach(), (logits.detach().argmax(dim=1) == labels).sum(), len(labels))
        return loss

    def validation_step(self, loaded: Loaded, batch_idx: int) -> None:
        """Collect probabilities; scores are computed over the whole split, never averaged over batches."""
        if loaded.batch is None or loaded.batch.labels is None:
            return
        logits = self.classifier(loaded.batch.frames, loaded.batch.lengths)
        self._val_probabilities.append(logits.float().softmax(dim=1))
        self._val_labels.append(loaded.batch.labels)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was summed over the epoch in progress."""
        checkpoint["running"] = self._train.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from it."""
        self._train = _Running(*checkpoint.get("running", ()))

    def training_scores(self) -> dict[str, float]:
        """Loss and accuracy over the epoch so far; clears them."""
        scores = self._train.scores()
        self._train = _Running()
        return scores

    def validation_scores(self) -> dict[str, float]:
        """Loss, accuracy and (two classes) AUROC over all of the validation split; clears what was collected."""
        if not self._val_labels:
            return {}
        probabilities, labels = torch.cat(self._val_probabilities), torch.cat(self._val_labels)
        self._val_probabilities, self._val_labels = [], []
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
        parameters = [p for p in self.classifier.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
            )
        elif config.optimizer == "muon":
            optimizer = Muon(muon_groups(self.classifier, config))
        elif config.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        else:
            groups = decay_groups(self.classifier, lr=config.lr, weight_decay=config.weight_decay)
            optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999))
        # A plain function: of a method, LambdaLR would save the attributes into the checkpoint.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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

    def __init__(self, loss: float = 0.0, hits: int = 0, clips: int = 0) -> None:
        self.loss: torch.Tensor | float = loss
        self.hits: torch.Tensor | int = hits
        self.clips = clips

    def state(self) -> tuple[float, int, int]:
        return float(self.loss), int(self.hits), self.clips

    def add(self, loss: torch.Tensor, hits: torch.Tensor, clips: int) -> None:
        self.loss, self.hits, self.clips = self.loss + loss * clips, self.hits + hits, self.clips + clips

    def scores(self) -> dict[str, float]:
        if not self.clips:
            return {}
        return {"train_loss": float(self.loss) / self.clips, "train_accuracy": float(self.hits) / self.clips}


def class_weights(counts: list[int]) -> torch.Tensor:
    """Inverse class frequencies, (K,), with a mean of one over the training rows; 0 for a class without rows."""
    present = sum(count > 0 for count in counts)
    total = sum(counts)
    return torch.tensor([total / (present * count) if count else 0.0 for count in counts])

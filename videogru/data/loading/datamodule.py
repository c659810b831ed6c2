"""The loaders Lightning trains with: order, sampling and augmentation depend on (seed, epoch, row) alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from videogru.config import Config
from videogru.data.clips.augment import augment_batch, mix_batch
from videogru.data.loading.batching import EpochBatches, Loaded, OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset, clip_lengths
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.loading.feature_dataset import FeatureDataset, feature_lengths
from videogru.data.loading.feature_store import FeatureRows
from videogru.data.manifests.corpus import Corpus


class CorpusModule(pl.LightningDataModule):
    """Training and validation loaders of a corpus; config.data must be resolved for the corpus's kind.

    features: of its rows, which are then read in place of the sources; nothing augments them.
    """

    def __init__(self, corpus: Corpus, config: Config, features: FeatureRows | None = None) -> None:
        super().__init__()
        self.corpus, self.config, self.features = corpus, config, features
        self._loaders: list[ClipLoader] = []

    @property
    def num_workers(self) -> int:
        """Reader processes of this one."""
        assert self.trainer is not None
        if self.features is not None:
            return 0  # they are mapped
        return default_workers(self.corpus, self.config.train.num_workers, sharing=self.trainer.num_devices)

    def train_dataloader(self) -> ClipLoader:
        """Shuffled batches; resumes inside an epoch."""
        trainer = self.trainer
        assert trainer is not None
        rows = self.corpus.training_rows("train")
        batches = EpochBatches(
            rows,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            # Not current_epoch: where a run goes on from the end of an epoch, it still is that one as readers begin.
            epoch=lambda: int(trainer.fit_loop.epoch_progress.current.processed),
            rank=trainer.global_rank,
            world=trainer.world_size,
            lengths=clip_lengths(self.corpus, rows, data=self.config.data)
            if self.features is None
            else feature_lengths(self.features, rows),
        )
        dataset = self._dataset(training=True)
        loader = ClipLoader(dataset, batches, num_workers=self.num_workers, persistent=True)
        self._loaders.append(loader)
        return _resumable(loader, batches, trainer)

    def val_dataloader(self) -> ClipLoader | DataLoader[Loaded] | list[ClipLoader]:
        """All validation rows in order, the process's share of them; none where there is no validation split."""
        trainer = self.trainer
        assert trainer is not None
        rows: NDArray[np.int64] = self.corpus.training_rows("val")
        if not len(rows):
            return []
        rows = rows[trainer.global_rank :: trainer.world_size]
        if not len(rows):
            # More processes than rows; all of them must go through the validation.
            return DataLoader([Loaded(0, None, ())], batch_size=None)  # type: ignore[arg-type]
        batches = OrderedBatches(rows, batch_size=self.config.train.batch_size)
        return ClipLoader(self._dataset(training=False), batches, num_workers=self.num_workers)

    def close(self) -> None:
        """End the workers that are still there; after the training, however it ended."""
        for loader in self._loaders:
            loader.close()

    def on_after_batch_transfer(self, batch: Loaded, dataloader_idx: int) -> Loaded:
        """Augment training batches of video and stills on the device, and mix clips of any kind."""
        trainer = self.trainer
        clips = batch.batch
        if clips is None or trainer is None or not trainer.training or self.features is not None:
            return batch
        augment, seed = self.config.data.augment, self.config.train.seed
        if self.corpus.kind != "volume":
            frames = augment_batch(
                clips.frames,
                clips.lengths,
                config=augment,
                seed=seed,
                epoch=batch.epoch,
                indices=clips.indices.tolist(),
            )
            clips = replace(clips, frames=frames)
        clips = mix_batch(clips, probability=augment.cutmix, seed=seed, epoch=batch.epoch)
        return Loaded(batch.epoch, clips, batch.failures)

    def transfer_batch_to_device(self, batch: Loaded, device: torch.device, dataloader_idx: int) -> Loaded:
        """Move a batch."""
        return batch.to(device)

    def _dataset(self, *, training: bool) -> ClipDataset:
        if self.features is not None:
            return FeatureDataset(self.corpus, self.features, data=self.config.data)
        return ClipDataset(self.corpus, data=self.config.data, seed=self.config.train.seed, training=training)


def _resumable(loader: ClipLoader, batches: EpochBatches, trainer: pl.Trainer) -> ClipLoader:
    """Give the loader the two methods by which Lightning stores and restores the place inside an epoch."""

    def state_dict() -> dict[str, Any]:
        return {"batches": trainer.fit_loop.epoch_loop.batch_progress.current.ready}

    def load_state_dict(state: dict[str, Any]) -> None:
        done = int(state["batches"])
        batches.skip = done if done < len(batches) else 0

    loader.state_dict = state_dict  # type: ignore[attr-defined]
    loader.load_state_dict = load_state_dict  # type: ignore[attr-defined]
    return loader

"""A model ready to answer, of a model file or an export; read as in training, one row out for every row in."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from videogru.checkpoint.model_file import ModelCard, find_model, read_card, read_model
from videogru.config import DataConfig
from videogru.data.clips.views import ONE_VIEW, Views
from videogru.data.loading.batching import OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.loading.feature_dataset import FeatureDataset
from videogru.data.loading.feature_store import FeatureRows
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.data.readers.video.open import check_decoder
from videogru.errors import ConfigError, ModelFileError
from videogru.inference.predictions import Predictions
from videogru.models.classifier import Classifier
from videogru.runtime.backends import Exported, open_exported
from videogru.runtime.export_folder import is_exported
from videogru.sequence import SequenceBatch
from videogru.shapes import BatchFrames, Gaps, Lengths

Change = Callable[[SequenceBatch], SequenceBatch]


class Predictor:
    """Classifies rows of a corpus or single files with one model file or export.

    device: auto, cpu, cuda, ...; data: changed reading options, else those the model was trained with; features: of the
    rows that are asked for, made by the model's own encoder, which then are read in place of their sources.
    """

    def __init__(
        self,
        model: Classifier | Exported,
        card: ModelCard,
        *,
        device: str = "auto",
        data: DataConfig | None = None,
        features: FeatureRows | None = None,
    ) -> None:
        self.card, self.features = card, features
        self.data = (data if data is not None else card.data).for_kind(card.kind)
        if isinstance(model, Exported):
            self.device = torch.device("cpu")  # it moves what it is given
            self._model: Classifier | Exported = model
        else:
            self.device = _device(device)
            self._model = model.to(self.device).eval()

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        data: DataConfig | None = None,
        features: FeatureRows | None = None,
    ) -> "Predictor":
        """path: a model file, run folder or export. Raises ModelFileError where it is no usable model."""
        found = find_model(Path(path))
        if is_exported(found):
            assert features is None, "features come of a model file"
            return cls(open_exported(found, device=device), read_card(found), data=data)
        classifier, card = read_model(found)
        return cls(classifier, card, device=device, data=data, features=features)

    @property
    def classifier(self) -> Classifier:
        """What PyTorch runs. Raises ModelFileError where the model is an export, which has no such thing."""
        if isinstance(self._model, Exported):
            raise ModelFileError(
                "this needs the model that PyTorch runs, and an export has none",
                where=self._model.card.folder,
                hint="Name the run or the .safetensors file that it was exported from.",
            )
        return self._model

    def predict(
        self,
        corpus: Corpus,
        rows: NDArray[np.int64],
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        views: Views = ONE_VIEW,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Predictions:
        """Probabilities of `rows` in their order; a source that cannot be read becomes a row with its error.

        views: clips times crops of each source, whose probabilities are averaged; tick: called with the number of rows
        finished since the last call; num_workers: 0 reads in this process, where a decoder that hangs or crashes cannot
        be ended; None takes one or more. Raises ConfigError where the model's sources have no such views.
        """
        same: dict[str, Change] = {"": lambda batch: batch}
        return self.predict_changed(
            corpus, rows, same, batch_size=batch_size, num_workers=num_workers, views=views, tick=tick
        )[""]

    @torch.inference_mode()
    def predict_changed(
        self,
        corpus: Corpus,
        rows: NDArray[np.int64],
        changes: Mapping[str, Change],
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        views: Views = ONE_VIEW,
        tick: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Predictions]:
        """What `predict` gives, for each change of the clips; every source is read once.

        changes: functions of a batch; where one gives several clips of a row, these follow each other and their
        probabilities are averaged.
        """
        place = {int(row): position for position, row in enumerate(rows)}
        shape = (len(rows), len(self.card.classes))
        probabilities = {name: np.full(shape, np.nan, dtype=np.float32) for name in changes}
        errors = {name: np.full(len(rows), "", dtype=object) for name in changes}
        if self.features is not None:
            if views != ONE_VIEW:
                raise ConfigError("features are of one view of each source", hint="Leave --views out.")
            dataset: ClipDataset = FeatureDataset(corpus, self.features, data=self.data)
            workers = 0
        else:
            dataset = ClipDataset(corpus, data=self.data, views=views)
            if corpus.kind == "video":
                check_decoder(self.data.decoder)
            workers = default_workers(corpus, num_workers, rows=len(rows))
        batches = OrderedBatches(rows, batch_size=max(1, batch_size // (views[0] * views[1])))
        loader = ClipLoader(dataset, batches, num_workers=workers)
        for loaded in loader:
            for name, change in changes.items():
                for row, reason in loaded.failures:
                    errors[name][place[row]] = reason
                if loaded.batch is None:
                    continue
                found, said = self._scores(change(loaded.batch), batch_size)
                positions = np.array([place[row] for row in found])
                probabilities[name][positions] = said
                for position in positions[~np.isfinite(said).all(axis=1)]:
                    probabilities[name][position] = np.nan
                    source = corpus.manifest.sources[rows[position]]
                    errors[name][position] = f"{source}: the model gives no finite score"
            tick(len(loaded.failures) + (0 if loaded.batch is None else len(loaded.batch.indices.unique())))
        return {
            name: Predictions(
                classes=self.card.classes,
                sources=np.asarray(corpus.manifest.sources[rows]),
                labels=corpus.manifest.labels[rows],
                probabilities=probabilities[name],
                errors=errors[name].astype(np.str_),
                rows=np.asarray(rows, dtype=np.int64),
            )
            for name in changes
        }

    def _scores(self, batch: SequenceBatch, batch_size: int) -> tuple[list[int], NDArray[np.float32]]:
        """Rows of a batch, each once, and their probabilities (N K), averaged over the clips of a row."""
        said = []
        for start in range(0, len(batch), batch_size):
            frames = batch.frames[start : start + batch_size].to(self.device)
            lengths = batch.lengths[start : start + batch_size].to(self.device)
            gaps = None if batch.gaps is None else batch.gaps[start : start + batch_size].to(self.device)
            said.append(self._probabilities(frames, lengths, gaps))
        rows, clip_row, counts = batch.indices.unique_consecutive(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(rows), len(self.card.classes), dtype=torch.float64)
        sums.index_add_(0, clip_row, torch.cat(said))
        return rows.tolist(), (sums / counts.unsqueeze(1)).float().numpy()

    def _probabilities(self, frames: BatchFrames, lengths: Lengths, gaps: Gaps | None) -> Float64[torch.Tensor, "B K"]:
        if not isinstance(self._model, Exported):
            read = self._model if self.features is None else self._model.from_maps
            logits: torch.Tensor = read(frames, lengths, gaps)
            return logits.cpu().double().softmax(dim=1)
        given = None if gaps is None else gaps.numpy()
        return torch.from_numpy(self._model.probabilities(frames.numpy(), lengths.numpy(), given)).double()

    def initial_state(self, batch: int) -> Mapping[str, Any]:
        """What `batch` streams keep before their first frames, by name.

        Raises ConfigError where the model needs frames that a stream does not have yet, or an export takes whole clips.
        """
        if isinstance(self._model, Exported):
            return self._model.fresh_states(batch)
        return self._model.initial_state(batch)

    @torch.inference_mode()
    def step(
        self, frame: Tensor, state: Mapping[str, Any], gaps: Float[Tensor, " B"]
    ) -> tuple[Float64[Tensor, "B K"], Mapping[str, Any]]:
        """Probabilities of streams after one more frame of each (B C H W), and what they keep then.

        gaps: since the frame before, in the sources' unit; a model without model.use_gaps does not read them.
        """
        if isinstance(self._model, Exported):
            said, after = self._model.step_on(frame.numpy(), state, gaps.numpy())
            return torch.from_numpy(said).double(), after
        logits, kept = self._model.step(frame.to(self.device), dict(state), gaps.to(self.device))
        return logits.cpu().double().softmax(dim=1), kept

    def predict_paths(
        self,
        paths: Sequence[Path | str],
        *,
        num_workers: int | None = None,
        views: Views = ONE_VIEW,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Predictions:
        """Probabilities of files, in their order."""
        corpus = unlabeled_corpus([str(path) for path in paths], self.card)
        rows = np.arange(len(paths), dtype=np.int64)
        return self.predict(corpus, rows, num_workers=num_workers, views=views, tick=tick)


def unlabeled_corpus(paths: Sequence[str], card: ModelCard) -> Corpus:
    """Files of the model's kind as rows without labels."""
    manifest = build_manifest(Path(), card.classes, list(paths), [-1] * len(paths))
    return Corpus(
        name="paths",
        kind=card.kind,
        classes=card.classes,
        manifest=manifest,
        arrays=None,
        card=None,
        missing=0,
        notes=(),
    )


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"the device {asked!r} cannot be used: {first}", hint="Use --device auto or cpu.") from error
    return device

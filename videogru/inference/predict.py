"""A model file ready to answer; the same reading path as in training, one row out for every row in."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.batching import OrderedBatches
from videogru.data.dataset import ClipDataset, default_workers, make_loader
from videogru.data.layouts import Corpus
from videogru.data.manifest import build_manifest
from videogru.data.video import check_decoder
from videogru.errors import ConfigError
from videogru.inference.predictions import Predictions
from videogru.modelfile import ModelCard, find_model, read_model
from videogru.models.classifier import Classifier

# Starting a worker costs about what it takes to read this many files.
_FILES_WORTH_A_WORKER = 8


class Predictor:
    """Classifies rows of a corpus or single files with one model file.

    device: auto, cpu, cuda, ...; data: changed reading options, else those the model was trained with.
    """

    def __init__(
        self, classifier: Classifier, card: ModelCard, *, device: str = "auto", data: DataConfig | None = None
    ) -> None:
        self.card = card
        self.data = (data if data is not None else card.data).for_kind(card.kind)
        self.device = _device(device)
        self.classifier = classifier.to(self.device).eval()

    @classmethod
    def from_file(cls, path: Path | str, *, device: str = "auto", data: DataConfig | None = None) -> "Predictor":
        """path: a model file or a run folder. Raises ModelFileError where it is no usable model."""
        classifier, card = read_model(find_model(Path(path)))
        return cls(classifier, card, device=device, data=data)

    @torch.inference_mode()
    def predict(
        self,
        corpus: Corpus,
        rows: NDArray[np.int64],
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Predictions:
        """Probabilities of `rows` in their order; a source that cannot be read becomes a row with its error.

        tick: called with the number of rows finished since the last call.
        """
        place = {int(row): position for position, row in enumerate(rows)}
        probabilities = np.full((len(rows), len(self.card.classes)), np.nan, dtype=np.float32)
        errors = np.full(len(rows), "", dtype=object)
        dataset = ClipDataset(corpus, data=self.data)
        if corpus.kind == "video":
            check_decoder(self.data.decoder)
        workers = default_workers(corpus, num_workers)
        if num_workers is None and len(rows) < _FILES_WORTH_A_WORKER:
            workers = 0
        loader = make_loader(dataset, OrderedBatches(rows, batch_size=batch_size), num_workers=workers)
        for loaded in loader:
            for row, reason in loaded.failures:
                errors[place[row]] = reason
            if loaded.batch is not None:
                batch = loaded.batch.to(self.device)
                logits = self.classifier(batch.frames, batch.lengths)
                positions = [place[int(row)] for row in loaded.batch.indices]
                said = logits.double().softmax(dim=1).float().cpu().numpy()
                probabilities[positions] = said
                for position in np.asarray(positions)[~np.isfinite(said).all(axis=1)]:
                    probabilities[position] = np.nan
                    errors[position] = f"{corpus.manifest.sources[rows[position]]}: the model gives no finite score"
            tick(len(loaded.failures) + (0 if loaded.batch is None else len(loaded.batch)))
        return Predictions(
            classes=self.card.classes,
            sources=np.asarray(corpus.manifest.sources[rows]),
            labels=corpus.manifest.labels[rows],
            probabilities=probabilities,
            errors=errors.astype(np.str_),
            rows=np.asarray(rows, dtype=np.int64),
        )

    def predict_paths(
        self,
        paths: Sequence[Path | str],
        *,
        num_workers: int | None = None,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Predictions:
        """Probabilities of files, in their order."""
        corpus = unlabeled_corpus([str(path) for path in paths], self.card)
        return self.predict(corpus, np.arange(len(paths), dtype=np.int64), num_workers=num_workers, tick=tick)


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

"""Features of `videogru encode`: the folder they lie in, what they depend on, and the settings they leave free.

  model.safetensors   the model whose encoder made them
  settings.json       key of that encoder, how sources are read, the form of a clip's features
  features.f32, index.jsonl   see data/loading/feature_store.py

Everything is named by content. The folder's key stands for the encoder's weights, its settings and the reading of
frames; a row's key for the bytes of its source, its window, the reading and the versions of what reads and computes.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from videogru import __version__
from videogru.checkpoint.model_file import MODEL_FILE_NAME, ModelCard, read_model
from videogru.config import AugmentConfig, Config, DataConfig, ModelConfig
from videogru.data.loading.content_hash import Identities, Identity
from videogru.data.loading.feature_store import Entry, FeatureRows, mapped, read_index
from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, DataError, ModelFileError
from videogru.kinds import Kind
from videogru.models.classifier import Classifier
from videogru.models.differences import PLANES
from videogru.models.digest import weights_digest
from videogru.settings import resolve_config

SETTINGS = "settings.json"
ABSENT = "absent"  # the content of a file that is not there
Form = Literal["means", "maps"]
# What of `data.*` says where sources lie and what training does with them, not what a clip of one is.
_NOT_READING = {
    *("dataset", "data_dir", "cache", "cache_dir", "cache_gib", "decode_timeout_seconds", "max_memory_gib", "augment"),
    *("max_bad", "use_check", "val_fraction", "test_fraction", "split_seed", "suffix", "label_column"),
}
_FREE = {"data_dir", "cache", "cache_dir", "cache_gib", "decode_timeout_seconds", "max_memory_gib"} | {
    *("max_bad", "use_check"),
}
_ENCODER = ("encoder", "encoder_width", "weights", "stem", "frame_differences")
_READERS = {
    "video": ("av", "decord", "torchcodec", "pillow", "numpy"),
    "volume": ("nibabel", "pydicom", "numpy"),
    "image": ("pillow", "numpy"),
}


class FeatureSettings(BaseModel):
    """settings.json. form: means over h and w, or whole maps; step: (D h w) of what is kept of one frame."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    key: str
    form: Form
    step: tuple[int, int, int]
    data: DataConfig


@dataclass(frozen=True, eq=False)
class Encoded:
    """A folder of features, opened: its settings, and the model (in eval mode) whose encoder made them."""

    folder: Path
    settings: FeatureSettings
    classifier: Classifier
    card: ModelCard


def settings_of(classifier: Classifier, card: ModelCard, data: DataConfig) -> FeatureSettings:
    """What is kept of a model's clips, and their folder's key; data: resolved, with the data set's name.

    Where each map becomes one step (model.seq=frames) only its mean is read, so that is kept; a ConvGRU reads maps.
    """
    model = card.model
    form: Form = "means" if model.seq in ("frames", "slices") and model.cell != "convgru" else "maps"
    planes = card.in_channels * PLANES[model.frame_differences]
    size = (1, 1) if form == "means" else classifier.encoder.map_size(planes, card.frame_size)
    parts = {
        "weights": weights_digest(classifier.encoder),
        "settings": {name: getattr(model, name) for name in _ENCODER if name != "weights"},
        "normalized": [card.mean, card.std],
        "frames": [card.in_channels, card.frame_size],
        "reading": reading_of(data),
        "form": form,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return FeatureSettings(key=key, form=form, step=(classifier.encoder.out_channels, *size), data=data)


def reading_of(data: DataConfig) -> dict[str, Any]:
    """The settings that shape what a clip of a source is, as `eval` reads it."""
    return data.model_dump(mode="json", exclude=_NOT_READING)


def versions_of(kind: Kind) -> dict[str, str]:
    """The installed packages that read such sources and compute with them."""
    found = {"videogru": __version__}
    for package in (*_READERS[kind], "torch", "torchvision"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def open_features(folder: Path) -> Encoded:
    """A folder of `videogru encode`.

    Raises ConfigError where it is none, DataError where its parts do not belong together: its model's encoder, mean,
    std or reading is not the one that made the features.
    """
    path, hint = folder / SETTINGS, "Make one: videogru encode DATASET --model FILE"
    if not path.is_file():
        raise ConfigError(f"no folder of features: it has no {SETTINGS}", where=folder, hint=hint)
    try:
        settings = FeatureSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        what = "cannot be read, or was written by another version"
        raise DataError(what, where=path, hint=f"Remove {folder} and encode again.") from error
    try:
        classifier, card = read_model(folder / MODEL_FILE_NAME)
    except ModelFileError as error:
        raise DataError(error.what, where=error.where, hint=f"Remove {folder} and encode again.") from error
    if settings_of(classifier, card, settings.data).key != settings.key:
        raise DataError(
            "the encoder's weights or settings are not those that made the features",
            where=folder / MODEL_FILE_NAME,
            hint=f"Encode with this model: videogru encode {settings.data.dataset} --model {folder / MODEL_FILE_NAME}",
        )
    return Encoded(folder, settings, classifier, card)


class RowKeys:
    """The keys of a corpus's rows. known: entries whose files, where they look as they did, are not read again."""

    def __init__(self, corpus: Corpus, data: DataConfig, known: Mapping[str, Entry]) -> None:
        self.corpus = corpus
        seen = {e.source: Identity(e.content, e.stamp) for e in known.values() if e.stamp}
        self._identities = Identities(corpus, seen)
        self._how = json.dumps([reading_of(data), versions_of(corpus.kind)], sort_keys=True)

    def of(self, row: int) -> Entry:
        """An entry with the row's key, source and content alone."""
        try:
            identity = self._identities.of(row)
        except OSError:
            identity = Identity(ABSENT, "")
        source = self.corpus.manifest.sources[row]
        # What is absent has its name for a content.
        parts = [identity.content, repr(self.corpus.manifest.window(row)), self._how]
        parts += [source] if identity.content == ABSENT else []
        key = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
        return Entry(key, source, identity.content, identity.stamp)


def features_of(encoded: Encoded, corpus: Corpus, rows: NDArray[np.int64]) -> FeatureRows:
    """The features of `rows`. Raises DataError where some are stale or not there, with how many and what to do."""
    known = read_index(encoded.folder, encoded.settings.step)
    keys = RowKeys(corpus, encoded.settings.data, known)
    found = {int(row): known.get(keys.of(int(row)).key) for row in rows}
    stale = sum(entry is None for entry in found.values())
    if stale:
        data = encoded.settings.data
        place = "" if data.data_dir is None else f" --data-dir {data.data_dir}"
        folder = encoded.folder
        raise DataError(
            f"{stale} of {len(found)} rows are not encoded as they are now: a file, the reading or a package changed, "
            "or encoding did not end",
            where=folder,
            hint=f"Encode again what changed: videogru encode {data.dataset} --model {folder}{place} --out {folder}",
        )
    there = {row: entry for row, entry in found.items() if entry is not None}
    return FeatureRows(encoded.folder, encoded.settings.step, there, mapped(encoded.folder, encoded.settings.step))


def settings_over_features(folder: Path, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """The settings of a training from features: what made them stands, the model's others are defaults.

    layers: (origin, settings), later ones win. No recipe takes part: it is for whole nets. Raises ConfigError where a
    layer sets what the features fix to another value, or asks for maps where means were kept.
    """
    encoded = open_features(folder)
    data = encoded.settings.data.model_copy(update={"augment": AugmentConfig()})
    model = encoded.card.model.model_copy(update={"weights": "none"})
    base = {"data": data.model_dump(mode="json"), "model": model.model_dump(mode="json")}
    config = resolve_config((str(folder), base), *layers)
    if str(Path(config.data.dataset).absolute()) == data.dataset:  # the same folder or table
        config = config.model_copy(update={"data": config.data.model_copy(update={"dataset": data.dataset})})
    fixed: list[tuple[str, Any, Any]] = [
        (f"data.{key}", getattr(data, key), getattr(config.data, key))
        for key in DataConfig.model_fields
        if key not in _FREE
    ]
    fixed += [(f"model.{key}", getattr(model, key), getattr(config.model, key)) for key in _ENCODER]
    for key, made, asked in fixed:
        if made != asked:
            what = "nothing augments features" if key == "data.augment" else f"these features were made with {made}"
            raise ConfigError(
                f"{key} = {_changed(made, asked)} cannot be set: {what}",
                where=folder,
                hint="Leave it out, or train on the files: videogru train --dataset ...",
            )
    check_form(encoded, config.model)
    return config


def _changed(made: Any, asked: Any) -> Any:
    """Of sections only what differs."""
    if not isinstance(asked, BaseModel):
        return asked
    return ", ".join(f"{name}={value}" for name, value in asked if value != getattr(made, name))


def check_form(encoded: Encoded, model: ModelConfig) -> None:
    """Raise ConfigError where the model reads maps and only their means were kept."""
    if encoded.settings.form == "means" and (model.seq not in ("frames", "slices") or model.cell == "convgru"):
        key = "model.cell=convgru" if model.cell == "convgru" else f"model.seq={model.seq}"
        raise ConfigError(
            f"{key} reads whole maps, and of these only the means were kept",
            where=encoded.folder,
            hint="Encode with a model of another model.seq than frames, or of model.cell=convgru.",
        )


def classifier_over(encoded: Encoded, config: Config, num_classes: int) -> Classifier:
    """A classifier with the encoder of the features, frozen, and all else drawn from config.train.seed."""
    card = encoded.card
    check_form(encoded, config.model)
    torch.manual_seed(config.train.seed)
    classifier = Classifier(
        config.model,
        in_channels=card.in_channels,
        frame_size=card.frame_size,
        num_classes=num_classes,
        mean=card.mean,
        std=card.std,
    )
    classifier.encoder.load_state_dict(encoded.classifier.encoder.state_dict())
    classifier.encoder.requires_grad_(False)
    return classifier

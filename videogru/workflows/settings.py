"""The settings of a training: defaults, recipe, files and flags in order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videogru.config import Config, DataConfig
from videogru.data.manifests.corpus import open_corpus
from videogru.data.manifests.dataset_card import load_card
from videogru.data.manifests.describe import describe_corpus
from videogru.errors import ConfigError
from videogru.resources import card_names, recipe_path, resource_dir
from videogru.settings import parse_assignments, read_settings_file, resolve_config
from videogru.training.features import settings_over_features


def settings_for_training(name: str | None, flags: Mapping[str, Any], assigned: Mapping[str, Any]) -> Config:
    """Defaults < recipe of the data set < --config (a file, or a recipe's name) < flags < --set.

    With train.features the settings of the features stand in place of defaults and recipe.

    Raises ConfigError where no data set is named, or a key or value does not hold.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if name is not None:
        path = Path(name)
        if not path.suffix and not path.exists():
            found = recipe_path(name)
            if found is None:
                recipes = sorted(p.stem for p in resource_dir("configs").glob("*.yaml"))
                raise ConfigError(f"no recipe {name!r}", hint=f"Recipes: {', '.join(recipes)}; or name a file")
            path = found
        layers.append((str(path), read_settings_file(path)))
    top = [*layers, ("flags", flags), ("--set", assigned)]
    if (features := resolve_config(*top).train.features) is not None:
        return settings_over_features(features, top)
    dataset = resolve_config(*top).data.dataset
    if not dataset:
        raise ConfigError(
            "no data set named", hint="Example: videogru train --dataset adrenalmnist3d   (see videogru data list)"
        )
    recipe = recipe_path(dataset) if dataset in card_names() else None
    recipe = recipe or recipe_path(_kind(resolve_config(*top).data))
    base = [(str(recipe), read_settings_file(recipe))] if recipe else []
    return resolve_config(*base, *top)


def _kind(data: DataConfig) -> str:
    if data.dataset in card_names():
        return load_card(data.dataset).kind
    return open_corpus(data, seed=data.split_seed, for_training=False).kind


def describe_dataset(name: str, data_dir: Path | None, assignments: list[str]) -> dict[str, Any]:
    """What `videogru data info` shows of a data set."""
    flags = {"data.dataset": name, "data.data_dir": None if data_dir is None else str(data_dir)}
    settings = settings_for_training(None, flags, parse_assignments(assignments))
    corpus = open_corpus(settings.data, seed=settings.data.split_seed)
    settings.data.check_read(corpus.kind)
    return describe_corpus(corpus, data=settings.data.for_kind(corpus.kind))

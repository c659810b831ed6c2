from pathlib import Path

import pytest
import yaml

from videogru.errors import ConfigError
from videogru.resources import card_names, data_root, recipe_path, resource_dir
from videogru.settings import resolve_config


def test_cards_and_recipes_are_found() -> None:
    assert {"adrenalmnist3d", "cifar100", "grid_digits", "kinetics400"} <= set(card_names())
    path = recipe_path("adrenalmnist3d")
    assert path is not None
    assert recipe_path("no-such-recipe") is None


def test_every_recipe_holds() -> None:
    recipes = list(resource_dir("configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        resolve_config((recipe.name, yaml.safe_load(recipe.read_text())))


def test_data_root_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDEOGRU_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv("VIDEOGRU_DATA", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="absent"):
        data_root()

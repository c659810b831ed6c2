"""Where cards, recipes and data lie: in a checkout beside the package, in an installed wheel inside it."""

import os
from importlib.resources import files
from pathlib import Path

from videogru.errors import ConfigError


def resource_dir(kind: str) -> Path:
    """The folder `datasets` or `configs`, wherever this copy of videogru keeps it."""
    packaged = Path(str(files("videogru"))) / kind
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / kind


def card_names() -> list[str]:
    """Names of the data sets that ship with a card, sorted."""
    return sorted(path.parent.name for path in resource_dir("datasets").glob("*/dataset.yaml"))


def recipe_path(name: str) -> Path | None:
    """configs/NAME.yaml, or None where there is none."""
    path = resource_dir("configs") / f"{name}.yaml"
    return path if path.is_file() else None


def data_root() -> Path:
    """Where data sets that do not ship are looked for: $VIDEOGRU_DATA, else ~/.cache/videogru."""
    named = os.environ.get("VIDEOGRU_DATA")
    if named and not Path(named).is_dir():
        raise ConfigError("no such folder", where=f"VIDEOGRU_DATA={named}")
    return Path(named) if named else Path.home() / ".cache" / "videogru"

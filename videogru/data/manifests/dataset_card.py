"""The card of a data set: what it is, under which license, and how to get it (datasets/<name>/dataset.yaml)."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from videogru.config import Settings
from videogru.errors import ConfigError, DataError
from videogru.kinds import Kind
from videogru.resources import card_names, data_root, resource_dir
from videogru.settings import nearest

Layout = Literal["manifest", "kinetics", "cifar100", "medmnist"]
_Text = Annotated[str, Field(min_length=1)]


class FileFacts(Settings):
    """Checksum of a published file, of exactly one kind, and its size where that is published."""

    bytes: int | None = Field(default=None, ge=1)
    md5: str | None = Field(default=None, pattern="^[0-9a-f]{32}$")
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one_checksum(self) -> "FileFacts":
        if (self.md5 is None) == (self.sha256 is None):
            raise ValueError("give md5 or sha256")
        return self


class Card(Settings):
    """One data set. `classes` come from labels.txt beside the card, in the order of the class codes."""

    name: _Text = Field(description="name of the card's folder")
    title: _Text
    kind: Kind
    layout: Layout = Field(description="how the files lie: manifest.csv, or the publisher's own layout")
    license: _Text
    citation: _Text
    source: _Text = Field(description="who publishes it, and where")
    how_to_obtain: _Text = Field(description="what to download, from whom, and where to put it")
    bundled: bool = Field(description="the data lie beside the card")
    files: dict[str, FileFacts] = Field(default_factory=dict, description="published files by name")
    classes: tuple[str, ...] = Field(min_length=2)
    folder: Path = Field(description="where the card lies")

    @property
    def home(self) -> Path:
        """Where the data are looked for without --data-dir."""
        return self.folder if self.bundled else data_root() / self.name

    def check_file(self, path: Path) -> None:
        """Compare a file with the published size and checksum; a name the card does not list passes.

        Raises DataError where they differ or the file cannot be read.
        """
        facts = self.files.get(path.name)
        if facts is None:
            return
        try:
            size = path.stat().st_size
            if facts.bytes is not None and size != facts.bytes:
                raise DataError(f"{size} bytes, published are {facts.bytes}", where=path, hint=self.how_to_obtain)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "md5" if facts.md5 else "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=path, hint=self.how_to_obtain) from error
        if found != (facts.md5 or facts.sha256):
            what = f"checksum {found}, published is {facts.md5 or facts.sha256}"
            raise DataError(what, where=path, hint=self.how_to_obtain)


def load_card(name: str) -> Card:
    """The card that ships under this name. Raises ConfigError for an unknown name, DataError for a broken card."""
    names = card_names()
    if name not in names:
        hint = f"{nearest(name, names)} Cards: {', '.join(names)}. Or name a folder or a manifest .csv.".strip()
        raise ConfigError(f"no data set {name!r}", hint=hint)
    return read_card(resource_dir("datasets") / name)


def read_card(folder: Path) -> Card:
    """The card in a folder with dataset.yaml and labels.txt. Raises DataError that names the file and the key."""
    path = folder / "dataset.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot be read as YAML: {error}", where=path) from error
    if not isinstance(content, dict) or {"classes", "folder"} & content.keys():
        raise DataError("expected the card's keys and values; classes belong into labels.txt", where=path)
    classes = read_labels(folder / "labels.txt")
    try:
        card = Card.model_validate({**content, "classes": classes, "folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{key}: {first['msg'].lower()}", where=path, hint=nearest(key, Card.model_fields) or None
        ) from None
    if card.name != folder.name:
        raise DataError(f"name is {card.name!r} but the folder is {folder.name!r}", where=path)
    return card


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of their codes. Raises DataError for a blank or repeated line."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=path) from error
    seen: set[str] = set()
    for line, name in enumerate(names, start=1):
        if not name or name != name.strip() or name in seen:
            raise DataError(f"blank, padded or repeated class name {name!r}", where=f"{path}:{line}")
        seen.add(name)
    return tuple(names)

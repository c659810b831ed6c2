"""Settings laid over each other: recipe, file, flags and --set over the defaults of `config.py`."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from videogru.config import Config
from videogru.errors import ConfigError


def known_keys(settings: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys, in order of definition."""
    keys: list[str] = []
    for name, field in settings.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def nearest(word: str, among: Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest known word, else ''."""
    close = get_close_matches(word, list(among), n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else ""


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`model.hidden_size=256` strings as {dotted key: value}; values are read as YAML.

    Raises ConfigError on a missing '=' or an unknown key, naming the nearest.
    """
    keys = known_keys()
    parsed: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set wants key=value, got {text!r}", hint="Example: --set model.hidden_size=256")
        if key not in keys:
            by_last = [known for known in keys if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            hint = f"Did you mean {by_last[0]}?" if by_last else nearest(key, keys) or "Keys: " + ", ".join(keys)
            raise ConfigError(f"unknown key {key!r} in --set", hint=hint)
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of --set {key} is no YAML: {value!r}") from error
    return parsed


def read_settings_file(path: Path) -> dict[str, Any]:
    """A recipe or saved config as nested dictionaries. Raises ConfigError where it is missing or no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("no such config file", where=path) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"cannot be read as YAML: {error}", where=path) from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError("expected sections data, model and train", where=path)
    try:
        list(_flatten(content))
    except RecursionError as error:  # an alias that refers to what it stands in
        raise ConfigError("sections without an end", where=path) from error
    # An empty section (`train:`) says nothing.
    return {key: value for key, value in content.items() if value is not None}


def resolve_config(*layers: tuple[str, Mapping[str, Any]]) -> Config:
    """Lay (origin, settings) over the defaults, later ones win; settings are nested or dotted.

    Raises ConfigError that names the key, the value, where it came from and the nearest valid key.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, settings in layers:
        for key, value in _flatten(settings):
            merged[key] = value
            origins[key] = origin
    nested: dict[str, Any] = {}
    for key, value in merged.items():
        if type(value) is bool and not _takes_yes_or_no(key):  # pydantic takes true for 1
            what = f"{key} = {str(value).lower()}: a yes or no, where another value is wanted"
            raise ConfigError(what, where=origins[key])
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key!r} goes below a plain value", where=origins[key])
        place[last] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error":
            raise ConfigError(str(first["ctx"]["error"])) from None
        given_in = next((o for k, o in origins.items() if k == key or k.startswith(key + ".")), None)
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"unknown key {key!r}", where=given_in, hint=nearest(key, known_keys()) or None) from None
        raise ConfigError(f"{key} = {first['input']!r}: {first['msg'].lower()}", where=given_in) from None


def _takes_yes_or_no(key: str) -> bool:
    """Whether the default is one; of unknown keys nothing is said here."""
    value: object = Config()
    for part in key.split("."):
        value = getattr(value, part, True)
    return isinstance(value, bool)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

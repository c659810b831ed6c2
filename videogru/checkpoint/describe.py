"""What `videogru model show` says of a model file, in plain values."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from videogru.checkpoint.model_file import ModelCard, read_model
from videogru.config import DataConfig, ModelConfig
from videogru.kinds import KINDS

_NOT_READING = {"dataset", "data_dir", "cache", "cache_dir", "augment", "max_bad", "val_share", "test_share"}


def describe_model(path: Path) -> dict[str, Any]:
    """Facts of a whole and sound model file: what it reads, what it is, how it scored, what wrote it.

    Raises ModelFileError.
    """
    classifier, card = read_model(path)
    parts = classifier.describe()
    steps = parts.pop("steps_per_frame")
    return {
        "file": str(path),
        "megabytes": round(path.stat().st_size / 1e6, 2),
        "format": card.format_version,
        "kind": card.kind,
        "classes": list(card.classes),
        "temporal": card.temporal,
        "reads": reading_facts(card),
        "model": {name: str(value) for name, value in _changed(card.model, ModelConfig()).items()}
        or {"all": "defaults"},
        "parameters": {**parts, "steps_per_frame": steps},
        "trained_on": {
            "dataset": card.dataset,
            "license": card.license,
            "window_seconds": list(card.window_seconds),
            # Epochs are told from 1 on, and kept from 0 on.
            "metrics": {name: round(score + (name == "epoch"), 4) for name, score in card.metrics.items()},
            "teacher": None if card.teacher is None else card.teacher.model_dump(),
        },
        "early_exit": _exit_facts(card),
        "written": {
            "created": card.created.isoformat(timespec="seconds"),
            "golden_sample": "yes" if card.golden else "none: verify has nothing to replay",
            "with": ", ".join(f"{package} {version}" for package, version in card.versions.items()),
        },
    }


def reading_facts(card: ModelCard) -> dict[str, Any]:
    """How a source becomes the model's input; beside the main facts every setting that is not at its default."""
    data = card.data
    main = {"frame_size", "channels", "num_frames", "fit", "sampling"}
    others = {
        key: value for key, value in _changed(data, DataConfig()).items() if key not in main and key not in _NOT_READING
    }
    kind = KINDS[card.kind]
    steps = f"{data.axis} {kind.steps}" if "axis" in kind.settings else kind.steps
    count = "all" if data.sampling == "all" else "1" if not kind.is_sequence else f"up to {data.num_frames}"
    return {
        "clip": f"{count} {steps}" + ("" if not kind.is_sequence else f" ({data.sampling} in training)"),
        "frame": f"{card.frame_size} x {card.frame_size} pixels, {card.in_channels} channels, fit {data.fit}",
        "mean": [round(value, 6) for value in card.mean],
        "std": [round(value, 6) for value in card.std],
        **{key: str(value) for key, value in others.items()},
    }


def _exit_facts(card: ModelCard) -> dict[str, Any] | None:
    """What `stream --exit-risk` stands on."""
    if card.exits is None:
        return None
    clips = card.exits.clips
    return {
        "calibrated_on": f"{clips:,} {card.exits.split} videos of {card.exits.dataset}",
        "least_risk": f"1 / {clips + 1:,}",
    }


def _changed(settings: BaseModel, defaults: BaseModel) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    return {key: value for key, value in settings if value != getattr(defaults, key)}

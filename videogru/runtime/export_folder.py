"""The folder of an exported model: what its card.json says, checked. Nothing heavy is imported here."""

import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videogru.errors import ConfigError, ModelFileError
from videogru.kinds import KINDS

EXPORT_VERSION = 1
CARD_NAME = "card.json"
EXAMPLE_NAME = "example.py"
NEXT = ".next"  # after the name of a state: what a step graph gives for the step after
FORMATS = ("onnx", "openvino", "pt2", "tensorrt")
PRECISIONS = ("fp32", "fp16", "int8")
MODEL_FILES = {
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
    "pt2": ("model.pt2",),
    "tensorrt": ("model.engine",),
}
# What writes and what runs a format: module, and the line that installs it.
PACKAGES = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "pip install 'videogru[onnx]'"),
    "openvino": (("onnx", "onnxscript", "onnxruntime", "openvino"), "pip install 'videogru[openvino]'"),
    "pt2": (("torch",), "pip install torch"),
    "tensorrt": (("onnx", "onnxscript", "onnxruntime", "tensorrt"), "pip install tensorrt 'videogru[onnx]'"),
}
STATE_TYPES: dict[str, tuple[type, ...]] = {"float32": (float, int), "int64": (int,), "bool": (bool,)}
_MAX_STATE = 2**28  # entries
EXPORT_AGAIN = "Copy the folder again, or export again: videogru export MODEL"


@dataclass(frozen=True, slots=True)
class ExportCard:
    """What card.json says: the format and precision, names in and out, labels, and the model's own card as it was.

    files: SHA-256 by name; states: of a step graph, shape and type by name; checks: figures of the export; golden:
    what it said of the golden sample where it was written, None in folders of before.
    """

    folder: Path
    format: str
    precision: str
    step: bool
    files: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    frame_shape: tuple[int, int, int]
    frame_type: str
    states: dict[str, dict[str, Any]]
    checks: dict[str, Any]
    golden: dict[str, Any] | None
    model_card: dict[str, Any]


def is_exported(path: Path) -> bool:
    """Whether `path` is the folder of an export."""
    return path.is_dir() and (path / CARD_NAME).is_file()


def check_packages(format: str) -> None:
    """Raises ConfigError, with the line that installs it, where a package is missing that `format` is written with."""
    modules, line = PACKAGES[format]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"--format {format} needs the package {module}, which is not installed", hint=line)


def read_export_card(folder: Path) -> ExportCard:
    """The checked card.json of a folder. Raises ModelFileError where it does not hold."""
    path = folder / CARD_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=path, hint=EXPORT_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError("damaged: it is no JSON", where=path, hint=EXPORT_AGAIN) from error
    version = content.get("export_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ModelFileError("not the card of an exported model", where=path, hint=EXPORT_AGAIN)
    if version > EXPORT_VERSION:
        raise ModelFileError(
            f"export version {version}, and this videogru reads up to {EXPORT_VERSION}",
            where=path,
            hint="Update videogru: pip install --upgrade videogru",
        )
    try:
        card = ExportCard(
            folder=folder,
            format=content["format"],
            precision=content["precision"],
            step=content["step"],
            files=dict(content["files"]),
            inputs=tuple(content["inputs"]),
            outputs=tuple(content["outputs"]),
            labels=tuple(content["labels"]),
            frame_shape=tuple(content["preprocessing"]["frame_shape"]),
            frame_type=content["preprocessing"]["frame_type"],
            states=dict(content["states"]),
            checks=dict(content["checks"]),
            golden=_golden_of(content),
            model_card=dict(content["model_card"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"damaged: {error!r} is missing or wrong", where=path, hint=EXPORT_AGAIN) from error
    if card.format not in FORMATS or set(card.files) != set(MODEL_FILES.get(card.format, ())):
        raise ModelFileError(
            f"damaged: files {sorted(card.files)} of format {card.format!r}", where=path, hint=EXPORT_AGAIN
        )
    try:
        wrong = [name for name, holds in _agreement(card, content["preprocessing"]).items() if not holds]
    except (KeyError, TypeError, ValueError, AttributeError):
        wrong = ["model_card"]
    if wrong:
        what = f"damaged: {' and '.join(wrong)} of the card do not agree with the rest of it"
        raise ModelFileError(what, where=path, hint=EXPORT_AGAIN)
    return card


def _agreement(card: ExportCard, preprocessing: dict[str, Any]) -> dict[str, bool]:
    """Whether parts of a card hold, by name: most stand in it twice, for who reads it without videogru."""
    model, side = card.model_card, card.model_card["frame_size"]
    normalization = preprocessing["normalization"]
    ends = (*(f"{name}{NEXT}" for name in card.states), "probabilities")
    return {
        "precision": card.precision in PRECISIONS,
        "step": type(card.step) is bool and bool(card.states) == card.step,
        "inputs": ("frame" if card.step else "frames") in card.inputs and set(card.states) <= set(card.inputs),
        "outputs": set(card.outputs) == set(ends),
        "labels": list(card.labels) == list(model["classes"]),
        "frame_shape": card.frame_shape == (model["in_channels"], side, side),
        "frame_type": card.frame_type == KINDS[model["kind"]].frame_type,
        "normalization": [list(normalization[name]) == list(model[name]) for name in ("mean", "std")] == [True, True],
        "states": all(map(_is_state, card.states.values())),
    }


def _is_state(state: dict[str, Any]) -> bool:
    """Whether it can be made: some dimensions of bounded size, a type, and a number to begin with."""
    shape = state["shape"]
    return (
        all(type(size) is int and size > 0 for size in shape)
        and math.prod(shape) <= _MAX_STATE
        and state["type"] in STATE_TYPES
        and type(state["fill"]) in STATE_TYPES[state["type"]]
    )


def _golden_of(content: dict[str, Any]) -> dict[str, Any] | None:
    golden = content.get("golden")
    if golden is None:
        return None
    said = [float(value) for value in golden["probabilities"]]
    if len(said) != len(content["labels"]) or not all(0 <= value <= 1.001 for value in said):
        raise ValueError("the golden sample's probabilities")
    return {"pattern": int(golden["pattern"]), "probabilities": said}


def file_sum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

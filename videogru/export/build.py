"""From a classifier to the files of an export folder."""

import contextlib
import io
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from videogru import __version__
from videogru.checkpoint.golden_sample import PATTERN, golden_batch
from videogru.checkpoint.model_file import ModelCard
from videogru.errors import ConfigError
from videogru.export import clip_graph as graph
from videogru.export import step_graph as stepped
from videogru.kinds import KINDS
from videogru.models.classifier import Classifier
from videogru.runtime.backends import open_exported
from videogru.runtime.export_folder import (
    CARD_NAME,
    EXPORT_VERSION,
    MODEL_FILES,
    ExportCard,
    check_packages,
    file_sum,
)
from videogru.sequence import SequenceBatch


def check_wanted(classifier: Classifier, *, format: str, precision: str, step: bool) -> None:
    """Refuse what cannot be made, before any work: raises ConfigError."""
    if precision == "int8" and format in ("pt2", "tensorrt"):
        raise ConfigError(
            f"--format {format} has no int8 here", hint="Use --format onnx or openvino, or --precision fp16."
        )
    if precision == "int8" and classifier.config.cell in ("hypergru", "convgru"):
        raise ConfigError(
            f"model.cell={classifier.config.cell} has no int8: its recurrent part would stay in float32",
            hint="Use --precision fp16, or a gru, lstm or mingru.",
        )
    if format == "pt2" and classifier.config.cell == "convgru" and not step:
        raise ConfigError(
            "model.cell=convgru has no pt2: torch.export freezes its number of clips", hint="Use --format onnx."
        )
    if step and format == "tensorrt":
        raise ConfigError("--format tensorrt has no --step here", hint="Use --format onnx, openvino or pt2.")
    if step:
        classifier.initial_state(1)  # says what a model lacks that cannot stream
    check_packages(format)
    if format == "tensorrt" and not torch.cuda.is_available():
        raise ConfigError("--format tensorrt builds for the GPU of this machine, and there is none")


def build(
    folder: Path,
    classifier: Classifier,
    card: ModelCard,
    clips: Sequence[SequenceBatch],
    *,
    format: str,
    precision: str,
    step: bool = False,
    traced_before: Any = None,
) -> ExportCard:
    """Write model and card, not compared with anything yet.

    clips: calibrate int8; traced_before: the ONNX model of `to_onnx`, where it is at hand.
    """
    frame_type = frame_type_of(card)
    files = [folder / name for name in MODEL_FILES[format]]
    traced: Any = stepped if step else graph
    if format == "pt2":
        traced.to_pt2(classifier, frame_type, files[0], half=precision == "fp16")
    else:
        from videogru.export import quantize

        model = traced.to_onnx(classifier, frame_type) if traced_before is None else traced_before
        if precision == "int8":
            feeds = stepped.feeds_of(classifier, clips) if step else feeds_of(clips, classifier.config.use_gaps)
            model = quantize.to_int8(model, feeds)
        elif precision == "fp16" and format == "onnx":
            model = quantize.with_half_weights(model)
        write_graph(model, format, files, half=precision == "fp16", length=card.data.num_frames)
    made = ExportCard(
        folder=folder,
        format=format,
        precision=precision,
        step=step,
        files={file.name: file_sum(file) for file in files},
        inputs=traced.input_names(classifier),
        outputs=traced.output_names(classifier),
        labels=card.classes,
        frame_shape=(card.in_channels, card.frame_size, card.frame_size),
        frame_type=str(frame_type).removeprefix("torch."),
        states=stepped.states_of(classifier) if step else {},
        checks={},
        golden=None,
        model_card=card.model_dump(mode="json"),
    )
    write_card(made, card)
    return made


def frame_type_of(card: ModelCard) -> torch.dtype:
    """Of the frames that a graph reads: as the readers give them."""
    return {"float32": torch.float32, "uint8": torch.uint8}[KINDS[card.kind].frame_type]


def write_graph(model: Any, format: str, files: Sequence[Path], *, half: bool, length: int) -> None:
    """Write an ONNX model in a format. half: store weights (openvino) or compute (tensorrt) in float16."""
    content = model.SerializeToString()
    if format == "onnx":
        files[0].write_bytes(content)
    elif format == "openvino":
        write_openvino(content, files[0], half=half)
    else:
        from videogru.runtime.tensorrt import build_engine

        files[0].write_bytes(build_engine(content, half=half, length=length))


def write_openvino(content: bytes, path: Path, *, half: bool) -> None:
    """Write an ONNX graph as OpenVINO's two files."""
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    model = openvino.Core().read_model(io.BytesIO(content))
    # What convert_model does besides, without its telemetry: fewer nodes, which load faster and take half the text.
    apply_moc_transformations(model, cf=False)
    openvino.save_model(model, path, compress_to_fp16=half)
    path.write_bytes(re.sub(rb"\n\s*", b"\n", path.read_bytes()))  # indentation is a tenth of it


def golden_answer(folder: Path, card: ModelCard) -> dict[str, Any]:
    """What an export says of the golden sample where it is written, for `videogru model verify` elsewhere."""
    said = open_exported(folder).probabilities(**golden_case(card))
    return {"pattern": PATTERN, "probabilities": [float(value) for value in said[0]]}


def golden_case(card: ModelCard) -> dict[str, NDArray[Any]]:
    """The golden sample as inputs of an export, by name: one clip."""
    return feeds_of([golden_batch(card)], card.model.use_gaps)[0]


def write_card(made: ExportCard, card: ModelCard) -> None:
    """Write card.json."""
    data = card.data
    content = {
        "export_version": EXPORT_VERSION,
        "format": made.format,
        "precision": made.precision,
        "step": made.step,
        "files": made.files,
        "inputs": made.inputs,
        "outputs": made.outputs,
        "labels": made.labels,
        "preprocessing": {
            "frame_shape": made.frame_shape,
            "frame_type": made.frame_type,
            "frame_range": [0, 255] if made.frame_type == "uint8" else [0, 1],
            "normalization": {"inside the model": True, "mean": card.mean, "std": card.std},
            "num_frames": data.num_frames,
            "sampling": data.sampling,
            "fit": data.fit,
        },
        "states": made.states,
        "checks": made.checks,
        "golden": made.golden,
        "versions": _versions(made.format),
        "model_card": made.model_card,
    }
    (made.folder / CARD_NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions(format: str) -> dict[str, str]:
    versions = {"videogru": __version__}
    for package in ("torch", "onnx", "onnxruntime", "openvino", "tensorrt"):
        if package in ("torch", format) or (format != "pt2" and package.startswith("onnx")):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
    return versions


def feeds_of(clips: Sequence[SequenceBatch], uses_gaps: bool) -> list[dict[str, NDArray[Any]]]:
    """Single clips, without padding, as inputs of a graph by name."""
    feeds = []
    for batch in clips:
        for place, length in enumerate(batch.lengths.tolist()):
            feed = {
                "frames": batch.frames[[place], :length].numpy(),
                "lengths": batch.lengths[[place]].numpy(),
            }
            if uses_gaps:
                assert batch.gaps is not None
                feed["gaps"] = batch.gaps[[place], :length].numpy()
            feeds.append(feed)
    return feeds

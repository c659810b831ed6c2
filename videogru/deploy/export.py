"""`videogru export`: a trained model as a folder that runs without it, kept only where the checks pass."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru import __version__
from videogru.assessing import open_run, with_classes_of
from videogru.checkpoint.golden_sample import PATTERN, golden_batch
from videogru.checkpoint.model_file import ModelCard, read_model
from videogru.config import Config
from videogru.data.loading.batching import OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.manifests.corpus import Corpus
from videogru.deploy import graph, stepped
from videogru.deploy.examples import example_for
from videogru.deploy.gate import SHAPES, Checked, cases_of, check_shapes, check_split, split_to_check
from videogru.errors import ConfigError, DataError
from videogru.inference.predict import Predictor
from videogru.models.classifier import Classifier
from videogru.runtime.backends import open_exported
from videogru.runtime.export_folder import (
    CARD_NAME,
    EXAMPLE_NAME,
    EXPORT_VERSION,
    MODEL_FILES,
    ExportCard,
    check_packages,
    file_sum,
)
from videogru.sequence import SequenceBatch

CALIBRATION_CLIPS = 64
_CLIPS_AT_ONCE = 8
_CALIBRATION_SEED = 0

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class ExportOutcome:
    """The folder that was written, its size in bytes, that of the model file, and the figures of the checks."""

    folder: Path
    bytes: int
    model_bytes: int
    checked: dict[str, Any]

    def lines(self) -> list[str]:
        """What the command prints."""
        share = self.bytes / self.model_bytes
        kept, before = self.checked["accuracy"], self.checked["accuracy_of_pytorch"]
        areas = self.checked.get("auroc"), self.checked.get("auroc_of_pytorch")
        said = [
            f"exported: {self.folder} ({self.bytes / 1e6:.2f} MB, {share:.2f} of the model file)",
            f"{self.checked['split']}: accuracy {kept:.4f}, PyTorch {before:.4f}; {self.checked['flips']} of "
            f"{self.checked['samples']} get another class",
        ]
        if None not in areas:
            said.append(f"{self.checked['split']}: AUROC {areas[0]:.4f}, PyTorch {areas[1]:.4f}")
        return [*said, f"run it: python {self.folder / EXAMPLE_NAME} FRAMES.npy"]


def export_model(
    path: Path,
    *,
    format: str,
    precision: str,
    step: bool,
    max_drop: float,
    out: Path | None,
    data_dir: Path | None,
    say: Say,
) -> ExportOutcome:
    """Export the model of a run or model file to `out`, else beside it, and prove it; nothing stays where it fails.

    step: the graph of one frame of a stream; max_drop: percentage points of accuracy on the validation split that may
    be lost below fp32. Raises GateRefused where a check fails, ConfigError and DataError where it cannot be made or
    compared.
    """
    model, settings, corpus = open_run(path, dataset=None, data_dir=data_dir)
    classifier, card = read_model(model)
    check_wanted(classifier, format=format, precision=precision, step=step)
    target = new_folder(model, out, f"{format}-{precision}{'-step' * step}")
    corpus = with_classes_of(corpus, card.classes, model)
    split = split_to_check(corpus)
    predictor = Predictor(classifier, card, device="cpu", data=settings.data)
    clips = calibration_clips(corpus, predictor, settings)
    say(f"exporting {model} to {format} {precision}")
    with written_whole(target) as folder:
        made = build(folder, classifier, card, clips, format=format, precision=precision, step=step)
        cases = cases_of(clips, classifier.config.use_gaps)
        largest, mean, padding = check_shapes(folder, classifier, cases, precision)
        say(f"probabilities differ from PyTorch's by up to {largest:.2g} at {len(cases)} shapes, in a fresh process")
        scores = check_split(
            predictor,
            Predictor.from_file(folder, device="cpu", data=settings.data),
            corpus,
            split=split,
            batch_size=settings.train.batch_size,
            num_workers=settings.train.num_workers,
            max_drop=max_drop,
            precision=precision,
        )
        if precision != "fp32" and (one := 100 / scores["samples"]) > max_drop:
            few = f"of {scores['samples']} {split} samples one is {one:.3g} points"
            say(f"note: {few}: too few to tell a drop of {max_drop:g} from none")
        checked = Checked(SHAPES, largest, mean, padding, **scores).to_dict() | {"max_drop_points": max_drop}
        if precision == "int8":
            checked["calibration_clips"] = sum(len(batch) for batch in clips)
        made = replace(made, checks=checked, golden=golden_answer(folder, card))
        write_card(made, card)
        (folder / EXAMPLE_NAME).write_text(example_for(made), encoding="utf-8")
        size = sum((folder / name).stat().st_size for name in made.files)
    return ExportOutcome(target, size, model.stat().st_size, checked)


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
        from videogru.deploy import quantize

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
    return torch.float32 if card.kind == "volume" else torch.uint8


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


def calibration_clips(corpus: Corpus, predictor: Predictor, settings: Config) -> list[SequenceBatch]:
    """CALIBRATION_CLIPS training clips, or all there are, drawn once and read as for inference.

    Raises DataError where none can be read.
    """
    rows = corpus.manifest.rows("train")
    chosen = np.random.default_rng(_CALIBRATION_SEED).permutation(rows)[:CALIBRATION_CLIPS]
    dataset = ClipDataset(corpus, data=predictor.data)
    workers = default_workers(corpus, settings.train.num_workers, rows=len(chosen))
    loader = ClipLoader(dataset, OrderedBatches(np.sort(chosen), batch_size=_CLIPS_AT_ONCE), num_workers=workers)
    found = [loaded.batch for loaded in loader if loaded.batch is not None]
    if not found:
        raise DataError("no training clip can be read to export with", where=corpus.name)
    return found


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


def new_folder(model: Path, out: Path | None, name: str) -> Path:
    """Where the export goes: `out`, else beside the model. Raises ConfigError where something is there already."""
    target = out if out is not None else model.parent / name
    if target.resolve() == Path.cwd():
        raise ConfigError("--out names the folder you are in; name a new one", where=target, hint=f"--out {name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            "is there already, and an export never overwrites", where=target, hint="Remove it, or choose another --out."
        )
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, which takes its name at the end; nothing stays where something fails."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if left.is_dir() and not _is_alive(left.suffixes[-2]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.is_dir():
            target.rmdir()  # empty
        partial.rename(target)
    except OSError as error:
        raise ConfigError(f"the export cannot be written: {error.strerror or error}", where=target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(suffix: str) -> bool:
    """Whether the process runs whose number is in the name of a folder; of other names nothing is known."""
    try:
        os.kill(int(suffix.lstrip(".")), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True

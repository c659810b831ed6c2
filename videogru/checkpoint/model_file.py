"""The one file inference needs: tensors in .safetensors, everything else as JSON in its header. Never a pickle."""

import contextlib
import json
import os
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from videogru import __version__
from videogru.config import MAX_CHANNELS, DataConfig, ModelConfig, Split
from videogru.errors import ConfigError, ModelFileError, VideogruError
from videogru.kinds import Kind
from videogru.models.classifier import Classifier, Normalize
from videogru.runtime.export_folder import is_exported, read_export_card

FORMAT_VERSION = 4  # 2: the golden sample; 3: the teacher; 4: the exit table
MODEL_FILE_NAME = "model.safetensors"
_HEADER_KEY = "videogru"
_PER_CHANNEL = Annotated[tuple[FiniteFloat, ...], Field(min_length=1, max_length=MAX_CHANNELS)]


class GoldenSample(BaseModel):
    """Reference output on a synthetic input: float32 logits (K,) on the source `pattern` of `golden_sample.py`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Annotated[int, Field(ge=1)]
    logits: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]


class TeacherFacts(BaseModel):
    """What a model was distilled from: name of the teacher's run or file, SHA-256 of its weights; parts of the loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    alpha: Annotated[FiniteFloat, Field(ge=0, le=1)]
    temperature: Annotated[FiniteFloat, Field(gt=0)]
    features: Annotated[FiniteFloat, Field(ge=0)]


class ExitTable(BaseModel):
    """How sure a model must be to answer before the end of a video; made and read by `inference/early_exit.py`.

    clips: videos of `split` of `dataset` that it was made from; thresholds (M,): confidences, increasing from 0 on;
    changed (M,): of how many of the clips the answer may be another than at their end, where reading stops as soon as
    the confidence lies above the threshold, or above any higher one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    split: Split
    clips: Annotated[int, Field(ge=1, le=10**9)]
    thresholds: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
    changed: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _falls(self) -> "ExitTable":
        if len(self.thresholds) != len(self.changed) or self.changed[-1] != 0 or self.changed[0] > self.clips:
            raise ValueError(f"{len(self.thresholds)} thresholds want as many counts, of {self.clips} clips down to 0")
        rows = list(zip(self.thresholds, self.changed, strict=True))
        if any(a[0] >= b[0] or a[1] <= b[1] for a, b in pairwise(rows)):
            raise ValueError("thresholds must increase and their counts fall")
        return self


class ModelCard(BaseModel):
    """What a model is and how its input is made.

    model: architecture (its `temporal` tells streaming models); data: preprocessing and sampling; classes: names in the
    order of the logits; mean, std: per channel, of frames in 0..1; frame_size: pixels, as in data; versions: packages
    that wrote it; dataset, license: of the training data; window_seconds: lengths of the windows of videos that it was
    trained on (10th, 50th and 90th percentile), empty for whole sources; metrics: scores by name; golden: what
    `videogru model verify` replays, None in files of format 1 and of trainings that did not end; teacher: of a
    distilled model; exits: of a model that `stream --exit-risk` may stop early; created: UTC.
    """

    # A metric may be nan, which JSON has no number for.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")

    format_version: int
    kind: Kind
    classes: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    model: ModelConfig
    data: DataConfig
    in_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    frame_size: Annotated[int, Field(ge=1)]
    mean: _PER_CHANNEL
    std: _PER_CHANNEL
    versions: dict[str, str]
    dataset: str
    license: str
    window_seconds: tuple[FiniteFloat, ...] = ()
    metrics: dict[str, float]
    golden: GoldenSample | None = None
    teacher: TeacherFacts | None = None
    exits: ExitTable | None = None
    created: datetime

    @model_validator(mode="after")
    def _agrees(self) -> "ModelCard":
        if not len(self.mean) == len(self.std) == self.in_channels or min(self.std) <= 0:
            raise ValueError(f"mean and std want {self.in_channels} values, std above 0")
        if self.frame_size != self.data.frame_size:
            raise ValueError(f"frame_size {self.frame_size} but data.frame_size {self.data.frame_size}")
        if self.data.channels not in (None, self.in_channels):
            raise ValueError(f"{self.in_channels} channels but data.channels {self.data.channels}")
        if self.window_seconds and min(self.window_seconds) <= 0:
            raise ValueError(f"window_seconds must lie above 0, got {self.window_seconds}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class names repeat")
        try:
            channels = self.data.for_kind(self.kind).channels
        except ConfigError as error:
            raise ValueError(error.what) from error
        if channels != self.in_channels:
            raise ValueError(f"{self.in_channels} channels, but of kind {self.kind} {channels} are read")
        if self.golden is not None and len(self.golden.logits) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes but a golden sample of {len(self.golden.logits)} logits")
        return self

    @property
    def temporal(self) -> str:
        """Temporal mode: bi or causal."""
        return self.model.temporal


def make_card(
    classifier: Classifier,
    *,
    kind: Kind,
    classes: tuple[str, ...],
    data: DataConfig,
    dataset: str = "",
    license: str = "",
    window_seconds: tuple[float, ...] = (),
    metrics: dict[str, float] | None = None,
    teacher: TeacherFacts | None = None,
) -> ModelCard:
    """The card of a classifier, with this moment and the installed versions. Raises ValueError where they disagree."""
    versions = {"videogru": __version__}
    for package in ("torch", "torchvision", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return ModelCard(
        format_version=FORMAT_VERSION,
        kind=kind,
        classes=classes,
        model=classifier.config,
        data=data,
        in_channels=classifier.in_channels,
        frame_size=classifier.frame_size,
        mean=classifier.mean,
        std=classifier.std,
        versions=versions,
        dataset=dataset,
        license=license,
        window_seconds=window_seconds,
        metrics=metrics or {},
        teacher=teacher,
        created=datetime.now(UTC),
    )


def write_model(path: Path, classifier: Classifier, card: ModelCard) -> None:
    """Write one model file, whole or not at all. Paths of this machine (data_dir, folders of weights) and its frame
    cache are left out: who predicts does not fill a disk without asking.

    Raises ValueError where card and classifier disagree, VideogruError where the file cannot be written.
    """
    if card.model != classifier.config or len(card.classes) != classifier.num_classes:
        raise ValueError("the card describes another classifier")
    if card.frame_size != classifier.frame_size or (card.mean, card.std) != (classifier.mean, classifier.std):
        raise ValueError("the card describes other frames than the classifier takes")
    here = {"data_dir": None, "dataset": Path(card.data.dataset).name, "cache": "none", "cache_dir": None}
    data = card.data.model_copy(update=here)
    model = card.model.model_copy(update={"weights": Path(card.model.weights).name})
    card = card.model_copy(update={"data": data, "model": model})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    content = save(tensors, metadata={_HEADER_KEY: card.model_dump_json()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise VideogruError(
            f"the model cannot be written: {error.strerror}",
            where=path,
            hint="Choose a folder that exists, is writable and has space.",
        ) from error


def read_card(path: Path) -> ModelCard:
    """The card of a model file, of which only the header is read, or of an export. Raises ModelFileError."""
    if is_exported(path):
        return _validated(path, json.dumps(read_export_card(path).model_card))
    with _opened(path) as file:
        return _card_of(path, file.metadata())


def read_model(path: Path, device: torch.device | str = "cpu") -> tuple[Classifier, ModelCard]:
    """The classifier, in eval mode on `device`, and its card. Fetches nothing, runs nothing of the file.

    Raises ModelFileError where the file is not a whole model file of this format: every tensor must be there, with the
    shape and type that the card's architecture has, and none besides.
    """
    with _opened(path) as file:
        card = _card_of(path, file.metadata())
        names = set(file.keys())
        classifier = _empty_classifier(path, card, len(names))
        wanted = classifier.state_dict()
        wrong = [f"missing {name}" for name in wanted if name not in names]
        wrong += [f"unexpected {name}" for name in sorted(names - wanted.keys())]
        if wrong:
            raise _misfit(path, wrong)
        for name, tensor in wanted.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                wrong.append(f"{name} has shape {shape}, not {tuple(tensor.shape)}")
        if wrong:
            raise _misfit(path, wrong)
        # Copies: a mapped file that is cut short later would end the process.
        tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in wanted}
    wrong = [f"{n} is {tensors[n].dtype}, not {wanted[n].dtype}" for n in wanted if tensors[n].dtype != wanted[n].dtype]
    if wrong:
        raise _misfit(path, wrong)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ModelFileError(f"weights are not finite: {broken[0]}", where=path, hint="Train again, with a lower --lr.")
    classifier.load_state_dict(tensors, assign=True)
    classifier.normalize = Normalize(card.mean, card.std)
    classifier.encoder.to(memory_format=torch.channels_last)
    classifier.config = card.model
    return classifier.eval().to(device), card


def find_model(path: Path) -> Path:
    """The model that `path` names: a model file, that of a run folder, or an export. Raises ModelFileError."""
    if is_exported(path):
        return path
    if path.is_dir():
        inside = path / MODEL_FILE_NAME
        if inside.is_file():
            return inside
        raise ModelFileError(
            f"this folder has no {MODEL_FILE_NAME}",
            where=path,
            hint="Name a finished run, a .safetensors model file, or a folder of `videogru export`.",
        )
    if not path.is_file():
        raise _missing(path)
    return path


def newest_model(runs: Path, kind: Kind | None = None) -> Path | None:
    """The newest runs/*/model.safetensors, of that kind of source where one is given; unreadable ones do not count."""
    files = [file for file in runs.glob(f"*/{MODEL_FILE_NAME}") if file.is_file()]
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, str(file)), reverse=True):
        try:
            card = read_card(file)
        except ModelFileError:
            continue
        if kind is None or card.kind == kind:
            return file
    return None


def _opened(path: Path) -> Any:
    if is_exported(path):
        raise ModelFileError(
            "this needs the model that PyTorch runs, and an export has none",
            where=path,
            hint="Name the run or the .safetensors file that it was exported from.",
        )
    if path.is_dir():
        raise ModelFileError("this is a folder, not a model file", where=path, hint=f"Name {path / MODEL_FILE_NAME}.")
    if not path.exists():
        raise _missing(path)
    try:
        # Checks the header's offsets against the size of the file; tensors are mapped, not read.
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        if path.suffix in (".ckpt", ".pth", ".pt", ".pkl", ".bin"):
            what = f"a {path.suffix} file is no model file, and it is not opened: pickles can run code"
            raise ModelFileError(what, where=path, hint=f"Name the {MODEL_FILE_NAME} of the same run.") from error
        what = f"damaged, cut short, or no .safetensors file: {error}"
        raise ModelFileError(what, where=path, hint="Copy it again, or train again.") from error
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error}", where=path, hint="Check the file's permissions.") from error


def _missing(path: Path) -> ModelFileError:
    return ModelFileError("no such file", where=path, hint="Train a model first (videogru train), or check the path.")


def _card_of(path: Path, header: dict[str, str] | None) -> ModelCard:
    """The card in a header, checked; the version first, as a newer format may hold anything."""
    text = (header or {}).get(_HEADER_KEY)
    if text is None:
        raise ModelFileError(
            "these tensors were not written by videogru: the header has no card",
            where=path,
            hint="Train with model.weights=FILE to start from an encoder's tensors.",
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError("the card in the header is no JSON", where=path, hint="Copy the file again.") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ModelFileError(f"format version {version!r} does not exist", where=path, hint="Copy the file again.")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"format version {version}, and videogru {__version__} reads up to {FORMAT_VERSION}",
            where=path,
            hint="Update videogru: pip install --upgrade videogru",
        )
    return _validated(path, text)


def _validated(path: Path, text: str) -> ModelCard:
    try:
        return ModelCard.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "card"
        raise ModelFileError(
            f"the card in the header does not hold: {key}: {first['msg']}",
            where=path,
            hint="The file was edited or written by another version; train again.",
        ) from error


def _empty_classifier(path: Path, card: ModelCard, num_tensors: int) -> Classifier:
    """The card's classifier without memory for its tensors: a header's claims are compared before any is taken."""
    if card.model.num_layers > num_tensors:
        raise _misfit(path, [f"{card.model.num_layers} recurrent layers but {num_tensors} tensors"])
    try:
        with torch.device("meta"):
            return Classifier(
                card.model.model_copy(update={"weights": "none"}),
                in_channels=card.in_channels,
                frame_size=card.frame_size,
                num_classes=len(card.classes),
                mean=card.mean,
                std=card.std,
            )
    except (VideogruError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _misfit(path, [f"no such model can be built ({str(error).splitlines()[0]})"]) from error


def _misfit(path: Path, wrong: list[str]) -> ModelFileError:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return ModelFileError(
        f"tensors and card do not fit: {'; '.join(wrong[:3])}{more}",
        where=path,
        hint="The file was edited or written by another version; train again.",
    )

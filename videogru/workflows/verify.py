"""`videogru model verify`: the golden sample through every backend that is here, beside what was said at training."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from videogru.checkpoint.golden_sample import PATTERN, Replay, compare, devices_here, golden_logits, replay
from videogru.checkpoint.model_file import ModelCard, read_card, read_model
from videogru.errors import ConfigError, GateRefused, VideogruError
from videogru.export import clip_graph as graph
from videogru.export.acceptance import PADDING_TOLERANCE
from videogru.export.build import build, check_wanted, frame_type_of, golden_case
from videogru.export.subprocess_run import ReplayFailed
from videogru.export.subprocess_run import replay as replay_export
from videogru.models.classifier import Classifier
from videogru.runtime.backends import RUNTIMES, check_runtime
from videogru.runtime.export_folder import FORMATS, check_packages, is_exported, read_export_card

BACKENDS = ("torch", "cuda", "mps", *FORMATS)
_FLOOR = -80.0  # of a logarithm: float32 has no smaller probabilities

State = Literal["ok", "FAILED", "not installed", "not supported"]


@dataclass(frozen=True)
class Verdict:
    """What came of one backend; told: the figures, the reason, or the line that installs it."""

    backend: str
    runs_on: str
    state: State
    told: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.runs_on}): {self.state}, {self.told}"


def parse_backends(text: str | None) -> tuple[str, ...]:
    """`torch,onnx` as names; none for None. Raises ConfigError for one that does not exist."""
    names = tuple(name.strip() for name in text.split(",")) if text is not None else ()
    for name in names:
        if name not in BACKENDS:
            raise ConfigError(f"no backend {name!r}", where="--backend", hint=f"Backends: {', '.join(BACKENDS)}")
    return names


def verify(path: Path, backends: Sequence[str] = ()) -> Iterator[Verdict]:
    """Replay the golden sample of a model file or an export, one backend after the other; backends: none for all.

    A model file is run by PyTorch on each device, with one thread and with all, and exported in fp32, for a moment, to
    each format; logits (of exports: logarithms of probabilities) may differ by `golden.TOLERANCE`. An export is run as
    it is: fp32 beside what PyTorch said, fp16 and int8 beside what the export itself said where it was written, whose
    probabilities may differ by the gate's PADDING_TOLERANCE.

    Raises GateRefused where nothing is stored that could be replayed, ConfigError where a backend that was asked for
    is not there, ModelFileError where the file cannot be read.
    """
    for verdict in _verify_export(path, backends) if is_exported(path) else _verify_model(path, backends):
        if backends and verdict.state.startswith("not "):
            raise ConfigError(f"{verdict.backend} is {verdict.state}", where=path, hint=verdict.told)
        yield verdict


def _verify_model(path: Path, backends: Sequence[str]) -> Iterator[Verdict]:
    classifier, card = read_model(path)
    golden = golden_logits(card)
    if golden is None:
        raise _nothing_to_replay(path)
    here = devices_here()
    for name, device in (("torch", "cpu"), ("cuda", "cuda"), ("mps", "mps")):
        if backends and name not in backends:
            continue
        if device in here:
            yield from _in_torch(name, device, classifier, card, golden)
        elif backends:
            yield Verdict(name, _versions("torch"), "not supported", "PyTorch finds no such device on this machine")
    classifier.to("cpu")
    traced = _Once(lambda: graph.to_onnx(classifier, frame_type_of(card)))
    for format in FORMATS:
        if not backends or format in backends:
            yield _as_export(format, classifier, card, golden, traced)


def _in_torch(
    name: str, device: str, classifier: Classifier, card: ModelCard, golden: torch.Tensor
) -> Iterator[Verdict]:
    """On a CPU with one thread, and with all where there are more: sums run in another order then."""
    model = classifier.to(device)
    for threads in sorted({1, torch.get_num_threads()}) if device == "cpu" else [None]:
        with _threads(threads):
            said = replay(model, card)
        count = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
        yield _judged(name, f"{_versions('torch')} eager{count}", compare(said, golden, device))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


class _Once:
    """The traced graph, made when it is first needed: two formats start from it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made


def _as_export(
    format: str, classifier: Classifier, card: ModelCard, golden: torch.Tensor, traced: Callable[[], Any]
) -> Verdict:
    """Export in fp32 to a folder that is removed again, and replay it in a fresh process that knows only the folder."""
    runs_on = _versions(RUNTIMES[format])
    try:
        check_packages(format)
    except ConfigError as error:
        return Verdict(format, runs_on, "not installed", error.hint or error.what)
    try:
        check_wanted(classifier, format=format, precision="fp32", step=False)
    except ConfigError as error:
        return Verdict(format, runs_on, "not supported", error.what)
    with tempfile.TemporaryDirectory() as place:
        try:
            before = None if format == "pt2" else traced()
            build(Path(place), classifier, card, [], format=format, precision="fp32", traced_before=before)
            (said,) = replay_export(Path(place), [golden_case(card)])
        except (VideogruError, ReplayFailed) as error:
            return Verdict(format, runs_on, "FAILED", f"it does not run: {error}")
    return _judged(format, runs_on, _compared_logs(said["probabilities"][0], golden, format))


def _verify_export(path: Path, backends: Sequence[str]) -> Iterator[Verdict]:
    made, card = read_export_card(path), read_card(path)
    if backends and made.format not in backends:
        raise ConfigError(f"this is an export to {made.format}", where=path, hint=f"Use --backend {made.format}.")
    runs_on = f"{made.precision}{', step by step' * made.step}, {_versions(RUNTIMES[made.format])}"
    wanted = golden_logits(card) if made.precision == "fp32" else _said_when_written(made.golden)
    if wanted is None:
        raise _nothing_to_replay(path)
    try:
        check_runtime(made)
    except ConfigError as error:
        yield Verdict(made.format, runs_on, "not installed", error.hint or error.what)
        return
    try:
        (answer,) = replay_export(path, [golden_case(card)])
    except ReplayFailed as error:
        yield Verdict(made.format, runs_on, "FAILED", f"it does not run: {error}")
        return
    said = answer["probabilities"][0]
    if made.precision == "fp32":
        yield _judged(made.format, runs_on, _compared_logs(said, wanted, made.format))
        return
    allowed = PADDING_TOLERANCE[made.precision]
    difference = float((torch.from_numpy(said) - wanted).abs().max())
    same = bool(wanted[int(said.argmax())] >= wanted.max() - allowed)
    yield _judged(made.format, runs_on, Replay(made.format, difference, allowed, same), "probabilities")


def _said_when_written(golden: dict[str, Any] | None) -> torch.Tensor | None:
    if golden is None or golden["pattern"] != PATTERN:
        return None
    return torch.tensor(golden["probabilities"])


def _compared_logs(probabilities: np.ndarray, golden: torch.Tensor, where: str) -> Replay:
    """Logits are known up to what softmax takes out: both as logarithms of probabilities."""
    said = torch.from_numpy(np.log(np.maximum(probabilities.astype(np.float64), np.exp(_FLOOR)))).float()
    return compare(said, golden.log_softmax(dim=0).clamp(min=_FLOOR), where)


def _judged(backend: str, runs_on: str, replay: Replay, of: str = "logits") -> Verdict:
    told = f"{of} differ by {replay.difference:.2g}, allowed {replay.allowed:.2g}"
    told += "" if replay.same_class else ", another class"
    return Verdict(backend, runs_on, "ok" if replay.holds else "FAILED", told)


def _versions(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def _nothing_to_replay(path: Path) -> GateRefused:
    return GateRefused(
        "no golden sample to replay: it was written by another version, or its training did not end",
        where=path,
        hint="Compare its predictions with those of the run: videogru eval MODEL",
    )

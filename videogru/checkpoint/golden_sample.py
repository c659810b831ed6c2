"""The golden sample: what a model said of one made source when it was written, and whether it says so here.

The source is computed from integers alone, so that no patient and no person travels with a model file. It is larger
than the model's frames, a scan is stored oblique and left-handed: it passes through sampling, turning, intensity,
channels and resizing as a file would, and through the whole classifier.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from videogru.checkpoint.model_file import FORMAT_VERSION, GoldenSample, ModelCard, read_model, write_model
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.loading.batching import Item, collate
from videogru.data.readers.source import FrameSource
from videogru.data.readers.volume.scan import Scan
from videogru.data.readers.volume.volume import volume_of
from videogru.errors import DataError
from videogru.kinds import Kind, Unit
from videogru.models.classifier import Classifier
from videogru.sequence import SequenceBatch

PATTERN = 1
TOLERANCE = 1e-3  # of a logit, or of the largest one above 1: processors differ in the order of their sums
_FRAMES, _HEIGHT, _WIDTH = 40, 144, 208
_FRAMES_PER_SECOND = 25
_PATH = Path("golden sample")
# Columns: stored axes in mm along R, A, S; a left-handed, tilted head scan of 5 mm slices.
_AFFINE = np.array([[0, -1.2, 0.5, 40], [1.1, 0, 0.3, -60], [-0.1, 0.2, 4.9, 12], [0, 0, 0, 1.0]])


@dataclass(frozen=True)
class Replay:
    """The golden sample on one device: largest difference of a logit, and how much of it is allowed."""

    device: str
    difference: float
    allowed: float
    same_class: bool

    @property
    def holds(self) -> bool:
        """Whether the model says what it said."""
        return self.same_class and self.difference <= self.allowed


class _Made:
    """A video or still (T 3 H W) uint8 as a source; see `FrameSource`."""

    def __init__(self, kind: Kind) -> None:
        video = kind == "video"
        self.path, self.kind = _PATH, kind
        self.unit: Unit = "seconds" if video else "index"
        steps = _FRAMES if video else 1
        scale = _FRAMES_PER_SECOND if video else 1
        self.positions = np.arange(steps, dtype=np.float64) / scale
        self.extent = (0.0, steps / scale)
        self.pixel_aspect = 1.0
        self.details: dict[str, object] = {}

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([_picture(index) for index in indices])

    def close(self) -> None:
        pass

    def __enter__(self) -> "_Made":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def add_golden_sample(path: Path) -> None:
    """Write into a model file what it says of the golden sample, in float32 on a CPU; else it stays as it is.

    Raises ModelFileError where the file cannot be read, VideogruError where it cannot be written, DataError where the
    model gives no finite score.
    """
    classifier, card = read_model(path)
    logits = tuple(float(value) for value in replay(classifier, card))
    if not all(map(math.isfinite, logits)):
        raise DataError(
            "the training diverged: the model gives no finite score",
            where=path,
            hint="Lower the learning rate (--lr), or clip the gradient (--set train.clip_norm=1).",
        )
    golden = GoldenSample(pattern=PATTERN, logits=logits)
    write_model(path, classifier, card.model_copy(update={"golden": golden, "format_version": FORMAT_VERSION}))


def verify_model(path: Path, device: torch.device | str = "cpu") -> Replay | None:
    """Read a model file and replay its golden sample on a device; None where the file has none that is known here.

    Raises ModelFileError where the file cannot be read.
    """
    classifier, card = read_model(path, device)
    wanted = golden_logits(card)
    return None if wanted is None else compare(replay(classifier, card), wanted, str(device))


def golden_logits(card: ModelCard) -> Tensor | None:
    """What the model said of the golden sample when it was written, (K,) float32; None where that is not known here."""
    if card.golden is None or card.golden.pattern != PATTERN:
        return None
    return torch.tensor(card.golden.logits)


def compare(said: Tensor, wanted: Tensor, device: str) -> Replay:
    """Logits or logarithms of probabilities, (K,) each, beside those that were said when the model was written."""
    difference = float((said - wanted).abs().max())
    allowed = TOLERANCE * max(1.0, float(wanted.abs().max()))
    same = bool(wanted[int(said.argmax())] >= wanted.max() - allowed)
    return Replay(device, difference, allowed, same)


def devices_here() -> list[str]:
    """The devices that torch can compute on: the CPU, and a GPU where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]


@torch.no_grad()
def replay(classifier: Classifier, card: ModelCard) -> Tensor:
    """Logits (K,) float32 of the golden sample; the classifier in eval mode, on its own device."""
    device = next(classifier.parameters()).device
    batch = golden_batch(card)
    gaps = None if batch.gaps is None else batch.gaps.to(device)
    logits: Tensor = classifier(batch.frames.to(device), batch.lengths.to(device), gaps)
    return logits[0].float().cpu()


def golden_batch(card: ModelCard) -> SequenceBatch:
    """The golden sample as the model reads it: one clip, by the card's preprocessing."""
    data = card.data.for_kind(card.kind)
    source = _source(card.kind, data)
    clip = prepare_clip(read_clip(source, data=data), data=data, pixel_aspect=source.pixel_aspect)
    batch = collate(0, [Item(0, -1, clip)]).batch
    assert batch is not None
    return batch


def _source(kind: Kind, data: DataConfig) -> FrameSource:
    if kind != "volume":
        return _Made(kind)
    x, y, z = np.ogrid[:72, :64, :36]
    inside = (x - 36) ** 2 // 9 + (y - 30) ** 2 // 7 + (z - 17) ** 2 // 2 < 90
    voxels = np.where(inside, 200 + _waves(x, y, 3 * z), (x + 3 * y + 5 * z) % 23).astype(np.int16)
    return volume_of(Scan(voxels, 2.0, -100.0, _AFFINE, {}), path=_PATH, data=data)


def _picture(index: int) -> Tensor:
    """Frame (3 H W) uint8: slow waves and sharp edges that move."""
    c, y, x = np.ogrid[:3, :_HEIGHT, :_WIDTH]
    square = (abs(x - 30 - 3 * index) < 20) & (abs(y - 60 - index) < 25 + 0 * c)
    return torch.from_numpy(np.where(square, 230 - 60 * c, _waves(x + 2 * index, y + 16 * c, index)).astype(np.uint8))


def _waves(x: Int64[np.ndarray, "..."], y: Int64[np.ndarray, "..."], t: Int64[np.ndarray, "..."] | int) -> np.ndarray:
    """0..189: triangles, by integer arithmetic alone, so that it is the same everywhere."""
    return np.asarray(abs((x + t) % 126 - 63) + abs((y - t) % 90 - 45) + abs((x + y) % 162 - 81))

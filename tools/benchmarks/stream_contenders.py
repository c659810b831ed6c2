"""Who takes part in the benchmark of streams: ways to answer after each new frame, on one model."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.video import r3d_18

from tools.benchmarks.bench_export import STREAM_FPS, noise
from videogru.checkpoint.model_file import ModelCard, make_card
from videogru.config import DataConfig, ModelConfig
from videogru.export.build import build as build_export
from videogru.export.build import check_wanted
from videogru.models.classifier import Classifier
from videogru.runtime.backends import open_exported

Reader = Callable[[Tensor], Tensor]

STEP, WINDOW, KEPT, CLIP_MODEL = "step", "window", "kept maps", "r3d_18"
CLASSES = 10
POOL = 64  # different frames, which come round again
GAP_SECONDS = 1 / STREAM_FPS


def build(encoder: str, hidden_size: int, num_layers: int, frame_size: int) -> Classifier:
    """A causal model with random weights, in eval mode."""
    torch.manual_seed(0)
    settings = {"encoder": encoder, "hidden_size": hidden_size, "num_layers": num_layers, "temporal": "causal"}
    made = Classifier(
        ModelConfig.model_validate(settings),
        in_channels=3,
        frame_size=frame_size,
        num_classes=CLASSES,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    return made.eval()


def frames_of(classifier: Classifier) -> Tensor:
    """(POOL 1 C H W) uint8, on the device of the model."""
    size = classifier.frame_size
    shape = (POOL, 1, classifier.in_channels, size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(classifier.head.linear.weight.device)


def readers(classifier: Classifier, window: int) -> dict[str, Reader]:
    """PyTorch: functions from the next frame (1 C H W) to logits; each keeps what it needs of the frames before."""
    device = classifier.head.linear.weight.device
    state = classifier.initial_state(1)
    gap = torch.full((1,), GAP_SECONDS, device=device)
    recent: deque[Tensor] = deque(maxlen=window)
    maps: deque[Tensor] = deque(maxlen=window)

    def step(frame: Tensor) -> Tensor:
        nonlocal state
        logits, state = classifier.step(frame, state, gap)
        return logits

    def lengths(count: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([count], device=device), gap.expand(1, count)

    def whole(frame: Tensor) -> Tensor:
        recent.append(frame)
        logits: Tensor = classifier(torch.stack(tuple(recent), dim=1), *lengths(len(recent)))
        return logits

    def kept(frame: Tensor) -> Tensor:
        maps.append(classifier.maps(frame.unsqueeze(1), lengths(1)[0]))
        return classifier.from_maps(torch.cat(tuple(maps), dim=1), *lengths(len(maps)))

    return {STEP: step, WINDOW: whole, KEPT: kept}


def clip_model_reader(classifier: Classifier, window: int) -> Reader:
    """The r3d_18 of torchvision (Tran et al. 2018, arXiv:1711.11248), random weights, on the last frames every time."""
    device = classifier.head.linear.weight.device
    model = r3d_18(num_classes=CLASSES).eval().to(device)
    recent: deque[Tensor] = deque(maxlen=window)

    def read(frame: Tensor) -> Tensor:
        recent.append(frame)
        clip = torch.stack(tuple(recent), dim=2).float().div(255).sub(0.5).div(0.25)
        logits: Tensor = model(clip.expand(-1, 3, -1, -1, -1))  # gray ones, too
        return logits

    return read


def export_readers(
    classifier: Classifier, card: ModelCard | None, window: int, form: str, precision: str, place: Path, threads: int
) -> dict[str, Reader]:
    """The same model as an export: its graph of one frame, and that of whole clips on the last frames.

    They give probabilities. Raises ConfigError where there is no such export, before anything is built.
    """
    check_wanted(classifier, format=form, precision=precision, step=True)
    check_wanted(classifier, format=form, precision=precision, step=False)
    card = card if card is not None else card_of(classifier, window)
    clips = [noise(classifier.frame_size, channels=classifier.in_channels, frames=window)]
    opened = {}
    for step in (True, False):
        folder = place / f"{form}-{precision}{'-step' * step}"
        folder.mkdir()
        build_export(folder, classifier, card, clips, format=form, precision=precision, step=step)
        opened[step] = open_exported(folder, threads=threads, device="cpu")
    state = opened[True].fresh_states(1)
    recent: deque[Tensor] = deque(maxlen=window)

    def step_on(frame: Tensor) -> Tensor:
        nonlocal state
        said, state = opened[True].step_on(frame.numpy(), state, torch.full((1,), GAP_SECONDS).numpy())
        return torch.from_numpy(said)

    def whole(frame: Tensor) -> Tensor:
        recent.append(frame)
        frames, count = torch.stack(tuple(recent), dim=1), len(recent)
        gaps = torch.full((1, count), GAP_SECONDS)
        said = opened[False].probabilities(frames.numpy(), torch.tensor([count]).numpy(), gaps.numpy())
        return torch.from_numpy(said)

    return {f"{form} {precision} {STEP}": step_on, f"{form} {precision} {WINDOW}": whole}


def card_of(classifier: Classifier, window: int) -> ModelCard:
    """Of a model that was never trained."""
    data = DataConfig(dataset="noise", frame_size=classifier.frame_size, num_frames=window).for_kind("video")
    return make_card(classifier, kind="video", classes=tuple(map(str, range(CLASSES))), data=data)

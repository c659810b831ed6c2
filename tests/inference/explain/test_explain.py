"""Explanations against clips that lack frames, prefixes that are cut, and gradients by hand."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tools.experiments.grad_cam import class_map
from videogru.config import ModelConfig
from videogru.inference.explain import explain as module
from videogru.inference.explain.explain import PATCHES, Variants, adds_up, covering_map, explain, windows
from videogru.models.classifier import Classifier
from videogru.sequence import FrameSequence

POOLINGS = ("last", "mean", "max", "attention", "multihead")


def classifier(*, frame_size: int = 16, channels: int = 1, **settings: object) -> Classifier:
    """A small model none of whose parts is at zero, as some start."""
    torch.manual_seed(0)
    model = ModelConfig(**({"encoder_width": 4, "hidden_size": 6} | settings))  # type: ignore[arg-type]
    made = Classifier(
        model, in_channels=channels, frame_size=frame_size, num_classes=3, mean=(0.5,) * channels, std=(0.2,) * channels
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def clip(steps: int, *, frame_size: int = 16, seed: int = 1) -> FrameSequence:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(steps, 1, frame_size, frame_size, generator=generator)
    gaps = 0.5 + torch.rand(steps, generator=generator, dtype=torch.float64)
    return FrameSequence(frames, gaps.cumsum(0), "mm")


@torch.no_grad()
def asked(model: Classifier, whole: FrameSequence, kept: list[int]) -> np.ndarray:
    """Logits of a clip that never had the other frames; those of no frame are the bias."""
    if not kept:
        return model.head.linear.bias.double().numpy()
    gaps = torch.zeros(1, len(kept))
    gaps[0, 1:] = whole.positions[kept].diff()
    return model(whole.frames[kept][None], torch.tensor([len(kept)]), gaps)[0].double().numpy()


CAUSAL = [
    *({"pooling": pooling} for pooling in POOLINGS),
    {"pooling": "attention", "cell": "lstm", "num_layers": 2, "residual": True},
    {"pooling": "max", "cell": "mingru", "frame_differences": "past"},
    {"pooling": "multihead", "cell": "hypergru", "seq": "rows"},
    {"pooling": "attention", "seq": "grid", "local_attention": 3},
    {"pooling": "mean", "use_gaps": True},
    {"pooling": "mean", "cell": "convgru"},
]


@pytest.mark.parametrize("settings", CAUSAL, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_what_causal_steps_add_is_the_logit(settings: dict[str, object], steps: int) -> None:
    model, whole = classifier(temporal="causal", **settings), clip(steps)
    told = explain(model, whole)
    logits = asked(model, whole, list(range(steps)))
    assert told.method == "prefixes"
    assert told.code == logits.argmax()
    np.testing.assert_allclose(told.logits, logits, atol=1e-5)
    assert told.baseline is not None
    assert told.baseline + told.contributions.sum() == pytest.approx(logits[told.code], abs=1e-5)
    prefixes = [asked(model, whole, list(range(stop)))[told.code] for stop in range(steps + 1)]
    np.testing.assert_allclose(told.contributions, np.diff(prefixes), atol=1e-5)


LOOKING_AHEAD = [
    *({"pooling": pooling} for pooling in POOLINGS),
    *({"frame_differences": mode, "seq": seq} for mode in ("past", "both") for seq in ("frames", "rows")),
    {"cell": "none", "frame_differences": "both"},
    {"cell": "none", "temporal": "causal"},
    {"use_gaps": True, "local_attention": 2},
    {"cell": "convgru", "frame_differences": "both"},
]


@pytest.mark.parametrize("settings", LOOKING_AHEAD, ids=str)
def test_left_out_is_as_if_the_frame_had_never_been(settings: dict[str, object]) -> None:
    model, whole = classifier(**settings), clip(7)
    told = explain(model, whole, widths=(1,))
    logit = asked(model, whole, list(range(7)))[told.code]
    lost = [logit - asked(model, whole, [step for step in range(7) if step != gone])[told.code] for gone in range(7)]
    assert told.method == "left out"
    assert told.baseline is None
    np.testing.assert_allclose(told.contributions, lost, atol=1e-5)
    assert told.strongest == int(np.argmax(lost))


@pytest.mark.parametrize("mode", ["none", "both"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_windows_are_shared_among_their_steps(mode: str, steps: int) -> None:
    model, whole = classifier(frame_differences=mode), clip(steps)
    told = explain(model, whole, code=1, widths=(1, 3))
    logit = asked(model, whole, list(range(steps)))[1]
    each = np.zeros((2, steps))
    for place, width in enumerate((1, 3)):
        for step in range(steps):
            for first in range(step - width + 1, step + 1):  # the windows that hold it
                gone = [k for k in range(first, first + width) if 0 <= k < steps]
                rest = [k for k in range(steps) if k not in gone]
                each[place, step] += (logit - asked(model, whole, rest)[1]) / len(gone) / width
    np.testing.assert_allclose(told.contributions, each.mean(axis=0), atol=1e-5)


def test_a_single_step_is_all_there_is_beside_the_bias() -> None:
    model, whole = classifier(), clip(1)
    told = explain(model, whole)
    bias = float(model.head.linear.bias[told.code].detach())
    assert told.contributions.tolist() == [pytest.approx(told.logits[told.code] - bias, abs=1e-6)]


@pytest.mark.parametrize("mode", ["none", "past", "both"])
def test_any_steps_can_be_left_out_however_they_are_batched(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = classifier(frame_differences=mode, use_gaps=True), clip(6)
    choices = [list(kept) for size in range(7) for kept in itertools.combinations(range(6), size)]
    wanted = np.stack([asked(model, whole, kept) for kept in choices])
    np.testing.assert_allclose(Variants(model, whole).logits(choices), wanted, atol=1e-5)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 1)
    np.testing.assert_allclose(Variants(model, whole).logits(choices), wanted, atol=1e-5)
    causal = classifier(temporal="causal", pooling="max")
    parts = explain(causal, whole).contributions
    monkeypatch.undo()
    np.testing.assert_allclose(parts, explain(causal, whole).contributions, atol=1e-5)


def test_windows_hold_every_step_as_often_as_they_are_wide() -> None:
    assert windows(4, 2) == [(0, 1), (0, 2), (1, 3), (2, 4), (3, 4)]
    assert windows(3, 1) == [(0, 1), (1, 2), (2, 3)]
    assert windows(5, 1, most=3) == [(0, 2), (2, 4), (4, 5)]
    for steps, width, most in itertools.product((1, 2, 7, 30), (1, 3, 5), (4, 256)):
        spans = windows(steps, width, most=most)
        held = [sum(start <= step < stop for start, stop in spans) for step in range(steps)]
        assert held == [width] * steps
        assert len(spans) <= min(steps, most) + width - 1


def test_prefixes_need_a_model_that_does_not_look_ahead() -> None:
    assert not adds_up(classifier())
    assert not adds_up(classifier(temporal="causal", cell="none"))
    with pytest.raises(ValueError, match="causal"):
        explain(classifier(), clip(3), method="prefixes")
    left_out = explain(classifier(temporal="causal"), clip(3), method="left out")
    assert left_out.baseline is None


def test_what_cannot_be_explained() -> None:
    with pytest.raises(ValueError, match="eval"):
        explain(classifier().train(), clip(3))
    broken = classifier()
    nn.init.constant_(broken.head.linear.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="no finite score"):
        explain(broken, clip(3))


def test_the_map_is_that_of_the_gradients() -> None:
    model, whole = classifier(seq="grid"), clip(4)
    caught: list[torch.Tensor] = []

    def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        caught.append(output)

    handle = model.encoder.register_forward_hook(keep)
    model(whole.frames[None], torch.tensor([4]))[0, 2].backward()
    handle.remove()
    (maps,) = caught
    assert maps.grad is not None
    weights = maps.grad[1].mean(dim=(1, 2))
    wanted = torch.einsum("d,dhw->hw", weights, maps[1].detach()).clamp(min=0).numpy()
    found = class_map(Variants(model, whole), 2, 1)
    assert found is not None and wanted.max() > 0
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"frame_differences": "past"}, {"frame_differences": "both"}])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_covered_square_is_covered_in_the_input(settings: dict, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole clips with the square painted over, pixel by pixel."""
    model, whole = classifier(**settings), clip(5)
    side, lengths = whole.frames.shape[-1], torch.tensor([5])
    wanted = np.zeros((PATCHES, PATCHES))
    fill = float(whole.frames[step].flatten().median())
    with torch.no_grad():
        logit = model(whole.frames[None], lengths)[0, 1]
        for y, x in itertools.product(range(PATCHES), repeat=2):
            painted = whole.frames.clone()
            for row, column in itertools.product(range(side), repeat=2):
                inside = [
                    (k - 0.5) * side / PATCHES <= p + 0.5 < (k + 1.5) * side / PATCHES
                    for k, p in ((y, row), (x, column))
                ]
                if all(inside):
                    painted[step, 0, row, column] = fill
            wanted[y, x] = max(0.0, float(logit - model(painted[None], lengths)[0, 1]))
    assert wanted.max() > 0
    found = covering_map(Variants(model, whole), 1, step)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 1)
    np.testing.assert_allclose(covering_map(Variants(model, whole), 1, step), found, atol=1e-6)


@pytest.mark.parametrize(
    "encoder", ["small", "airbench", "conv2", "pixels", "sweeps", "resnet18", "mobilenet_v3_small"]
)
def test_every_encoder_has_a_map(encoder: str) -> None:
    model = classifier(encoder=encoder, frame_size=32)
    told = explain(model, clip(3, frame_size=32))
    assert told.where.shape == (PATCHES, PATCHES)
    assert np.isfinite(told.where).all() and told.where.min() >= 0


def test_frames_smaller_than_the_squares() -> None:
    told = explain(classifier(encoder="pixels", frame_size=5), clip(3, frame_size=5))
    assert told.where.shape == (PATCHES, PATCHES)


def test_a_map_of_one_cell_has_no_gradients_map() -> None:
    model = classifier(encoder="resnet18", stem="imagenet", frame_size=32)
    assert model.encoder.map_size(1, 32) == (1, 1)
    assert class_map(Variants(model, clip(3, frame_size=32)), 0, 0) is None
    assert len(explain(model, clip(3, frame_size=32)).contributions) == 3


def test_top_steps_speak_for_the_class() -> None:
    told = explain(classifier(), clip(8))
    top = told.top(3)
    parts = told.contributions
    assert top == [step for step in np.argsort(-parts).tolist()[:3] if parts[step] > 0]
    assert told.top(99) == [step for step in np.argsort(-parts).tolist() if parts[step] > 0]

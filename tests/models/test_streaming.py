"""A stream gives, frame by frame, what the whole model gives for all frames so far; and its state can travel."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.thinning import thinned
from videogru.config import ModelConfig
from videogru.errors import ConfigError
from videogru.models.classifier import Classifier
from videogru.models.streaming import RunningMean, what_reads_ahead

CELLS = ["gru", "lstm", "hypergru", "mingru", "none"]
POOLINGS = ["last", "mean", "max", "attention", "multihead"]
STREAMS, FRAMES = 3, 9


def make(dtype: torch.dtype = torch.float32, **settings) -> Classifier:
    """As after training: no part is the identity, none is zero."""
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 4, "hidden_size": 6, "temporal": "causal", "hyper_size": 3, **settings})
    made = Classifier(config, in_channels=1, frame_size=16, num_classes=5, mean=(0.4,), std=(0.2,))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not parameter.any() or "norm" in name or name.startswith("lookahead"):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return made.to(dtype).eval()


def make_clips(frames: int = FRAMES, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(STREAMS, frames, 1, 16, 16, generator=generator, dtype=dtype)


def make_gaps(frames: int = FRAMES) -> torch.Tensor:
    gaps = torch.rand(STREAMS, frames, generator=torch.Generator().manual_seed(2)) + 0.1
    gaps[:, 0] = 0
    return gaps


def stream(model: Classifier, clips: torch.Tensor, gaps: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after each frame (B T K)."""
    state = model.initial_state(len(clips))
    said = []
    for t in range(clips.shape[1]):
        logits, state = model.step(clips[:, t], state, None if gaps is None else gaps[:, t])
        said.append(logits)
    return torch.stack(said, dim=1)


@torch.no_grad()
def by_prefix(model: Classifier, clips: torch.Tensor, gaps: torch.Tensor | None = None) -> torch.Tensor:
    """What `forward` gives for the first frame, the first two, ... (B T K): the definition."""
    said = []
    for t in range(1, clips.shape[1] + 1):
        lengths = torch.full((len(clips),), t)
        said.append(model(clips[:, :t], lengths, None if gaps is None else gaps[:, :t]))
    return torch.stack(said, dim=1)


def assert_streams_as_it_reads(model: Classifier, frames: int = FRAMES) -> None:
    clips, gaps = make_clips(frames), make_gaps(frames) if model.config.use_gaps else None
    mine, theirs = stream(model, clips, gaps), by_prefix(model, clips, gaps)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
    # Else the test could not fail: every frame changes the answer.
    assert float((theirs[:, 1:] - theirs[:, :-1]).abs().amax(-1).min()) > 1e-4


@pytest.mark.parametrize(
    ("seq", "cell", "pooling"), thinned(["frames", "rows", "cols", "grid"], CELLS, ["mean", "multihead"], every=3)
)
def test_every_serialization_and_cell(seq, cell, pooling):
    assert_streams_as_it_reads(make(seq=seq, cell=cell, pooling=pooling, num_layers=2))


@pytest.mark.parametrize(
    ("pooling", "layer_norm", "cell"), thinned(POOLINGS, [True, False], ["gru", "lstm", "convgru"], every=7)
)
def test_every_pooling(pooling, layer_norm, cell):
    if pooling == "max":
        # A step that is not above those before it changes nothing.
        model = make(cell=cell, pooling="max", layer_norm=layer_norm)
        clips = make_clips()
        torch.testing.assert_close(stream(model, clips), by_prefix(model, clips), rtol=0, atol=1e-5)
    else:
        assert_streams_as_it_reads(make(cell=cell, pooling=pooling, layer_norm=layer_norm))


@pytest.mark.parametrize(
    "settings",
    [
        {"frame_differences": "past"},
        {"residual": True, "num_layers": 3},
        {"residual": True, "num_layers": 2, "cell": "convgru", "hidden_size": 16},
        {"local_attention": 3},
        {"local_attention": 1, "seq": "grid", "attention_heads": 3},
        {"local_attention": 30, "cell": "none"},
        {"use_gaps": True},
        {"use_gaps": True, "seq": "rows", "cell": "lstm"},
        {"use_gaps": True, "cell": "convgru"},
        {"lookahead": 1},
        {"lookahead": 4, "pooling": "attention"},
        {"lookahead": 30, "pooling": "multihead"},
        {"lookahead": 3, "seq": "grid", "pooling": "max"},
        {"lookahead": 2, "cell": "none", "local_attention": 2},
        {"lookahead": 2, "cell": "convgru", "use_gaps": True, "frame_differences": "past"},
        {
            **{"seq": "rows", "cell": "lstm", "num_layers": 2, "residual": True, "frame_differences": "past"},
            **{"local_attention": 3, "use_gaps": True, "pooling": "multihead", "lookahead": 3},
        },
        {"encoder": "sweeps", "seq": "cols"},
        {"encoder": "mobilenet_v3_small", "hidden_size": 12},
        {"cell": "none", "temporal": "bi"},  # without a recurrent part nothing is bidirectional
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_every_other_part(settings):
    model = make(**settings)
    if settings.get("pooling") == "max":
        clips = make_clips()
        torch.testing.assert_close(stream(model, clips), by_prefix(model, clips), rtol=0, atol=1e-5)
    else:
        assert_streams_as_it_reads(model)


def test_bytes():
    model = make(frame_differences="past")
    clips = (make_clips() * 255).to(torch.uint8)
    torch.testing.assert_close(stream(model, clips), by_prefix(model, clips), rtol=0, atol=1e-5)


LONG = {"encoder": "pixels", "frame_differences": "past", "num_layers": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "gru", "pooling": "mean"},
        {"cell": "lstm", "pooling": "attention", "lookahead": 5},
        {"cell": "mingru", "pooling": "multihead", "local_attention": 4, "use_gaps": True},
    ],
    ids=lambda settings: settings["cell"],
)
@pytest.mark.parametrize("frames", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_in_float64(frames, settings):
    model = make(torch.float64, **LONG, **settings)
    clips, gaps = make_clips(frames, torch.float64), make_gaps(frames) if "use_gaps" in settings else None
    said = stream(model, clips, gaps)
    for t in (1, 2, 10, frames // 2, frames - 1, frames):
        with torch.no_grad():
            whole = model(clips[:, :t], torch.full((STREAMS,), t), None if gaps is None else gaps[:, :t])
        torch.testing.assert_close(said[:, t - 1], whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_mean_of_many_steps_loses_no_digits(steps):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, steps, 1, 4, generator=generator) + 3
    scores = torch.randn(1, steps, 1, generator=generator)
    for given in (torch.zeros_like(scores), scores):
        state = {name: torch.full((1, *slot.shape), slot.fill) for name, slot in RunningMean.slots(1, 4).items()}
        there = torch.ones(1, 1, dtype=torch.bool)
        for t in range(values.shape[1]):
            state = RunningMean.absorb(values[:, t : t + 1], given[:, t : t + 1], there, state)
        share = given.double().softmax(1).unsqueeze(-1)
        expected = (values.double() * share).sum(1)
        torch.testing.assert_close(state["mean"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("high", [1e4, -1e4])
def test_scores_of_any_size(high):
    values, scores = torch.rand(1, 5, 1, 2), torch.tensor([0, high, high + 1, -high, high]).view(1, 5, 1)
    state = {name: torch.full((1, *slot.shape), slot.fill) for name, slot in RunningMean.slots(1, 2).items()}
    for t in range(5):
        state = RunningMean.absorb(
            values[:, t : t + 1], scores[:, t : t + 1], torch.ones(1, 1, dtype=torch.bool), state
        )
        expected = (values[:, : t + 1] * scores[:, : t + 1].softmax(1).unsqueeze(-1)).sum(1)
        torch.testing.assert_close(state["mean"], expected)


EVERYTHING = {
    **{"cell": "lstm", "num_layers": 2, "frame_differences": "past", "local_attention": 2, "use_gaps": True},
    **{"pooling": "attention", "lookahead": 2, "seq": "rows"},
}


def test_a_batch_of_streams_equals_single_streams_of_any_age():
    model, clips, gaps = make(**EVERYTHING), make_clips(), make_gaps()
    alone, states = [], []
    for row, age in enumerate((5, 0, 2)):  # streams that begin at different moments are then read together
        state = model.initial_state(1)
        for t in range(age):
            _, state = model.step(clips[row : row + 1, t], state, gaps[row : row + 1, t])
        states.append(state)
        after = state
        for t in range(age, age + 3):
            logits, after = model.step(clips[row : row + 1, t], after, gaps[row : row + 1, t])
        alone.append(logits)
    joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    for further in range(3):
        rows = [(row, age + further) for row, age in enumerate((5, 0, 2))]
        frame = torch.stack([clips[place] for place in rows])
        logits, joined = model.step(frame, joined, torch.stack([gaps[place] for place in rows]))
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-5)
    # And apart again, in another order.
    some = {name: tensor[[2, 0]] for name, tensor in joined.items()}
    both, _ = model.step(clips[[2, 0], 8], some, gaps[[2, 0], 8])
    all_three, _ = model.step(clips[:, 8], joined, gaps[:, 8])
    torch.testing.assert_close(both, all_three[[2, 0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [EVERYTHING, {"cell": "none", "layer_norm": False, "pooling": "last"}])
def test_a_saved_state_goes_on_exactly(settings, tmp_path: Path):
    model, clips, gaps = make(**settings), make_clips(), make_gaps()
    state = model.initial_state(STREAMS)
    for t in range(4):
        _, state = model.step(clips[:, t], state, gaps[:, t])
    save_file(state, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in state.items()}
    for t in range(4, 9):
        logits, state = model.step(clips[:, t], state, gaps[:, t])
        resumed, loaded = model.step(clips[:, t], loaded, gaps[:, t])
        assert torch.equal(logits, resumed)


def test_a_state_keeps_its_size_and_is_not_changed_by_a_step():
    model, clips, gaps = make(**EVERYTHING), make_clips(), make_gaps()
    state = model.initial_state(STREAMS)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for t in range(FRAMES):
        before = {name: tensor.clone() for name, tensor in state.items()}
        _, after = model.step(clips[:, t], state, gaps[:, t])
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert {name: tensor.shape for name, tensor in after.items()} == shapes
        assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() < 64_000 for tensor in after.values())
        state = after
    assert state["frames"].tolist() == [FRAMES] * STREAMS


def test_no_gradients_are_kept():
    model = make()
    logits, state = model.step(make_clips()[:, 0], model.initial_state(STREAMS))
    assert not logits.requires_grad and not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temporal": "bi"}, "model.temporal=bi"),
        ({"temporal": "bi", "cell": "none", "local_attention": 2}, "model.temporal=bi"),
        ({"temporal": "bi", "cell": "none", "use_gaps": True}, "model.temporal=bi"),
        ({"temporal": "bi", "cell": "none", "frame_differences": "both"}, "model.frame_differences=both"),
    ],
)
def test_what_needs_frames_to_come_says_so(settings, key):
    model = make(**settings)
    assert what_reads_ahead(model.config) == key
    for action in (lambda: model.initial_state(1), lambda: model.step(make_clips()[:, 0], {})):
        with pytest.raises(ConfigError, match=f"{key} needs frames to come(.|\n)*model.temporal=causal"):
            action()


def test_what_a_step_does_not_take():
    model, frame = make(), make_clips()[:, 0]
    state = model.initial_state(STREAMS)
    with pytest.raises(ValueError, match="at least one stream"):
        model.initial_state(0)
    with pytest.raises(ValueError, match="takes \\(B 1 16 16\\)"):
        model.step(frame[..., :8], state)
    with pytest.raises(ValueError, match="recurrent.0.hidden is \\(3, 6\\) torch.float32, not \\(2, 6\\)|frames is"):
        model.step(frame[:2], state)
    with pytest.raises(ValueError, match="torch.float64"):
        model.step(frame, state | {"recurrent.0.hidden": state["recurrent.0.hidden"].double()})
    with pytest.raises(ValueError, match="recurrent.0.cell is missing"):
        make(cell="lstm").step(frame, state)
    with pytest.raises(ValueError, match="recurrent.1.hidden is extra"):
        model.step(frame, make(num_layers=2).initial_state(STREAMS))
    gapped = make(use_gaps=True)
    with pytest.raises(ValueError, match="use_gaps"):
        gapped.step(frame, gapped.initial_state(STREAMS))
    with pytest.raises(ValueError, match="eval mode"):
        model.train().step(frame, state)


class OneStep(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, frame: torch.Tensor, state: dict[str, torch.Tensor]):
        return self.model.step(frame, state)


# torch warns so about every nn.GRU it exports.
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.slow
def test_a_step_exports_with_a_free_number_of_streams():
    model = make(pooling="attention", local_attention=2, lookahead=2, frame_differences="past")
    state, frame = model.initial_state(STREAMS), torch.rand(STREAMS, 1, 16, 16)
    batch = torch.export.Dim.DYNAMIC
    shapes = {"frame": {0: batch}, "state": {name: {0: batch} for name in state}}
    exported = torch.export.export(OneStep(model).eval(), (frame, state), dynamic_shapes=shapes, strict=False)
    run = exported.module()
    for streams in (2, 5):
        mine, theirs = model.initial_state(streams), model.initial_state(streams)
        for _ in range(3):
            frame = torch.rand(streams, 1, 16, 16)
            logits, mine = model.step(frame, mine)
            from_graph, theirs = run(frame, theirs)
            torch.testing.assert_close(from_graph, logits, rtol=0, atol=1e-5)


def test_math_of_a_first_frame():
    """One frame: the running mean is the state itself."""
    model = make(pooling="mean", encoder="conv2")
    clips = make_clips()
    with torch.no_grad():
        outputs, _ = model.features(clips[:, :1], torch.ones(STREAMS, dtype=torch.int64))
    _, state = model.step(clips[:, 0], model.initial_state(STREAMS))
    torch.testing.assert_close(state["head.mean"][:, 0], outputs[:, 0])
    assert state["head.total"].tolist() == [[1.0]] * STREAMS and math.isfinite(float(state["head.peak"][0, 0]))

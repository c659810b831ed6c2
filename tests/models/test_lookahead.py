"""The row convolution against its formula and against a model that sees all; and nothing else changes."""

import pytest
import torch
from torch import nn

from videogru.config import ModelConfig
from videogru.errors import ConfigError
from videogru.models.classifier import Classifier
from videogru.models.cost import count_macs
from videogru.models.lookahead import Lookahead
from videogru.settings import resolve_config

LENGTHS = torch.tensor([6, 1, 4])


def make(**settings) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 4, "hidden_size": 6, "temporal": "causal", **settings})
    return Classifier(config, in_channels=1, frame_size=16, num_classes=5, mean=(0.4,), std=(0.2,))


def make_clips() -> torch.Tensor:
    return torch.rand(3, 6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_equals_the_sum_of_the_paper(ahead):
    part = Lookahead(4, ahead).double()
    nn.init.normal_(part.weight)
    states = torch.randn(2, 6, 4, dtype=torch.float64)
    expected = torch.zeros_like(states)
    for t in range(6):
        for j in range(ahead + 1):
            if t + j < 6:
                expected[:, t] += part.weight[j].detach() * states[:, t + j]
    torch.testing.assert_close(part(states), expected, rtol=0, atol=1e-13)


def test_starts_as_the_identity_and_draws_no_random_number():
    without, with_it = make(), make(lookahead=3)
    assert [name for name in with_it.state_dict() if name not in without.state_dict()] == ["lookahead.weight"]
    assert with_it.lookahead is not None and with_it.lookahead.weight.shape == (4, 6)
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_it.state_dict()[name])
    torch.testing.assert_close(with_it.eval()(make_clips(), LENGTHS), without.eval()(make_clips(), LENGTHS))


@pytest.mark.parametrize("cell", ["gru", "convgru", "none"])
@pytest.mark.parametrize("seq", ["frames", "rows"])
def test_a_step_sees_so_many_further_ones_and_no_more(cell, seq):
    if cell == "convgru" and seq == "rows":
        pytest.skip("convgru reads maps")
    model = make(lookahead=2, cell=cell, seq=seq, encoder="conv2").eval()
    nn.init.normal_(model.lookahead.weight)
    clips = make_clips()[:1].requires_grad_()
    outputs, _ = model.features(clips, torch.tensor([6]))
    per_frame = model.steps_per_frame
    (seen,) = torch.autograd.grad(outputs[0, 2 * per_frame].sum(), clips)
    reached = [bool(frame.any()) for frame in seen[0]]
    last = 2 + -(-2 // per_frame)  # rows: two further rows are of the same frame or the next
    first = 2 if cell == "none" else 0
    if per_frame == 1:
        assert reached == [first <= t <= last for t in range(6)]
    else:
        assert not any(reached[last + 1 :]) and reached[2]


def test_no_prediction_depends_on_its_batch_and_padding():
    model = make(lookahead=3, pooling="attention").eval()
    for parameter in (model.lookahead.weight, model.head.query):
        nn.init.normal_(parameter)
    clips = make_clips()
    with torch.no_grad():
        alone = [model(clips[i : i + 1, :n], LENGTHS[i : i + 1]) for i, n in enumerate(LENGTHS.tolist())]
        for clip, length in enumerate(LENGTHS.tolist()):
            clips[clip, length:] = float("nan")
        torch.testing.assert_close(model(clips, LENGTHS), torch.cat(alone), rtol=0, atol=1e-5)
        outputs, _ = model.features(clips, LENGTHS)
        assert not outputs[1, 1:].any()


def test_every_weight_learns():
    model = make(lookahead=3, input_dropout=0.0, dropout=0.0, encoder="conv2")
    nn.functional.cross_entropy(model(make_clips(), LENGTHS), torch.tensor([0, 1, 2])).backward()
    assert bool((model.lookahead.weight.grad != 0).all())


def test_bfloat16_is_not_for_it():
    model = make(lookahead=2).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = model.features(make_clips(), LENGTHS)
    assert outputs.dtype == torch.float32


def test_it_is_counted():
    model = make(lookahead=3)
    assert model.describe()["lookahead"] == 4 * 6
    assert count_macs(model, 6)["lookahead"] == 6 * 4 * 6
    assert "lookahead" not in make().describe()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lookahead": 2}, "model.temporal=causal"),
        ({"lookahead": 2, "temporal": "causal", "pooling": "last"}, "model.pooling=last"),
        ({"lookahead": -1, "temporal": "causal"}, "model.lookahead"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ConfigError, match=words):
        resolve_config(("--set", {f"model.{key}": value for key, value in settings.items()}))


def test_sizes():
    with pytest.raises(ValueError, match="at least 1"):
        Lookahead(4, 0)


# torch warns so about every nn.GRU it exports.
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.slow
def test_exports_with_a_free_batch_size():
    model = make(lookahead=2).eval()
    nn.init.normal_(model.lookahead.weight)
    batch = torch.export.Dim.DYNAMIC
    shapes = {"frames": {0: batch}, "lengths": {0: batch}}
    exported = torch.export.export(model, (make_clips(), LENGTHS), dynamic_shapes=shapes, strict=False).module()
    for size in (2, 5):
        frames, lengths = torch.rand(size, 6, 1, 16, 16), torch.randint(1, 7, (size,))
        torch.testing.assert_close(exported(frames, lengths), model(frames, lengths), rtol=0, atol=1e-5)

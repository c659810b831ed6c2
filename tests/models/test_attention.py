"""Local attention against full attention with a mask written out, and what it leaves alone in the whole model."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from videogru.config import ModelConfig
from videogru.models import attention
from videogru.models.attention import LocalAttention, MultiheadPooling
from videogru.models.classifier import Classifier
from videogru.models.serialize import serialize

LENGTHS = torch.tensor([7, 1, 4, 6])


def make(size: int = 6, radius: int = 2, heads: int = 3, *, causal: bool = False) -> LocalAttention:
    """A layer in float64 that has learned: no parameter at its initial value."""
    torch.manual_seed(0)
    layer = LocalAttention(size, radius, heads, causal=causal).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def make_steps(clips: int, total: int, size: int = 6) -> torch.Tensor:
    return torch.randn(clips, total, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def full_attention(layer: LocalAttention, steps: torch.Tensor, radius: int, heads: int, causal: bool) -> torch.Tensor:
    """One clip (S D) without padding: every pair of steps is scored, and a mask of S x S keeps the near ones."""
    total = len(steps)
    centered = steps - steps.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    queries = normed @ layer.query.weight.T + layer.query.bias
    keys, values = normed @ layer.key.weight.T, normed @ layer.value.weight.T
    mask, places = torch.full((total, total), -math.inf, dtype=torch.float64), torch.zeros(total, total).long()
    for i in range(total):
        for j in range(total):
            if abs(i - j) <= radius and not (causal and j > i):
                mask[i, j], places[i, j] = 0.0, j - i + radius
    answers, width = [], queries.shape[1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(width) + layer.position_bias[head][places] + mask
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        answers.append(weights @ values[:, part])
    return steps + torch.cat(answers, 1) @ layer.project.weight.T + layer.project.bias


@pytest.mark.parametrize(("total", "radius"), [(1, 1), (1, 5), (7, 2), (7, 10), (50, 1), (50, 20), (64, 16), (65, 16)])
@pytest.mark.parametrize(("size", "heads"), [(6, 1), (6, 3), (6, 4), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_full_attention_with_a_mask(total, radius, size, heads, causal):
    layer, steps = make(size, radius, heads, causal=causal), make_steps(2, total, size)
    mine = layer(steps, torch.full((2,), total))
    for clip in range(2):
        expected = full_attention(layer, steps[clip], radius, heads, causal)
        torch.testing.assert_close(mine[clip], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_those_of_full_attention(causal):
    layer = make(radius=4, causal=causal)
    mine, theirs = make_steps(1, 40).requires_grad_(), make_steps(1, 40).requires_grad_()
    own = torch.autograd.grad(layer(mine, torch.tensor([40])).square().sum(), [mine, *layer.parameters()])
    loss = full_attention(layer, theirs[0], 4, 3, causal).square().sum()
    for grad, expected in zip(own, torch.autograd.grad(loss, [theirs, *layer.parameters()]), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_finite_differences(causal, monkeypatch):
    monkeypatch.setattr(attention, "_SHORTEST_BLOCK", 2)  # several blocks, the last one with room
    layer, lengths = make(size=4, heads=2, causal=causal), torch.tensor([7, 3])
    names = [name for name, _ in layer.named_parameters()]

    def run(steps, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (steps, lengths))

    tensors = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (make_steps(2, 7, 4).requires_grad_(), *tensors))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("radius", [1, 3, 9])
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_a_batch_equals_its_members_and_padding_is_zero(causal, radius, garbage):
    layer, steps = make(radius=radius, causal=causal), make_steps(4, 7)
    for clip, length in enumerate(LENGTHS.tolist()):
        steps[clip, length:] = garbage
    steps.requires_grad_()
    outputs = layer(steps, LENGTHS)
    for clip, length in enumerate(LENGTHS.tolist()):
        alone = layer(steps[clip : clip + 1, :length], LENGTHS[clip : clip + 1])
        torch.testing.assert_close(outputs[clip : clip + 1, :length], alone, rtol=0, atol=1e-12)
        assert torch.count_nonzero(outputs[clip, length:]) == 0
    outputs.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool((p.grad != 0).any()) for p in layer.parameters())
    for clip, length in enumerate(LENGTHS.tolist()):
        assert bool((steps.grad[clip, :length] != 0).any(-1).all())
        assert torch.count_nonzero(steps.grad[clip, length:]) == 0


@pytest.mark.parametrize(("causal", "touched"), [(False, range(17, 24)), (True, range(20, 24))])
def test_a_step_reaches_its_neighbors_only(causal, touched):
    layer, steps, lengths = make(radius=3, causal=causal), make_steps(1, 40), torch.tensor([40])
    changed = steps.clone()
    changed[0, 20, 0] += 1  # not all features alike, LayerNorm would not see it
    differs = (layer(steps, lengths) != layer(changed, lengths)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(touched)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_memory_and_time_grow_with_the_steps_not_with_their_square(causal):
    largest, products = [], []
    for total in (1024, 2048):
        layer, steps = make(radius=8, causal=causal), make_steps(1, total).requires_grad_()
        with Largest() as seen, FlopCounterMode(display=False) as flops:
            layer(steps, torch.tensor([total])).sum().backward()
        assert seen.elements < total * total / 8
        largest.append(seen.elements)
        products.append(flops.get_total_flops())
    assert largest[1] == 2 * largest[0]
    assert products[1] == 2 * products[0]


def test_it_starts_as_the_identity_and_learns_to_add():
    torch.manual_seed(0)
    layer, steps = LocalAttention(6, 2, 3), make_steps(4, 7).float()
    outputs = layer(steps, LENGTHS)
    for clip, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(outputs[clip, :length], steps[clip, :length])
    outputs.square().sum().backward()
    assert bool((layer.project.weight.grad != 0).any())


def test_steps_stay_float32_under_autocast():
    layer, steps = make().float(), make_steps(4, 7).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(steps.bfloat16(), LENGTHS)
        assert torch.equal(layer(steps, LENGTHS), make().float()(steps, LENGTHS))
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(0, 1, 1), (4, 0, 1), (4, 1, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        LocalAttention(*sizes)
    with pytest.raises(ValueError, match="at least 1"):
        MultiheadPooling(min(sizes[0], sizes[1]), sizes[2])


def make_model(**settings) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder": "conv2", "hidden_size": 6, "seq": "grid", "attention_heads": 2, **settings})
    return Classifier(config, in_channels=1, frame_size=16, num_classes=5, mean=(0.4,), std=(0.2,))


def make_learned(**settings) -> Classifier:
    model = make_model(**settings)
    for name, parameter in model.named_parameters():
        if name.startswith(("local_attention.", "head.")):
            nn.init.normal_(parameter, std=0.3)
    return model


def make_clips() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(3, 4, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([4, 1, 3])


@pytest.mark.parametrize("temporal", ["bi", "causal"])
def test_the_model_attends_between_serialize_and_recurrent(temporal):
    model = make_learned(local_attention=3, temporal=temporal).eval()
    frames, lengths = make_clips()
    maps = model.encoder(model.normalize(frames.flatten(0, 1))).unflatten(0, (3, 4))
    steps, twin = serialize(maps, "grid"), LocalAttention(128, 3, 2, causal=temporal == "causal")
    twin.load_state_dict(model.local_attention.state_dict())
    expected = model.recurrent(twin(steps, 16 * lengths), 16 * lengths)
    torch.testing.assert_close(model.features(frames, lengths)[0], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(model.recurrent(steps, 16 * lengths), expected, atol=1e-3)


def test_a_causal_model_with_attention_does_not_see_the_future():
    frames, lengths = make_clips()
    changed, lengths = frames.clone(), torch.full_like(lengths, 4)
    changed[:, 3] = 1 - changed[:, 3]
    for temporal in ("causal", "bi"):
        model = make_learned(local_attention=20, temporal=temporal, cell="none").eval()
        same = model.features(frames, lengths)[0][:, :48] == model.features(changed, lengths)[0][:, :48]
        assert bool(same.all()) == (temporal == "causal")


@pytest.mark.parametrize("cell", ["gru", "none"])
@pytest.mark.parametrize("pooling", ["last", "multihead"])
@pytest.mark.parametrize("garbage", [1e3, math.nan])
def test_logits_depend_on_nothing_but_valid_frames(cell, pooling, garbage):
    model = make_learned(local_attention=5, cell=cell, pooling=pooling).eval()
    frames, lengths = make_clips()
    for clip, length in enumerate(lengths.tolist()):
        frames[clip, length:] = garbage
    with torch.no_grad():
        alone = [model(frames[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
        torch.testing.assert_close(model(frames, lengths), torch.cat(alone), rtol=0, atol=1e-4)


def test_every_parameter_of_the_model_gets_a_gradient():
    model = make_learned(local_attention=2, pooling="multihead", input_dropout=0.0, dropout=0.0)
    nn.functional.cross_entropy(model(*make_clips()), torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def test_off_it_leaves_no_trace_and_on_it_changes_no_other_part():
    off, on = make_model(), make_model(local_attention=4)
    assert off.local_attention is None
    assert not any("attention" in name for name in off.state_dict())
    assert set(on.state_dict()) > set(off.state_dict())
    assert all(torch.equal(on.state_dict()[name], tensor) for name, tensor in off.state_dict().items())
    frames, lengths = make_clips()
    assert torch.equal(on.eval()(frames, lengths), off.eval()(frames, lengths))  # its initial value is the identity


def test_describe_counts_it_where_there_is_one():
    facts, without = make_model(local_attention=4).describe(), make_model().describe()
    added = 2 * 128 + 4 * 128 * 128 + 2 * 128 + 2 * 9  # LayerNorm, four matrices, two biases, relative positions
    assert facts["attention"] == added
    assert "attention" not in without
    assert facts["total"] == without["total"] + added


def test_attention_stays_float32_in_a_model_under_autocast():
    model = make_learned(local_attention=3, pooling="multihead").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(*make_clips())
    with torch.no_grad():
        exact = model(*make_clips())
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.05


# torch warns so about every nn.GRU it exports.
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.slow
def test_a_model_with_attention_exports_with_a_free_batch_size():
    model = make_learned(local_attention=3, pooling="multihead").eval()
    batch = torch.export.Dim.DYNAMIC
    shapes = {"frames": {0: batch}, "lengths": {0: batch}}
    exported = torch.export.export(model, make_clips(), dynamic_shapes=shapes, strict=False).module()
    for size in (2, 5):
        frames, lengths = torch.rand(size, 4, 1, 16, 16), torch.randint(1, 5, (size,))
        torch.testing.assert_close(exported(frames, lengths), model(frames, lengths), rtol=0, atol=1e-5)

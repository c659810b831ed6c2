"""What is recomputed is the same: losses, gradients, batch statistics."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.thinning import thinned
from videogru.config import ModelConfig
from videogru.models.checkpointing import by_stage, stages
from videogru.models.classifier import Classifier
from videogru.models.encoders.encoder import ResidualBlock

LENGTHS = torch.tensor([3, 1, 2])


def make(**settings) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 4, "hidden_size": 5, "seq": "grid", "num_layers": 2, **settings})
    return Classifier(
        config, in_channels=3, frame_size=28, num_classes=4, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
    ).train()


def step(net: Classifier, *, autocast: bool = False) -> Tensor:
    """Loss of one training step, gradients left in the parameters; dropout the same each time."""
    frames = torch.rand(3, 3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = net(frames.to(next(net.parameters()).dtype), LENGTHS)
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 2]))
    loss.backward()
    return loss.detach()


def both(net: Classifier, steps: int, *, autocast: bool = False) -> tuple[Classifier, Classifier, Tensor, Tensor]:
    saving = copy.deepcopy(net)
    saving.use_checkpointing(steps)
    return net, saving, step(net, autocast=autocast), step(saving, autocast=autocast)


@pytest.mark.parametrize("encoder", ["small", "airbench", "resnet18", "conv2", "pixels", "sweeps"])
def test_encoders_give_equal_losses_gradients_and_statistics(encoder):
    plain, saving, loss, same = both(make(encoder=encoder, seq="rows"), 2)
    assert torch.equal(loss, same)
    for (name, mine), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
        size = max(1.0, float(mine.grad.abs().max()))
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * size, msg=name)
    buffers = dict(plain.named_buffers())
    for name, buffer in saving.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    if encoder in ("small", "airbench", "resnet18"):
        counts = [buffer for name, buffer in saving.named_buffers() if name.endswith("num_batches_tracked")]
        assert counts and all(int(count) == 1 for count in counts)
        assert all(m.momentum == 0.1 for m in saving.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("cell", "temporal", "steps"),
    thinned(["gru", "lstm", "hypergru", "mingru"], ["bi", "causal"], [1, 4, 1000], every=5),
)
def test_chunks_of_steps_give_equal_gradients(cell, temporal, steps):
    plain, saving, loss, same = both(make(cell=cell, temporal=temporal, residual=True).double(), steps)
    torch.testing.assert_close(loss, same, rtol=0, atol=1e-13)
    for (name, mine), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("encoder", ["small", "sweeps"])
def test_equal_under_autocast(encoder):
    plain, saving, loss, same = both(make(encoder=encoder), 3, autocast=True)
    torch.testing.assert_close(loss, same, rtol=0, atol=1e-6)
    for (name, mine), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5, msg=name)
    for mine, theirs in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(mine, theirs)


class _Saved:
    """Bytes that autograd keeps between forward and backward, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def saved_bytes(net: Classifier, frames: Tensor) -> int:
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        logits = net(frames, torch.full((len(frames),), frames.shape[1]))
    total = sum(saved.storages.values()) - sum(p.numel() * p.element_size() for p in net.parameters())
    del logits
    return total


def test_less_is_kept_for_the_way_back():
    torch.manual_seed(0)
    settings = {"seq": "grid", "encoder": "pixels", "hidden_size": 32, "num_layers": 1}
    frames = torch.rand(2, 1, 3, 28, 28)
    plain = saved_bytes(make(**settings), frames)
    saving = make(**settings)
    saving.use_checkpointing(28)
    assert saved_bytes(saving, frames) < 0.6 * plain


def test_only_training_with_gradients_runs_a_part_twice():
    net = make(encoder="conv2")
    net.use_checkpointing(1000)
    calls = {"conv": 0, "gru": 0}
    for name, part in (("conv", net.encoder.layers[0]), ("gru", net.recurrent.forward_layers[0])):
        part.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    step(net)
    assert calls == {"conv": 2, "gru": 2}
    frames, lengths = torch.rand(2, 1, 3, 28, 28), torch.tensor([1, 1])
    with torch.no_grad():
        net(frames, lengths)
    assert calls == {"conv": 3, "gru": 3}
    net.eval()(frames, lengths).sum().backward()
    assert calls == {"conv": 4, "gru": 4}


def test_each_block_and_each_kernel_begins_a_stage():
    conv2 = stages(make(encoder="conv2").encoder.layers)
    assert [[type(part).__name__ for part in stage] for stage in conv2] == [["Conv2d", "ReLU", "MaxPool2d"]] * 2
    small = stages(make(encoder="small").encoder.layers)
    assert [type(part).__name__ for part in small[0]] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [[type(part) for part in stage] for stage in small[1:]] == [[ResidualBlock]] * 3
    assert len(stages(make(encoder="resnet18").encoder.layers)) == 1 + 8
    assert len(stages(make(encoder="mobilenet_v3_small").encoder.layers)) == 13


def test_dropout_draws_the_same_numbers_again():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    twin, frames = copy.deepcopy(layers), torch.rand(4, 1, 6, 6)
    for net, run in ((layers, layers), (twin, lambda x: by_stage(twin, x))):
        torch.manual_seed(1)
        run(frames).square().sum().backward()
        assert net[2].num_batches_tracked == 1
    for one, other in zip(layers.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_second_backward_pass_is_the_first_again():
    net = make(encoder="small")
    net.use_checkpointing(4)
    loss = net(torch.rand(2, 1, 3, 28, 28), torch.tensor([1, 1])).square().sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    buffers = [buffer.clone() for buffer in net.buffers()]
    second = torch.autograd.grad(loss, list(net.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(buffers, net.buffers(), strict=True))

"""Statements of the article, each put to the test; the docstring of a test names its claim."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

from videogru.config import ModelConfig
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.models.classifier import Classifier
from videogru.models.recurrent import Recurrent
from videogru.settings import resolve_config
from videogru.training.fit import build_classifier, fit
from videogru.workflows.settings import settings_for_training

AS_PRINTED = {"temporal": "causal", "pooling": "last", "layer_norm": False, "input_dropout": 0.0, "dropout": 0.0}


def make(frame_size: int = 224, num_classes: int = 10, **settings) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        ModelConfig(**settings),
        in_channels=3,
        frame_size=frame_size,
        num_classes=num_classes,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ).eval()


def steps_read(model: Classifier, frames: torch.Tensor) -> torch.Tensor:
    """The steps that enter the recurrent part, caught on their way."""
    caught: list[torch.Tensor] = []
    hook = model.recurrent.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    with torch.no_grad():
        model(frames, torch.full((len(frames),), frames.shape[1]))
    hook.remove()
    return caught[0]


@pytest.mark.parametrize(("seq", "steps", "size"), [("grid", 49, 512), ("rows", 7, 3584), ("cols", 7, 3584)])
def test_resnet18_at_224_hands_on_49_cells_or_7_rows(seq, steps, size):
    """Claim: a 7x7x512 map becomes 49 vectors of 512. It does, end to end, and each is the vector of one cell.

    The "3584" of the article is one row of the map, 512 * 7; the flattened map would have 25,088.
    """
    model, frames = make(encoder="resnet18", seq=seq, hidden_size=4), torch.rand(1, 1, 3, 224, 224)
    read = steps_read(model, frames)
    assert read.shape == (1, steps, size)
    with torch.no_grad():
        maps = model.encoder(model.normalize(frames[:, 0]))
    assert maps[0].numel() == 25_088
    first = {"grid": maps[0, :, 0, 0], "rows": maps[0, :, 0, :], "cols": maps[0, :, :, 0]}[seq]
    torch.testing.assert_close(read[0, 0], first.flatten(), rtol=0, atol=1e-5)


class SampleNet(nn.Module):
    """The article's sample network with its axes in order: plain torch, nothing of this package."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, padding=1)
        self.gru = nn.GRU(128 * side, 256, num_layers=2, batch_first=True)
        self.fc = nn.Linear(256, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.max_pool2d(nn.functional.relu(self.conv1(images)), 2)
        maps = nn.functional.max_pool2d(nn.functional.relu(self.conv2(maps)), 2)
        batch, channels, height, width = maps.shape
        rows = maps.permute(0, 2, 1, 3).reshape(batch, height, channels * width)
        return self.fc(self.gru(rows)[0][:, -1])


def test_the_sample_network_is_this_model():
    """Claim: conv, pool, conv, pool, 56 rows of 128 * 56, a GRU of two layers, the last state, a linear head."""
    settings = {"encoder": "conv2", "seq": "rows", "hidden_size": 256, "num_layers": 2}
    model, net = make(**settings, **AS_PRINTED), SampleNet(56, 10)
    tensors = dict(model.encoder.layers.state_dict())
    for index, layer in enumerate(model.recurrent.forward_layers):
        tensors |= {f"gru.{name.replace('_l0', f'_l{index}')}": t for name, t in layer.state_dict().items()}
    tensors |= {f"fc.{name}": tensor for name, tensor in model.head.linear.state_dict().items()}
    net.load_state_dict(tensors)
    images = torch.rand(2, 3, 224, 224)
    assert steps_read(model, images.unsqueeze(1)).shape == (2, 56, 128 * 56)
    with torch.no_grad():
        mine, theirs = model(images.unsqueeze(1), torch.ones(2).long()), net((images - 0.5) / 0.25)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert float(theirs.std()) > 0.01  # no answer that any net would give


def test_the_printed_view_cuts_channels_not_rows():
    """Claim: `x.view(B, 56, -1)` gives the rows of a map. It gives 2 2/7 channels per step, and no row is whole."""
    channel, row, column = torch.meshgrid(torch.arange(128), torch.arange(56), torch.arange(56), indexing="ij")
    step = {}
    for name, places in (("channel", channel), ("row", row), ("column", column)):
        maps = places.expand(2, -1, -1, -1).contiguous()
        step[name] = maps.view(2, 56, -1)[0, 0], rearrange(maps, "b c h w -> b h (c w)")[0, 0]
    assert step["channel"][0].shape == step["channel"][1].shape == (128 * 56,)  # so nothing warns of the mistake
    assert step["channel"][0].bincount().tolist() == [56 * 56, 56 * 56, 16 * 56]
    assert step["row"][0].unique().tolist() == list(range(56))
    assert step["channel"][1].bincount().tolist() == [56] * 128
    assert step["row"][1].unique().tolist() == [0]
    assert step["column"][1].bincount().tolist() == [128] * 56


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("temporal", ["bi", "causal"])
def test_a_gru_has_a_quarter_fewer_parameters_than_an_lstm(num_layers, temporal):
    """Claim: 33 % fewer. It is 3 gates against 4: exactly 25 % fewer, and the LSTM has a third more."""
    count = {}
    for cell in ("gru", "lstm"):
        part = Recurrent(ModelConfig(cell=cell, num_layers=num_layers, temporal=temporal, layer_norm=False), 512)
        count[cell] = sum(parameter.numel() for parameter in part.parameters())
    assert 4 * count["gru"] == 3 * count["lstm"]


def test_hn_of_a_bidirectional_gru_is_the_backward_state_at_step_0():
    """Claim: `hn[-1]` sums up both directions. It is the backward half alone; pooling=last takes both ends."""
    model = make(12, encoder="pixels", encoder_width=4, seq="rows", hidden_size=6, **{**AS_PRINTED, "temporal": "bi"})
    frames = torch.rand(2, 1, 3, 12, 12)
    forward, backward = model.recurrent.forward_layers[0], model.recurrent.backward_layers[0]
    both = nn.GRU(4 * 12, 6, batch_first=True, bidirectional=True)
    both.load_state_dict(
        {**forward.state_dict(), **{f"{name}_reverse": tensor for name, tensor in backward.state_dict().items()}}
    )
    with torch.no_grad():
        outputs, hn = both(steps_read(model, frames))
        logits = model(frames, torch.ones(2).long())
    assert torch.equal(hn[-1], outputs[:, 0, 6:])
    assert not torch.allclose(hn[-1], outputs[:, -1, 6:], atol=1e-3)  # at the last step it has read one step only
    assert torch.equal(hn[-2], outputs[:, -1, :6])
    torch.testing.assert_close(logits, model.head.linear(torch.cat((hn[-2], hn[-1]), dim=-1)), rtol=0, atol=1e-6)


def equation(layer: nn.GRU, steps: torch.Tensor) -> torch.Tensor:
    """The article's h = (1 - z) h + z n, step by step: states (B S H)."""
    inner = steps @ layer.weight_ih_l0.T + layer.bias_ih_l0
    state, states = steps.new_zeros(len(steps), layer.hidden_size), []
    for step in range(steps.shape[1]):
        (r, z, n), (u_r, u_z, u_n) = (
            part.chunk(3, dim=-1) for part in (inner[:, step], state @ layer.weight_hh_l0.T + layer.bias_hh_l0)
        )
        gate = torch.sigmoid(z + u_z)
        state = (1 - gate) * state + gate * torch.tanh(n + torch.sigmoid(r + u_r) * u_n)
        states.append(state)
    return torch.stack(states, dim=1)


def test_the_update_gate_of_torch_is_the_mirror_of_the_equation():
    """Claim: h = (1 - z) h + z n. torch has z and 1 - z the other way round, which the sign of z's weights undoes."""
    torch.manual_seed(0)
    layer, steps = nn.GRU(5, 6, batch_first=True).double(), torch.randn(3, 9, 5, dtype=torch.float64)
    mirrored = nn.GRU(5, 6, batch_first=True).double()
    mirrored.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for tensor in mirrored.parameters():
            tensor[6:12].neg_()  # torch's order of gates: r, z, n
        torch.testing.assert_close(mirrored(steps)[0], equation(layer, steps), rtol=0, atol=1e-12)
        assert not torch.allclose(layer(steps)[0], equation(layer, steps), atol=1e-3)


def test_pixels_in_reading_order_are_the_steps_of_the_pixel_level_serialization():
    """Claim: an image can be read pixel by pixel. With encoder=pixels and seq=grid step y * W + x is that pixel."""
    model, frames = make(8, encoder="pixels", encoder_width=4, seq="grid", hidden_size=4), torch.rand(1, 1, 3, 8, 8)
    read = steps_read(model, frames)
    assert read.shape == (1, 64, 4)
    frames[0, 0, :, 5, 2] = 0
    changed = (steps_read(model, frames) != read).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5 * 8 + 2]


def test_the_recipe_is_the_article_s_whatever_lies_below_it(repository):
    """Claim: Adam 1e-3, decay 1e-4, smoothing 0.1, clipping 1.0, dropouts 0.3 and 0.5, LayerNorm, batches of 128."""
    path = repository / "configs" / "cifar100-article.yaml"
    alone = resolve_config((path.name, yaml.safe_load(path.read_text(encoding="utf-8"))))
    used = settings_for_training("cifar100-article", {}, {})
    unread = {"encoder_width": 0}  # by resnet18
    assert used.data == alone.data
    assert used.train == alone.train
    assert {**used.model.model_dump(), **unread} == {**alone.model.model_dump(), **unread}
    train, model = used.train, used.model
    assert (train.optimizer, train.lr, train.weight_decay, train.label_smoothing) == ("adam", 1e-3, 1e-4, 0.1)
    assert (train.clip_norm, train.batch_size, model.layer_norm) == (1.0, 128, True)
    assert (model.input_dropout, model.dropout, model.hidden_size, model.num_layers) == (0.3, 0.5, 256, 2)


def smoothed(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean cross-entropy to 1 - smoothing on the label and the rest of it spread over all classes alike."""
    wanted = torch.full_like(logits, smoothing / logits.shape[1])
    wanted[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(wanted * logits.log_softmax(1)).sum(1).mean()


def test_a_training_takes_the_steps_of_the_recipe(tmp_path):
    """Claim: label smoothing, clipping by the norm, then Adam with weight decay. Three steps written out agree."""
    smoothing, clip, decay, lr, rows = 0.2, 0.05, 0.1, 0.01, 12
    given = {
        "data": {"dataset": "made-up", "frame_size": 8, "channels": 1},
        "model": {"encoder": "pixels", "encoder_width": 4, "seq": "rows", "hidden_size": 5, "pooling": "last"},
        "train": {"label_smoothing": smoothing, "clip_norm": clip, "weight_decay": decay, "lr": lr, "keep": "last"},
    }
    plain = {"model": {"input_dropout": 0.0, "dropout": 0.0}, "train": {"schedule": "constant", "warmup": 0.0}}
    quick = {"train": {"epochs": 3, "batch_size": rows, "num_workers": 0, "precision": "fp32"}}
    config = resolve_config(("given", given), ("plain", plain), ("quick", quick))
    config = config.model_copy(update={"data": config.data.for_kind("image")})
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(rows) % 3
    names = [f"made-up/{row}" for row in range(rows)]
    manifest = build_manifest(Path(), ("a", "b", "c"), names, labels, np.zeros(rows, dtype=int))
    corpus = Corpus("made-up", "image", ("a", "b", "c"), manifest, images, None, 0, ())
    trained = load_file(fit(config, corpus, tmp_path, resume=False, progress=False, say=lambda text: None).model)

    model = build_classifier(config, 3)
    means, squares = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    for step in (1, 2, 3):
        loss = smoothed(model(torch.from_numpy(images), torch.ones(rows).long()), torch.from_numpy(labels), smoothing)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(float(grad.square().sum()) for grad in grads) ** 0.5
        assert norm > clip  # else clipping would not be seen
        for parameter, mean, square, grad in zip(model.parameters(), means, squares, grads, strict=True):
            pulled = grad * clip / norm + decay * parameter.detach()
            mean.mul_(0.9).add_(0.1 * pulled)
            square.mul_(0.999).add_(0.001 * pulled.square())
            rate = lr / (1 - 0.9**step)
            parameter.data -= rate * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5, msg=name)

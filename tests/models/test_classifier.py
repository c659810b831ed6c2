"""The whole model: it ignores padding and batch mates, learns with all its parameters, and equals its parts."""

import math

import pytest
import torch
from torch import nn

from videogru.config import ModelConfig
from videogru.models.classifier import Classifier, Normalize

SEQS = ["frames", "rows", "cols", "grid"]
LENGTHS = torch.tensor([4, 1, 3])


def make(in_channels: int = 1, frame_size: int = 16, **settings) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 8, "hidden_size": 6, **settings})
    mean, std = (0.4, 0.5, 0.3)[:in_channels], (0.2, 0.3, 0.25)[:in_channels]
    model = Classifier(config, in_channels=in_channels, frame_size=frame_size, num_classes=5, mean=mean, std=std)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not the identity
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def make_frames(channels: int = 1, size: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (3, 4, channels, size, size), generator=generator, dtype=dtype)
    return torch.rand(3, 4, channels, size, size, generator=generator, dtype=dtype)


@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize("cell", ["gru", "lstm", "none"])
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
def test_a_prediction_depends_on_nothing_but_its_valid_frames(seq, cell, pooling):
    model = make(seq=seq, cell=cell, pooling=pooling, num_layers=2, encoder="conv2").eval()
    if model.head.query is not None:
        nn.init.normal_(model.head.query)
    frames = make_frames()
    with torch.no_grad():
        alone = [model(frames[i : i + 1, :n], LENGTHS[i : i + 1]) for i, n in enumerate(LENGTHS.tolist())]
        for garbage in (1e3, math.nan):
            for clip, length in enumerate(LENGTHS.tolist()):
                frames[clip, length:] = garbage
            torch.testing.assert_close(model(frames, LENGTHS), torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["small", "pixels", "mobilenet_v3_small"])
def test_the_same_for_other_encoders_and_uint8(encoder):
    model = make(3, 32, encoder=encoder, temporal="causal").eval()
    frames = make_frames(3, 32, torch.uint8)
    with torch.no_grad():
        alone = [model(frames[i : i + 1, :n], LENGTHS[i : i + 1]) for i, n in enumerate(LENGTHS.tolist())]
        torch.testing.assert_close(model(frames, LENGTHS), torch.cat(alone), rtol=0, atol=1e-5)
        frames[1, 1:] = 255 - frames[1, 1:]
        torch.testing.assert_close(model(frames, LENGTHS), torch.cat(alone), rtol=0, atol=1e-5)


def test_training_keeps_padding_out_of_batch_norm():
    ragged, only_valid = make(), make()
    frames = make_frames()
    valid = torch.cat([frames[i, :n] for i, n in enumerate(LENGTHS.tolist())])
    for clip, length in enumerate(LENGTHS.tolist()):
        frames[clip, length:] = 1e3
    ragged(frames, LENGTHS)
    only_valid.encoder(only_valid.normalize(valid))
    for name, buffer in only_valid.encoder.named_buffers():
        torch.testing.assert_close(dict(ragged.encoder.named_buffers())[name], buffer, msg=name)


def test_training_maps_return_to_their_clips():
    settings = {"encoder": "conv2", "input_dropout": 0.0, "dropout": 0.0}  # no BatchNorm: both modes agree
    for seq in SEQS:
        model = make(seq=seq, **settings)
        frames = make_frames()
        trained = model(frames, LENGTHS)
        torch.testing.assert_close(trained, model.eval()(frames, LENGTHS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize("cell", ["gru", "none"])
def test_every_parameter_gets_a_gradient(seq, cell):
    model = make(seq=seq, cell=cell, pooling="attention", num_layers=2, input_dropout=0.0, dropout=0.0)
    nn.functional.cross_entropy(model(make_frames(), LENGTHS), torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize(("cell", "learns"), [("gru", True), ("none", False)])
def test_only_a_recurrent_part_learns_the_order_of_two_frames(cell, learns):
    model = make(encoder="conv2", cell=cell, input_dropout=0.0, dropout=0.0)
    dark, light = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    frames, labels = torch.stack((torch.cat((dark, light)), torch.cat((light, dark)))), torch.tensor([0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(frames, torch.tensor([2, 2])), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (float(loss.detach()) < 0.05) if learns else (float(loss.detach()) > 0.69)  # ln 2: a guess


def test_bytes_and_fractions_are_the_same_frames():
    model = make(3).eval()
    frames = make_frames(3, dtype=torch.uint8)
    torch.testing.assert_close(model(frames, LENGTHS), model(frames.float() / 255, LENGTHS), rtol=0, atol=1e-5)


def test_normalize_takes_out_mean_and_std_per_channel():
    frames = make_frames(3, dtype=torch.uint8)[0]
    values = Normalize((0.4, 0.5, 0.3), (0.2, 0.3, 0.25))(frames)
    for channel, (mean, std) in enumerate(zip((0.4, 0.5, 0.3), (0.2, 0.3, 0.25), strict=True)):
        expected = (frames[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(values[:, channel].double(), expected, rtol=0, atol=1e-5)


def test_features_are_what_the_head_reads():
    model = make(seq="rows").eval()
    outputs, lengths = model.features(make_frames(), LENGTHS)
    assert lengths.tolist() == [8, 2, 6]  # maps of 2 x 2
    assert outputs.shape == (3, 8, 12)
    assert torch.count_nonzero(outputs[1, 2:]) == 0
    assert torch.equal(model.head(outputs, lengths), model(make_frames(), LENGTHS))


@pytest.mark.parametrize("seq", ["frames", "grid"])
def test_autocast_gives_float32_logits_near_the_exact_ones(seq):
    model = make(seq=seq).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(make_frames(), LENGTHS)
    with torch.no_grad():
        exact = model(make_frames(), LENGTHS)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.05


def test_training_under_autocast_with_ragged_lengths():
    model = make(seq="grid")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(make_frames(), LENGTHS)
    logits.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_float64_all_the_way():
    model = make().double().eval()
    assert model(make_frames(dtype=torch.float64), LENGTHS).dtype == torch.float64


def test_describe_counts_each_part():
    facts = make(encoder="pixels", seq="rows", layer_norm=False).describe()
    rows = 16 * 8
    assert facts == {
        "encoder": 8 + 8,
        "recurrent": 2 * 3 * (rows * 6 + 6 * 6 + 6 + 6),
        "head": 12 * 5 + 5,
        "total": 16 + 2 * 3 * (rows * 6 + 48) + 65,
        "steps_per_frame": 16,
    }


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(B T 1 12 12\), but this model takes \(B T 1 16 16\)"):
        make()(make_frames(size=12), LENGTHS)
    with pytest.raises(ValueError, match="std above 0"):
        Normalize((0.5,), (0.0,))
    with pytest.raises(ValueError, match="3 channels but 1 means"):
        Classifier(ModelConfig(), in_channels=3, frame_size=16, num_classes=2, mean=(0.5,), std=(0.5,))


# torch warns so about every nn.GRU it exports.
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("cell", ["gru", "lstm", "hypergru", "mingru", "none"])
def test_a_model_exports_with_a_free_batch_size(cell):
    model = make(encoder="conv2", pooling="attention", cell=cell, hidden_size=200).eval()
    batch = torch.export.Dim.DYNAMIC
    shapes = {"frames": {0: batch}, "lengths": {0: batch}}
    exported = torch.export.export(model, (make_frames(), LENGTHS), dynamic_shapes=shapes, strict=False).module()
    for size in (2, 5, 40):
        frames, lengths = torch.rand(size, 4, 1, 16, 16), torch.randint(1, 5, (size,))
        torch.testing.assert_close(exported(frames, lengths), model(frames, lengths), rtol=0, atol=1e-5)

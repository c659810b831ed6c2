"""Differences of frames against a loop, in a model against its members, and beside weights of still images."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.models.test_classifier import LENGTHS, make, make_frames
from videogru.config import ModelConfig
from videogru.models.differences import PLANES, add_differences
from videogru.models.encoders.encoder import build_encoder


def by_hand(clip: np.ndarray, mode: str) -> np.ndarray:
    """Of one clip without padding, frame by frame."""
    made = []
    for t, frame in enumerate(clip):
        planes = [frame]
        if mode in ("past", "both"):
            planes.append(frame - clip[t - 1] if t else np.zeros_like(frame))
        if mode == "both":
            planes.append(clip[t + 1] - frame if t + 1 < len(clip) else np.zeros_like(frame))
        made.append(np.concatenate(planes))
    return np.stack(made)


@pytest.mark.parametrize("mode", ["none", "past", "both"])
def test_as_a_loop_makes_them(mode):
    frames = make_frames(3)
    made = add_differences(frames, LENGTHS, mode)
    assert made.shape[2] == 3 * PLANES[mode]
    for clip, length in enumerate(LENGTHS.tolist()):
        wanted = by_hand(frames[clip, :length].numpy(), mode)
        np.testing.assert_array_equal(made[clip, :length].numpy(), wanted)


@pytest.mark.parametrize("mode", ["past", "both"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_never_shows(mode, training):
    model = make(frame_differences=mode, dropout=0.0, input_dropout=0.0).train(training)
    frames = make_frames()
    with torch.no_grad():
        before = model(frames, LENGTHS)
        for clip, length in enumerate(LENGTHS.tolist()):
            frames[clip, length:] = torch.nan
        torch.testing.assert_close(model(frames, LENGTHS), before, rtol=0, atol=1e-6)
        if not training:
            alone = [model(frames[i : i + 1, :n], LENGTHS[i : i + 1]) for i, n in enumerate(LENGTHS.tolist())]
            torch.testing.assert_close(before, torch.cat(alone), rtol=0, atol=1e-5)


def test_the_order_free_twin_tells_moving_from_still_but_not_forth_from_back():
    model = make(frame_differences="both", cell="none", pooling="mean").eval()
    plain = make(cell="none", pooling="mean").eval()
    frames = make_frames()[:1]
    length = torch.tensor([4])
    mixed = frames[:, [2, 0, 3, 1]]
    with torch.no_grad():
        torch.testing.assert_close(plain(frames, length), plain(mixed, length), rtol=0, atol=1e-6)
        assert not torch.allclose(model(frames, length), model(mixed, length), atol=1e-4)


def test_past_is_causal():
    model = make(frame_differences="past", temporal="causal").eval()
    frames = make_frames()
    later = frames.clone()
    later[:, 2:] = 0
    whole = torch.full((3,), 4)
    with torch.no_grad():
        one, other = (model.features(clips, whole)[0][:, :2] for clips in (frames, later))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with pytest.raises(ValidationError, match="frame_differences=past"):
        ModelConfig(temporal="causal", frame_differences="both")


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_nets_answer_as_without_them_at_first(encoder, channels):
    nets = []
    for mode in ("none", "both"):
        torch.manual_seed(0)
        config = ModelConfig(encoder=encoder, stem="imagenet", frame_differences=mode)
        nets.append(build_encoder(config, in_channels=channels, frame_size=64).eval())
    frames = torch.rand(2, 3 * channels, 64, 64, generator=torch.Generator().manual_seed(0))
    for net in nets[1:]:  # what is drawn before the first convolution is rebuilt differs
        net.load_state_dict(
            {k: v for k, v in nets[0].state_dict().items() if v.shape == net.state_dict()[k].shape}, strict=False
        )
    first = [next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)) for net in nets]
    with torch.no_grad():
        first[1].weight[:, :channels] = first[0].weight
        torch.testing.assert_close(nets[0](frames[:, :channels]), nets[1](frames), rtol=0, atol=1e-4)
        assert not first[1].weight[:, channels:].any()


@pytest.mark.parametrize("encoder", ["small", "airbench", "conv2", "pixels", "sweeps"])
def test_every_own_encoder_takes_them(encoder):
    model = make(3, 32, encoder=encoder, frame_differences="both")
    model(make_frames(3, 32), LENGTHS).sum().backward()
    first = next(m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.GRU))
    weight = first.weight if isinstance(first, torch.nn.Conv2d) else first.weight_ih_l0
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0

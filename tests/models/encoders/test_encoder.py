"""Shapes, stems, and weights from torchvision and from files; nothing is downloaded."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from videogru.config import ModelConfig
from videogru.errors import ConfigError
from videogru.models.encoders.encoder import build_encoder


def make(encoder: str = "small", in_channels: int = 3, frame_size: int = 32, **settings):
    torch.manual_seed(0)
    return build_encoder(ModelConfig(encoder=encoder, **settings), in_channels=in_channels, frame_size=frame_size)


@pytest.mark.parametrize(
    ("encoder", "frame_size", "channels", "side"),
    [
        ("small", 28, 128, 4),
        ("small", 32, 128, 4),
        ("small", 64, 128, 4),
        ("small", 112, 128, 7),
        ("small", 224, 128, 7),
        ("airbench", 28, 128, 3),
        ("airbench", 32, 128, 3),
        ("airbench", 112, 128, 7),
        ("airbench", 224, 128, 7),
        ("sweeps", 32, 128, 4),
        ("sweeps", 112, 128, 14),
        ("sweeps", 224, 128, 7),
        ("conv2", 28, 128, 7),
        ("pixels", 28, 32, 28),
        ("resnet18", 32, 512, 4),
        ("resnet34", 224, 512, 7),
        ("resnet50", 112, 2048, 4),
        ("mobilenet_v3_small", 64, 576, 4),
        ("mobilenet_v3_large", 112, 960, 4),
    ],
)
@pytest.mark.parametrize("in_channels", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_maps_have_the_size_that_was_told(encoder, frame_size, channels, side, in_channels):
    built = make(encoder, in_channels, frame_size)
    assert built.training
    assert built.map_size(in_channels, frame_size) == (side, side)
    assert built.training
    assert built.out_channels == channels
    with torch.no_grad():
        maps = built.eval()(torch.rand(1, in_channels, frame_size, frame_size))
    assert maps.shape == (1, channels, side, side)


def test_conv2_at_224_is_the_sample_net_of_the_article():
    assert make("conv2", frame_size=224).map_size(3, 224) == (56, 56)


def test_asking_for_the_map_size_changes_no_tensor():
    built = make()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    built.map_size(3, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())


@pytest.mark.parametrize(
    "encoder", ["small", "airbench", "conv2", "pixels", "sweeps", "resnet18", "mobilenet_v3_small"]
)
def test_every_parameter_gets_a_gradient(encoder):
    # Large frames: BatchNorm over few values makes gradients vanish by itself.
    built = make(encoder, in_channels=1, frame_size=48)
    built(torch.rand(3, 1, 48, 48)).square().mul(torch.rand(1)).mean().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize(
    ("frame_size", "stem", "stride"), [(64, "auto", 1), (65, "auto", 2), (32, "imagenet", 2), (112, "small", 1)]
)
def test_the_stem_follows_the_setting_and_the_frame_size(frame_size, stem, stride):
    resnet = make("resnet18", frame_size=frame_size, stem=stem).layers
    assert resnet.conv1.stride == (stride, stride)
    assert resnet.conv1.kernel_size == ((3, 3) if stride == 1 else (7, 7))
    assert isinstance(resnet.maxpool, nn.Identity) == (stride == 1)
    mobilenet = make("mobilenet_v3_small", frame_size=frame_size, stem=stem).layers
    assert mobilenet.features[0][0].stride == (stride, stride)


def test_wider_is_larger():
    assert make(encoder_width=64).out_channels == 256
    assert make("pixels", encoder_width=7).out_channels == 7


def test_frames_that_vanish_on_the_way_are_a_clear_error():
    with pytest.raises(ConfigError, match=r"3 x 3 pixels are too small") as caught:
        make("conv2", frame_size=3).map_size(3, 3)
    assert caught.value.where == "data.frame_size"


@pytest.fixture
def cached_mobilenet(tmp_path, monkeypatch):
    """A net whose tensors lie where torchvision's download would have put them."""
    torch.manual_seed(5)
    net = models.mobilenet_v3_small()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.MobileNet_V3_Small_Weights.DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[-1])
    return net.eval()


def test_imagenet_weights_give_the_features_of_torchvision(cached_mobilenet):
    frames = torch.rand(1, 3, 96, 96)
    built = make("mobilenet_v3_small", frame_size=96, weights="imagenet").eval()
    torch.testing.assert_close(built(frames), cached_mobilenet.features(frames))


def test_gray_frames_answer_like_equal_red_green_and_blue(cached_mobilenet):
    gray = torch.rand(1, 1, 96, 96)
    built = make("mobilenet_v3_small", in_channels=1, frame_size=96, weights="imagenet").eval()
    expected = cached_mobilenet.features(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(built(gray), expected, rtol=1e-4, atol=1e-5)


def test_a_failed_download_says_what_else_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="could not be fetched") as caught:
        make("resnet18", weights="imagenet")
    assert "model.weights=none" in caught.value.hint
    assert ".safetensors" in caught.value.hint


@pytest.mark.parametrize("encoder", ["small", "airbench", "conv2", "pixels", "sweeps"])
def test_own_encoders_have_no_imagenet_weights(encoder):
    with pytest.raises(ConfigError, match=f"no ImageNet weights for the encoder '{encoder}'"):
        make(encoder, weights="imagenet")


def test_weights_from_a_file_of_the_encoder_and_of_a_whole_model(tmp_path):
    saved = make()
    own, whole = tmp_path / "encoder.safetensors", tmp_path / "model.safetensors"
    save_file(saved.layers.state_dict(), own)
    tensors = {f"encoder.{name}": tensor for name, tensor in saved.state_dict().items()}
    save_file({**tensors, "head.linear.weight": torch.zeros(2, 2)}, whole)
    for path in (own, whole):
        torch.manual_seed(9)
        built = build_encoder(ModelConfig(weights=str(path)), in_channels=3, frame_size=32)
        assert all(torch.equal(t, saved.state_dict()[n]) for n, t in built.state_dict().items())


def test_weights_from_a_file_with_torchvision_names(tmp_path):
    torch.manual_seed(2)
    net = models.mobilenet_v3_small().eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    built = make("mobilenet_v3_small", frame_size=96, weights=str(tmp_path / "net.safetensors")).eval()
    frames = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(built(frames), net.features(frames))


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "encoder.safetensors"
    tensors = make("conv2").layers.state_dict()
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"conv1.weight has shape \(64, 3, 3, 3\), not \(64, 1, 3, 3\)") as caught:
        make("conv2", in_channels=1, weights=str(path))
    assert caught.value.where == str(path)
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="unexpected extra"):
        make("conv2", weights=str(path))
    del tensors["conv2.bias"]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"missing conv2.bias"):
        make("conv2", weights=str(path))


class Trap:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.ckpt", "weights.safetensors"])
def test_a_pickle_is_never_opened(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match="cannot be read" if name.endswith("safetensors") else "can run code"):
        make(weights=str(path))


def test_a_missing_file_of_weights_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        make(weights=str(tmp_path / "absent.safetensors"))
    assert caught.value.where == str(tmp_path / "absent.safetensors")

"""The 2-D CNN that reads one frame: (N C H W) -> feature maps (N D h w).

Own nets: `small` (a cheap residual net), `airbench` (learns small images in few epochs), `conv2` (the article's sample
net), `pixels` (a 1x1 convolution), `sweeps` (GRUs instead of convolutions). The others are torchvision's, with their
tensor names, without their pooling and classifier.
"""

from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from videogru.config import ModelConfig
from videogru.errors import ConfigError
from videogru.models.checkpointing import by_stage
from videogru.models.differences import PLANES
from videogru.models.encoders.sweeps import Sweep

OWN_NETS = ("small", "airbench", "conv2", "pixels", "sweeps")
SMALL_STEM_PIXELS = 64  # stem=auto: below and at this side, a torchvision net gets a stem that does not down-sample
_DROPPED_LAYERS = ("fc.", "classifier.")  # heads of torchvision's nets, ignored in a file of weights
_MODEL_FILE_PREFIX = "encoder.layers."  # where a videogru model file keeps its encoder


class Encoder(nn.Module):
    """One frame to one map: (N C H W) float -> (N D h w), D = `out_channels`; no frame sees another in eval mode.

    checkpointing: in training the stages are recomputed on the way back.
    """

    def __init__(self, layers: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.layers = layers
        self.out_channels = out_channels
        self.checkpointing = False

    def forward(self, frames: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        """Feature maps, one per frame."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return by_stage(self.layers, frames)
        maps: Tensor = self.layers(frames)
        return maps

    def map_size(self, in_channels: int, frame_size: int) -> tuple[int, int]:
        """(h, w) of the maps of square frames, from shapes alone. Raises ConfigError where frames are too small."""
        training = self.training
        tensors = {name: tensor.to("meta") for name, tensor in self.state_dict().items()}
        frames = torch.empty(1, in_channels, frame_size, frame_size, device="meta", dtype=next(self.parameters()).dtype)
        try:
            maps = torch.func.functional_call(self.eval(), tensors, (frames,))
        except RuntimeError as error:
            raise ConfigError(
                f"frames of {frame_size} x {frame_size} pixels are too small for this encoder",
                where="data.frame_size",
                hint="Raise data.frame_size, or choose model.encoder=small or pixels.",
            ) from error
        finally:
            self.train(training)
        return int(maps.shape[-2]), int(maps.shape[-1])


def build_encoder(config: ModelConfig, *, in_channels: int, frame_size: int) -> Encoder:
    """The encoder of `config` for square frames of `frame_size` pixels, with the weights it names.

    in_channels: of a frame; with model.frame_differences the encoder takes that many times PLANES. What torchvision's
    nets make of the differences starts at zero, so that weights of still images answer as they did.
    The 3x3 stem of a ResNet (model.stem) has no counterpart in the ImageNet weights and starts from random values.
    Raises ConfigError where weights do not exist, cannot be fetched or do not fit.
    """
    if config.weights == "imagenet" and config.encoder in OWN_NETS:
        raise ConfigError(
            f"there are no ImageNet weights for the encoder {config.encoder!r}",
            where="model.weights",
            hint="Use model.weights=none, or a torchvision encoder such as model.encoder=resnet18.",
        )
    layers: nn.Module
    seen = in_channels * PLANES[config.frame_differences]
    if config.encoder == "small":
        layers, out_channels = _small(config.encoder_width, seen, frame_size)
    elif config.encoder == "airbench":
        layers, out_channels = _airbench(config.encoder_width, seen, frame_size)
    elif config.encoder == "conv2":
        layers, out_channels = _conv2(seen), 128
    elif config.encoder == "sweeps":
        layers, out_channels = _sweeps(config.encoder_width, seen, frame_size)
    elif config.encoder == "pixels":
        layers = nn.Sequential(OrderedDict(project=nn.Conv2d(seen, config.encoder_width, 1)))
        out_channels = config.encoder_width
    else:
        small_stem = config.stem == "small" or (config.stem == "auto" and frame_size <= SMALL_STEM_PIXELS)
        layers, out_channels = _torchvision(config, in_channels, small_stem)
    if config.weights not in ("none", "imagenet"):
        _load_weights(layers, Path(config.weights))
    return Encoder(layers, out_channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, arXiv:1512.03385, section 3.3).

    The shortcut averages before its 1x1 convolution (ResNet-D: He et al. 2019, arXiv:1812.01187, section 4.2): no pixel
    is dropped, and oneDNN's gradient of a strided 1x1 convolution over few channels writes outside its memory
    (seen in torch 2.15: 8 channels, 14x14, 952 frames).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, maps: Float[Tensor, "N Din H W"]) -> Float[Tensor, "N Dout h w"]:
        """Maps down-sampled by the stride."""
        inner = self.relu(self.bn1(self.conv1(maps)))
        outer: Tensor = self.relu(self.bn2(self.conv2(inner)) + self.shortcut(maps))
        return outer


class PooledBlock(nn.Module):
    """3x3 convolution, 2x2 max-pool, BatchNorm, GELU, then 3x3 convolution, BatchNorm, GELU.

    The order of Jordan 2024 (arXiv:2404.00498, section 3.1): what follows the pool works on a quarter of the cells.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.gelu = nn.GELU()

    def forward(self, maps: Float[Tensor, "N Din H W"]) -> Float[Tensor, "N Dout h w"]:
        """Maps of half the side."""
        inner = self.gelu(self.bn1(self.pool(self.conv1(maps))))
        outer: Tensor = self.gelu(self.bn2(self.conv2(inner)))
        return outer


def _small(width: int, in_channels: int, frame_size: int) -> tuple[nn.Module, int]:
    """A stem and three blocks of `width`, 2 and 4 times `width` channels, each of stride 2.

    The stem halves frames above 48 pixels and quarters those above 128: maps are 4x4 at 28, 32 and 64 pixels, 7x7 at
    112 and 224. Stride 2 from the first block on: the full-size layers would cost most and learn least.
    """
    stem = max(16, width // 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(in_channels, stem, 3, 1 if frame_size <= 48 else 2, padding=1, bias=False),
        stem_bn=nn.BatchNorm2d(stem),
        stem_relu=nn.ReLU(inplace=True),
    )
    if frame_size > 128:
        layers["stem_pool"] = nn.MaxPool2d(2)
    before = stem
    for stage, channels in enumerate((width, 2 * width, 4 * width), start=1):
        layers[f"stage{stage}"] = ResidualBlock(before, channels, stride=2)
        before = channels
    net = nn.Sequential(layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net, before


def _airbench(width: int, in_channels: int, frame_size: int) -> tuple[nn.Module, int]:
    """A 2x2 convolution to 24 channels and three pooled blocks of `width`, 2 and 4 times `width` channels.

    Maps are 3x3 at 28 and 32 pixels, 7x7 at 112 and 224. Jordan's net has 64, 256 and 256 channels, and its first
    layer is frozen to whiten the pixels; here it learns.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(in_channels, 24, 2, 1 if frame_size <= 48 else 2), stem_gelu=nn.GELU()
    )
    if frame_size > 128:
        layers["stem_pool"] = nn.MaxPool2d(2)
    before = 24
    for stage, channels in enumerate((width, 2 * width, 4 * width), start=1):
        layers[f"stage{stage}"] = PooledBlock(before, channels)
        before = channels
    return nn.Sequential(layers), before


def _sweeps(width: int, in_channels: int, frame_size: int) -> tuple[nn.Module, int]:
    """Three sweeps of `width`, `width` and 2 times `width` units: maps of 1/8 of the side, 1/32 above 128 pixels."""
    patch = 4 if frame_size <= 128 else 16
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        sweep1=Sweep(in_channels, width, patch),
        sweep2=Sweep(2 * width, width, 1),
        sweep3=Sweep(2 * width, 2 * width, 2),
    )
    return nn.Sequential(layers), 4 * width


def _conv2(in_channels: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 64, 3, padding=1),
            relu1=nn.ReLU(inplace=True),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 128, 3, padding=1),
            relu2=nn.ReLU(inplace=True),
            pool2=nn.MaxPool2d(2),
        )
    )


def _torchvision(config: ModelConfig, in_channels: int, small_stem: bool) -> tuple[nn.Module, int]:
    from torchvision import models  # takes a second, and own encoders do without

    net = models.get_model(config.encoder, weights=None)
    seen = in_channels * PLANES[config.frame_differences]
    if config.weights == "imagenet":
        net.load_state_dict(_imagenet_tensors(config.encoder))
    if config.encoder.startswith("resnet"):
        net.conv1 = _with_input_channels(net.conv1, in_channels, seen)
        if small_stem:
            net.conv1 = nn.Conv2d(seen, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        children = OrderedDict((name, child) for name, child in net.named_children() if name not in ("avgpool", "fc"))
        return nn.Sequential(children), net.fc.in_features
    first = net.features[0]
    first[0] = _with_input_channels(first[0], in_channels, seen)
    if small_stem:
        first[0].stride = (1, 1)
    return nn.Sequential(OrderedDict(features=net.features)), net.features[-1].out_channels


def _with_input_channels(conv: nn.Conv2d, in_channels: int, seen: int) -> nn.Conv2d:
    """The convolution for frames of 1 or 3 channels, of which it sees more: what comes behind them counts zero.

    For gray frames a sum over the three kernels answers to gray as the net did to R = G = B.
    """
    if in_channels not in (1, 3):
        raise ConfigError(f"frames have 1 or 3 channels, not {in_channels}", where="data.channels")
    if seen == 3 == in_channels:
        return conv
    other = nn.Conv2d(
        seen,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        (int(conv.padding[0]), int(conv.padding[1])),
        bias=False,
    )
    with torch.no_grad():
        other.weight.zero_()
        other.weight[:, :in_channels] = conv.weight if in_channels == 3 else conv.weight.sum(1, keepdim=True)
    return other


def _imagenet_tensors(encoder: str) -> dict[str, Tensor]:
    from torchvision import models

    weights = models.get_model_weights(encoder).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, HTTPException, RuntimeError) as error:
        raise ConfigError(
            f"the ImageNet weights of {encoder} could not be fetched from {weights.url}: {error}",
            where="model.weights",
            hint="Use model.weights=none, or model.weights=FILE with a .safetensors file of the encoder's tensors.",
        ) from error


def _load_weights(layers: nn.Module, path: Path) -> None:
    """Fill all tensors of `layers` from a .safetensors file with its own (or torchvision's) names, or a model file."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"weights are none, imagenet or a .safetensors file, not {path.name!r}",
            where="model.weights",
            hint="Pickled files (.pth, .pt, .ckpt) can run code when opened and are refused; "
            "save the tensors with safetensors.torch.save_file.",
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the weights cannot be read: {error}", where=path, hint="Check model.weights, or use model.weights=none."
        ) from error
    if any(name.startswith(_MODEL_FILE_PREFIX) for name in tensors):
        parts = ((name.partition(_MODEL_FILE_PREFIX), tensor) for name, tensor in tensors.items())
        tensors = {name: tensor for (before, prefix, name), tensor in parts if prefix and not before}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_DROPPED_LAYERS)}
    wanted = layers.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"the weights do not fit the encoder: {'; '.join(wrong[:3])}{more}",
            where=path,
            hint="Set model.encoder, encoder_width, stem, frame_differences and data.channels as when it was saved.",
        )
    layers.load_state_dict(tensors)

"""What tests of model files and exports share: a small net with moved weights, and an edited card."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from videogru.checkpoint.golden_sample import add_golden_sample
from videogru.checkpoint.model_file import make_card, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.models.classifier import Classifier


def stirred_classifier(side: int, **settings: object) -> Classifier:
    """Three channels, four classes, in eval mode; weights are moved, so that no part is the identity it starts as."""
    torch.manual_seed(0)
    model = Classifier(
        ModelConfig(**settings),
        in_channels=3,
        frame_size=side,
        num_classes=4,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> None:
    """The same file with other tensors or other values in its card; of `section__key`, the value inside a section."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["videogru"])
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    save_file(load_file(path) if tensors is None else tensors, path, metadata={"videogru": json.dumps(content)})


GOLDEN_KINDS = {
    "video": DataConfig(frame_size=24, num_frames=6, channels=3, fit="crop"),
    "volume": DataConfig(frame_size=24, num_frames=6, channels=3, fit="pad", slab=3, axis="auto"),
    "image": DataConfig(frame_size=24, num_frames=1, channels=1, fit="stretch"),
}


def written(path: Path, kind: str, **settings: object) -> Path:
    """A model file with a golden sample; its running means are not those of the start."""
    data = GOLDEN_KINDS[kind]
    torch.manual_seed(4)
    config = ModelConfig(**{"encoder_width": 8, "hidden_size": 6, **settings})
    shape = {"mean": (0.4,) * data.channels, "std": (0.2,) * data.channels}
    model = Classifier(config, in_channels=data.channels, frame_size=24, num_classes=4, **shape).train()
    model(torch.rand(4, 2, data.channels, 24, 24), torch.tensor([2, 2, 2, 1]), torch.ones(4, 2))
    card = make_card(model, kind=kind, classes=tuple("abcd"), data=data)
    write_model(path, model.eval(), card)
    add_golden_sample(path)
    return path

"""torch.compile for the encoder, the part of the model that is one graph."""

import torch

from videogru.errors import ConfigError
from videogru.models.classifier import Classifier


def compile_encoder(classifier: Classifier, device: torch.device | str) -> None:
    """Have the encoder compiled at its first call; names of tensors and the model file stay as they are.

    Raises ConfigError where nothing can be compiled on `device` (on a CPU that takes a C++ compiler, on a GPU Triton),
    and for `sweeps`, whose recurrent layers would break the graph into pieces.
    """
    if classifier.config.encoder == "sweeps":
        raise ConfigError(
            "the encoder sweeps is made of recurrent layers, which torch.compile leaves as they are",
            where="train.compile",
            hint="Train without it: --set train.compile=false",
        )
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    # Backends fail in many ways, with types of their own.
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"torch.compile does not work here: {first}",
            where="train.compile",
            hint="Train without it (--set train.compile=false), or install a C++ compiler "
            "(Debian: apt install g++; for a GPU also pip install triton).",
        ) from error
    classifier.encoder.compile()


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1

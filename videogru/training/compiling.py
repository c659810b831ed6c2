"""Whether torch.compile serves the encoder here."""

import torch

from videogru.config import ModelConfig
from videogru.errors import ConfigError


def check_compiles(model: ModelConfig, device: torch.device | str) -> None:
    """Raises ConfigError where nothing can be compiled on `device`: a CPU takes a C++ compiler, a GPU Triton.

    And for `sweeps`, whose recurrent layers would break the graph into pieces.
    """
    if model.encoder == "sweeps":
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


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1

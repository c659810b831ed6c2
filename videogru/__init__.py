"""videogru classifies anything that unrolls along an axis: videos, scans, still images."""

from typing import Any

__version__ = "0.1.0"

# Name -> module; imported on first use, so that `videogru --help` never waits for torch.
_PUBLIC = {
    "Classifier": "videogru.models.classifier",
    "FrameSequence": "videogru.sequence",
    "Predictor": "videogru.inference.predictor",
    "open_source": "videogru.data.readers.open",
}
__all__ = ["Classifier", "FrameSequence", "Predictor", "__version__", "open_source"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'videogru' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

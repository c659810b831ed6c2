"""The kinds of source: one record each, with everything that depends on the kind alone."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["video", "volume", "image"]
Unit = Literal["seconds", "mm", "index"]
Fit = Literal["crop", "pad", "stretch"]


@dataclass(frozen=True)
class KindRecord:
    """What one kind of source is.

    unit: of step positions; steps: what its steps are called; fit, channels: defaults of data.fit and data.channels
    (None: as many as data.slab); frame_type: dtype of the frames that readers return; is_sequence: a source has more
    than one step; caches, samplings: the values of data.cache and data.sampling that apply; settings: the keys of
    `data` that not every kind reads, and this one does; example_file, example_dataset: for example commands.
    """

    name: Kind
    plural: str
    unit: Unit
    steps: str
    fit: Fit
    channels: int | None
    frame_type: Literal["uint8", "float32"]
    is_sequence: bool
    caches: frozenset[str]
    samplings: frozenset[str]
    settings: frozenset[str]
    example_file: str
    example_dataset: str

    @property
    def has_times(self) -> bool:
        """Whether positions are seconds."""
        return self.unit == "seconds"


_VIDEO = {"decoder", "folder_fps", "stride_seconds", "context_seconds", "augment.shift_seconds"}
_VOLUME = {
    *("slab", "series", "volume", "max_memory_gib"),
    *("axis", "intensity", "percentile_low", "percentile_high", "window_low", "window_high", "zscore_range"),
    *("augment.flip_axes", "augment.bias_field", "augment.gamma"),
}
_SEQUENCE = {"augment.drop_steps"}

KINDS: dict[Kind, KindRecord] = {
    "video": KindRecord(
        name="video",
        plural="videos",
        unit="seconds",
        steps="frames",
        fit="crop",
        channels=3,
        frame_type="uint8",
        is_sequence=True,
        caches=frozenset({"none", "jpeg", "raw"}),
        samplings=frozenset({"random", "uniform", "dense", "all"}),
        settings=frozenset(_VIDEO | _SEQUENCE),
        example_file="clip.mp4",
        example_dataset="grid_digits",
    ),
    "volume": KindRecord(
        name="volume",
        plural="volumes",
        unit="mm",
        steps="slices",
        fit="pad",
        channels=None,
        frame_type="float32",
        is_sequence=True,
        caches=frozenset({"none", "raw"}),
        samplings=frozenset({"random", "uniform", "all"}),
        settings=frozenset(_VOLUME | _SEQUENCE),
        example_file="scan.nii.gz",
        example_dataset="adrenalmnist3d",
    ),
    "image": KindRecord(
        name="image",
        plural="images",
        unit="index",
        steps="image",
        fit="crop",
        channels=3,
        frame_type="uint8",
        is_sequence=False,
        caches=frozenset({"none"}),
        samplings=frozenset({"random", "uniform", "all"}),
        settings=frozenset(),
        example_file="picture.png",
        example_dataset="cifar100 --seq rows",
    ),
}


def readers_of(key: str) -> tuple[KindRecord, ...]:
    """The kinds that read a kind-specific setting of `data`; all kinds for any other key."""
    found = tuple(record for record in KINDS.values() if key in record.settings)
    return found or tuple(KINDS.values())

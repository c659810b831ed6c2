"""Every setting and its default: three frozen models, one home.

Precedence: these defaults < recipe configs/NAME.yaml < --config FILE < flags < --set model.hidden_size=256.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from videogru.errors import ConfigError
from videogru.kinds import KINDS, Fit, Kind, readers_of

Split = Literal["train", "val", "test"]
FrameDifferences = Literal["none", "past", "both"]
MAX_CHANNELS = 15
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
# YAML reads 3 as a number.
Word = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value), Field(min_length=1)]


class Settings(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class AugmentConfig(Settings):
    """Random changes of a training clip, the same for all its steps, drawn from (seed, epoch, index).

    Ranges are symmetric around "no change"; 0 switches a change off. Video and stills are augmented as a batch on the
    device; volumes in three dimensions by MONAI in the workers. cutmix also depends on the other clips of the batch.
    """

    flip: Fraction = Field(0.0, description="probability of a mirror along the width (volumes: along each axis)")
    rotate_degrees: float = Field(0.0, ge=0, le=180, description="largest rotation (volumes: about each axis)")
    scale: Fraction = Field(0.0, description="largest relative zoom, in or out")
    translate: Fraction = Field(0.0, description="largest shift as a fraction of the side")
    brightness: Fraction = Field(0.0, description="largest change of brightness, as a fraction of full range")
    contrast: Fraction = Field(0.0, description="largest relative change of contrast")
    noise: Fraction = Field(0.0, description="largest sd of Gaussian noise, as a fraction of full range")
    shift_seconds: float = Field(0.0, ge=0, description="largest shift of a start_seconds,end_seconds window in time")
    flip_axes: str = Field(
        "xyz",
        pattern="^x?y?z?$",
        description="axes of the patient that flip mirrors in volumes: x left-right, y back-front, z feet-head",
    )
    bias_field: float = Field(
        0.0, ge=0, lt=10, description="largest coefficient of a smooth factor over volumes, as of an MRI coil"
    )
    gamma: float = Field(0.0, ge=0, lt=10, description="volumes: intensity ** g, g up to 1 + this or 1 / as much")
    drop_steps: Fraction = Field(0.0, description="largest share of a clip's steps that are left out, at random places")
    erase: Fraction = Field(
        0.0, description="probability of filling one square with the mean (volumes: a block with 0)"
    )
    cutmix: Fraction = Field(
        0.0, description="probability of a box from another clip of the batch, with its share of the label"
    )


# `for_kind` always refuses these for other kinds; `check_read` refuses the rest where a user provides them.
_ALWAYS_REFUSED = ("slab", "series", "context_seconds", "augment.shift_seconds", "volume", "max_memory_gib")


class DataConfig(Settings):
    """What is read from a source, and how a clip is cut from it."""

    dataset: str = Field("", description="card name, folder with a subfolder per class, or manifest .csv")
    data_dir: Path | None = Field(None, description="where the card's data lie; default: see `videogru data info NAME`")
    frame_size: int = Field(112, ge=4, le=4096, description="height and width given to the encoder, pixels")
    num_frames: int = Field(
        16, ge=1, le=100_000, description="steps per clip; a shorter source gives fewer and is padded and masked"
    )
    sampling: Literal["random", "uniform", "dense", "all"] = Field(
        "random",
        description="which steps make a clip. random: one from each of num_frames equal segments, at drawn places in "
        "training, else at the centers; uniform: at the centers, always; dense: num_frames steps stride_seconds apart, "
        "drawn in training, else from the middle; all: every step, whatever num_frames is",
    )
    stride_seconds: float = Field(0.1, gt=0, description="between the frames of sampling=dense")
    context_seconds: float = Field(
        0.0, ge=0, description="read before and after each start_seconds,end_seconds window, inside the video"
    )
    channels: int | None = Field(
        None, ge=1, le=MAX_CHANNELS, description="1 gray, 3 RGB; default: data.slab for volumes, else 3"
    )
    slab: int = Field(
        1, ge=1, le=MAX_CHANNELS, description="odd; each step of a volume is a slice with its neighbors as channels"
    )
    fit: Fit | None = Field(
        None, description="to a square: crop the center, pad, or stretch; default: pad for volumes, else crop"
    )
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = Field("auto", description="video decoder")
    decode_timeout_seconds: float = Field(
        60.0,
        ge=0,
        le=1e6,
        description="reading one source may take this long, then its process is ended and replaced, and the source "
        "counts as unreadable; 0: no limit. Needs reader processes: with train.num_workers=0 nothing is watched",
    )
    cache: Literal["none", "jpeg", "raw"] = Field(
        "none",
        description="videos are decoded once, into frames that later epochs read; raw: the same bits, channels * "
        "frame_size^2 bytes a frame; jpeg: near, 13 to 20 % of that. Volumes with raw only: all slices, 4 * "
        "frame_size^2 bytes each",
    )
    cache_dir: Path | None = Field(None, description="where; default: frame-cache/ beside the data sets")
    cache_gib: float = Field(50.0, gt=0, description="of disk that the folder may fill; then no more is added")
    folder_fps: float = Field(
        25.0, gt=0, le=100_000, description="frames per second of a folder of numbered images, which have no times"
    )
    axis: Literal["axial", "coronal", "sagittal", "auto"] = Field(
        "axial",
        description="axis along which a volume is unrolled; auto: the one with the thickest spacing, axial where equal",
    )
    volume: Annotated[int, Field(ge=0)] | Literal["mean"] | None = Field(
        None, description="which volume of a 4-D file, counted from 0, or their mean; null: only 3-D files are read"
    )
    intensity: Literal["percentile", "window", "zscore"] = Field(
        "percentile",
        description="how volume intensities map to 0..1, linearly and clipped, between: two percentiles; a fixed "
        "window (CT); the mean of the foreground (what is above the mean) -+ zscore_range of its standard deviations",
    )
    series: Word | None = Field(
        None,
        description="which DICOM series of a folder that holds several: its SeriesInstanceUID or its SeriesNumber; "
        "other volumes have none",
    )
    suffix: Word | None = Field(
        None, description="of a BIDS folder, which scans: the end of their names, as T1w; default: the only one there"
    )
    label_column: Word | None = Field(
        None,
        description="of a BIDS folder, the column of participants.tsv with the classes; default: the only one of "
        "words or few numbers that describes no person (sex, handedness), place or date",
    )
    percentile_low: float = Field(0.5, ge=0, le=100)
    percentile_high: float = Field(99.5, ge=0, le=100)
    window_low: float = Field(0.0, description="for intensity=window, in the scan's units (HU for CT)")
    window_high: float = Field(255.0, description="for intensity=window")
    zscore_range: float = Field(4.0, gt=0, le=1000, description="standard deviations, for intensity=zscore")
    max_memory_gib: float = Field(
        4.0,
        gt=0,
        description="of a volume: its voxels, their sums for volume=mean and a clip of it; larger ones are refused "
        "before they are read",
    )
    val_fraction: Fraction = Field(0.15, description="share of groups held out, where the data set names no val split")
    test_fraction: Fraction = Field(0.15, description="the same for the test split")
    split_seed: int = Field(
        0, ge=0, description="of the splits that are drawn; apart from train.seed, so that seeds share them"
    )
    use_check: bool = Field(
        True, description="training leaves out what the newest `videogru data check` of this data set found unreadable"
    )
    max_bad: int = Field(100, ge=0, description="unreadable training files that are skipped before the run stops")
    augment: AugmentConfig = AugmentConfig()

    @field_validator("volume", mode="before")
    @classmethod
    def _number_or_mean(cls, value: object) -> object:
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if value in (None, "mean") or (type(value) is int and value >= 0):
            return value
        raise ValueError(f"data.volume = {value!r}: give a number, counted from 0, or mean")

    @model_validator(mode="after")
    def _ranges(self) -> "DataConfig":
        for low, high in (("percentile_low", "percentile_high"), ("window_low", "window_high")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"data.{low} = {getattr(self, low)} must lie below data.{high} = {getattr(self, high)}"
                )
        return self

    @model_validator(mode="after")
    def _channels_fit(self) -> "DataConfig":
        if self.slab % 2 == 0:
            raise ValueError(f"data.slab = {self.slab} must be odd: a slice and as many neighbors on each side")
        allowed = (1, 3) if self.slab == 1 else (self.slab,)
        if self.channels is not None and self.channels not in allowed:
            raise ValueError(f"data.channels = {self.channels} must be {' or '.join(map(str, allowed))}")
        return self

    def check_read(self, kind: Kind, given: Collection[str] | None = None) -> None:
        """Raise ConfigError where a setting that a `kind` never reads is not at its default.

        given: dotted keys, as `data.axis`; others are not looked at. Default: all.
        """
        specific = set().union(*(record.settings for record in KINDS.values()))
        for key in sorted(specific - KINDS[kind].settings - set(_ALWAYS_REFUSED)):
            if given is None or f"data.{key}" in given:
                self._check_default(key, kind)
        # 1 is what `for_kind` makes of it, and what settings that were saved hold.
        usual = (1, type(self).model_fields["num_frames"].default)
        if (
            not KINDS[kind].is_sequence
            and self.num_frames not in usual
            and (given is None or "data.num_frames" in given)
        ):
            hint = "Leave it out: model.seq and data.frame_size say how many steps the model makes of one."
            raise ConfigError("data.num_frames is for videos and volumes; an image is one frame", hint=hint)

    def for_kind(self, kind: Kind) -> "DataConfig":
        """The same with the defaults that depend on the kind of source filled in.

        Raises ConfigError where a setting is for another kind.
        """
        record = KINDS[kind]
        for key in _ALWAYS_REFUSED:
            if key not in record.settings:
                self._check_default(key, kind)
        if self.cache not in record.caches:
            others = " or ".join(sorted(record.caches, reverse=True))
            raise ConfigError(f"data.cache={self.cache} is not for {record.plural}", hint=f"Use {others}.")
        if self.sampling not in record.samplings:
            raise ConfigError(
                f"data.sampling={self.sampling} counts in seconds, and {record.plural} have none",
                hint="Use random, uniform or all.",
            )
        return self.model_copy(
            update={
                "channels": self.channels or record.channels or self.slab,
                "fit": self.fit or record.fit,
                "num_frames": self.num_frames if record.is_sequence else 1,
            }
        )

    def _check_default(self, key: str, kind: Kind) -> None:
        """Raise ConfigError where a key of other kinds of source is not at its default."""
        section, _, name = key.rpartition(".")
        settings: Settings = getattr(self, section) if section else self
        default = type(settings).model_fields[name].default
        if getattr(settings, name) != default:
            owners = " and ".join(record.plural for record in readers_of(key))
            hint = f"Remove it, or leave it at its default, {default}."
            raise ConfigError(f"data.{key} is for {owners}, not for {KINDS[kind].plural}", hint=hint)


class ModelConfig(Settings):
    """encoder -> serialize -> recurrent -> head."""

    encoder: Literal[
        "small",
        "airbench",
        "resnet18",
        "resnet34",
        "resnet50",
        "mobilenet_v3_small",
        "mobilenet_v3_large",
        "conv2",
        "pixels",
        "sweeps",
    ] = "small"
    encoder_width: int = Field(
        32,
        ge=1,
        le=4096,
        description="channels of the first stage (small, airbench) or of the 1x1 convolution (pixels), "
        "units of the first GRU (sweeps)",
    )
    weights: str = Field("none", description="none, imagenet, or a .safetensors file with the encoder's tensors")
    stem: Literal["auto", "imagenet", "small"] = Field(
        "auto", description="first layers of torchvision encoders; auto: small up to 64 pixels"
    )
    seq: Literal["frames", "slices", "rows", "cols", "grid"] = "frames"
    frame_differences: FrameDifferences = Field(
        "none", description="channels that show the change since the frame before (past), and to the next one (both)"
    )
    cell: Literal["gru", "lstm", "hypergru", "mingru", "convgru", "none"] = Field(
        "gru",
        description="convgru: keeps the map through the recurrence, for seq=frames; none: no recurrent part, the "
        "order-free twin",
    )
    temporal: Literal["bi", "causal"] = "bi"
    lookahead: int = Field(
        0, ge=0, le=1024, description="further steps that each step's output sees, for temporal=causal; 0: none"
    )
    hidden_size: int = Field(128, ge=1, le=16_384, description="units per direction")
    num_layers: int = Field(1, ge=1, le=64)
    residual: bool = Field(False, description="add each recurrent layer's input to its output, projected to its width")
    use_gaps: bool = Field(False, description="the recurrent part reads how far apart the steps lie, in mm or seconds")
    hyper_size: int = Field(32, ge=1, le=4096, description="units of the small GRU that modulates a hypergru")
    local_attention: int = Field(
        0, ge=0, le=1024, description="steps to each side that a step attends to before the recurrent part; 0: off"
    )
    attention_heads: int = Field(4, ge=1, le=64, description="of local_attention and of pooling=multihead")
    pooling: Literal["last", "mean", "max", "attention", "multihead"] = "mean"
    layer_norm: bool = Field(True, description="LayerNorm after the recurrent part")
    input_dropout: Fraction = Field(0.3, description="before each recurrent layer")
    dropout: Fraction = Field(0.5, description="before the linear head")

    @model_validator(mode="after")
    def _maps_stay_maps(self) -> "ModelConfig":
        if self.cell == "convgru" and (self.seq not in ("frames", "slices") or self.local_attention):
            raise ValueError("model.cell=convgru reads whole maps: it needs model.seq=frames and no local_attention")
        return self

    @model_validator(mode="after")
    def _causal_sees_no_next_frame(self) -> "ModelConfig":
        if self.temporal == "causal" and self.frame_differences == "both":
            raise ValueError("model.temporal=causal knows no next frame: use model.frame_differences=past")
        return self

    @model_validator(mode="after")
    def _ahead_there_is_something(self) -> "ModelConfig":
        if self.lookahead and self.temporal != "causal":
            raise ValueError("model.lookahead is for model.temporal=causal: bi sees all steps")
        if self.lookahead and self.pooling == "last":
            raise ValueError("model.lookahead does nothing with model.pooling=last, which has no step ahead: use mean")
        return self


class TrainConfig(Settings):
    """The article's recipe, and what we add as options."""

    epochs: Positive = 30
    batch_size: Positive = Field(32, description="per process")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = Field(
        "adam", description="muon: orthogonalized momentum for the convolutions, AdamW at `lr` for the rest"
    )
    muon_lr: float = Field(0.1, gt=0, description="peak rate of what muon steps")
    muon_recurrent: bool = Field(False, description="muon also steps each gate of GRUs and LSTMs")
    weight_decay: float = Field(1e-4, ge=0)
    label_smoothing: Fraction = 0.1
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Fraction = Field(0.1, description="share of all steps with a linearly rising rate")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: bool = Field(False, description="torch.compile the encoder; takes a minute before the first step")
    gradient_checkpointing: bool = Field(
        False, description="recompute the encoder's stages and the recurrent steps backward: less memory, more time"
    )
    checkpoint_steps: Positive = Field(128, description="recurrent steps that are recomputed as one")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: inverse class frequency")
    early_stopping: int = Field(0, ge=0, description="epochs without a better validation score before stopping; 0: off")
    keep: Literal["best", "last"] = Field(
        "best", description="weights that are kept: best validation score, or last epoch"
    )
    ema_decay: Fraction = Field(0.0, description="decay per step of the averaged weights that are kept; 0: off")
    seed: int = Field(0, ge=0, lt=2**31)
    num_workers: int | None = Field(
        None, ge=0, le=128, description="reader processes; default: one per core but one, at most 8"
    )
    devices: int = Field(
        1, ge=1, le=1024, description="processes per node, a GPU each if any; not set: as many as torchrun started"
    )
    nodes: int = Field(1, ge=1, le=65_536, description="machines; not set: as torchrun says")
    save_every_minutes: float = Field(
        10.0, ge=0, description="how often the state is saved inside an epoch; 0: only after epochs"
    )
    features: Path | None = Field(
        None, description="folder of `videogru encode`: recurrent part and head are trained on it, the encoder is kept"
    )
    teacher: Path | None = Field(
        None, description="model file or run that teaches this one (distillation); it must know the same classes"
    )
    distill_alpha: float = Field(0.9, ge=0, le=1, description="share of the loss that the teacher's classes have")
    distill_temperature: float = Field(4.0, gt=0, le=1000, description="softens the classes of teacher and student")
    distill_features: float = Field(
        0.0, ge=0, description="weight of the difference to the teacher's states, step by step; 0: off"
    )

    @model_validator(mode="after")
    def _distilled_by_somebody(self) -> "TrainConfig":
        if self.teacher is None:
            for key in ("distill_alpha", "distill_temperature", "distill_features"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"train.{key} needs a teacher: --teacher MODEL")
        elif not self.distill_alpha and not self.distill_features:
            raise ValueError("train.distill_alpha=0 without train.distill_features leaves nothing to teach")
        return self

    @model_validator(mode="after")
    def _features_are_read_alone(self) -> "TrainConfig":
        if self.features is not None and self.teacher is not None:
            raise ValueError("--teacher sees frames, which --features has none of: leave one of them out")
        if self.features is not None and self.compile:
            raise ValueError("train.compile is for the encoder, which --features never runs: leave it out")
        return self

    @model_validator(mode="after")
    def _compiled_or_recomputed(self) -> "TrainConfig":
        if self.compile and self.gradient_checkpointing:
            raise ValueError("train.compile and train.gradient_checkpointing do not go together: choose one")
        return self

    @model_validator(mode="after")
    def _gates_need_muon(self) -> "TrainConfig":
        if self.muon_recurrent and self.optimizer != "muon":
            raise ValueError(f"train.muon_recurrent needs train.optimizer=muon, not {self.optimizer}")
        return self


class Config(Settings):
    """The whole of a run's settings."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    def to_yaml(self) -> str:
        """YAML that `--config` takes back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

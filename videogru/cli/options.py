"""The words of the command line: options that commands share, and the help of `train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core


class Format(StrEnum):
    """How `infer` writes its rows."""

    table = "table"
    jsonl = "jsonl"
    csv = "csv"


class SplitName(StrEnum):
    """Splits, as typed."""

    train = "train"
    val = "val"
    test = "test"


def _set_option(help: str) -> Any:
    return typer.Option("--set", metavar="KEY=VALUE", help=f"{help}; repeatable.")


SetOption = Annotated[list[str] | None, _set_option("Any setting, as model.hidden_size=256")]
DataSetOption = Annotated[list[str] | None, _set_option("Any data.* setting, as data.decoder=pyav")]
CheckSetOption = Annotated[
    list[str] | None, _set_option("Any data.* setting, as data.decoder=pyav, or train.num_workers=4")
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the data of a named data set lie.", show_default=False)
]
SeriesOption = Annotated[
    str | None,
    typer.Option(metavar="NUMBER-OR-UID", help="Which series, where DICOM folders hold several.", show_default=False),
]
SuffixOption = Annotated[
    str | None, typer.Option("--suffix", help="Of a BIDS folder: which scans, as T1w.", show_default=False)
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label", metavar="COLUMN", help="Of a BIDS folder: the classes in participants.tsv.", show_default=False
    ),
]
ViewsOption = Annotated[
    str, typer.Option("--views", metavar="CLIPSxCROPS", help="Average over clips in time times crops, as 10x3.")
]


VolumeOption = Annotated[
    str | None,
    typer.Option(
        "--volume", metavar="N|mean", help="Volume of 4-D files, counted from 0, or their mean.", show_default=False
    ),
]
MaxMemoryOption = Annotated[
    float | None,
    typer.Option(
        "--max-memory", metavar="GIB", help="Memory that one volume file may take, GiB; larger ones are refused."
    ),
]
SeqOption = Annotated[
    str | None, typer.Option("--seq", help="How feature maps become steps: frames (slices), rows, cols, grid.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", help="small, airbench, resnet18/34/50, mobilenet_v3_small/large, conv2, pixels, sweeps."),
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="Settings file, or the name of a recipe that ships (configs/NAME.yaml).")
]
TeacherOption = Annotated[
    Path | None,
    typer.Option("--teacher", help="Run or model file that teaches this one (distillation).", show_default=False),
]
FeaturesOption = Annotated[
    Path | None,
    typer.Option(
        "--features",
        help="Folder of `videogru encode`: trains recurrent part and head alone, in seconds.",
        show_default=False,
    ),
]

# The settings that flags of `train` stand for.
TRAIN_FLAGS = {
    "dataset": "data.dataset",
    "data_dir": "data.data_dir",
    "suffix": "data.suffix",
    "label": "data.label_column",
    "series": "data.series",
    "seq": "model.seq",
    "encoder": "model.encoder",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "devices": "train.devices",
    "nodes": "train.nodes",
    "seed": "train.seed",
    "volume": "data.volume",
    "max_memory": "data.max_memory_gib",
    "teacher": "train.teacher",
    "features": "train.features",
}


class TrainCommand(typer.core.TyperCommand):
    """Shows the defaults of its flags in --help; they live in `config.py`, which is read only then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """With the defaults after what each flag means."""
        from videogru.config import Config

        defaults = Config().model_dump(mode="json")
        for parameter in self.params:
            section, _, key = TRAIN_FLAGS.get(parameter.name or "", "").partition(".")
            value = defaults[section][key] if section else None
            if isinstance(parameter, typer.core.TyperOption) and value not in (None, ""):
                said = f" Default: {value:g}." if isinstance(value, float) else f" Default: {value}."
                parameter.help = (parameter.help or "").removesuffix(said) + said
        super().format_help(ctx, formatter)

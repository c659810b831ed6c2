"""The commands of `videogru data`: what data sets and single sources hold, and whether all of it can be read."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from videogru.cli.options import (
    CheckSetOption,
    DataDirOption,
    DataSetOption,
    LabelOption,
    MaxMemoryOption,
    SeriesOption,
    SuffixOption,
    VolumeOption,
)
from videogru.cli.terminal import say, show_cards, show_facts
from videogru.errors import ConfigError

app = typer.Typer(help="Look at data sets.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(name="list", epilog="[bold]Example[/bold]\n\nvideogru data list")
def data_list() -> None:
    """Data sets that ship with a card, and whether their data are here."""
    from videogru.data.manifests.describe import list_cards

    show_cards(list_cards())


@app.command(
    name="info",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru data info grid_digits\n\n"
    "videogru data info clips/\n\n"
    "videogru data info bids/ --suffix T1w --label group\n\n"
    "videogru data info scan.nii.gz\n\n"
    "videogru data info cifar100 --data-dir ~/data/cifar100",
)
def data_info(
    name_or_folder: Annotated[
        str,
        typer.Argument(help="Name of a data set, folder of classes or in BIDS, table, or one scan, video, image."),
    ],
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The picture of a single file; default: scan-info/<name>.png here.", show_default=False),
    ] = None,
    volume: VolumeOption = None,
    max_memory: MaxMemoryOption = None,
    series: SeriesOption = None,
    suffix: SuffixOption = None,
    label: LabelOption = None,
    set_: DataSetOption = None,
) -> None:
    """Classes, counts per split, shapes, durations or spacing of a data set; or what one scan, video or image is."""
    from videogru.workflows import check_data as checks
    from videogru.workflows.settings import describe_dataset

    named = {"suffix": suffix, "label_column": label}
    flags = {"volume": volume, "max_memory_gib": max_memory, "series": series, **named}
    assigned = [*(f"data.{key}={value}" for key, value in flags.items() if value is not None), *(set_ or [])]
    if checks.is_source(name_or_folder):
        if data_dir is not None:
            raise ConfigError("--data-dir is for data sets, not for a single file", hint="Leave it out.")
        if suffix is not None or label is not None:
            raise ConfigError(
                "--suffix and --label are for BIDS folders, not for a single file", hint="Leave them out."
            )
        facts, sheet = checks.source_info(Path(name_or_folder), assigned, out)
        show_facts(facts)
        if sheet is not None:
            print(f"picture: {sheet}")
        return
    if out is not None:
        raise ConfigError("--out is for the picture of a single file", hint="Leave it out, or name a scan or video.")
    facts = describe_dataset(name_or_folder, data_dir, assigned)
    show_facts(facts)


@app.command(
    name="check",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru data check grid_digits\n\n"
    "videogru data check clips/\n\n"
    "videogru data check table.csv --data-dir ~/data/clips --out checks/clips --set train.num_workers=4",
)
def data_check(
    name_or_folder: Annotated[str, typer.Argument(help="Name of a data set, folder of classes or in BIDS, or table.")],
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: checks/<data set> here.", show_default=False)
    ] = None,
    suffix: SuffixOption = None,
    label: LabelOption = None,
    set_: CheckSetOption = None,
) -> None:
    """Decode everything; find what cannot be read, copies across splits, and mistakes in the table. Can be resumed."""
    from videogru.workflows import check_data as checks

    named = {"suffix": suffix, "label_column": label}
    assigned = [*(f"data.{key}={value}" for key, value in named.items() if value is not None), *(set_ or [])]
    checked = checks.check_data(name_or_folder, data_dir, assigned, out, progress=sys.stderr.isatty(), say=say)
    for line in checks.summary_lines(checked):
        print(line)
    if checked.bad:
        raise typer.Exit(3)

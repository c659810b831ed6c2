"""The command `videogru encode`: what the encoder makes of a data set, once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from videogru.cli.options import DataDirOption
from videogru.cli.terminal import say

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "videogru encode grid_digits --model runs/grid_digits-0001\n\n"
    "videogru encode clips/ --model model.safetensors --out features/clips\n\n"
    "videogru train --features features/clips --set model.cell=lstm --set model.pooling=attention"
)
def encode(
    dataset: Annotated[str, typer.Argument(help="Name of a data set, folder of classes, or manifest .csv.")],
    model: Annotated[Path, typer.Option(help="Model file or run folder whose encoder reads.", show_default=False)],
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the features; default: features/<data set>-<key> here.", show_default=False),
    ] = None,
) -> None:
    """Run a model's encoder over a data set once, so that other heads and cells train in seconds. Can be resumed."""
    from videogru.workflows.extract_features import encode_data

    done = encode_data(dataset, model, data_dir, out, progress=sys.stderr.isatty(), say=say)
    size = f"{done.bytes / 1e6:.1f} MB"
    print(f"{done.folder}: {done.rows} rows, {done.done} encoded now, {done.bad} cannot be read, {size}")
    print(f"train on them: videogru train --features {done.folder}")
    if done.bad:
        raise typer.Exit(3)

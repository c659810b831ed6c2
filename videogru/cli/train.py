"""The command `videogru train`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from videogru.cli.options import (
    TRAIN_FLAGS,
    ConfigOption,
    DataDirOption,
    EncoderOption,
    FeaturesOption,
    LabelOption,
    MaxMemoryOption,
    SeqOption,
    SeriesOption,
    SetOption,
    SuffixOption,
    TeacherOption,
    TrainCommand,
    VolumeOption,
)
from videogru.cli.terminal import say, show_outcome
from videogru.errors import ConfigError

app = typer.Typer()


@app.command(
    cls=TrainCommand,
    epilog="[bold]Examples[/bold]\n\n"
    "videogru train --dataset adrenalmnist3d\n\n"
    "videogru train --dataset grid_digits --epochs 20 --set model.cell=none\n\n"
    "videogru train --dataset cifar100 --seq rows --data-dir ~/data/cifar100\n\n"
    "videogru train --dataset clips/        (a folder with a subfolder per class)\n\n"
    "videogru train --dataset bids/ --suffix T1w --label group     (a BIDS folder)\n\n"
    "videogru train --dataset table.csv     (columns source,label[,split,group,start_seconds,end_seconds])\n\n"
    "videogru train --dataset clips/ --teacher runs/clips-0001 --set model.encoder=mobilenet_v3_small\n\n"
    "videogru train --features features/clips-0123456789ab --set model.cell=lstm\n\n"
    "videogru train --resume runs/clips-0001",
)
def train(
    dataset: Annotated[
        str | None,
        typer.Option(help="Name of a data set, folder with a subfolder per class or in BIDS, or a table."),
    ] = None,
    data_dir: DataDirOption = None,
    suffix: SuffixOption = None,
    label: LabelOption = None,
    series: SeriesOption = None,
    seq: SeqOption = None,
    encoder: EncoderOption = None,
    config: ConfigOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips per step and process.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    devices: Annotated[int | None, typer.Option(help="Processes per machine, a GPU each where there are any.")] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Machines; start the command on each, see docs/training.md.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with, with its own settings.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/<data set>-NNNN.", show_default=False)
    ] = None,
    volume: VolumeOption = None,
    max_memory: MaxMemoryOption = None,
    teacher: TeacherOption = None,
    features: FeaturesOption = None,
    set_: SetOption = None,
) -> None:
    """Train on a data set; leaves a run folder with the model file, scores and a report.

    Recipes (configs/NAME.yaml, of the data set or its kind) set other defaults than those shown.
    """
    from videogru.settings import parse_assignments
    from videogru.workflows import train as runs
    from videogru.workflows.run_folder import run_config
    from videogru.workflows.settings import settings_for_training

    values = {
        "dataset": dataset,
        "data_dir": None if data_dir is None else str(data_dir),
        "suffix": suffix,
        "label": label,
        "series": series,
        "seq": seq,
        "encoder": encoder,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "devices": devices,
        "nodes": nodes,
        "seed": seed,
        "volume": volume,
        "max_memory": max_memory,
        "teacher": None if teacher is None else str(teacher),
        "features": None if features is None else str(features),
    }
    flags = {key: values[name] for name, key in TRAIN_FLAGS.items()}
    given = {key: value for key, value in flags.items() if value is not None}
    assigned = parse_assignments(set_ or [])
    progress = sys.stderr.isatty()
    if resume is not None:
        if given or assigned or config or out:
            raise ConfigError(
                "--resume takes all settings from the run; leave the other flags out",
                hint=f"videogru train --resume {resume}",
            )
        settings = run_config(resume)
        _start_processes(runs.processes_to_start(settings))
        outcome = runs.resume(resume, progress=progress, say=say)
    else:
        settings = settings_for_training(config, given, assigned)
        _start_processes(runs.processes_to_start(settings))
        outcome = runs.train(settings, out=out, progress=progress, say=say)
    show_outcome(outcome)


def _start_processes(wanted: tuple[int, int] | None) -> None:
    """Where several processes are wanted, have them do this command, and end as they do."""
    if wanted is None:
        return
    from videogru.training.launch import launch

    devices, nodes = wanted
    raise typer.Exit(launch(sys.argv[1:], devices=devices, nodes=nodes, say=say))

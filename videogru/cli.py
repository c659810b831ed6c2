"""The command line: short, frozen flags; the only place that prints errors and exits.

Exit codes: 0 ok, 1 internal error, 2 usage, settings or data, 3 some inputs failed, 4 refused, 130 interrupted.
Heavy modules are imported inside the commands, so that `videogru --help` answers at once.
"""

import errno
import io
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from videogru import __version__, cli_features, cli_infer, cli_stream
from videogru.cli_data import data_app
from videogru.cli_deploy import add_commands
from videogru.cli_model import model_app
from videogru.errors import ConfigError, VideogruError
from videogru.options import (
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
    SplitName,
    SuffixOption,
    TeacherOption,
    TrainCommand,
    ViewsOption,
    VolumeOption,
)
from videogru.terminal import console, say, show_outcome

app = typer.Typer(
    name="videogru",
    help="Classify videos, scans and images as sequences: a 2-D CNN reads each frame, a bidirectional GRU the order.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")


# A full disk, missing rights, a name too long: nothing that a traceback would explain.
_OF_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


def _version(asked: bool | None) -> None:
    if asked:
        print(f"videogru {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    pass


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
        settings = runs.settings_for_training(config, given, assigned)
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


@app.command(
    name="eval",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru eval runs/adrenalmnist3d-0001\n\n"
    "videogru eval runs/clips-0001 --split val\n\n"
    "videogru eval runs/clips-0001 --views 10x3\n\n"
    "videogru eval model.safetensors --dataset table.csv --out scores/",
)
def evaluate(
    run_or_model: Annotated[Path, typer.Argument(help="Run folder, model file or export.")],
    split: Annotated[SplitName, typer.Option(help="Rows to evaluate on.")] = SplitName.test,
    dataset: Annotated[str | None, typer.Option(help="Another data set than the model was trained on.")] = None,
    data_dir: DataDirOption = None,
    views: ViewsOption = "1x1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: in the run.", show_default=False)
    ] = None,
) -> None:
    """Evaluate a model on a split: metrics with 95 % intervals, predictions, report."""
    from videogru.data.clips.views import parse_views
    from videogru.workflows.evaluate import evaluate_run

    outcome = evaluate_run(
        run_or_model,
        split=split.value,
        dataset=dataset,
        data_dir=data_dir,
        views=parse_views(views),
        device=device,
        out=out,
        say=say,
    )
    show_outcome(outcome)
    if any(evaluation.failed for evaluation in outcome.evaluations.values()):
        raise typer.Exit(3)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "videogru probe runs/grid_digits-0001\n\n"
    "videogru probe runs/adrenalmnist3d-0001 --split val"
)
def probe(
    run_or_model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    split: Annotated[SplitName, typer.Option(help="Rows to probe on.")] = SplitName.test,
    data_dir: DataDirOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Does the model need time? Its score with the frames shuffled, reversed, alone, and one by one."""
    from rich.table import Table

    from videogru.inference.evaluation import METRIC_NAMES
    from videogru.workflows.evaluate import probe_run

    found = probe_run(run_or_model, split=split.value, data_dir=data_dir, device=device, say=say)
    table = Table("frames", METRIC_NAMES[found.metric], "95 % interval", "difference", box=None, pad_edge=False)
    for row in found.table_rows():
        table.add_row(*row)
    console().print(table)
    print(found.verdict)


app.command(epilog=cli_infer.EXAMPLES)(cli_infer.infer)
app.command(epilog=cli_stream.EXAMPLES)(cli_stream.stream)
add_commands(app)
app.command(epilog=cli_features.EXAMPLES)(cli_features.encode)


def main() -> None:
    """Run a command; turn what went wrong into one message and an exit code."""
    # SIGTERM ends every command as Ctrl-C does: cleanly, with 130.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "VIDEOGRU_LAUNCHED_BY" in os.environ:
        from videogru.training.launch import end_with_launcher

        end_with_launcher()
    sys.exit(_run())


def _run() -> int:
    # nibabel writes what it dislikes in a header to stderr; what matters of it comes back as an error.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this, as `>&-` does
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text; one of them must not end the work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = int(app(standalone_mode=False, prog_name="videogru") or 0)
        if code == 130:
            say("interrupted")
        return code
    except VideogruError as error:
        if not (error.is_echo or _is_beside_another()):
            say(str(error) if error.exit_code == 130 else f"error: {error}")
        return error.exit_code
    except MemoryError as error:
        say(f"error: not enough memory ({error}); make data.num_frames, data.frame_size or train.batch_size smaller")
        return 2
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            return _click_exit(error)
        say(f"error: {error.filename or 'writing'}: {error.strerror}")
        return 2
    except Exception as error:  # noqa: BLE001
        return _click_exit(error)


def _is_beside_another() -> bool:
    """Whether torchrun started this process beside another here, which meets the same errors and tells them."""
    variables = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return None not in variables and variables[-1] != "0"


def _click_exit(error: Exception) -> int:
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        say("interrupted")
        return 130
    traceback.print_exception(error)
    say("error: this is a mistake in videogru, not yours; please report it with the lines above")
    return 1

"""The commands of `videogru model`: what it is, whether it says what it said, how sure it must be to stop early."""

from pathlib import Path
from typing import Annotated

import typer

from videogru.cli.options import DataDirOption, SplitName
from videogru.cli.terminal import say, show_facts

app = typer.Typer(
    help="Look at model files, check them, calibrate them.", no_args_is_help=True, rich_markup_mode="rich"
)


@app.command(
    name="show",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru model show runs/grid_digits-0001\n\n"
    "videogru model show model.safetensors",
)
def model_show(run_or_model: Annotated[Path, typer.Argument(help="Run folder or model file.")]) -> None:
    """What a model reads, what it is, how it scored, and what wrote it."""
    from videogru.checkpoint.describe import describe_model
    from videogru.checkpoint.model_file import find_model

    show_facts(describe_model(find_model(run_or_model)))


@app.command(
    name="verify",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru model verify runs/grid_digits-0001\n\n"
    "videogru model verify a.safetensors exported/ --backend torch,onnx",
)
def model_verify(
    runs_or_models: Annotated[list[Path], typer.Argument(help="Run folders, model files and exports.")],
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Only these: torch, cuda, mps, onnx, openvino, pt2, tensorrt. Default: all that are here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Replay the golden sample stored at training through PyTorch and every export runtime here (4 where one fails)."""
    from videogru.checkpoint.model_file import find_model
    from videogru.errors import GateRefused, ModelFileError
    from videogru.workflows.verify import parse_backends, verify

    names, failed, unread = parse_backends(backend), 0, 0
    for run_or_model in runs_or_models:
        try:
            path = find_model(run_or_model)
            for verdict in verify(path, names):
                print(f"{path}: {verdict}", flush=True)
                failed += verdict.state == "FAILED"
        except GateRefused as error:
            say(str(error))
            failed += 1
        except ModelFileError as error:  # the others are verified all the same
            say(f"error: {error}")
            unread += 1
    if failed or unread:
        raise typer.Exit(4 if failed else 2)


@app.command(
    name="calibrate",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru model calibrate runs/clips-0001\n\n"
    "videogru model calibrate runs/clips-0001 --dataset more.csv --split test",
)
def model_calibrate(
    run_or_model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    split: Annotated[SplitName, typer.Option(help="Rows to read, which no training saw.")] = SplitName.val,
    dataset: Annotated[str | None, typer.Option(help="Another data set than the model was trained on.")] = None,
    data_dir: DataDirOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Write into a model file how sure it must be for `stream --exit-risk`, by reading videos. Weights stay."""
    from videogru.workflows.calibrate import calibrate_run

    failed = calibrate_run(run_or_model, split=split.value, dataset=dataset, data_dir=data_dir, device=device, say=say)
    if failed:
        raise typer.Exit(3)

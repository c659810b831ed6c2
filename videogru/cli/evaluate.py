"""The commands `videogru eval` and `videogru probe`."""

from pathlib import Path
from typing import Annotated

import typer

from videogru.cli.options import (
    DataDirOption,
    SplitName,
    ViewsOption,
)
from videogru.cli.terminal import console, say, show_outcome

app = typer.Typer()


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

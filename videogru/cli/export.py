"""The commands that take a trained model out of the training framework: export, and the table that compares them."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from videogru.cli.options import DataDirOption
from videogru.cli.terminal import console, say

if TYPE_CHECKING:
    from videogru.config import Split


class ExportFormat(StrEnum):
    """What a model is exported to."""

    onnx = "onnx"
    openvino = "openvino"
    pt2 = "pt2"
    tensorrt = "tensorrt"


class Precision(StrEnum):
    """Of an export's weights and sums."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class BenchSplit(StrEnum):
    """Rows that `bench` measures accuracy on, or none."""

    none = "none"
    train = "train"
    val = "val"
    test = "test"


app = typer.Typer()


@app.command(
    name="export",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru export runs/grid_digits-0001 --format onnx\n\n"
    "videogru export runs/grid_digits-0001 --format openvino --precision int8 --out exported/\n\n"
    "videogru export runs/grid_digits-0001 --format onnx --step     (one frame at a time)\n\n"
    "videogru infer video.mp4 --model exported/",
)
def export(
    run_or_model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    format: Annotated[ExportFormat, typer.Option(help="What runs it later.")],
    precision: Annotated[
        Precision, typer.Option(help="int8: calibrated on training clips; fp16: half the file.")
    ] = Precision.fp32,
    step: Annotated[
        bool, typer.Option("--step", help="One frame and the states in, probabilities and the states out.")
    ] = False,
    max_drop: Annotated[
        float,
        typer.Option(min=0, max=100, help="Points of validation accuracy that fp16 and int8 may lose."),
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: FORMAT-PRECISION[-step] in the run.", show_default=False),
    ] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Export a model with its normalization, compare it with PyTorch, and keep it only where it is as good (else 4)."""
    from videogru.workflows.export import export_model

    done = export_model(
        run_or_model,
        format=format.value,
        precision=precision.value,
        step=step,
        max_drop=max_drop,
        out=out,
        data_dir=data_dir,
        say=say,
    )
    for line in done.lines():
        print(line)


@app.command(
    name="bench",
    epilog="[bold]Examples[/bold]\n\n"
    "videogru bench runs/grid_digits-0001 exported/\n\n"
    "videogru bench exported/ --split none --threads 4 --out bench/",
)
def bench(
    models: Annotated[list[Path], typer.Argument(help="Run folders, model files and exports.", metavar="MODELS...")],
    split: Annotated[
        BenchSplit, typer.Option(help="Rows to measure accuracy on; none: leave it out.")
    ] = BenchSplit.val,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips at once, for the throughput.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each, one after the other.")] = 10,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.txt, bench.json and bench.png.", show_default=True)
    ] = Path("bench"),
) -> None:
    """Size, load time, latency, throughput, memory and accuracy of models and exports, side by side."""
    from videogru.workflows.benchmark import bench_models

    found = bench_models(
        models,
        split=None if split is BenchSplit.none else cast("Split", split.value),
        threads=threads,
        batch_size=batch_size,
        rounds=rounds,
        data_dir=data_dir,
        say=say,
    )
    console().print(found.table())
    for path in found.write(out):
        print(f"written: {path}")

"""The command `videogru infer`: what files show, as a table, CSV or JSON lines."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from videogru.cli.options import DataSetOption, Format, MaxMemoryOption, SeriesOption, ViewsOption, VolumeOption
from videogru.cli.terminal import say
from videogru.errors import ConfigError

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "videogru infer scan.nii.gz dicom_series/\n\n"
    "videogru infer clips/ 'more/*.mp4' --model runs/clips-0001 --format csv --out answers.csv\n\n"
    "videogru infer video.mp4 --top-k 5 --format jsonl --set data.decoder=decord\n\n"
    "videogru infer bold.nii.gz --volume mean\n\n"
    "videogru infer sentence.mp4 --windows\n\n"
    "videogru infer scan.nii.gz --explain"
)
def infer(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs.", metavar="PATHS...")],
    model: Annotated[
        Path | None,
        typer.Option(help="Model file, run or export; default: the newest run that fits.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: the terminal.", show_default=False)] = None,
    format: Annotated[
        Format | None, typer.Option(help="Default: by the ending of --out, else table.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes named per input.")] = 1,
    views: ViewsOption = "1x1",
    series: SeriesOption = None,
    windows: Annotated[
        bool,
        typer.Option(
            "--windows", help="What shows when in long videos: a table, and a picture in timelines/ or by --out."
        ),
    ] = False,
    window_seconds: Annotated[
        list[float] | None,
        typer.Option(help="Length of the windows of --windows, repeatable; default: as trained.", show_default=False),
    ] = None,
    min_confidence: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Windows must be surer than this; default: 0.7.", show_default=False),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="How much each step spoke for the class, and a picture in explanations/ or by --out."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    volume: VolumeOption = None,
    max_memory: MaxMemoryOption = None,
    set_: DataSetOption = None,
) -> None:
    """Name the class of files; every input gets a row, a prediction or an error."""
    from videogru.data.clips.views import parse_views
    from videogru.inference.timeline.timeline import MIN_CONFIDENCE
    from videogru.settings import parse_assignments
    from videogru.workflows import explain as explain_answers
    from videogru.workflows import predict as answers
    from videogru.workflows import timeline as timeline_answers

    by_ending = {".csv": Format.csv, ".jsonl": Format.jsonl}
    chosen = format or (by_ending.get(out.suffix, Format.table) if out else Format.table)
    if windows and (top_k != 1 or views != "1x1"):
        raise ConfigError("--windows names one class per segment, from one view: leave --top-k and --views out")
    if not windows and (window_seconds or min_confidence is not None):
        raise ConfigError("--window-seconds and --min-confidence go with --windows", hint="Add --windows.")
    if explain and (windows or parse_views(views) != (1, 1)):
        raise ConfigError(
            "--explain tells what one clip of each input says: leave --windows and --views out",
            hint="Example: videogru infer scan.nii.gz --explain",
        )
    flags = {"data.volume": volume, "data.max_memory_gib": max_memory, "data.series": series}
    settings = {key: value for key, value in flags.items() if value is not None} | parse_assignments(set_ or [])
    if windows:
        failed = timeline_answers.answer_windows(
            paths,
            model=model,
            out=out,
            form=chosen.value,
            window_seconds=window_seconds or (),
            min_confidence=MIN_CONFIDENCE if min_confidence is None else min_confidence,
            device=device,
            settings=settings,
            progress=sys.stderr.isatty(),
            say=say,
        )
    elif explain:
        failed = explain_answers.answer_explained(
            paths,
            model=model,
            out=out,
            form=chosen.value,
            top_k=top_k,
            device=device,
            settings=settings,
            progress=sys.stderr.isatty(),
            say=say,
        )
    else:
        failed = answers.answer(
            paths,
            model=model,
            out=out,
            form=chosen.value,
            top_k=top_k,
            views=parse_views(views),
            device=device,
            settings=settings,
            progress=sys.stderr.isatty(),
            say=say,
        )
    if failed:
        raise typer.Exit(3)

"""The command `videogru stream`."""

import os
import sys
from io import BufferedIOBase
from pathlib import Path
from typing import Annotated, cast

import typer

from videogru.cli.terminal import say
from videogru.errors import ConfigError

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "videogru stream video.mp4 --model runs/clips-0001\n\n"
    "videogru export runs/clips-0001 --format openvino --precision int8 --step --out small/\n\n"
    "videogru stream video.mp4 --model small/\n\n"
    "videogru stream rtsp://camera.local/live --out answers.jsonl --every 1\n\n"
    "videogru stream video.mp4 --exit-risk 0.01     (no further than where the answer stays, with a risk of 1 %)\n\n"
    "videogru stream 0     (the first camera, where PyAV reads cameras)\n\n"
    "ffmpeg -i video.mp4 -f rawvideo -pix_fmt rgb24 - | videogru stream - --size 112x96 --fps 25"
)
def stream(
    source: Annotated[
        str, typer.Argument(help="Video file, number of a camera, RTSP or HTTP address, or - for raw frames.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model file, run folder or export --step; default: the newest run on videos.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, one per answer; default: the output, where it is no terminal.", show_default=False
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Between answers; default: one per frame that is read.", show_default=False
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes named per answer.")] = 1,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Of the raw frames of - (rgb24).", show_default=False)
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Of the raw frames of -.", show_default=False)] = None,
    step_seconds: Annotated[
        float | None, typer.Option(help="Between the frames that are read; default: as trained.", show_default=False)
    ] = None,
    restart: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Forget what was seen, so often; default: never.", show_default=False),
    ] = None,
    exit_risk: Annotated[
        float | None,
        typer.Option(
            metavar="RISK",
            help="Stop reading a file where the risk of another answer at its end is this; default: never.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Follow a video as it comes; cost and memory per frame stay the same. For models with model.temporal=causal."""
    from videogru.workflows.stream import answer_stream, parse_size

    given = {"--every": every, "--fps": fps, "--step-seconds": step_seconds, "--restart": restart}
    for flag, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{flag} wants a number above 0, got {value:g}")
    if exit_risk is not None:
        if not 0 < exit_risk < 1:
            raise ConfigError(f"--exit-risk wants a number between 0 and 1, got {exit_risk:g}")
        for flag, value in (("--restart", restart), ("--step-seconds", step_seconds)):
            if value is not None:
                raise ConfigError(
                    f"--exit-risk is known for whole videos, read as in training, and {flag} reads otherwise",
                    hint="Leave one of them out.",
                )
    if source == "-" and sys.stdin.isatty():
        raise ConfigError("nothing is piped in", where="standard input", hint="videogru stream --help shows how.")
    try:
        answer_stream(
            source,
            model=model,
            out=out,
            every_seconds=every,
            top_k=top_k,
            size=None if size is None else parse_size(size),
            fps=fps,
            step_seconds=step_seconds,
            restart_seconds=restart,
            exit_risk=exit_risk,
            device=device,
            stdin=cast(BufferedIOBase, sys.stdin.buffer) if source == "-" else None,
            say=say,
        )
    except BrokenPipeError:
        # Who reads the records has had enough, as `head` has; without this, Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

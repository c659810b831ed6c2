"""Re-encode videos small, so that training reads them fast: H.264 of a given short side with near key frames.

    python -m tools.data.prepare_kinetics KINETICS --out KINETICS-256
    python -m tools.data.prepare_kinetics clips/set.csv --out clips-128 --short-side 128 --dry-run

SOURCE is a folder (every video file below it; the layout and Kinetics' tables are kept) or a manifest of video files
(one of the same name is written for the outputs, with its labels, splits, groups and windows). What our reader reads is
what is encoded: upright frames with square pixels at the times of the source, variable or not; sides are even, smaller
videos keep their size, sound is left out. Each output is read again and compared with what went in (number and times
of frames, PSNR of some) before it takes its name, which is that of the source with .mp4.

prepared.csv in the output folder keeps what was done, so that a second call does only the rest; sources that cannot be
prepared are listed in bad.csv with their reason, and the others go on (exit status 3). A source whose process dies or
takes longer than --timeout-seconds is such a source. A second call tries those again.
"""

import io
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from tools.data.prepared_folder import (
    BAD,
    Done,
    Found,
    Journal,
    bad,
    check_settings,
    find,
    outputs_of,
    part_of,
    write_tables,
)
from tools.measuring import Parser, exit_code
from videogru.config import DataConfig
from videogru.data.loading.worker_pool import watched_map
from videogru.data.readers.open import open_source
from videogru.data.readers.source import FrameSource
from videogru.data.readers.video.open import open_video
from videogru.errors import DataError, SourceError, VideogruError

TICKS_PER_SECOND = 90_000
TIME_TOLERANCE_SECONDS = 1e-4  # of a frame's time; the outputs count 90,000 ticks a second
SAMPLED_FRAMES = 8
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601
BLOCK_BYTES = 256 * 2**20  # of decoded frames at a time
TELL_SECONDS = 60.0  # between two lines of progress where there is no terminal for a bar
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


@dataclass(frozen=True)
class Settings:
    """What the outputs depend on."""

    short_side: int = 256
    gop: int = 12
    crf: int = 21
    preset: str = "fast"
    min_psnr: float = 26.0


@dataclass(frozen=True)
class Task:
    """One source and where its output goes, as paths below the two folders."""

    root: Path
    out: Path
    source: str
    output: str
    settings: Settings


# One video ------------------------------------------------------------------------------------------------------


def prepare(task: Task) -> Done:
    """Encode and verify one video. Raises SourceError or DataError with the reason why it cannot be prepared."""
    torch.set_num_threads(1)
    path, target = task.root / task.source, task.out / task.output
    if path.is_dir():
        raise SourceError("is a folder; only video files are prepared", where=path)
    with open_source(path, data=DataConfig(), kind="video") as source:
        facts = path.stat()
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        try:
            positions = source.positions
            size, samples = encode(source, part, task.settings)
            if source.positions is not positions:  # the index was damaged; reading has corrected it
                positions = source.positions
                size, samples = encode(source, part, task.settings)
            worst = verify(part, positions, source.extent[1], samples, task.settings.min_psnr)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    return Done(
        task.source,
        task.output,
        "",
        facts.st_size,
        facts.st_mtime_ns,
        target.stat().st_size,
        len(positions),
        float(positions[-1] - positions[0]),
        *size,
        round(worst, 2),
    )


def scaled_size(height: int, width: int, pixel_aspect: float, short_side: int) -> tuple[int, int]:
    """(rows, columns), even, with square pixels and the short side asked for; nothing is enlarged."""
    tall = height * pixel_aspect
    scale = min(1.0, short_side / min(tall, width))
    return max(2, 2 * round(tall * scale / 2)), max(2, 2 * round(width * scale / 2))


def blocks(source: FrameSource) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first, frames (T 3 H W)) of the whole video, a bounded number of bytes at a time."""
    height, width = source.read([0]).shape[2:]
    step = max(1, BLOCK_BYTES // (3 * height * width))
    for start in range(0, len(source.positions), step):
        yield start, source.read(range(start, min(start + step, len(source.positions))))


def encode(
    source: FrameSource, target: Path, settings: Settings, b_frames: int = 0
) -> tuple[tuple[int, int], dict[int, NDArray[np.uint8]]]:
    """Write the video; returns (width, height) and some of the frames (H W 3) that went in, by their index."""
    count = len(source.positions)
    wanted = set(np.unique(np.linspace(0, count - 1, min(SAMPLED_FRAMES, count)).astype(int)).tolist())
    samples: dict[int, NDArray[np.uint8]] = {}
    ticks = np.rint(source.positions * TICKS_PER_SECOND).astype(np.int64)
    if len(np.unique(ticks)) != count:
        raise SourceError("frames follow each other faster than 90,000 a second", where=source.path)
    if ticks[0] < 0:
        raise SourceError(f"begins before second 0, at {source.positions[0]:.3f}, which MP4 cannot", where=source.path)
    # The last frame's end is that of the video, and so of its last window; x264 knows nothing of it.
    ends = np.append(ticks[1:], max(round(source.extent[1] * TICKS_PER_SECOND), ticks[-1] + 1))
    shown = dict(zip(ticks.tolist(), (ends - ticks).tolist(), strict=True))
    base = Fraction(1, TICKS_PER_SECOND)
    options = {"crf": str(settings.crf), "preset": settings.preset}
    # Without B-frames and with closed groups: a seek lands on a key frame, and what follows it needs nothing before.
    options["x264-params"] = f"keyint={settings.gop}:scenecut=0:bframes={b_frames}:open-gop=0:threads=1"
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options=options)
        rows = cols = 0
        for start, frames in blocks(source):
            if not rows:
                rows, cols = scaled_size(frames.shape[2], frames.shape[3], source.pixel_aspect, settings.short_side)
                stream.width, stream.height, stream.pix_fmt = cols, rows, "yuv420p"
                stream.codec_context.time_base = stream.time_base = base
            for offset, frame in enumerate(resized(frames, rows, cols)):
                pixels = frame.permute(1, 2, 0).contiguous().numpy()
                index = start + offset
                if index in wanted:
                    samples[index] = pixels
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture.pts, picture.time_base = int(ticks[index]), base
                for packet in stream.encode(picture):
                    packet.duration = shown[packet.pts]
                    container.mux(packet)
        for packet in stream.encode():
            packet.duration = shown[packet.pts]
            container.mux(packet)
    return (cols, rows), samples


def resized(frames: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(T 3 rows cols), by the filter that training's own resizing uses."""
    if tuple(frames.shape[2:]) == (rows, cols):
        return frames
    return F.interpolate(frames, size=(rows, cols), mode="bilinear", antialias=True, align_corners=False)


def verify(
    target: Path, positions: NDArray[np.float64], end: float, samples: dict[int, NDArray[np.uint8]], min_psnr: float
) -> float:
    """The worst sampled frame's PSNR of luma in dB. Raises DataError where the output is not the source."""
    with open_video(target) as output:
        if len(output.positions) != len(positions):
            raise DataError(f"the output has {len(output.positions)} frames of {len(positions)}")
        late = float(np.abs(output.positions - positions).max())
        if late > TIME_TOLERANCE_SECONDS:
            raise DataError(f"a frame of the output is {late:.4f} s off its time")
        if abs(output.extent[1] - end) > TIME_TOLERANCE_SECONDS:
            raise DataError(f"the output ends at {output.extent[1]:.4f} s instead of {end:.4f}")
        indices = sorted(samples)
        read = output.read(indices).permute(0, 2, 3, 1).numpy().astype(np.float64)
    # Luma alone: H.264 here keeps a quarter of the color, which saturated edges do not survive.
    errors = [
        float(np.square((frame - samples[index]) @ LUMA).mean()) for index, frame in zip(indices, read, strict=True)
    ]
    worst = 10 * float(np.log10(255**2 / max(*errors, 1e-9)))
    if worst < min_psnr:
        raise DataError(f"a frame of the output differs from the source: {worst:.1f} dB, wanted {min_psnr:g}")
    return worst


# All of them ------------------------------------------------------------------------------------------------------


def attempt(task: Task) -> Done:
    """`prepare`, whatever goes wrong told as SourceError: one source must not end the work."""
    try:
        return prepare(task)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(reason_of(error), where=task.root / task.source) from error


def reason_of(error: BaseException) -> str:
    """One line for the table."""
    what = error.what if isinstance(error, VideogruError) else f"{type(error).__name__}: {error}"
    return " ".join(what.split())


def prepare_all(options: Any, settings: Settings) -> int:
    """Prepare what is not prepared yet; returns the exit status."""
    found = find(options.source)
    root, sources = found.root, found.sources
    out: Path = options.out.resolve()
    if out == root or out.is_relative_to(root) or root.is_relative_to(out):
        hint = f"Its videos lie in {root}; name a folder beside it."
        raise DataError("the output folder may not lie in the source's, nor around it", where=out, hint=hint)
    check_settings(out, asdict(settings), write=False)
    outputs, journal = outputs_of(sources), Journal(out)
    waiting = [source for source in sources if not journal.is_done(source, outputs[source], root, out)]
    total = sum((root / source).stat().st_size for source in waiting if (root / source).is_file())
    free = shutil.disk_usage(next(parent for parent in (out, *out.parents) if parent.is_dir())).free
    print(
        f"{len(sources)} videos, {len(sources) - len(waiting)} of them done; {len(waiting)} to do, "
        f"{total / 1e6:,.1f} MB; {free / 1e9:,.1f} GB free",
        file=sys.stderr,
    )
    if options.dry_run:
        for source in waiting:
            print(f"{source} -> {outputs[source]}")
        return 0
    check_settings(out, asdict(settings), write=True)
    journal.mend()
    tasks = [Task(root, out, source, outputs[source], settings) for source in waiting]
    _work_off(tasks, journal, options)
    return finish(found, outputs, journal, out)


def _work_off(tasks: list[Task], journal: Journal, options: Any) -> None:
    at_work: dict[str, Task] = {}

    def handed_out() -> Iterator[Task]:
        for task in tasks:
            if shutil.disk_usage(task.out).free < options.keep_free_gib * 2**30:
                hint = "Make room, or lower --keep-free-gib; the same command goes on."
                raise DataError(f"less than {options.keep_free_gib:g} GiB of disk are free", where=task.out, hint=hint)
            at_work[task.source] = task
            yield task

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = sys.stderr.isatty()
    told, failed = time.monotonic(), 0
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not terminal) as progress:
            bar = progress.add_task("preparing", total=len(tasks))
            answers = watched_map(
                attempt,
                handed_out(),
                num_workers=options.processes,
                timeout_seconds=options.timeout_seconds,
                in_order=False,
                method="spawn",  # decoders that were opened before a fork hang
            )
            for done, (task, answer) in enumerate(answers, start=1):
                del at_work[task.source]
                if isinstance(answer, SourceError):
                    for left in (task.out / task.output, part_of(task.out / task.output)):
                        left.unlink(missing_ok=True)  # the first: of an earlier state of the source
                    answer = bad(task.root, task.source, reason_of(answer))
                    failed += 1
                journal.note(answer)
                progress.update(bar, completed=done, description=f"preparing ({failed} bad)" if failed else "preparing")
                if not terminal and time.monotonic() >= told + TELL_SECONDS:
                    told = time.monotonic()
                    print(f"{done} of {len(tasks)}, {failed} of them bad", file=sys.stderr, flush=True)
    finally:
        for task in at_work.values():  # their processes were ended
            part_of(task.out / task.output).unlink(missing_ok=True)


def finish(found: Found, outputs: dict[str, str], journal: Journal, out: Path) -> int:
    """Write bad.csv and the tables, and print what became of all; 3 where something is bad."""
    lines = [journal.lines[source] for source in found.sources]
    good = [line for line in lines if not line.reason]
    reasons = {line.source: line.reason for line in lines if line.reason}
    write_tables(found, {line.source: outputs[line.source] for line in good}, reasons, out)
    before, after = (sum(getattr(line, name) for line in good) for name in ("source_bytes", "output_bytes"))
    print(f"{len(good)} of {len(lines)} videos are in {out}, {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB")
    if found.manifest is not None and good:
        print(f"their manifest: {out / found.table}")
    if reasons:
        source, reason = next(iter(reasons.items()))
        print(f"{len(reasons)} could not be prepared: see {out / BAD}, such as {source}: {reason}")
    return 3 if reasons else 0


def main(words: list[str] | None = None) -> int:
    """Prepare and write; returns the exit status."""
    parser = Parser(prog="prepare_kinetics.py", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of videos, or a manifest")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets the videos and the tables")
    shown = "%(default)s"
    numbers: tuple[tuple[str, Any, str, str], ...] = (
        ("--short-side", Settings.short_side, "PIXELS", f"larger videos are made as small as this (default: {shown})"),
        ("--gop", Settings.gop, "FRAMES", f"from key frame to key frame (default: {shown})"),
        ("--crf", Settings.crf, "0..51", f"x264's quality; lower is better and larger (default: {shown})"),
        ("--min-psnr", Settings.min_psnr, "DB", f"that each sampled frame must reach (default: {shown})"),
        ("--processes", 1, "N", f"videos at a time; each uses one core (default: {shown})"),
        ("--timeout-seconds", 600.0, "SECONDS", f"for one video (default: {shown})"),
        ("--keep-free-gib", 5.0, "GIB", f"of disk; where less is free, the work stops (default: {shown})"),
    )
    for flag, default, unit, text in numbers:
        parser.add_argument(flag, type=type(default), default=default, metavar=unit, help=text)
    parser.add_argument("--preset", choices=PRESETS, default=Settings.preset, help=f"x264's preset (default: {shown})")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    options = parser.parse_args(words)
    for flag in ("gop", "processes", "timeout_seconds"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} has to be at least 1")
    if options.short_side < 2 or options.short_side % 2:
        parser.error("--short-side has to be even, and at least 2")
    if not 0 <= options.crf <= 51:
        parser.error("--crf has to lie in 0..51")
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text; one of them must not end the work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    settings = Settings(options.short_side, options.gop, options.crf, options.preset, options.min_psnr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kept = "what was prepared stays, the same command goes on"
    return exit_code("prepare_kinetics.py", lambda: prepare_all(options, settings), kept=kept)


if __name__ == "__main__":
    raise SystemExit(main())

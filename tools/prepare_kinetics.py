"""Re-encode videos small, so that training reads them fast: H.264 of a given short side with near key frames.

    python tools/prepare_kinetics.py KINETICS --out KINETICS-256
    python tools/prepare_kinetics.py clips/set.csv --out clips-128 --short-side 128 --dry-run

SOURCE is a folder (every video below it; the layout and Kinetics' tables are kept) or a manifest (a manifest.csv with
the new names is written). What our reader reads is what is encoded: upright frames with square pixels at the times of
the source, variable or not; sides are even, smaller videos keep their size, sound is left out. Each output is read
again and compared with what went in (number and times of frames, PSNR of some) before it takes its name.

prepared.csv in the output folder keeps what was done, so that a second call goes on; sources that cannot be prepared
are listed in bad.csv with their reason, and the others go on (exit status 3). A source whose process dies or takes
longer than --timeout-seconds is such a source.
"""

import csv
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measuring import Parser, exit_code
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from videogru.data.columns import Text
from videogru.data.frames import FrameSource, kind_of_name, media_files
from videogru.data.manifest import Manifest, read_manifest
from videogru.data.table import TABLE_SUFFIXES
from videogru.data.video import open_video
from videogru.data.watchdog import watched_map
from videogru.errors import DataError, SourceError, VideogruError

TICKS_PER_SECOND = 90_000
TIME_TOLERANCE_SECONDS = 1e-4  # of a frame's time; the outputs count 90,000 ticks a second
SAMPLED_FRAMES = 8
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601
BLOCK_BYTES = 256 * 2**20  # of decoded frames at a time


@dataclass(frozen=True)
class Settings:
    """What the outputs depend on."""

    short_side: int = 256
    gop: int = 12
    crf: int = 21
    preset: str = "fast"
    min_psnr: float = 26.0


@dataclass(frozen=True)
class Done:
    """A line of prepared.csv; reason is '' where the output is good."""

    source: str
    output: str
    reason: str
    source_bytes: int
    source_mtime_ns: int
    output_bytes: int = 0
    frames: int = 0
    seconds: float = 0.0
    width: int = 0
    height: int = 0
    worst_psnr: float = 0.0


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
    facts = path.stat()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with open_video(path) as source:
            positions = source.positions
            size, samples = encode(source, part, task.settings)
            if source.positions is not positions:
                raise SourceError("its index does not hold: frames are not where it says", where=path)
        worst = verify(part, positions, samples, task.settings.min_psnr)
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
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return (cols, rows), samples


def resized(frames: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(T 3 rows cols), by the filter that training's own resizing uses."""
    if tuple(frames.shape[2:]) == (rows, cols):
        return frames
    return F.interpolate(frames, size=(rows, cols), mode="bilinear", antialias=True, align_corners=False)


def verify(
    target: Path, positions: NDArray[np.float64], samples: dict[int, NDArray[np.uint8]], min_psnr: float
) -> float:
    """The worst sampled frame's PSNR of luma in dB. Raises DataError where the output is not the source."""
    with open_video(target) as output:
        if len(output.positions) != len(positions):
            raise DataError(f"the output has {len(output.positions)} frames of {len(positions)}")
        late = float(np.abs(output.positions - positions).max())
        if late > TIME_TOLERANCE_SECONDS:
            raise DataError(f"a frame of the output is {late:.4f} s off its time")
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


# The folder -----------------------------------------------------------------------------------------------------


def find(source: Path) -> tuple[Path, list[str], Manifest | None]:
    """(root, paths below it, manifest if it is one) of what has to be prepared."""
    if source.suffix.lower() in TABLE_SUFFIXES:
        manifest = read_manifest(source)
        return manifest.root, sorted(set(manifest.sources)), manifest
    if not source.is_dir():
        raise DataError("no such folder", where=source, hint="SOURCE is a folder, or a manifest .csv.")
    root = source.resolve()
    paths = [path for path in media_files(root) if kind_of_name(path.name) == "video"]
    if not paths:
        raise DataError("holds no video", where=source)
    return root, [path.relative_to(root).as_posix() for path in paths], None


def outputs_of(sources: list[str]) -> dict[str, str]:
    """{source: output}; a second source whose output would have the same name gets '' instead."""
    taken: set[str] = set()
    outputs = {}
    for source in sources:
        output = str(Path(source).with_suffix(".mp4").as_posix())
        outputs[source] = "" if output in taken else output
        taken.add(output)
    return outputs


def read_journal(path: Path) -> dict[str, Done]:
    """The last line of each source; a line that was cut off by a kill is left out."""
    if not path.is_file():
        return {}
    lines: dict[str, Done] = {}
    kinds = {field.name: field.type for field in fields(Done)}
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            try:
                values: dict[str, Any] = {
                    name: cells[name] if kind is str else kind(cells[name])  # type: ignore[operator]
                    for name, kind in kinds.items()
                }
            except (TypeError, ValueError, KeyError):
                continue
            lines[values["source"]] = Done(**values)
    return lines


def is_done(line: Done | None, root: Path, out: Path) -> bool:
    """The output is there as it was verified, and the source is still the same."""
    if line is None or line.reason:
        return False
    try:
        source, output = (root / line.source).stat(), (out / line.output).stat()
    except OSError:
        return False
    same = (source.st_size, source.st_mtime_ns) == (line.source_bytes, line.source_mtime_ns)
    return same and output.st_size == line.output_bytes


def check_settings(out: Path, settings: Settings) -> None:
    """Raises DataError where the folder was filled with other settings; notes them down in a new one."""
    path = out / "settings.json"
    mine = asdict(settings)
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine:
            raise DataError(f"was made with {theirs}, not {mine}", where=out, hint="Name another --out.")
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine) + "\n", encoding="utf-8")


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
    root, sources, manifest = find(options.source)
    out: Path = options.out.resolve()
    if out == root or out.is_relative_to(root) or root.is_relative_to(out):
        raise DataError("the output folder must lie beside the source's", where=out)
    names = outputs_of(sources)
    journal = read_journal(out / "prepared.csv")
    waiting = [source for source in sources if not is_done(journal.get(source), root, out)]
    total = sum((root / source).stat().st_size for source in waiting if (root / source).is_file())
    place = next(parent for parent in (out, *out.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    print(
        f"{len(sources)} videos, {len(sources) - len(waiting)} of them done; {len(waiting)} to do, "
        f"{total / 1e6:,.1f} MB; {free / 1e9:,.1f} GB free",
        file=sys.stderr,
    )
    if options.dry_run:
        for source in waiting:
            print(f"{source} -> {names[source] or 'nothing: the name is taken'}")
        return 0
    check_settings(out, settings)
    keep_free = int(options.keep_free_gib * 2**30)
    with (out / "prepared.csv").open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Done)], lineterminator="\n")
        if not file.tell():
            writer.writeheader()

        def note(line: Done) -> None:
            journal[line.source] = line
            writer.writerow(asdict(line))
            file.flush()

        def tasks() -> Iterator[Task]:
            for source in waiting:
                if not names[source]:
                    note(_bad(root, source, "another video has the same name but for its suffix"))
                    continue
                if shutil.disk_usage(out).free < keep_free:
                    hint = "Make room, or lower --keep-free-gib; then call again."
                    raise DataError(f"less than {options.keep_free_gib:g} GiB are left", where=out, hint=hint)
                yield Task(root, out, source, names[source], settings)

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("preparing", total=len(waiting))
            answers = watched_map(
                attempt,
                tasks(),
                num_workers=options.processes,
                timeout_seconds=options.timeout_seconds,
                in_order=False,
                method="spawn",  # decoders that were opened before a fork hang
            )
            for task, answer in answers:
                if isinstance(answer, SourceError):
                    (out / task.output).with_name(f".{Path(task.output).name}.part").unlink(missing_ok=True)
                    answer = _bad(root, task.source, reason_of(answer))
                note(answer)
                progress.advance(bar)
    return finish(out, root, sources, journal, manifest)


def _bad(root: Path, source: str, reason: str) -> Done:
    path = root / source
    facts = path.stat() if path.is_file() else None
    return Done(source, "", reason, facts.st_size if facts else 0, facts.st_mtime_ns if facts else 0)


def finish(out: Path, root: Path, sources: list[str], journal: dict[str, Done], manifest: Manifest | None) -> int:
    """Write bad.csv and the tables, and print what became of all; 3 where something is bad."""
    lines = [journal[source] for source in sources if source in journal]
    good, bad = ([line for line in lines if bool(line.reason) == flag] for flag in (False, True))
    with (out / "bad.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("source", "reason"))
        writer.writerows((line.source, line.reason) for line in bad)
    if manifest is not None:
        outputs = {line.source: line.output for line in good}
        rows = np.array([row for row, source in enumerate(manifest.sources) if source in outputs], np.int64)
        kept = manifest.take(rows)
        renamed = Text.of([outputs[source] for source in kept.sources])
        groups = kept.groups if not kept.groups.is_column(kept.sources) else None
        _with_sources(kept, renamed, groups, out).to_csv(out / "manifest.csv")
    else:
        for table in [*root.glob("*.csv"), *root.glob("annotations/*.csv")]:
            (out / table.relative_to(root)).parent.mkdir(exist_ok=True)
            shutil.copyfile(table, out / table.relative_to(root))
    before, after = (sum(getattr(line, name) for line in good) for name in ("source_bytes", "output_bytes"))
    print(
        f"{len(good)} prepared, {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB; {len(bad)} bad: see {out / 'bad.csv'}"
    )
    return 3 if bad else 0


def _with_sources(manifest: Manifest, sources: Text, groups: Any, root: Path) -> Manifest:
    from dataclasses import replace

    from videogru.data.columns import Coded

    return replace(manifest, root=root, sources=sources, groups=Coded.of(sources) if groups is None else groups)


def main(words: list[str] | None = None) -> int:
    """Prepare and write; returns the exit status."""
    parser = Parser(prog="prepare_kinetics.py", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the videos and the tables")
    parser.add_argument("--short-side", type=int, default=256, help="pixels")
    parser.add_argument("--gop", type=int, default=Settings.gop, help="frames from key frame to key frame")
    parser.add_argument("--crf", type=int, default=Settings.crf, help="x264's quality, lower is better and larger")
    parser.add_argument("--preset", default=Settings.preset, help="x264's preset")
    parser.add_argument(
        "--min-psnr", type=float, default=Settings.min_psnr, help="dB that each sampled frame must reach"
    )
    parser.add_argument("--processes", type=int, default=1, help="videos at a time; each uses one core")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="for one video")
    parser.add_argument("--keep-free-gib", type=float, default=5.0, help="of disk; below, the work stops")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(words)
    if min(options.short_side, options.gop, options.processes, options.timeout_seconds) < 1 or options.short_side % 2:
        parser.error("--short-side has to be even, --gop, --processes and --timeout-seconds at least 1")
    settings = Settings(options.short_side, options.gop, options.crf, options.preset, options.min_psnr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kept = "what was prepared stays, the same command goes on"
    return exit_code("prepare_kinetics.py", lambda: prepare_all(options, settings), kept=kept)


if __name__ == "__main__":
    raise SystemExit(main())

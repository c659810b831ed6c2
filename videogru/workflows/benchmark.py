"""`videogru bench`: models and exports side by side, each in a process of its own, taking turns."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videogru.checkpoint.model_file import ModelCard, find_model, read_card
from videogru.config import Split
from videogru.errors import ConfigError, ModelFileError
from videogru.export.subprocess_run import child_environment, last_error
from videogru.files import atomic_path, atomic_text
from videogru.inference.evaluation import evaluate
from videogru.inference.predictor import Predictor
from videogru.runtime.export_folder import is_exported, read_export_card
from videogru.workflows.evaluate import open_run, with_classes_of

Say = Callable[[str], None]

_LONGEST = 1024  # steps of a clip of data.sampling=all, which has no number of its own
_TURN_SECONDS = 0.5  # a turn repeats a call for about this long
_RESAMPLES = 100  # of intervals, which are not shown


@dataclass(frozen=True)
class Entry:
    """What was measured of one model.

    size in bytes of the model alone; load: imports and reading; latency: one clip, of `samples` calls in `rounds`
    turns; throughput: clips per second, `batch_size` at once, median of the turns; speedup: median over the turns of
    the first entry's latency by this one's; accuracy in 0..1, None where it was not asked for.
    """

    name: str
    runs_on: str
    bytes: int
    load_seconds: float
    latency_p50_ms: float
    latency_p95_ms: float
    speedup: float
    samples: int
    clips_per_second: float
    peak_mebibytes: float
    accuracy: float | None


@dataclass(frozen=True)
class Bench:
    """All entries, and how they were measured."""

    entries: tuple[Entry, ...]
    split: str | None
    threads: int
    batch_size: int
    rounds: int
    frames: str

    def header(self) -> list[str]:
        """Names of the columns."""
        accuracy = [] if self.split is None else [f"accuracy ({self.split})"]
        columns = ["model", "runs on", "MB", "load s", "ms p50", "ms p95", "times as fast", "clips/s", "MiB peak"]
        return [*columns, *accuracy]

    def rows(self) -> list[list[str]]:
        """The cells, as text."""
        found = []
        for one in self.entries:
            cells = [one.name, one.runs_on, f"{one.bytes / 1e6:.2f}", f"{one.load_seconds:.1f}"]
            cells += [f"{one.latency_p50_ms:.2f}", f"{one.latency_p95_ms:.2f}", f"{one.speedup:.2f}"]
            cells += [f"{one.clips_per_second:.1f}", f"{one.peak_mebibytes:.0f}"]
            cells += [] if one.accuracy is None else [f"{one.accuracy:.4f}"]
            found.append(cells)
        return found

    def note(self) -> str:
        """A line on how it was measured."""
        return (
            f"{self.frames}; threads: {self.threads}; {self.rounds} turns each, one after the other; "
            f"throughput with {self.batch_size} clips at once"
        )

    def table(self) -> Any:
        """For a terminal."""
        from rich.table import Table

        table = Table(*self.header(), box=None, pad_edge=False, caption=self.note(), caption_justify="left")
        for cells in self.rows():
            table.add_row(*cells)
        return table

    def text(self) -> str:
        """The table in plain text."""
        lines = [self.header(), *self.rows()]
        widths = [max(len(cells[k]) for cells in lines) for k in range(len(lines[0]))]
        padded = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines]
        return "\n".join(line.rstrip() for line in [*padded, "", self.note()]) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write bench.txt, bench.json and bench.png. Raises DataError where they cannot be written."""
        paths = [folder / f"bench.{suffix}" for suffix in ("txt", "json", "png")]
        with atomic_text(paths[0]) as file:
            file.write(self.text())
        with atomic_text(paths[1]) as file:
            json.dump(asdict(self), file, indent=1, allow_nan=False)
            file.write("\n")
        with atomic_path(paths[2]) as part:
            _draw(self).savefig(part, format="png", dpi=150, metadata={"Software": None})
        return paths


class Worker:
    """A process that measures one model; `load_seconds` as it says."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        environment = child_environment() | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "videogru.workflows.benchmark_worker", str(path), str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.load_seconds: float = self._answer()["load_seconds"]
        self.peak_mebibytes = 0.0

    def seconds(self, clips: int, steps: int, repeats: int) -> list[float]:
        """Of each of `repeats` calls with `clips` clips of `steps` steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"clips": clips, "steps": steps, "repeats": repeats}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_mebibytes = float(answer["peak_mebibytes"])
        seconds: list[float] = answer["seconds"]
        return seconds

    def close(self) -> None:
        """End the process."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.terminate()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = last_error(self.process.stderr.read())
            said = said or f"ended with status {self.process.wait()}"
            raise ModelFileError(f"could not be measured: {said}", where=self.path)
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def workers(paths: Sequence[Path], threads: int) -> Iterator[list[Worker]]:
    """A process for each path, loaded one after the other."""
    with ExitStack() as stack:
        started = []
        for path in paths:
            worker = Worker(path, threads)
            stack.callback(worker.close)
            started.append(worker)
        yield started


def bench_models(
    paths: Sequence[Path],
    *,
    split: Split | None,
    threads: int,
    batch_size: int,
    rounds: int,
    data_dir: Path | None,
    say: Say,
) -> Bench:
    """Measure all of `paths`; the first is what the others are compared with.

    Raises ConfigError where they do not read the same clips, ModelFileError for what cannot be loaded.
    """
    models = [find_model(path) for path in paths]
    cards = [read_card(model) for model in models]
    shapes = {_clip_shape(card) for card in cards}
    if len(shapes) > 1:
        raise ConfigError(
            f"the models read different clips: {' and '.join(map(str, sorted(shapes)))}",
            hint="Compare those of one data set and size.",
        )
    (shape,) = shapes
    accuracy = [None if split is None else _accuracy(path, split, data_dir, say) for path in paths]
    steps = shape[0]
    with workers(models, threads) as started:
        turns = []
        for worker in started:  # not counted: first calls prepare
            worker.seconds(1, steps, 3)
            once = statistics.median(worker.seconds(1, steps, 3))
            turns.append(max(1, round(_TURN_SECONDS / once)))
        latency: list[list[list[float]]] = [[] for _ in started]
        rates: list[list[float]] = [[] for _ in started]
        for round_ in range(1, rounds + 1):
            for place, worker in enumerate(started):
                latency[place].append(worker.seconds(1, steps, turns[place]))
            say(f"measured {len(started)} models, turn {round_} of {rounds}")
        for _ in range(max(2, rounds // 2)):
            for place, worker in enumerate(started):
                rates[place].append(batch_size / statistics.median(worker.seconds(batch_size, steps, 2)))
        entries = [
            Entry(
                name=_name(path),
                runs_on=_runs_on(path),
                bytes=_size(model),
                load_seconds=worker.load_seconds,
                latency_p50_ms=1e3 * float(np.percentile(np.concatenate(latency[place]), 50)),
                latency_p95_ms=1e3 * float(np.percentile(np.concatenate(latency[place]), 95)),
                speedup=_speedup(latency[0], latency[place]),
                samples=sum(map(len, latency[place])),
                clips_per_second=statistics.median(rates[place]),
                peak_mebibytes=worker.peak_mebibytes,
                accuracy=accuracy[place],
            )
            for place, (path, model, worker) in enumerate(zip(paths, models, started, strict=True))
        ]
    frames = f"clips of {steps} x {shape[1]} x {shape[2]} x {shape[2]}"
    return Bench(tuple(entries), split, threads, batch_size, rounds, frames)


def _speedup(first: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> float:
    """Median over the turns, so that a machine that slows down meanwhile slows both."""
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(first, own, strict=True)]
    return statistics.median(ratios)


def _accuracy(path: Path, split: Split, data_dir: Path | None, say: Say) -> float:
    model, settings, corpus = open_run(path, dataset=None, data_dir=data_dir)
    predictor = Predictor.from_file(model, device="cpu", data=settings.data)
    corpus = with_classes_of(corpus, predictor.card.classes, model)
    rows = corpus.manifest.rows(split)
    if not len(rows):
        raise ConfigError(f"no rows in the split {split}", where=corpus.name, hint="Use another --split, or none.")
    say(f"{path}: accuracy on {len(rows)} rows of {split}")
    train = settings.train
    said = predictor.predict(corpus, rows, batch_size=train.batch_size, num_workers=train.num_workers)
    return float(evaluate(said, resamples=_RESAMPLES).metrics["top1"].value)


def _clip_shape(card: ModelCard) -> tuple[int, int, int]:
    """Steps, channels and side."""
    data = card.data.for_kind(card.kind)
    return min(data.num_frames, _LONGEST), card.in_channels, card.frame_size


def _name(path: Path) -> str:
    return path.name or str(path)


def _runs_on(path: Path) -> str:
    if not is_exported(path):
        return "PyTorch, eager"
    card = read_export_card(path)
    return f"{card.format} {card.precision}"


def _size(model: Path) -> int:
    if is_exported(model):
        return sum((model / name).stat().st_size for name in read_export_card(model).files)
    return model.stat().st_size


def _draw(bench: Bench) -> Any:
    """Latency and size as bars."""
    from matplotlib.figure import Figure

    names = [f"{one.name}\n{one.runs_on}" for one in bench.entries]
    figure = Figure(figsize=(9, 1 + 0.6 * len(names)), layout="constrained")
    bars = [
        ("ms for one clip (p50, line to p95)", [one.latency_p50_ms for one in bench.entries]),
        ("MB", [one.bytes / 1e6 for one in bench.entries]),
    ]
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), bars, strict=True):
        axes.barh(names, values, color="#4878a8")
        axes.set_xlabel(title)
        for place, value in enumerate(values):
            axes.annotate(f" {value:.3g}", (value, place - 0.05), va="bottom", fontsize=8)
        axes.margins(x=0.18)
    for place, one in enumerate(bench.entries):
        figure.axes[0].plot([one.latency_p50_ms, one.latency_p95_ms], [place, place], color="#222222", linewidth=1)
    figure.axes[0].invert_yaxis()  # the first on top; the other shares it
    figure.suptitle(bench.note(), fontsize=8)
    return figure

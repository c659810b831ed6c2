"""What stopping a stream early saves, and how often it gives another answer than the end of the video.

    python -m tools.benchmarks.bench_exit MODEL [--data-dir DIR] [--risks 0.01,0.02,0.05,0.1,0.2] [--out docs/deploy]

MODEL is a model file or run folder that was calibrated (at the end of its training, or `videogru model calibrate`).
Every video of --split (test) is read as `videogru stream` reads it, from opening the file to the last answer: once to
the end, and once for each risk. Who comes first differs from video to video, and none finds what another one opened.

- saved: frames that the model did not read, seconds of video behind the last one that it read, and seconds of work, as
  shares of those of reading to the end; 95 % percentile bootstrap intervals over the videos;
- disagreement: videos whose answer is another than at their end, with the 95 % interval of Clopper and Pearson (1934,
  Biometrika 26(4)): what --exit-risk promises, over many calibrations, to be no larger than the risk;
- accuracy: early, and of the same videos read to the end.

The picture shows, besides, what any threshold would give on this split. Writes exit.json, exit.md and exit.png.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tools.measuring import (
    Parser,
    exit_code,
    machine,
    machine_lines,
    progress,
    write_json,
    write_picture,
    write_text,
)
from videogru.config import SPLITS
from videogru.data.readers.stream import open_stream
from videogru.data.readers.video.packet_index import kept_indexes
from videogru.errors import ConfigError, DataError, SourceError
from videogru.inference.early_exit import check_exits, known_exits, threshold_for
from videogru.inference.metrics import Interval, interval, resample_counts
from videogru.inference.predictor import Predictor
from videogru.inference.stream import Progress, StreamClassifier, follow, step_seconds_of
from videogru.workflows.evaluate import open_run, with_classes_of

RISKS = "0.01,0.02,0.05,0.1,0.2"
RESAMPLES = 1000
SOME_FAILED = 3
COLORS = ("#0072b2", "#d55e00", "#999999")


@dataclass(frozen=True)
class Pass:
    """One video read once: frames, seconds from its start to where nothing more was read, the answer (index of a class)
    and the seconds that it took.
    """

    frames: int
    video_seconds: float
    answer: int
    seconds: float


@dataclass(frozen=True)
class Risk:
    """What one risk gave: its threshold; disagreement with [low, high]; shares saved and accuracies as intervals."""

    risk: float
    surer_than: float
    disagreeing: int
    disagreement: Interval
    frames_saved: Interval
    video_seconds_saved: Interval
    seconds_saved: Interval
    median_stop_seconds: float
    accuracy: float


def clopper_pearson(count: int, of: int) -> Interval:
    """A share with its exact 95 % interval."""
    found = binomtest(count, of).proportion_ci(confidence_level=0.95, method="exact")
    return Interval(count / of, float(found.low), float(found.high))


def read(
    classifier: StreamClassifier, path: Path, surer_than: float | None
) -> tuple[Pass, list[NDArray[np.float64]], float]:
    """A pass, the probabilities (K,) after each of its frames, and the length of the video in seconds.

    As the command reads it, in a process that never opened it before. Raises SourceError where it cannot be read.
    """
    kept_indexes.clear()
    classifier.begin()
    began = time.perf_counter()
    stream = open_stream(str(path), data=classifier.data)
    try:
        assert stream.extent is not None, "a file has an end"
        happened = Progress()
        step = step_seconds_of(classifier.card, classifier.data, stream)
        said = list(follow(stream, classifier, step_seconds=step, progress=happened, surer_than=surer_than))
    finally:
        stream.close()
    taken = time.perf_counter() - began
    if not said:
        raise SourceError("ends before the first frame that is to be read", where=path)
    start, end = stream.extent
    read_to = said[-1][0] if happened.stopped else end
    probabilities = [values for _, values in said]
    return Pass(len(said), read_to - start, int(probabilities[-1].argmax()), taken), probabilities, end - start


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> Interval:
    """The share of `below` (N,) that is not in `above` (N,), over all, with its bootstrap interval."""
    table = np.stack([above, below])
    drawn = [table @ part for part in resample_counts(len(above), resamples=RESAMPLES, seed=0)]
    resampled = np.concatenate(drawn, axis=1)
    return interval(float(1 - above.sum() / below.sum()), 1 - resampled[0] / resampled[1])


def judge(risk: float, surer_than: float, early: list[Pass], full: list[Pass], labels: list[int]) -> Risk:
    """The passes of one risk against those to the end; of the labels, -1 is not known."""
    changed = sum(a.answer != b.answer for a, b in zip(early, full, strict=True))

    def saved(name: str) -> Interval:
        values = [np.array([getattr(one, name) for one in passes], np.float64) for passes in (early, full)]
        return ratio(*values)

    return Risk(
        risk=risk,
        surer_than=surer_than,
        disagreeing=changed,
        disagreement=clopper_pearson(changed, len(full)),
        frames_saved=saved("frames"),
        video_seconds_saved=saved("video_seconds"),
        seconds_saved=saved("seconds"),
        median_stop_seconds=float(np.median([one.video_seconds for one in early])),
        accuracy=accuracy(early, labels),
    )


def accuracy(passes: list[Pass], labels: list[int]) -> float:
    """Of the videos whose class is known; NaN where none is."""
    right = [one.answer == label for one, label in zip(passes, labels, strict=True) if label >= 0]
    return float(np.mean(right)) if right else math.nan


def curve(videos: list[NDArray[np.float64]]) -> list[tuple[float, float, float]]:
    """(threshold, disagreement, share of frames saved) at every threshold that matters; videos: (T K) each.

    At most some 200 thresholds, evenly from all confidences.
    """
    levels = np.unique(np.concatenate([[0.0], *(video.max(axis=1) for video in videos)]))
    levels = levels[np.linspace(0, len(levels) - 1, min(len(levels), 200)).round().astype(int)]
    total = sum(len(video) for video in videos)
    found = []
    for level in levels.tolist():
        frames = changed = 0
        for video in videos:
            sure = np.flatnonzero(video.max(axis=1) > level)
            stop = int(sure[0]) if len(sure) else len(video) - 1
            frames += stop + 1
            changed += int(video[stop].argmax() != video[-1].argmax())
        found.append((level, changed / len(videos), 1 - frames / total))
    return found


def share(value: Interval) -> str:
    """In percent, with its interval."""
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f}–{100 * value.high:.1f})"


def report(content: Mapping[str, Any], risks: Sequence[Risk], refused: Mapping[str, str]) -> str:
    """The table in Markdown."""
    unread = "; not read: " + ", ".join(content["unread"]) if content["unread"] else ""
    full = content["to the end"]
    known = "" if math.isnan(full["accuracy"]) else f", right in {100 * full['accuracy']:.1f} %"
    lines = [
        "# Streams that stop early",
        "",
        *machine_lines(content["machine"]),
        "",
        f"Split {content['split']} of {content['data set']}: {content['videos']:,} videos of "
        f"{full['video_seconds']:.2f} s (median), {full['frames']:g} frames read of each (median){known}{unread}. "
        f"Calibrated on {content['calibrated on']}. What is measured, and how: `tools/benchmarks/bench_exit.py`.",
        "",
        "| `--exit-risk` | surer than | disagree with the end | frames saved | seconds of video saved | "
        "seconds of work saved | stops at (median) | right |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in risks:
        cells = [
            *(f"{one.risk:g}", f"{one.surer_than:.4f}", f"{one.disagreeing}: {share(one.disagreement)}"),
            *map(share, (one.frames_saved, one.video_seconds_saved, one.seconds_saved)),
            *(f"{one.median_stop_seconds:.2f} s", "–" if math.isnan(one.accuracy) else f"{100 * one.accuracy:.1f} %"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {risk} | refused: {reason} | | | | | | |" for risk, reason in refused.items()]
    return "\n".join(lines) + "\n"


def picture(risks: Sequence[Risk], points: Sequence[tuple[float, float, float]]) -> Any:
    """Frames saved against disagreement: of all thresholds, and of those that were chosen for a risk."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [100 * x for _, x, _ in points],
        [100 * y for _, _, y in points],
        color=COLORS[0],
        linewidth=1.2,
        label="any threshold, on these videos",
    )
    for number, one in enumerate(risks):
        x, y = one.disagreement, one.frames_saved
        axes.plot([100 * one.risk], [100 * y.value], linestyle="", marker="|", markersize=14, color=COLORS[2])
        axes.errorbar(
            100 * x.value,
            100 * y.value,
            xerr=[[100 * (x.value - x.low)], [100 * (x.high - x.value)]],
            yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
            fmt="o",
            color=COLORS[1],
            capsize=2,
        )
        # Neighbors are near each other: one above, one below.
        above = number % 2 == 1
        axes.annotate(
            f"{one.risk:g}",
            (100 * x.value, 100 * y.value),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
        )
    axes.plot([], [], "o", color=COLORS[1], label="chosen for --exit-risk, 95 % intervals")
    axes.plot([], [], "|", markersize=10, color=COLORS[2], label="what it promises at most")
    right = max([100 * one.disagreement.high for one in risks], default=0)
    axes.set(
        xlabel="answers that differ from those at the end, %",
        ylabel="frames saved, %",
        xlim=(-0.5, max(5.0, 1.1 * right)),
        ylim=(0, 100),
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure


def measure(options: Any, risks: list[float], facts: Mapping[str, object]) -> int:
    """All of it; 3 where a video could not be read."""
    model, _, corpus = open_run(options.model, dataset=options.dataset, data_dir=options.data_dir)
    predictor = Predictor.from_file(model, device=options.device)
    corpus = with_classes_of(corpus, predictor.card.classes, model)
    check_exits(predictor.card, corpus, options.split)
    table = known_exits(predictor.card, model)
    thresholds: dict[float, float] = {}
    refused: dict[str, str] = {}
    for risk in risks:
        try:
            thresholds[risk] = threshold_for(table, risk)
        except ConfigError as error:
            refused[f"{risk:g}"] = error.what
    classifier = StreamClassifier(predictor)
    rows = corpus.manifest.rows(options.split).tolist()
    rows = rows[: options.videos] if options.videos else rows
    passes: dict[float | None, list[Pass]] = {None: [], **{risk: [] for risk in thresholds}}
    whole: list[NDArray[np.float64]] = []
    labels, lengths, unread = [], [], {}
    for number, row in enumerate(progress(rows, "videos")):
        path = corpus.manifest.path(row)
        turns = list(passes)
        first = number % len(turns)
        found = {}
        try:
            for turn in (*turns[first:], *turns[:first]):
                found[turn] = read(classifier, path, None if turn is None else thresholds[turn])
        except SourceError as error:
            unread[path.name] = error.what
            continue
        for turn, (one, _, _) in found.items():
            passes[turn].append(one)
        whole.append(np.stack(found[None][1]))
        lengths.append(found[None][2])
        labels.append(int(corpus.manifest.labels[row]))
    if not whole:
        raise DataError("not one video could be read", where=corpus.name)
    full = passes[None]
    judged = [judge(risk, level, passes[risk], full, labels) for risk, level in thresholds.items()]
    points = curve(whole)
    content = {
        "machine": facts,
        "data set": corpus.name,
        "split": options.split,
        "videos": len(full),
        "unread": unread,
        "calibrated on": f"{table.clips:,} {table.split} videos of {table.dataset}",
        "to the end": {
            "frames": float(np.median([one.frames for one in full])),
            "video_seconds": float(np.median(lengths)),
            "seconds": sum(one.seconds for one in full),
            "accuracy": accuracy(full, labels),
        },
    }
    text = report(content, judged, refused)
    plain = [plain_values(asdict(one)) for one in judged]
    curves = {"threshold, disagreement, frames saved": points}
    write_json(options.out / "exit.json", plain_values({**content, "risks": plain, "refused": refused, **curves}))
    write_text(options.out / "exit.md", text)
    write_picture(options.out / "exit.png", picture(judged, points))
    print(text)
    return SOME_FAILED if unread else 0


def plain_values(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_exit.py", description=__doc__)
    parser.add_argument("model", type=Path, help="model file or run folder")
    parser.add_argument("--dataset", help="another data set than the model was trained on")
    parser.add_argument("--data-dir", type=Path, help="where the data lie")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument("--risks", default=RISKS, help="default: %(default)s")
    parser.add_argument("--videos", type=int, default=0, help="only the first N; default: all")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/deploy"), help="folder; default: %(default)s")
    options = parser.parse_args(words)
    try:
        risks = sorted({float(word) for word in options.risks.split(",")})
    except ValueError:
        parser.error(f"--risks wants numbers with commas, got {options.risks}")
    if not risks or not all(0 < risk < 1 for risk in risks) or options.videos < 0:
        parser.error("--risks wants numbers between 0 and 1, --videos 0 (all) or more")
    facts = machine(["python", "-m", "tools.benchmarks.bench_exit", *words])
    return exit_code("bench_exit.py", lambda: measure(options, risks, facts), kept="nothing was written")


if __name__ == "__main__":
    sys.exit(main())

"""Compare the timelines of `videogru infer --windows` with a table that says what shows when.

    python -m tools.benchmarks.bench_timeline MODEL --table words.csv --out docs/video/timeline [--split test] \
        [--videos N]

MODEL is a model file or run folder, trained on windows like those of the table (source, label, split, start_seconds,
end_seconds). Every video of the split gets a timeline, whose segments are compared with the table's rows:

- found: rows whose middle lies in a segment of their class;
- F1 at an overlap (intersection over union) of 0.1, 0.25 and 0.5: a segment is right where the row of its class that it
  overlaps most is not taken yet (Lea et al. 2017, arXiv:1611.05267);
- error rate: edits between the two lists of classes in order of time, over the number of rows (the word error rate of
  speech recognition, Levenshtein distance).

Intervals: 95 %, percentile bootstrap over the videos. A video that cannot be read misses all its rows.
Writes OUT.json and OUT.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchmetrics.functional.text import edit_distance

from tools.measuring import Parser, exit_code, machine, machine_sentence, progress, write_json, write_text
from videogru.checkpoint.model_file import find_model
from videogru.config import SPLITS, DataConfig
from videogru.data.manifests.corpus import open_corpus
from videogru.errors import DataError, SourceError
from videogru.inference.metrics import interval, resample_counts
from videogru.inference.predictor import Predictor
from videogru.inference.timeline.timeline import MIN_CONFIDENCE, Segment, read_timeline

OVERLAPS = (0.1, 0.25, 0.5)
RESAMPLES = 1000
SOME_FAILED = 3


class Counts(NamedTuple):
    """Of one video: rows, segments, rows found, pairs at each of OVERLAPS, and edits."""

    rows: int
    segments: int
    found: int
    pairs: tuple[int, ...]
    edits: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_timeline.py", description=__doc__)
    parser.add_argument("model", type=Path, help="model file or run folder")
    parser.add_argument("--table", required=True, help="table with start_seconds and end_seconds")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose videos, default test")
    parser.add_argument("--videos", type=int, default=0, help="only the first N; default: all")
    parser.add_argument("--min-confidence", type=float, default=MIN_CONFIDENCE, help="as of infer, default 0.7")
    options = parser.parse_args(words)
    if options.videos < 0 or not 0 <= options.min_confidence <= 1:
        parser.error("--videos wants 0 (all) or more, --min-confidence a number from 0 to 1")
    facts = machine(["python", "-m", "tools.benchmarks.bench_timeline", *words])
    return exit_code("bench_timeline.py", lambda: work(options, facts), kept="nothing was written")


def work(options: Any, facts: dict[str, object]) -> int:
    """All of it; 3 where a video could not be read."""
    predictor = Predictor.from_file(find_model(options.model))
    truths = read_truths(options.table, options.split)
    if options.videos:
        truths = dict(list(truths.items())[: options.videos])
    counts, unread = [], {}
    for path, truth in progress(list(truths.items()), "videos"):
        segments: tuple[Segment, ...] = ()
        try:
            segments = read_timeline(predictor, path, min_confidence=options.min_confidence, num_workers=0).segments
        except SourceError as error:
            unread[path.name] = error.what
        counts.append(compare(segments, truth))
    content = {
        "machine": facts,
        "split": options.split,
        "videos": len(counts),
        "rows": sum(one.rows for one in counts),
        "segments": sum(one.segments for one in counts),
        "unread": unread,
        "scores": scores(counts),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_name(options.out.name + ".json"), content)
    text = markdown(content)
    write_text(options.out.with_name(options.out.name + ".md"), text)
    print(text)
    return SOME_FAILED if unread else 0


def read_truths(table: str, split: str) -> dict[Path, tuple[Segment, ...]]:
    """The rows of each video of a split, in order of time. Raises DataError without rows or times."""
    manifest = open_corpus(DataConfig(dataset=table), for_training=False).manifest
    found: dict[Path, list[Segment]] = {}
    for row in manifest.rows(split).tolist():  # type: ignore[arg-type]
        window = manifest.window(row)
        if window is None:
            raise DataError(f"{manifest.sources[row]} has a row without start_seconds and end_seconds", where=table)
        segment = Segment(*window, manifest.classes[manifest.labels[row]], 1.0)
        found.setdefault(manifest.path(row), []).append(segment)
    if not found:
        raise DataError(f"no rows of split {split}", where=table)
    return {path: tuple(sorted(rows, key=lambda row: row.start_seconds)) for path, rows in found.items()}


def compare(segments: Sequence[Segment], truth: Sequence[Segment]) -> Counts:
    """Segments of a video against what it shows; both in order of time."""
    middles = [(row.label, (row.start_seconds + row.end_seconds) / 2) for row in truth]
    found = sum(
        any(s.label == label and s.start_seconds <= middle < s.end_seconds for s in segments)
        for label, middle in middles
    )
    pairs = tuple(paired(segments, truth, least) for least in OVERLAPS)
    names = {name: chr(0x100 + k) for k, name in enumerate(sorted({s.label for s in (*segments, *truth)}))}
    said, meant = ("".join(names[s.label] for s in line) for line in (segments, truth))
    edits = int(edit_distance([said], [meant], reduction="sum"))
    return Counts(len(truth), len(segments), found, pairs, edits)


def paired(segments: Sequence[Segment], truth: Sequence[Segment], least: float) -> int:
    """How many segments have a row of their own, with at least this overlap."""
    taken: set[int] = set()
    for segment in segments:
        over = [overlap(segment, row) for row in truth]
        best = int(np.argmax(over)) if over else -1
        if best >= 0 and over[best] >= least and best not in taken:
            taken.add(best)
    return len(taken)


def overlap(first: Segment, second: Segment) -> float:
    """Intersection over union in time; 0 for different classes."""
    if first.label != second.label:
        return 0.0
    shared = min(first.end_seconds, second.end_seconds) - max(first.start_seconds, second.start_seconds)
    whole = max(first.end_seconds, second.end_seconds) - min(first.start_seconds, second.start_seconds)
    return max(0.0, shared) / whole


def scores(counts: Sequence[Counts]) -> dict[str, list[float]]:
    """Value, low and high of each score, over all videos together."""
    table = np.array([[one.rows, one.segments, one.found, one.edits, *one.pairs] for one in counts], dtype=np.float64)
    drawn = [table.T @ part for part in resample_counts(len(counts), resamples=RESAMPLES, seed=0)]
    own, resampled = _scores(table.sum(axis=0)[:, None]), _scores(np.concatenate(drawn, axis=1))
    found = {name: interval(float(own[name][0]), resampled[name]) for name in own}
    return {name: [one.value, one.low, one.high] for name, one in found.items()}


def _scores(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    rows, segments, found, edits, *pairs = sums
    result = {"found": found / rows}
    for least, together in zip(OVERLAPS, pairs, strict=True):
        result[f"F1 at {least:g}"] = 2 * together / (rows + segments)
    return result | {"error rate": edits / rows}


def markdown(content: dict[str, Any]) -> str:
    """The table with what it was made of."""
    unread = "; not read, all their rows missed: " + ", ".join(content["unread"]) if content["unread"] else ""
    lines = [
        "# Timelines against the truth",
        "",
        machine_sentence(content["machine"]),
        "",
        f"Split {content['split']}: {content['videos']:,} videos, {content['rows']:,} rows, {content['segments']:,} "
        f"segments{unread}. Intervals: 95 %, bootstrap over the videos. "
        "The scores: `tools/benchmarks/bench_timeline.py`.",
        "",
        "| score | value |",
        "|---|---:|",
    ]
    lines += [
        f"| {name} | {value:.3f} ({low:.3f}–{high:.3f}) |" for name, (value, low, high) in content["scores"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

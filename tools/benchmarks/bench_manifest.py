"""Time and memory of a manifest with millions of rows, in the reading process and in its workers.

    python -m tools.benchmarks.bench_manifest --rows 10000000 --out docs/video

Writes a table of made-up clips (seeded; Kinetics-400's classes, paths as Kinetics has them, three splits, a group for
each video of three clips) as CSV and Parquet into a temporary folder (--temp: where), then reads it in fresh processes:
with its splits, without them (so that they are drawn), and with some of the files there. Loaders with workers, forked
and spawned, then pass random rows on; each worker says how much of its memory no other process shares. The same loader
over ten rows tells what of it is the interpreter and its libraries. Writes manifest.json and manifest.md.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from tools.measuring import (
    Parser,
    exit_code,
    last_error,
    machine,
    machine_sentence,
    progress,
    write_json,
    write_text,
)
from videogru.config import SPLITS
from videogru.data.manifests.dataset_card import load_card
from videogru.data.manifests.manifest import Manifest, missing_rows, read_manifest
from videogru.data.manifests.splits import assign_splits
from videogru.errors import DataError

MIB = 2**20
CLIPS_PER_VIDEO = 3
WORKER_ROWS = 400_000  # random rows that the workers of a loader pass on together
_LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)


def table_of(rows: int, start: int, rng: np.random.Generator) -> Any:
    """`rows` clips from number `start` on: source, label, split, group."""
    classes = load_card("kinetics400").classes
    videos = -(-rows // CLIPS_PER_VIDEO)
    ids = _LETTERS[rng.integers(0, len(_LETTERS), (videos, 11))].copy().view("S11")[:, 0].astype("U11").tolist()
    labels = rng.integers(0, len(classes), videos).tolist()
    splits = rng.choice(len(SPLITS), videos, p=(0.8, 0.1, 0.1)).tolist()
    columns: dict[str, list[str]] = {name: [] for name in ("source", "label", "split", "group")}
    for row in range(rows):
        video, clip = divmod(row, CLIPS_PER_VIDEO)
        name, label, split = f"{ids[video]}{start:x}", classes[labels[video]], SPLITS[splits[video]]
        columns["source"].append(f"{split}/{label}/{name}_{clip * 10:06d}_{clip * 10 + 10:06d}.mp4")
        for key, cell in (("label", label), ("split", split), ("group", name)):
            columns[key].append(cell)
    return pa.table(columns)


def write_tables(folder: Path, rows: int) -> dict[str, Path]:
    """set.csv, set.parquet, and drawn.csv without the splits."""
    rng = np.random.default_rng(0)
    paths = {name: folder / name for name in ("set.csv", "set.parquet", "drawn.csv", "ten.csv")}
    step = 250_000
    first = table_of(min(step, rows), 0, rng)
    arrow_csv.write_csv(first.slice(0, 10), paths["ten.csv"], _STYLE)
    with (
        arrow_csv.CSVWriter(paths["set.csv"], first.schema, write_options=_STYLE) as whole,
        arrow_csv.CSVWriter(paths["drawn.csv"], first.drop_columns("split").schema, write_options=_STYLE) as drawn,
        parquet.ParquetWriter(paths["set.parquet"], first.schema) as packed,
    ):
        for start in progress(range(0, rows, step), "writing the tables"):
            table = first if start == 0 else table_of(min(step, rows - start), start, rng)
            whole.write_table(table)
            drawn.write_table(table.drop_columns("split"))
            packed.write_table(table)
    return paths


_STYLE = arrow_csv.WriteOptions(quoting_style="needed", include_header=True)


# In the measured processes --------------------------------------------------------------------------------------


def memory() -> dict[str, float]:
    """MiB of this process: resident, and what no other process shares (written to, or only read)."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name.rstrip(":")] = int(value) / 1024
    return {
        "resident": fields["Rss"],
        "written": fields["Private_Dirty"],
        "read only": fields["Private_Clean"],
    }


def read(path: Path, steps: str) -> dict[str, Any]:
    """Seconds of reading, of what `steps` names, and the memory afterwards."""
    figures: dict[str, Any] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        start, busy = time.perf_counter(), time.process_time()
        result = work()
        figures[f"{what} seconds"] = time.perf_counter() - start
        figures[f"{what} core seconds"] = time.process_time() - busy
        return result

    before = memory()["resident"]
    manifest = timed("read", lambda: read_manifest(path))
    figures["held MiB"] = held_mebibytes(manifest)
    if "splits" in steps:
        manifest = timed("splits", lambda: assign_splits(manifest, val_fraction=0.1, test_fraction=0.1, seed=0))
    if "missing" in steps:
        figures["missing rows"] = len(timed("missing", lambda: missing_rows(manifest)))
    figures["grown MiB"] = memory()["resident"] - before
    # Not getrusage, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    figures["peak MiB"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return figures


def held_mebibytes(manifest: Manifest) -> float:
    """What the columns take."""
    arrays: list[Any] = [
        manifest.labels,
        manifest.splits,
        manifest.groups.codes,
        manifest.start_seconds,
        manifest.end_seconds,
    ]
    texts = [manifest.sources, *([] if manifest.groups.names is manifest.sources else [manifest.groups.names])]
    held: int = sum(array.nbytes for array in arrays) + sum(text.nbytes for text in texts)
    return held / MIB


class Rows:
    """A dataset whose items are what a clip needs of its row, and the worker's memory after a batch."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        """Bytes of the paths and groups, so that each row is really read."""
        manifest = self.manifest
        total = 0
        for row in rows:
            total += len(str(manifest.path(row))) + len(manifest.groups[row]) + int(manifest.labels[row] >= 0)
            total += manifest.window(row) is None
        return {"pid": os.getpid(), "bytes": total, "memory": memory()}


def pass_through(path: Path, method: str, workers: int) -> dict[str, Any]:
    """MiB of each worker after it passed its share of random rows on."""
    from torch.utils.data import DataLoader

    manifest = read_manifest(path)
    order = np.random.default_rng(1).integers(0, len(manifest), WORKER_ROWS).tolist()
    loader: DataLoader[Any] = DataLoader(
        Rows(manifest),  # type: ignore[arg-type]
        batch_size=1000,
        sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=method,
    )
    start = time.perf_counter()
    last: dict[int, dict[str, float]] = {}
    first_seconds = 0.0
    for batch in loader:
        first_seconds = first_seconds or time.perf_counter() - start
        last[batch["pid"]] = batch["memory"]
    names = ("resident", "written", "read only")
    medians = {name: statistics.median(each[name] for each in last.values()) for name in names}
    return {"workers": len(last), "first batch seconds": first_seconds, **medians, "parent MiB": memory()["resident"]}


def _as_it_is(batch: Any) -> Any:
    return batch


def child(words: list[str]) -> int:
    """One measured process: prints its figures as JSON."""
    what, path, *rest = words
    figures = read(Path(path), rest[0]) if what == "read" else pass_through(Path(path), rest[0], int(rest[1]))
    print(json.dumps(figures))
    return 0


# In the measuring process ---------------------------------------------------------------------------------------


def measured(*words: object) -> dict[str, Any]:
    """What a fresh process of this tool says."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.bench_manifest", "--child", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise DataError(f"a measured process failed: {last_error(done.stderr)}", where=words[1])
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def put_files(path: Path, count: int) -> int:
    """Make the first `count` files that a table names; returns how many these are."""
    manifest = read_manifest(path)
    for row in range(min(count, len(manifest))):
        manifest.path(row).parent.mkdir(parents=True, exist_ok=True)
        manifest.path(row).touch()
    return min(count, len(manifest))


def measure_all(folder: Path, rows: int, present: int, workers: list[int], rounds: int) -> dict[str, Any]:
    """All figures by name; times are of each round."""
    paths = write_tables(folder, rows)
    results: dict[str, Any] = {
        "rows": rows,
        "csv MiB": paths["set.csv"].stat().st_size / MIB,
        "parquet MiB": paths["set.parquet"].stat().st_size / MIB,
    }
    reads: dict[str, list[dict[str, Any]]] = {}
    kinds = {
        "CSV": (paths["set.csv"], "missing"),
        "Parquet": (paths["set.parquet"], "missing"),
        "CSV, splits drawn": (paths["drawn.csv"], "splits"),
    }
    for _ in range(rounds):
        for name, (path, steps) in kinds.items():
            reads.setdefault(name, []).append(measured("read", path, steps))
            print(f"{name}: {reads[name][-1]}", file=sys.stderr, flush=True)
    results["reads"] = reads
    loaders: list[dict[str, Any]] = []
    for method, count in ((method, count) for method in ("fork", "spawn") for count in workers):
        figures = measured("pass", paths["set.csv"], method, count)
        bare = measured("pass", paths["ten.csv"], method, count)
        loaders.append({"method": method, "asked": count, "manifest": figures, "ten rows": bare})
        print(f"{method}, {count} workers: {figures}; ten rows: {bare}", file=sys.stderr, flush=True)
    results["loaders"] = loaders
    if present:
        made = put_files(paths["set.csv"], present)
        results["files there"] = {"files": made, **measured("read", paths["set.csv"], "missing")}
    return results


def report(results: dict[str, Any], facts: dict[str, object]) -> str:
    """The figures in Markdown."""

    def middle(name: str, key: str, form: str = "{:.1f}") -> str:
        values = [figures[key] for figures in results["reads"][name] if key in figures]
        return form.format(statistics.median(values)) if values else "–"

    lines = [
        f"# A manifest of {results['rows']:,} rows",
        "",
        f"{machine_sentence(facts)} CSV {results['csv MiB']:,.0f} MiB, Parquet {results['parquet MiB']:,.0f} MiB; "
        f"medians of {len(results['reads']['CSV'])} rounds, each reading in a process of its own. Seconds of a core "
        "come first, since others used the machine too; in parentheses those of the clock.",
        "",
        "| | read, s | draw splits, s | which files are absent (none is there), s | columns, MiB "
        "| process grows by, MiB | peak, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in results["reads"]:
        cells = []
        for what in ("read", "splits", "missing"):
            core, wall = middle(name, f"{what} core seconds"), middle(name, f"{what} seconds")
            cells.append("–" if wall == "–" else f"{core} ({wall})")
        cells += [middle(name, key, "{:,.0f}") for key in ("held MiB", "grown MiB", "peak MiB")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if "files there" in results:
        there = results["files there"]
        lines += [
            "",
            f"With {there['files']:,} of the files there: reading (which looks for links that lead elsewhere) "
            f"{there['read core seconds']:.1f} ({there['read seconds']:.1f}) s, finding the absent "
            f"{there['missing core seconds']:.1f} ({there['missing seconds']:.1f}) s.",
        ]
    lines += [
        "",
        f"Workers that pass {WORKER_ROWS:,} random rows on (path, label, group, window), MiB of each (median). "
        "*written*: private pages it wrote; *only read*: pages that no other process has mapped at that moment, of "
        "files that the system holds once. *by the manifest*: written, less what the same worker writes with ten rows.",
        "",
        "| | resident | written | with ten rows | by the manifest | only read | first batch, s (ten rows) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in results["loaders"]:
        full, bare = each["manifest"], each["ten rows"]
        cells = [f"{full[key]:,.0f}" for key in ("resident", "written")]
        cells += [f"{bare['written']:,.0f}", f"{full['written'] - bare['written']:,.0f}", f"{full['read only']:,.0f}"]
        cells.append(f"{full['first batch seconds']:.1f} ({bare['first batch seconds']:.1f})")
        lines.append(f"| {each['method']}, {each['asked']} workers | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--child"]:
        return child(words[1:])
    parser = Parser(prog="bench_manifest.py", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--present", type=int, default=100_000, help="files that are made for the last measurement")
    parser.add_argument("--workers", default="2,8", help="numbers of workers, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temp", type=Path, help="where the temporary folder is made (2 GB for 10 million rows)")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets manifest.json and manifest.md")
    options = parser.parse_args(words)
    counts = options.workers.split(",")
    if options.rows < 20 or options.rounds < 1 or not all(count.isdigit() and int(count) for count in counts):
        parser.error("--rows has to be at least 20, --rounds at least 1, --workers numbers from 1 on")
    facts = machine(["python", "-m", "tools.benchmarks.bench_manifest", *words])

    def work_on() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.temp) as folder:
            sizes = (options.rows, options.present, [int(count) for count in counts], options.rounds)
            results = measure_all(Path(folder), *sizes)
        text = report(results, facts)
        write_json(options.out / "manifest.json", {"facts": facts, **results})
        write_text(options.out / "manifest.md", text)
        print(text)

    return exit_code("bench_manifest.py", work_on, kept="nothing is written")


if __name__ == "__main__":
    raise SystemExit(main())

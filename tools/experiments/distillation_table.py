"""The table of the distillation benchmark: accuracy, size and time of teacher and students; JSON and Markdown."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tools.experiments.article import HOLDS, INTERVALS, interval, points, samples, verdict
from tools.experiments.distillation_rows import ROWS, TASKS, run_folder
from tools.measuring import machine, machine_sentence, median_range, write_json, write_text
from videogru.checkpoint.model_file import MODEL_FILE_NAME, read_model
from videogru.errors import DataError
from videogru.inference.predictions import read_csv
from videogru.models.classifier import Classifier
from videogru.models.cost import count_macs

ROUNDS, BATCH, TURN_SECONDS = 7, 32, 0.2
KEPT, TIME = 0.97, 0.25  # of the teacher's accuracy at least, of its time at most


def measure(work: Path, tasks: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """Everything in the table, from the runs that are finished. Raises DataError where none is."""
    facts = machine(command)
    found = {task: _task(work, task) for task in tasks}
    if not any(row["seeds"] for one in found.values() for row in one["rows"].values()):
        raise DataError("no finished run", where=work, hint="Train first, without --only measure.")
    return {"tasks": found, "machine": facts}


def _finished(work: Path, task: str, row: str) -> list[int]:
    found = []
    for path in work.glob(f"{task}-{row}-seed*/evaluation-test.json"):
        number = path.parent.name.rpartition("seed")[2]
        if number.isdecimal() and (path.parent / MODEL_FILE_NAME).is_file():
            found.append(int(number))
    return sorted(found)


def _task(work: Path, task: str) -> dict[str, Any]:
    """Rows of one data set. Comparisons are over the seeds that both rows have, paired by seed and source."""
    seeds = {row: _finished(work, task, row) for row in ROWS}
    hits = {
        row: np.stack([_hits(run_folder(work, task, row, seed)) for seed in some])
        for row, some in seeds.items()
        if some
    }
    rows: dict[str, Any] = {row: {"title": ROWS[row].title, "seeds": some} for row, some in seeds.items()}
    for row, values in hits.items():
        rows[row]["accuracy"] = interval(samples(values[None])[0], len(values))
        rows[row]["per_seed"] = values.mean(axis=1).tolist()
        if ROWS[row].taught:
            both = _paired(hits, seeds, row, "teacher")
            rows[row]["share_of_teacher"] = both and interval(both[0] / both[1], both[2])
            both = _paired(hits, seeds, row, "alone")
            rows[row]["minus_alone"] = both and interval(both[0] - both[1], both[2])
    nets = {row: run_folder(work, task, row, some[0]) / MODEL_FILE_NAME for row, some in seeds.items() if some}
    for row, cost in _costs(nets).items():
        rows[row] |= cost
    return {"title": TASKS[task].title, "rows": rows}


def _hits(run: Path) -> NDArray[np.float64]:
    """(N,) 1 where the test row was named rightly; rows that could not be read count as wrong."""
    said = read_csv(run / "predictions-test.csv")
    return np.asarray((said.predicted == said.labels) & (said.labels >= 0), dtype=np.float64)


def _paired(
    hits: dict[str, NDArray[np.float64]], seeds: dict[str, list[int]], row: str, other: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], int] | None:
    """`samples` of two rows over the seeds that both have, and how many these are."""
    both = [seed for seed in seeds[row] if seed in seeds[other]]
    if not both:
        return None
    values = [hits[name][[seeds[name].index(seed) for seed in both]] for name in (row, other)]
    ours, theirs = samples(np.stack(values))
    return ours, theirs, len(both)


def _costs(nets: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Size, and milliseconds a clip, alone and in batches, one of each net per round, in turns."""
    models = {row: read_model(path) for row, path in nets.items()}
    found: dict[str, dict[str, Any]] = {}
    for row, (model, card) in models.items():
        frames = 1 if card.kind == "image" else card.data.num_frames
        found[row] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "megabytes": nets[row].stat().st_size / 1e6,
            "macs": count_macs(model, frames)["total"],
            "alone_ms": [],
            "batch_ms": [],
        }
    for round_ in range(ROUNDS + 1):
        for row, (model, card) in models.items():
            frames = 1 if card.kind == "image" else card.data.num_frames
            for key, count in (("alone_ms", 1), ("batch_ms", BATCH)):
                taken = _milliseconds(model, count, frames)
                if round_:  # the first one warms up
                    found[row][key].append(taken)
    return found


@torch.inference_mode()
def _milliseconds(model: Classifier, count: int, frames: int) -> float:
    """Per clip, the mean over TURN_SECONDS."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, frames, model.in_channels, model.frame_size, model.frame_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    lengths, gaps = torch.full((count,), frames), torch.zeros(count, frames)
    model(clips, lengths, gaps)  # the net before has emptied the caches
    started, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started < TURN_SECONDS:
        model(clips, lengths, gaps)
        done += 1
    return (time.perf_counter() - started) * 1000 / done / count


def write_table(out: Path, content: dict[str, Any]) -> None:
    """Write both files, and print the table."""
    write_json(out / "distillation.json", content)
    text = markdown(content)
    write_text(out / "distillation.md", text)
    print(text)


def markdown(content: dict[str, Any]) -> str:
    """The tables, what they rest on, and whether the goals are met."""
    lines = ["# Distillation", "", machine_sentence(content["machine"]), ""]
    lines += [
        f"Test accuracy in percent, mean over seeds; {INTERVALS}. Shares and differences are paired by seed and "
        f"source. Times in float32: medians (least–greatest) of {ROUNDS} rounds in which the nets take turns, a clip "
        f"alone and in batches of {BATCH}; ratios are to the teacher, round by round. Size: of the model file.",
        "",
    ]
    for one in content["tasks"].values():
        lines += [f"## {one['title']}", "", *_table(one["rows"]), "", *_verdicts(one["rows"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: dict[str, Any]) -> list[str]:
    lines = [
        "| net | seeds | accuracy | % of the teacher's | minus alone | MB | parameters | MACs a clip | ms alone | "
        "ms in batches | of the teacher's time, alone | in batches |",
        f"|---|---:|---|---|---|---:|---:|---:|{'---|' * 4}",
    ]
    for row in rows.values():
        if not row["seeds"]:
            lines.append(f"| {row['title']} | 0 | not run |{' |' * 9}")
            continue
        cells = [row["title"], str(len(row["seeds"])), points(row["accuracy"])]
        cells.append(points(row["share_of_teacher"]) if "share_of_teacher" in row else "")
        cells.append(points(row["minus_alone"], signed=True) if "minus_alone" in row else "")
        cells += [f"{row['megabytes']:.2f}", f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M"]
        cells += [median_range(row[key], "{:.2f}") for key in ("alone_ms", "batch_ms")]
        cells += [median_range(_ratios(rows, row, key), "{:.2f}") for key in ("alone_ms", "batch_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratios(rows: dict[str, Any], row: dict[str, Any], key: str) -> list[float]:
    """Time over the teacher's in the same round; none where it was not trained."""
    if not rows["teacher"]["seeds"]:
        return []
    return [mine / theirs for mine, theirs in zip(row[key], rows["teacher"][key], strict=True)]


def _verdicts(rows: dict[str, Any]) -> list[str]:
    """The goals, for each row that was taught."""
    lines = []
    for row in rows.values():
        share, ahead = row.get("share_of_teacher"), row.get("minus_alone")
        if share is not None:
            times = [statistics.median(_ratios(rows, row, key)) for key in ("alone_ms", "batch_ms")]
            kept = "is kept" if share["value"] >= KEPT else "is NOT kept"
            sure = "" if (share["low"] >= KEPT) == (share["high"] >= KEPT) else " (the interval holds both)"
            fast = ["met" if ratio <= TIME else "NOT met" for ratio in times]
            lines.append(
                f"- {row['title']}: {KEPT:.0%} of the teacher's accuracy {kept}{sure}; a quarter of its time is "
                f"{fast[0]} alone and {fast[1]} in batches."
            )
        if ahead is not None:
            better = {HOLDS: "better than alone, beyond the interval"}.get(
                verdict(ahead), "not better beyond the interval"
            )
            lines.append(f"- {row['title']}: {better}.")
    return lines

"""Memory and open files of a process that reads videos for long, and of a long training; what a watched worker costs.

    python -m tools.benchmarks.bench_resources [--videos ../shared/data/videos] [--opens 5000] [--steps 300] \
        --out docs/video

opens: one process opens a video and reads 8 frames with the default reader, over and over, in turn over all files of at
most 150 kB below --videos (without it, over small ones it makes). training: `videogru train` on small videos with 2
workers; the resident set and the open files of the main process and of its workers are read from outside twice a
second. one file: `Predictor.predict_paths` of one video in the process itself and through one watched worker, in turn.
Slopes are of a line through what follows the first fifth. Writes resources.json and resources.png.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.fuzzing.video_mutations import RECIPES, collect_bases, make_video
from tools.measuring import Parser, exit_code, last_error, machine, progress, write_json, write_picture
from videogru.config import DataConfig
from videogru.data.clips.sampling import uniform
from videogru.data.readers.open import open_source
from videogru.errors import DataError

FRAMES = 8
ROUNDS = 15
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_mib(pid: int | str = "self") -> float:
    """The resident set of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


def open_files(pid: int | str = "self") -> int:
    """Its open file descriptors."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def watch_opens(files: list[Path], count: int) -> dict[str, Any]:
    """Open and read `count` times in this process; samples every 25."""
    at, mib, descriptors = [], [], []
    for number in progress(range(count), "opens"):
        with open_source(files[number % len(files)], data=DataConfig(), kind="video") as source:
            chosen = uniform(positions=source.positions, extent=source.extent, num_frames=FRAMES)
            source.read([int(index) for index in chosen])
        if number % 25 == 24:
            at.append(number + 1)
            mib.append(round(resident_mib(), 2))
            descriptors.append(open_files())
    return {"files": len(files), "opens": at, "mib": mib, "descriptors": descriptors} | slope(at, mib, 1000)


def slope(at: Sequence[float], mib: Sequence[float], per: float) -> dict[str, float]:
    """MiB per `per` of what `at` counts, after the first fifth, and the largest value."""
    late = len(at) // 5
    line = np.polyfit(at[late:], mib[late:], 1)
    return {"slope_mib": round(float(line[0]) * per, 3), "per": per, "most_mib": max(mib)}


def make_set(folder: Path) -> None:
    """48 videos in two classes: large and small pictures of the same stripes."""
    for number in range(48):
        path = folder / "clips" / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 64 if number % 2 else 96
        make_video(path, RECIPES["mpeg4.mp4"], frames=24 + number % 7, height=side, width=side)


def watch_training(folder: Path, steps: int) -> dict[str, Any]:
    """Train for about `steps` steps in a process of its own and look at it and its children meanwhile."""
    make_set(folder)
    settings = {
        "data.frame_size": 64, "data.num_frames": 8, "train.num_workers": 2, "model.encoder_width": 8,
        "model.hidden_size": 16, "data.val_fraction": 0.15, "data.test_fraction": 0.15,
    }  # fmt: skip
    epochs = max(1, round(steps / 9))  # 34 training rows in batches of 4
    words = ["train", "--dataset", str(folder / "clips"), "--epochs", str(epochs), "--batch-size", "4"]
    words += [
        "--out",
        str(folder / "run"),
        *(word for item in settings.items() for word in ("--set", "=".join(map(str, item)))),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "videogru", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    samples: list[dict[str, Any]] = []
    started = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        try:
            workers = _children(process.pid)
            main = {"mib": resident_mib(process.pid), "descriptors": open_files(process.pid)}
            each = [{"mib": resident_mib(pid), "descriptors": open_files(pid)} for pid in workers]
        except (FileNotFoundError, ProcessLookupError):  # ended between two looks
            continue
        each = [worker for worker in each if worker["mib"]]  # one that has ended, but was not yet waited for, has none
        samples.append({"seconds": round(time.monotonic() - started, 2), "main": main, "workers": each})
    if process.returncode:
        raise DataError(f"the training ended with {process.returncode}: {last_error(process.stderr.read())}")  # type: ignore[union-attr]
    busy = [sample for sample in samples if len(sample["workers"]) >= 2]
    done = epochs * 9
    per = (busy[-1]["seconds"] - busy[0]["seconds"]) / done * 100
    seconds = [sample["seconds"] for sample in busy]
    return {
        "steps": done,
        "main": slope(seconds, [sample["main"]["mib"] for sample in busy], per),
        "worker": slope(seconds, [max(worker["mib"] for worker in sample["workers"]) for sample in busy], per),
        "descriptors_main": [min(s["main"]["descriptors"] for s in busy), max(s["main"]["descriptors"] for s in busy)],
        "samples": busy,
    }


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cost_of_a_worker(run: Path, file: Path) -> dict[str, Any]:
    """Milliseconds of one file, unwatched and through a worker, wall and CPU (of all processes)."""
    from videogru.inference.predictor import Predictor

    predictor = Predictor.from_file(run, device="cpu")
    ways: dict[str, int | None] = {"unwatched": 0, "watched": None}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, workers in ways.items():
            before, started = _cpu_seconds(), time.perf_counter()
            predictor.predict_paths([file], num_workers=workers)
            if number:
                wall[name].append(1000 * (time.perf_counter() - started))
                cpu[name].append(1000 * (_cpu_seconds() - before))
    return {
        name: {"wall_ms": round(statistics.median(wall[name]), 1), "cpu_ms": round(statistics.median(cpu[name]), 1)}
        for name in ways
    } | {"rounds": ROUNDS, "resident_mib": round(resident_mib())}


def _cpu_seconds() -> float:
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def verdict(found: dict[str, Any]) -> str:
    """One line."""
    opens, training = found["opens"], found["training"]
    return (
        f"{opens['slope_mib']:+.2f} MiB per 1,000 opens after the first fifth ({opens['opens'][-1]:,} opens, "
        f"at most {opens['most_mib']:.0f} MiB, {min(opens['descriptors'])} to {max(opens['descriptors'])} open files); "
        "training: "
        f"{training['main']['slope_mib']:+.2f} MiB per 100 steps in the main process, "
        f"{training['worker']['slope_mib']:+.2f} in the larger worker ({training['steps']} steps, "
        f"{training['descriptors_main'][0]} to {training['descriptors_main'][1]} open files)"
    )


def picture(found: dict[str, Any]) -> Any:
    """Four panels: memory above, open files below; opens on the left, training on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    opens, samples = found["opens"], found["training"]["samples"]
    axes[0][0].plot(opens["opens"], opens["mib"], color="#0072b2")
    axes[1][0].plot(opens["opens"], opens["descriptors"], color="#0072b2")
    seconds = [sample["seconds"] for sample in samples]
    lines = {"main process": [sample["main"] for sample in samples]}
    lines |= {f"worker {place + 1}": [sample["workers"][place] for sample in samples] for place in range(2)}
    for (name, values), color in zip(lines.items(), ("#0072b2", "#d55e00", "#009e73"), strict=True):
        axes[0][1].plot(seconds, [value["mib"] for value in values], color=color, label=name)
        axes[1][1].plot(seconds, [value["descriptors"] for value in values], color=color)
    axes[0][0].set_title(f"{opens['opens'][-1]:,} opens and reads of {opens['files']} videos")
    axes[0][1].set_title(f"training, {found['training']['steps']} steps, 2 workers")
    axes[0][1].legend(frameon=False)
    axes[0][0].set_ylabel("resident, MiB")
    axes[1][0].set_ylabel("open files")
    axes[1][0].set_xlabel("opens")
    axes[1][1].set_xlabel("seconds")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, say; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_resources.py", description=__doc__)
    parser.add_argument("--videos", type=Path, help="folder with videos; small ones are taken")
    parser.add_argument("--opens", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=300, help="of the training, about")
    parser.add_argument("--out", type=Path, required=True, help="folder for resources.json and resources.png")
    options = parser.parse_args(words)
    if options.opens < 250 or options.steps < 45:
        parser.error("--opens wants 250 or more and --steps 45 or more: a slope needs some samples")
    facts = machine(["python", "-m", "tools.benchmarks.bench_resources", *words])

    def work_on() -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            collect_bases(folder / "made", None)
            files = sorted((options.videos or folder / "made").rglob("*.*"))
            known = (".mp4", ".mov", ".mkv", ".webm", ".avi")
            files = [path for path in files if path.suffix in known and path.stat().st_size <= 150_000]
            found: dict[str, Any] = {"opens": watch_opens(files, options.opens)}
            found["training"] = watch_training(folder, options.steps)
            found["one file"] = cost_of_a_worker(folder / "run", folder / "clips" / "a" / "0.mp4")
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": facts, "verdict": verdict(found), **found}
        write_json(options.out / "resources.json", found)
        write_picture(options.out / "resources.png", picture(found))
        print(found["verdict"])
        print(json.dumps(found["one file"]))

    return exit_code("bench_resources.py", work_on, kept="nothing is written")


if __name__ == "__main__":
    sys.exit(main())

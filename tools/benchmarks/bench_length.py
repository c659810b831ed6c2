"""Seconds and peak memory of one training step (forward and backward) against the length of the sequence.

    python -m tools.benchmarks.bench_length --out results
    python -m tools.benchmarks.bench_length --what lengths --lengths 256,1024 --cells gru,mingru \
        --checkpointing off --out results

Square color frames go through the encoder `pixels` (a 1x1 convolution) and `--seq grid`: every pixel is one step.
A length is rounded to the nearest square, 512 to 23 x 23 = 529. Each measurement is a process of its own; cells and
checkpointing alternate inside each round. Memory is the peak of the resident set (on a GPU: of allocated memory)
during the first step, above what was held once the model and the batch were made. Writes length.json, .md and .png
after every round, so that Ctrl-C leaves the rounds before it.
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tools.measuring import (
    Parser,
    exit_code,
    last_error,
    machine,
    machine_lines,
    median_range,
    write_json,
    write_picture,
    write_text,
)
from videogru.config import ModelConfig
from videogru.models.classifier import Classifier
from videogru.training.memory import keep_freed_memory

WIDTH, HIDDEN, CLASSES = 16, 128, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELLS = ("gru", "mingru", "lstm")
COLORS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito's: told apart by color-blind readers too
MALLOC = {"fit": "On a CPU freed memory is kept, as in a training.", "usual": "The C library's malloc is as it is."}
CHECKPOINTING = {"both": (False, True), "on": (True,), "off": (False,)}


@dataclass(frozen=True)
class Case:
    """One measurement: a classifier, the shape of its batch (B T 3 side side), and whether it recomputes."""

    encoder: str
    cell: str
    seq: str
    side: int
    frames: int
    batch: int
    checkpointing: bool

    @property
    def steps(self) -> int:
        """Steps that the recurrent part reads of one clip."""
        return self.frames * (self.side**2 if self.seq == "grid" else 1)

    def __str__(self) -> str:
        no = "" if self.checkpointing else "no "
        return f"{self.encoder}, {self.cell}, {self.steps} steps, {no}checkpointing"


@dataclass
class Result:
    """All that was measured of one case; killed: how many of its processes were, for want of memory."""

    case: Case
    seconds: list[float]
    mib: list[float]
    killed: int = 0

    def add(self, seconds: Sequence[float], mib: Sequence[float]) -> None:
        """What one process measured; nothing where it was killed."""
        self.seconds.extend(seconds)
        self.mib.extend(mib)
        self.killed += not mib

    def shown(self, values: Sequence[float], form: str) -> str:
        """Its seconds or MiB as a cell of a table."""
        killed = f"killed {self.killed} of {self.killed + len(self.mib)}"
        if not self.killed:
            return median_range(values, form)
        return f"{median_range(values, form)}, {killed}" if values else killed

    @property
    def summary(self) -> dict[str, Any]:
        """The case with its steps, all that was measured, and the medians, as it is written."""
        medians = {name: statistics.median(x) if x else None for name, x in (("s", self.seconds), ("MiB", self.mib))}
        return {**asdict(self), "steps": self.case.steps, "medians": medians}


def side_of(length: int) -> int:
    """The side of the square of pixels nearest to a length; frames have at least 4 pixels a side."""
    return max(4, round(math.sqrt(length)))


def length_cases(lengths: Sequence[int], cells: Sequence[str], checkpointing: Sequence[bool], batch: int) -> list[Case]:
    """Single frames of raw pixels; those of one length follow each other."""
    sides = sorted({side_of(length) for length in lengths})
    return [
        Case("pixels", cell, "grid", side, 1, batch, on) for side in sides for on in checkpointing for cell in cells
    ]


def encoder_cases(checkpointing: Sequence[bool]) -> list[Case]:
    """Two clips at a time, where the encoder and not the sequence takes the memory."""
    clips = (("resnet18", 16), ("small", 32))
    return [Case(name, "gru", "frames", 112, frames, 2, on) for name, frames in clips for on in checkpointing]


def build(case: Case, checkpoint_steps: int) -> Classifier:
    """The classifier of a case in training mode, float32."""
    settings = {"encoder": case.encoder, "cell": case.cell, "seq": case.seq, "hidden_size": HIDDEN}
    if case.encoder == "pixels":
        settings["encoder_width"] = WIDTH
    torch.manual_seed(0)
    classifier = Classifier(
        ModelConfig.model_validate(settings),
        in_channels=3,
        frame_size=case.side,
        num_classes=CLASSES,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    if case.checkpointing:
        classifier.use_checkpointing(checkpoint_steps)
    return classifier.train()


def measure(case: Case, *, repeats: int, checkpoint_steps: int, malloc: str) -> tuple[list[float], float]:
    """Seconds of `repeats` steps, and MiB that a first, untimed step takes; in this process."""
    if malloc == "fit" and DEVICE == "cpu":
        keep_freed_memory()
    # A tiny step first: what torch loads at its first backward, and at its first checkpoint, is no part of a step.
    _stepper(replace(case, encoder="pixels", side=4, frames=1, batch=2), checkpoint_steps)()
    step = _stepper(case, checkpoint_steps)
    held = forget_peak()
    step()
    mib = peak() - held
    return [step() for _ in range(repeats)], mib


def _stepper(case: Case, checkpoint_steps: int) -> Callable[[], float]:
    """A function that does one step, forward and backward, and returns its seconds."""
    classifier = build(case, checkpoint_steps).to(DEVICE)
    frames = torch.randint(0, 256, (case.batch, case.frames, 3, case.side, case.side), dtype=torch.uint8, device=DEVICE)
    lengths = torch.full((case.batch,), case.frames, device=DEVICE)
    labels = torch.randint(0, CLASSES, (case.batch,), device=DEVICE)

    def step() -> float:
        classifier.zero_grad()
        started = time.perf_counter()
        F.cross_entropy(classifier(frames, lengths), labels).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def forget_peak() -> float:
    """MiB held now; from here on `peak` counts anew. Raises SystemExit where the system cannot do that."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # Not ru_maxrss: that starts at the peak of the parent, and never falls.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise SystemExit(f"peak memory can be measured on Linux only: {error}") from None
    return _resident("VmRSS")


def peak() -> float:
    """The most MiB held since `forget_peak`."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else _resident("VmHWM")


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def run_case(case: Case, **how: int | str) -> tuple[list[float], list[float]]:
    """`measure` in a fresh process, as lists to add up; empty ones where it was killed, as for want of memory."""
    command = [sys.executable, "-m", "tools.benchmarks.bench_length", "--case", json.dumps(asdict(case))]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL or "OutOfMemoryError" in done.stderr:
        return [], []
    if done.returncode:
        raise SystemExit(f"{case}: {last_error(done.stderr)}")
    seconds, mib = json.loads(done.stdout.splitlines()[-1])
    return seconds, [mib]


def report(results: Sequence[Result], facts: Mapping[str, object], settings: Mapping[str, Any]) -> str:
    """Tables in Markdown, a line per sequence and cell, with and without checkpointing side by side."""
    lines = ["# One training step against the length of the sequence", "", *machine_lines(facts), ""]
    lengths = [result for result in results if result.case.encoder == "pixels"]
    if lengths:
        lines += [
            f"Raw pixels: encoder `pixels` of width {WIDTH}, `--seq grid`, {HIDDEN} units per direction, both "
            f"directions, {lengths[0].case.batch} frames a batch, float32.",
            "",
            *_table(lengths),
            "",
        ]
    encoders = [result for result in results if result.case.encoder != "pixels"]
    if encoders:
        lines += [f"Clips of 112 x 112 pixels, {encoders[0].case.batch} a batch, float32.", "", *_table(encoders), ""]
    lines.append(
        f"Rounds: {settings['rounds_done']} of {settings['rounds']}. Seconds: forward and backward, median (least to "
        "greatest) after a first step; MiB: peak during that first step above what model and batch held, over "
        "processes; killed: processes that ended for want of memory. Checkpointing recomputes the encoder's stages, "
        f"and {settings['checkpoint_steps']} recurrent steps at a time. {MALLOC[settings['malloc']]}"
    )
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result]) -> list[str]:
    first = "cell" if results[0].case.encoder == "pixels" else "encoder"
    rows: dict[str, dict[bool, Result]] = {}
    for result in results:
        name = result.case.cell if first == "cell" else result.case.encoder
        rows.setdefault(f"{name} | {result.case.steps}", {})[result.case.checkpointing] = result
    lines = [f"| {first} | steps | seconds | with checkpointing | MiB | with checkpointing |", f"|---|{'---:|' * 5}"]
    for name, pair in rows.items():
        seconds = [pair[on].shown(pair[on].seconds, "{:.3g}") if on in pair else "" for on in (False, True)]
        mib = [pair[on].shown(pair[on].mib, "{:,.0f}") if on in pair else "" for on in (False, True)]
        lines.append(f"| {' | '.join([name, *seconds, *mib])} |")
    return lines


def picture(results: Sequence[Result]) -> Any:
    """Seconds and MiB against steps, both axes logarithmic; a color per cell, dashed with checkpointing."""
    # Half a second to import, and the measuring processes do not draw.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    shown = [result for result in results if result.case.encoder == "pixels" and result.seconds]
    cells = list(dict.fromkeys(result.case.cell for result in shown))
    steps = sorted({result.case.steps for result in shown})
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, label in zip(panels, ("seconds per training step", "peak memory of a training step, MiB"), strict=True):
        for cell, color in zip(cells, COLORS * len(cells), strict=False):
            for on in (False, True):
                line = [r for r in shown if (r.case.cell, r.case.checkpointing) == (cell, on)]
                if not line:
                    continue
                values = [statistics.median(r.seconds if axes is panels[0] else r.mib) for r in line]
                axes.plot(
                    [r.case.steps for r in line],
                    values,
                    color=color,
                    linestyle="--" if on else "-",
                    marker="s" if on else "o",
                    markersize=4,
                    label=f"{cell}, checkpointing" if on else cell,
                )
        axes.set(xscale="log", yscale="log", xlabel="steps of the sequence", ylabel=label)
        axes.set_xticks(steps, [str(count) for count in steps])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    return figure


def write(out: Path, results: Sequence[Result], settings: Mapping[str, Any], facts: Mapping[str, object]) -> str:
    """Write what was measured so far; returns the report."""
    text = report(results, facts, settings)
    summaries = [result.summary for result in results]
    write_json(out / "length.json", {"facts": facts, "settings": settings, "results": summaries})
    write_text(out / "length.md", text)
    if any(result.case.encoder == "pixels" and result.seconds for result in results):
        write_picture(out / "length.png", picture(results))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_length.py", description=__doc__)
    parser.add_argument("--what", default="lengths,encoders", help="lengths, encoders or both; default: %(default)s")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="steps; default: %(default)s")
    parser.add_argument("--cells", default=",".join(CELLS), help="default: %(default)s")
    parser.add_argument("--checkpointing", choices=list(CHECKPOINTING), default="both", help="default: %(default)s")
    parser.add_argument("--checkpoint-steps", type=int, default=128, help="recomputed as one; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="frames in a batch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="processes per measurement; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per process; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/article"), help="folder; default: %(default)s")
    parser.add_argument("--malloc", choices=list(MALLOC), default="fit", help="fit: as in a training; usual: untouched")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    counts = {name: getattr(options, name) for name in ("checkpoint_steps", "batch_size", "rounds", "repeats")}
    how = {name: getattr(options, name) for name in ("repeats", "checkpoint_steps", "malloc")}
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)), **how)))
        return 0
    what, cells = options.what.split(","), options.cells.split(",")
    lengths = [int(text) if text.isdecimal() else 0 for text in options.lengths.split(",")]
    if not set(what) <= {"lengths", "encoders"} or not set(cells) <= {*CELLS} or min(lengths) < 16:
        parser.error(f"--what takes lengths, encoders; --cells {', '.join(CELLS)}; --lengths numbers from 16 on")
    if min(counts.values()) < 1:
        parser.error(f"{', '.join(counts)} want whole numbers above 0")
    modes = CHECKPOINTING[options.checkpointing]
    cases = length_cases(lengths, cells, modes, options.batch_size) if "lengths" in what else []
    cases += encoder_cases(modes) if "encoders" in what else []
    facts = machine(["python", "-m", "tools.benchmarks.bench_length", *words])
    settings = {**how, **counts, "hidden_size": HIDDEN, "width": WIDTH}

    def rounds() -> None:
        results = [Result(case, [], []) for case in cases]
        for round_ in range(1, options.rounds + 1):
            for result in results:
                seconds, mib = run_case(result.case, **how)
                result.add(seconds, mib)
                shown = f"{statistics.median(seconds):.3g} s, {mib[0]:.0f} MiB" if seconds else "killed"
                print(f"round {round_}/{options.rounds}: {result.case}: {shown}", file=sys.stderr, flush=True)
            text = write(options.out, results, {**settings, "rounds_done": round_}, facts)
        print(text)

    return exit_code("bench_length.py", rounds, kept=f"what whole rounds measured is in {options.out}")


if __name__ == "__main__":
    sys.exit(main())

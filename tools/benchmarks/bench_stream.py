"""Milliseconds and memory per new frame of a stream, over many frames, and against reading a window again each time.

    python -m tools.benchmarks.bench_stream
    python -m tools.benchmarks.bench_stream --model runs/grid_digits-0001/model.safetensors --frames 20000 --out results

Contenders, by turns in every round, on the same model and frames:

  step         classifier.step: the new frame and the state
  window       classifier.forward on the last --window frames, as clip models do for every new frame
  kept maps    the encoder on the new frame, the recurrent part on the last --window maps: what a 2-D encoder could do
  r3d_18       a clip model, torchvision's, on the last --window frames
  --exports    step and window of the same model as exports: `videogru export --step` and without

Then one stream of --frames frames by the contender --long, in blocks: median and 95th percentile of the milliseconds,
and the resident set at the end of each block. Writes NAME.json and .md after the rounds and after every tenth block,
and at the end, or after Ctrl-C, NAME.png besides. Without --model weights are random: speed does not depend on them.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.stream_contenders import (
    CLIP_MODEL,
    KEPT,
    POOL,
    STEP,
    WINDOW,
    Reader,
    build,
    clip_model_reader,
    export_readers,
    frames_of,
    readers,
)
from tools.measuring import (
    Parser,
    exit_code,
    machine,
    machine_lines,
    median_range,
    write_json,
    write_picture,
    write_text,
)
from videogru.checkpoint.model_file import find_model, read_model
from videogru.runtime.export_folder import FORMATS, PRECISIONS

WARM_UP = 20
GOAL = 12.0  # times a step, at least
COLORS = ("#0072b2", "#d55e00")


@dataclass(frozen=True)
class Block:
    """Frames of the long stream that were summed up as one; frames: how many were read at its end."""

    frames: int
    median_ms: float
    p95_ms: float
    rss_mib: float


@dataclass
class Results:
    """Milliseconds per frame of each contender, one median per round, and the blocks of the long stream."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def ratios(self, name: str) -> list[float]:
        """How many times as long as a step of the same runtime, round by round."""
        of_export, _, _ = name.rpartition(f" {WINDOW}")
        step = f"{of_export} {STEP}" if of_export else name if name.endswith(STEP) else STEP
        return [other / one for other, one in zip(self.rounds[name], self.rounds[step], strict=True)]

    def ends(self) -> tuple[Sequence[Block], Sequence[Block]]:
        """The first and the last tenth of the blocks, one at least; the very first, which warms up, is left out."""
        rest = self.blocks[1:] or self.blocks
        count = max(1, len(rest) // 10)
        return rest[:count], rest[-count:]


def milliseconds(read: Reader, frame: torch.Tensor) -> float:
    """Of one frame, until the logits are in the memory of the CPU."""
    started = time.perf_counter()
    read(frame).cpu()
    return 1000 * (time.perf_counter() - started)


def rss_mib() -> float:
    """The resident set of this process. Raises SystemExit where the system does not tell it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise SystemExit(f"memory can be measured on Linux only: {error}") from None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


@torch.inference_mode()
def compare(
    contenders: Mapping[str, Reader], frames: torch.Tensor, *, window: int, rounds: int, repeats: int, results: Results
) -> None:
    """Every contender's turn of `repeats` frames, `rounds` times, with full windows."""
    names = tuple(contenders)
    results.rounds |= {name: [] for name in names}
    for read in contenders.values():
        for place in range(window + 2):
            read(frames[place % POOL])
    for round_ in range(1, rounds + 1):
        first = round_ % len(names)  # who comes first differs, and what a turn finds in the caches is not timed
        for name in (*names[first:], *names[:first]):
            read = contenders[name]
            read(frames[0])
            taken = [milliseconds(read, frames[place % POOL]) for place in range(repeats)]
            results.rounds[name].append(statistics.median(taken))
        said = ", ".join(f"{name} {results.rounds[name][-1]:.2f} ms" for name in names)
        print(f"round {round_}/{rounds}: {said}", file=sys.stderr, flush=True)


@torch.inference_mode()
def run_long(
    read: Reader,
    pool: torch.Tensor,
    *,
    frames: int,
    block: int,
    results: Results,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """One stream of so many frames; a block is added to the results for every `block` of them."""
    for place in range(WARM_UP):
        read(pool[place % POOL])
    for done in range(block, frames + 1, block):
        taken = [milliseconds(read, pool[place % POOL]) for place in range(done - block, done)]
        p95 = sorted(taken)[min(block - 1, round(0.95 * block))]
        results.blocks.append(Block(done, statistics.median(taken), p95, rss_mib()))
        tick()


def report(results: Results, facts: Mapping[str, object], settings: Mapping[str, Any]) -> str:
    """Tables in Markdown."""
    lines = ["# What a new frame of a stream costs", "", *machine_lines(facts), "", settings["model"], ""]
    if results.rounds:
        lines += [
            f"Medians of {settings['repeats']} frames, over {len(results.rounds[STEP])} rounds in which the "
            "contenders took turns: median (least to greatest). Times a step: of the same runtime.",
            "",
            "| | ms per new frame | times a step |",
            "|---|---:|---:|",
        ]
        for name, taken in results.rounds.items():
            cells = median_range(taken, "{:.2f}"), median_range(results.ratios(name), "{:.1f}")
            lines.append(f"| {contender_title(name, settings['window'])} | {cells[0]} | {cells[1]} |")
        lines += ["", *verdicts(results), ""]
    if results.blocks:
        first, last = results.ends()
        lines += [
            f"One stream of {results.blocks[-1].frames:,} frames (of {settings['frames']:,}) by {settings['long']}, in "
            f"blocks of {settings['block']:,}; the first block, which warms up, is left out.",
            "",
            "| | first tenth | last tenth |",
            "|---|---:|---:|",
        ]
        for title, form, values in (
            ("ms per frame, median of blocks", "{:.2f}", [[b.median_ms for b in part] for part in (first, last)]),
            ("ms per frame, 95th percentile", "{:.2f}", [[b.p95_ms for b in part] for part in (first, last)]),
            ("resident set, MiB", "{:,.1f}", [[b.rss_mib for b in part] for part in (first, last)]),
        ):
            lines.append(f"| {title} | {' | '.join(form.format(statistics.median(part)) for part in values)} |")
        lines.append("")
    return "\n".join(lines)


def contender_title(name: str, window: int) -> str:
    """A contender in words."""
    runtime, _, how = name.rpartition(" ")
    if name == CLIP_MODEL:
        return f"PyTorch, r3d_18 on the last {window} frames"
    if name == KEPT:
        return f"PyTorch, the last {window} maps again, one frame encoded"
    return f"{runtime or 'PyTorch'}, " + (
        "`step`, with the state" if how == STEP else f"the last {window} frames again"
    )


def verdicts(results: Results) -> list[str]:
    """The goal, for each window that was read again."""
    lines = []
    for name in results.rounds:
        if name.endswith(WINDOW):
            times = statistics.median(results.ratios(name))
            said = "met" if times >= GOAL else "NOT met"
            lines.append(
                f"- {name.removesuffix(WINDOW).strip() or 'PyTorch'}: a step {GOAL:g} times cheaper is {said}."
            )
    return lines


def picture(results: Results, settings: Mapping[str, Any]) -> Any:
    """Milliseconds per frame and MiB against frames read, both from zero on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    frames = [block.frames for block in results.blocks]
    left, right = figure.subplots(1, 2)
    left.fill_between(
        frames, [b.median_ms for b in results.blocks], [b.p95_ms for b in results.blocks], alpha=0.2, color=COLORS[0]
    )
    left.plot(
        frames,
        [b.median_ms for b in results.blocks],
        color=COLORS[0],
        label=f"{settings['long']} (shaded: to the 95th percentile)",
    )
    window = settings["long"].removesuffix(STEP) + WINDOW
    if window in results.rounds:
        usual = statistics.median(results.rounds[window])
        left.axhline(usual, color=COLORS[1], linestyle="--", label=f"the window again, {usual:.1f} ms")
    left.set(ylabel="ms per new frame")
    right.plot(frames, [b.rss_mib for b in results.blocks], color=COLORS[0])
    right.set(ylabel="resident set, MiB")
    for axes in (left, right):
        axes.set(xlabel="frames read", ylim=(0, None), xlim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def write(
    out: Path, results: Results, settings: Mapping[str, Any], facts: Mapping[str, object], *, draw: bool = False
) -> str:
    """Write what was measured so far; returns the report. draw: the picture, too, which takes memory for good."""
    text = report(results, facts, settings)
    name = settings["name"]
    write_json(out / f"{name}.json", {"facts": facts, "settings": settings, **asdict(results)})
    write_text(out / f"{name}.md", text)
    if draw and results.blocks:
        write_picture(out / f"{name}.png", picture(results, settings))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_stream.py", description=__doc__)
    parser.add_argument("--model", type=Path, help="model file or run folder; default: random weights")
    parser.add_argument("--encoder", default="resnet18", help="without --model; default: %(default)s")
    parser.add_argument("--frame-size", type=int, default=112, help="without --model; default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=256, help="without --model; default: %(default)s")
    parser.add_argument("--num-layers", type=int, default=2, help="without --model; default: %(default)s")
    parser.add_argument("--window", type=int, default=16, help="frames that are read again; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of all contenders; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="frames per turn; default: %(default)s")
    parser.add_argument("--frames", type=int, default=100_000, help="of the long stream; default: %(default)s")
    parser.add_argument("--block", type=int, default=1000, help="frames per point of it; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch; default: as it chooses")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--exports",
        nargs="*",
        default=[],
        metavar="FORMAT:PRECISION",
        help="like onnx:fp32 openvino:int8; default: none",
    )
    parser.add_argument("--long", default=STEP, help="contender of the long stream, like 'openvino int8 step'")
    parser.add_argument("--out", type=Path, default=Path("docs/deploy"), help="folder; default: %(default)s")
    parser.add_argument("--name", default="stream", help="of the files; default: %(default)s")
    options = parser.parse_args(words)
    names = ("frame_size", "hidden_size", "num_layers", "window", "rounds", "repeats", "frames", "block")
    counts = {name: getattr(options, name) for name in names}
    if min(*counts.values(), options.threads or 1) < 1 or options.frames < options.block:
        parser.error(f"{', '.join(counts)} and threads want whole numbers above 0, and frames no fewer than block")
    exports = [tuple(word.split(":")) for word in options.exports]
    if not all(len(pair) == 2 and pair[0] in FORMATS and pair[1] in PRECISIONS for pair in exports):
        parser.error(f"--exports wants FORMAT:PRECISION of {', '.join(FORMATS)} and {', '.join(PRECISIONS)}")
    if exports and options.device != "cpu":
        parser.error("--exports run on the CPU here: leave --device out")
    if options.long not in (STEP, *(f"{form} {precision} {STEP}" for form, precision in exports)):
        parser.error("--long wants step, or 'FORMAT PRECISION step' of one of --exports")
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine(["python", "-m", "tools.benchmarks.bench_stream", *words])

    def measure() -> None:
        card = None
        if options.model is None:
            classifier = build(options.encoder, options.hidden_size, options.num_layers, options.frame_size)
        else:
            classifier, card = read_model(find_model(options.model))
        classifier = classifier.to(options.device)
        config, size, window = classifier.config, classifier.frame_size, options.window
        cells = (
            f"{config.num_layers} x {config.cell} {config.hidden_size}" if config.cell != "none" else "no recurrence"
        )
        about = (
            f"Encoder {config.encoder}, {size} x {size} pixels, {cells}, pooling {config.pooling}, float32 where an "
            f"export is not said to be less, batch 1, {torch.get_num_threads()} threads."
        )
        contenders = readers(classifier, window) | {CLIP_MODEL: clip_model_reader(classifier, window)}
        with tempfile.TemporaryDirectory() as place:
            for form, precision in exports:
                print(f"building {form} {precision}", file=sys.stderr, flush=True)
                threads = torch.get_num_threads()
                contenders |= export_readers(classifier, card, window, form, precision, Path(place), threads)
        settings = {**counts, "model": about, "device": options.device, "long": options.long, "name": options.name}
        results, pool = Results(), frames_of(classifier)
        turns = {name: counts[name] for name in ("window", "rounds", "repeats")}
        compare(contenders, pool, **turns, results=results)
        write(options.out, results, settings, facts)

        def tick() -> None:
            if len(results.blocks) % 10 == 0:
                write(options.out, results, settings, facts)
                block = results.blocks[-1]
                print(
                    f"{block.frames:,} frames: {block.median_ms:.2f} ms, {block.rss_mib:,.0f} MiB",
                    file=sys.stderr,
                    flush=True,
                )

        read = contenders.pop(options.long)
        contenders.clear()  # their memory is none of the stream's
        try:
            run_long(read, pool, frames=options.frames, block=options.block, results=results, tick=tick)
        finally:  # after Ctrl-C, too
            text = write(options.out, results, settings, facts, draw=True)
        print(text, end="")

    return exit_code("bench_stream.py", measure, kept=f"{options.out} has what was measured until then")


if __name__ == "__main__":
    sys.exit(main())

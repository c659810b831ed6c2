"""Milliseconds and memory per new frame of a stream, over many frames, and against reading a window again each time.

    python tools/bench_stream.py
    python tools/bench_stream.py --model runs/grid_digits-0001/model.safetensors --frames 20000 --out results

Contenders, by turns in every round, on the same model and frames:

  step         classifier.step: the new frame and the state
  window       classifier.forward on the last --window frames, as clip models do for every new frame
  kept maps    the encoder on the new frame, the recurrent part on the last --window maps: what a 2-D encoder could do

Then one stream of --frames frames by `step`, in blocks: median and 95th percentile of the milliseconds, and the
resident set at the end of each block. Writes stream.json, .md and .png after the rounds and after every tenth block, so
that Ctrl-C leaves the blocks before it. Without --model the weights are random: speed does not depend on them.
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Parser,
    exit_code,
    machine,
    machine_lines,
    median_range,
    write_json,
    write_picture,
    write_text,
)

from videogru.config import ModelConfig
from videogru.modelfile import find_model, read_model
from videogru.models.classifier import Classifier

CONTENDERS = ("step", "window", "kept maps")
CLASSES = 10
POOL = 64  # different frames, which come round again
WARM_UP = 20
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

    rounds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CONTENDERS})
    blocks: list[Block] = field(default_factory=list)

    def ratios(self, name: str) -> list[float]:
        """How many times as long as a step, round by round."""
        return [other / step for other, step in zip(self.rounds[name], self.rounds["step"], strict=True)]

    def ends(self) -> tuple[Sequence[Block], Sequence[Block]]:
        """The first and the last tenth of the blocks, one at least; the very first, which warms up, is left out."""
        rest = self.blocks[1:] or self.blocks
        count = max(1, len(rest) // 10)
        return rest[:count], rest[-count:]


def build(encoder: str, hidden_size: int, num_layers: int, frame_size: int) -> Classifier:
    """A causal model with random weights, in eval mode."""
    torch.manual_seed(0)
    settings = {"encoder": encoder, "hidden_size": hidden_size, "num_layers": num_layers, "temporal": "causal"}
    made = Classifier(
        ModelConfig.model_validate(settings),
        in_channels=3,
        frame_size=frame_size,
        num_classes=CLASSES,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    return made.eval()


def frames_of(classifier: Classifier) -> torch.Tensor:
    """(POOL 1 C H W) uint8, on the device of the model."""
    size = classifier.frame_size
    shape = (POOL, 1, classifier.in_channels, size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(classifier.head.linear.weight.device)


def readers(classifier: Classifier, window: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions from the next frame (1 C H W) to logits; each keeps what it needs of the frames before."""
    device = classifier.head.linear.weight.device
    state = classifier.initial_state(1)
    gap = torch.full((1,), 0.04, device=device)
    recent: deque[torch.Tensor] = deque(maxlen=window)
    maps: deque[torch.Tensor] = deque(maxlen=window)

    def step(frame: torch.Tensor) -> torch.Tensor:
        nonlocal state
        logits, state = classifier.step(frame, state, gap)
        return logits

    def lengths(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([count], device=device), gap.expand(1, count)

    def whole(frame: torch.Tensor) -> torch.Tensor:
        recent.append(frame)
        logits: torch.Tensor = classifier(torch.stack(tuple(recent), dim=1), *lengths(len(recent)))
        return logits

    def kept(frame: torch.Tensor) -> torch.Tensor:
        maps.append(classifier.maps(frame.unsqueeze(1), lengths(1)[0]))
        return classifier.from_maps(torch.cat(tuple(maps), dim=1), *lengths(len(maps)))

    return dict(zip(CONTENDERS, (step, whole, kept), strict=True))


def milliseconds(read: Callable[[torch.Tensor], torch.Tensor], frame: torch.Tensor) -> float:
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
def compare(classifier: Classifier, *, window: int, rounds: int, repeats: int, results: Results) -> None:
    """Every contender's turn of `repeats` frames, `rounds` times, with full windows."""
    frames, contenders = frames_of(classifier), readers(classifier, window)
    for read in contenders.values():
        for place in range(window + 2):
            read(frames[place % POOL])
    for round_ in range(1, rounds + 1):
        for name, read in contenders.items():
            taken = [milliseconds(read, frames[place % POOL]) for place in range(repeats)]
            results.rounds[name].append(statistics.median(taken))
        said = ", ".join(f"{name} {results.rounds[name][-1]:.2f} ms" for name in CONTENDERS)
        print(f"round {round_}/{rounds}: {said}", file=sys.stderr, flush=True)


@torch.inference_mode()
def run_long(
    classifier: Classifier, *, frames: int, block: int, results: Results, tick: Callable[[], None] = lambda: None
) -> None:
    """One stream of so many frames; a block is added to the results for every `block` of them."""
    pool, read = frames_of(classifier), readers(classifier, 1)["step"]
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
    if results.rounds["step"]:
        lines += [
            f"Medians of {settings['repeats']} frames, over {len(results.rounds['step'])} rounds in which the "
            "contenders took turns: median (least to greatest).",
            "",
            "| | ms per new frame | times a step |",
            "|---|---:|---:|",
        ]
        names = {
            "step": "`step`, with the state",
            "window": f"the last {settings['window']} frames again",
            "kept maps": f"the last {settings['window']} maps again, one frame encoded",
        }
        for name in CONTENDERS:
            cells = median_range(results.rounds[name], "{:.2f}"), median_range(results.ratios(name), "{:.1f}")
            lines.append(f"| {names[name]} | {cells[0]} | {cells[1]} |")
        lines.append("")
    if results.blocks:
        first, last = results.ends()
        lines += [
            f"One stream of {results.blocks[-1].frames:,} frames (of {settings['frames']:,}), in blocks of "
            f"{settings['block']:,}; the first block, which warms up, is left out.",
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


def picture(results: Results) -> Any:
    """Milliseconds per frame and MiB against frames read, both from zero on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    frames = [block.frames for block in results.blocks]
    left, right = figure.subplots(1, 2)
    left.fill_between(
        frames, [b.median_ms for b in results.blocks], [b.p95_ms for b in results.blocks], alpha=0.2, color=COLORS[0]
    )
    left.plot(
        frames, [b.median_ms for b in results.blocks], color=COLORS[0], label="step (shaded: to the 95th percentile)"
    )
    if results.rounds["window"]:
        usual = statistics.median(results.rounds["window"])
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


def write(out: Path, results: Results, settings: Mapping[str, Any], facts: Mapping[str, object]) -> str:
    """Write what was measured so far; returns the report."""
    text = report(results, facts, settings)
    write_json(out / "stream.json", {"facts": facts, "settings": settings, **asdict(results)})
    write_text(out / "stream.md", text)
    if results.blocks:
        write_picture(out / "stream.png", picture(results))
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
    parser.add_argument("--out", type=Path, default=Path("docs/deploy"), help="folder; default: %(default)s")
    options = parser.parse_args(words)
    names = ("frame_size", "hidden_size", "num_layers", "window", "rounds", "repeats", "frames", "block")
    counts = {name: getattr(options, name) for name in names}
    if min(*counts.values(), options.threads or 1) < 1 or options.frames < options.block:
        parser.error(f"{', '.join(counts)} and threads want whole numbers above 0, and frames no fewer than block")
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine(["python", "tools/bench_stream.py", *words])

    def measure() -> None:
        if options.model is None:
            sizes = options.hidden_size, options.num_layers, options.frame_size
            classifier = build(options.encoder, *sizes)
        else:
            classifier = read_model(find_model(options.model))[0]
        classifier = classifier.to(options.device)
        config, size = classifier.config, classifier.frame_size
        cells = (
            f"{config.num_layers} x {config.cell} {config.hidden_size}" if config.cell != "none" else "no recurrence"
        )
        about = (
            f"Encoder {config.encoder}, {size} x {size} pixels, {cells}, pooling {config.pooling}, float32, batch 1."
        )
        settings = {**counts, "model": about, "device": options.device}
        results = Results()
        turns = {name: counts[name] for name in ("window", "rounds", "repeats")}
        compare(classifier, **turns, results=results)
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

        run_long(classifier, frames=options.frames, block=options.block, results=results, tick=tick)
        print(write(options.out, results, settings, facts), end="")

    return exit_code("bench_stream.py", measure, kept=f"{options.out} has what was measured until then")


if __name__ == "__main__":
    sys.exit(main())

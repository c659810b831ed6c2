"""Put video nets side by side: accuracy with intervals, size, cost, and times that were measured in turns.

    python -m tools.experiments.video_table NAME=RUN [NAME=RUN ...] --out docs/video/digits [--title TEXT]

Each RUN is a folder of `videogru train` or of tools/experiments/train_r3d.py, all on the same test rows; the others are
compared with the first. A clip has --frames frames. Times: a training step (forward, backward, Adam) on a batch of
--batch clips in RAM, and one clip through the net in inference mode, contenders alternating within each round. Writes
OUT.json and OUT.md, and says how many epochs of each net fit into the training time of the first.
"""

import csv
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tools.experiments.train_r3d import R3D, WEIGHTS
from tools.measuring import (
    Parser,
    exit_code,
    machine,
    machine_sentence,
    median_range,
    write_json,
    write_text,
)
from videogru.checkpoint.model_file import MODEL_FILE_NAME, read_model
from videogru.config import Config
from videogru.errors import DataError
from videogru.inference.evaluation import evaluate, usable_rows
from videogru.inference.metrics import paired_difference
from videogru.inference.predictions import Predictions, read_csv
from videogru.models.cost import count_macs
from videogru.training.fit import precision
from videogru.workflows.run_folder import run_config


class Net(NamedTuple):
    """A contender: its predictions, its module and how long it was trained."""

    name: str
    folder: Path
    predictions: Predictions
    module: nn.Module
    epochs: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="video_table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="the first is compared with")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--title", default="", help="of the table")
    parser.add_argument("--frames", type=int, default=12, help="of a clip in the measurements, default 12")
    parser.add_argument("--batch", type=int, default=16, help="clips in a training step, default 16")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, default 7")
    options = parser.parse_args(words)
    facts = machine(["python", "-m", "tools.experiments.video_table", *words])
    return exit_code("video_table.py", lambda: work(options, facts), kept="nothing was written")


def work(options: Any, facts: dict[str, object]) -> int:
    """All of it."""
    named = [text.partition("=") for text in options.runs]
    ours = _first_run([Path(folder) for _, _, folder in named])
    config = run_config(ours)
    splits = (ours / "splits.csv").read_text(encoding="utf-8").splitlines()
    column = splits[0].split(",").index("split")
    train_rows = sum(row[column] == "train" for row in csv.reader(splits[1:]))
    nets = [read_net(name, Path(folder), config) for name, _, folder in named]
    for net in nets[1:]:
        if not np.array_equal(net.predictions.rows, nets[0].predictions.rows):
            raise DataError(f"other test rows than {nets[0].folder}", where=net.folder)
    scores = [score(net, nets[0]) for net in nets]
    times = measure(nets, config, frames=options.frames, batch=options.batch, rounds=options.rounds)
    rows = [one | cost(net, options.frames) | seconds for one, net, seconds in zip(scores, nets, times, strict=True)]
    content = {"title": options.title, "machine": facts, "frames": options.frames, "batch": options.batch}
    content |= {"train_rows": train_rows, "nets": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_suffix(".json"), content)
    text = markdown(content, nets)
    write_text(options.out.with_suffix(".md"), text)
    print(text)
    return 0


def _first_run(folders: list[Path]) -> Path:
    """A run of ours among the folders: it holds the settings of the data."""
    found = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
    if found is None:
        raise DataError("none of these is a run of videogru train", where=folders[0])
    return found


def read_net(name: str, folder: Path, config: Config) -> Net:
    """A run of `videogru train` or of train_r3d.py. Raises DataError or ModelFileError if it is not finished."""
    predictions = read_csv(folder / "predictions-test.csv")
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    module: nn.Module
    if (folder / MODEL_FILE_NAME).is_file():
        module = read_model(folder / MODEL_FILE_NAME)[0]
    else:
        data = config.data.for_kind("video")
        channels = data.channels or 3
        # Mean and std change no time; the scores come from the predictions.
        module = R3D(len(predictions.classes), (0.25,) * channels, (0.25,) * channels, 12)
        module.load_state_dict(load_file(folder / WEIGHTS))
    return Net(name, folder, predictions, module.eval(), len(lines) - 1)


def score(net: Net, first: Net) -> dict[str, Any]:
    """Accuracy with its interval, and first minus this one on the same rows (paired)."""
    accuracy = evaluate(net.predictions).metrics["top1"]
    usable = usable_rows(net.predictions) & usable_rows(first.predictions)
    labels = net.predictions.labels[usable]
    _, _, ahead = paired_difference(
        first.predictions.probabilities[usable], net.predictions.probabilities[usable], labels, metric="top1"
    )
    return {
        "name": net.name,
        "epochs": net.epochs,
        "test_rows": len(net.predictions),
        "accuracy": [accuracy.value, accuracy.low, accuracy.high],
        "first_minus_this": [ahead.value, ahead.low, ahead.high],
    }


def cost(net: Net, frames: int) -> dict[str, Any]:
    """Parameters, and multiply-accumulates of a clip."""
    parameters = sum(p.numel() for p in net.module.parameters())
    if not isinstance(net.module, R3D):
        return {"parameters": parameters, "macs": count_macs(net.module, frames)["total"]}  # type: ignore[arg-type]
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        net.module(clips(net.module, 1, frames), torch.tensor([frames]))
    return {"parameters": parameters, "macs": counter.get_total_flops() // 2}


def clips(module: nn.Module, count: int, frames: int) -> torch.Tensor:
    """Seeded noise of the size that the net takes: (B T C H W) uint8."""
    size = getattr(module, "frame_size", 64)
    channels = getattr(module, "in_channels", 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, channels, size, size), dtype=torch.uint8, generator=generator)


def measure(nets: Sequence[Net], config: Config, *, frames: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a training step per clip, and of one clip in inference, one value per round."""
    bf16 = precision(config.train.precision) == "bf16-mixed"
    template = next(net.module for net in nets if not isinstance(net.module, R3D))
    many, one = clips(template, batch, frames), clips(template, 1, frames)
    lengths, length = torch.full((batch,), frames), torch.tensor([frames])
    inputs = [(many[:, :, : _channels(net.module, many)], one[:, :, : _channels(net.module, one)]) for net in nets]
    labels = torch.arange(batch) % len(nets[0].predictions.classes)
    found: list[dict[str, Any]] = [{"train_ms": [], "infer_ms": []} for _ in nets]
    steps = [_step(net.module, own, lengths, labels, bf16=bf16) for net, (own, _) in zip(nets, inputs, strict=True)]
    for round_ in range(rounds + 1):
        for net, step, (_, one), row in zip(nets, steps, inputs, found, strict=True):
            taken = _timed(step) / batch
            net.module.eval()
            with torch.inference_mode():
                net.module(one, length)  # the step has emptied the caches
                alone = min(_timed(partial(net.module, one, length)) for _ in range(3))
            if round_:  # the first round warms up
                row["train_ms"].append(taken)
                row["infer_ms"].append(alone)
    return found


def _channels(module: nn.Module, frames: torch.Tensor) -> int:
    """How many of the channels of the clips a net reads."""
    return int(getattr(module, "in_channels", frames.shape[2]))


def _step(
    module: nn.Module, frames: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, *, bf16: bool
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-6)

    def step() -> None:
        module.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(module(frames, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def markdown(content: dict[str, Any], nets: Sequence[Net]) -> str:
    """The table, the machine, and what the ratios mean for equal time."""
    rows = content["nets"]
    lines = [f"# {content['title'] or 'Video nets side by side'}", "", machine_sentence(content["machine"]), ""]
    lines += [
        f"Clips of {content['frames']} frames; epochs of {content['train_rows']} clips in steps of {content['batch']}, "
        "no loading, and inference of one clip in float32, alternating: medians (least–greatest), ratios round by "
        "round. Intervals: 95 %, bootstrap over the test clips, one seed each; differences are paired.",
        "",
        "| net | epochs | test accuracy | first minus this | parameters | MACs a clip | training, s an epoch | "
        "inference, ms a clip | its ratio to the first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value, low, high = row["accuracy"]
        gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["first_minus_this"]) if row is not rows[0] else ""
        epoch = [ms * content["train_rows"] / 1000 for ms in row["train_ms"]]
        ratios = [mine / first for mine, first in zip(row["infer_ms"], rows[0]["infer_ms"], strict=True)]
        lines.append(
            f"| {row['name']} | {row['epochs']} | {value:.3f} ({low:.3f}–{high:.3f}) | {gap} | "
            f"{row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e9:.2f} G | {median_range(epoch, '{:.1f}')} | "
            f"{median_range(row['infer_ms'], '{:.1f}')} | {median_range(ratios, '{:.2f}')} |"
        )
    lines.append("")
    first = float(np.median(rows[0]["train_ms"])) * nets[0].epochs
    for row in rows[1:]:
        lines.append(
            f"- In the time of the first, {row['name']} trains {first / float(np.median(row['train_ms'])):.1f} epochs."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

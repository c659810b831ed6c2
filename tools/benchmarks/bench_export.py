"""Size and speed of every export of one model against eager PyTorch: ResNet-18 + 2-layer biGRU 256, 16 frames.

    python -m tools.benchmarks.bench_export --out docs/deploy/export [--sizes 112 224] [--rounds 10] [--threads 1]

The weights are random: neither size nor speed depends on them, and what accuracy an export costs is measured on trained
models, by `videogru export`. Every contender runs in a process of its own, and they take turns; a speed-up is the
median over the turns of eager float32's time by theirs. The last rows are the same model, causal, one frame at a time
(--step), in ms for one frame. What cannot be made here is listed with the reason. Writes OUT.json and OUT.md.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.measuring import Parser, exit_code, machine, machine_sentence, write_json, write_text
from videogru.checkpoint.model_file import ModelCard, make_card, read_model, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.errors import VideogruError
from videogru.export.acceptance import answers_of, cases_of
from videogru.export.build import build, check_wanted
from videogru.export.subprocess_run import replay
from videogru.models.classifier import Classifier
from videogru.sequence import SequenceBatch
from videogru.workflows.benchmark import Bench, bench_models

FRAMES = 16
CLASSES = 10
STREAM_FPS = 25
CALIBRATION = 8  # clips of smooth noise
CONTENDERS = tuple(
    (form, precision) for form in ("onnx", "openvino", "pt2", "tensorrt") for precision in ("fp32", "fp16", "int8")
)
STEP = (("onnx", "fp32"), ("onnx", "int8"), ("openvino", "int8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_export.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 224], help="pixels, default 112 224")
    parser.add_argument("--encoder", default="resnet18", help="default resnet18")
    parser.add_argument("--hidden-size", type=int, default=256, help="default 256")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each, default 10")
    parser.add_argument("--threads", type=int, default=1, help="of each, default 1")
    parser.add_argument("--batch-size", type=int, default=4, help="clips at once for the throughput, default 4")
    options = parser.parse_args(words)
    if min(options.rounds - 1, options.threads, options.batch_size, *options.sizes) < 1:
        parser.error("--rounds wants 2 or more, --threads, --batch-size and --sizes 1 or more")
    torch.set_num_threads(options.threads)
    facts = machine(["python", "-m", "tools.benchmarks.bench_export", *words])
    return exit_code("bench_export.py", lambda: work(options, facts), kept="nothing was written")


def work(options: Any, facts: dict[str, object]) -> int:
    """All of it."""
    tables = []
    for size in options.sizes:
        for temporal in ("bi", "causal"):
            with tempfile.TemporaryDirectory() as place:
                tables.append(measured(options, size, temporal, Path(place)))
    content = {"machine": facts, "frames": FRAMES, "calibration_clips": CALIBRATION, "tables": tables}
    write_json(options.out.with_name(options.out.name + ".json"), content)
    text = markdown(content)
    write_text(options.out.with_name(options.out.name + ".md"), text)
    print(text)
    return 0


def measured(options: Any, size: int, temporal: str, place: Path) -> dict[str, Any]:
    """One table: the model of `size` pixels in all formats; of a causal one the step graphs."""
    model, card = made(options, size, temporal)
    path = place / "eager fp32.safetensors"
    write_model(path, model, card)
    classifier, card = read_model(path)
    clips = [noise(size)]
    paths, differences, left_out = [path], [0.0], {}
    for form, precision in STEP if temporal == "causal" else CONTENDERS:
        name = f"{form} {precision}"
        print(f"{size} {temporal}: building {name}", file=sys.stderr, flush=True)
        try:
            check_wanted(classifier, format=form, precision=precision, step=temporal == "causal")
            folder = place / name
            folder.mkdir()
            build(folder, classifier, card, clips, format=form, precision=precision, step=temporal == "causal")
        except VideogruError as error:
            left_out[name] = f"{error.what}" + (f" ({error.hint})" if error.hint else "")
            continue
        paths.append(folder)
        differences.append(difference(folder, classifier, clips))
    found = bench_models(
        paths,
        split=None,
        threads=options.threads,
        batch_size=options.batch_size,
        rounds=options.rounds,
        data_dir=None,
        say=lambda text: print(f"{size} {temporal}: {text}", file=sys.stderr, flush=True),
    )
    return table(found, size, temporal, differences, left_out)


def made(options: Any, size: int, temporal: str) -> tuple[Classifier, ModelCard]:
    """The model with random weights, and its card."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=options.encoder,
        stem="imagenet",
        hidden_size=options.hidden_size,
        num_layers=2,
        temporal=temporal,  # type: ignore[arg-type]
    )
    classifier = Classifier(
        config, in_channels=3, frame_size=size, num_classes=CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3
    ).eval()
    data = DataConfig(dataset="noise", frame_size=size, num_frames=FRAMES).for_kind("video")
    names = tuple(map(str, range(CLASSES)))
    return classifier, make_card(classifier, kind="video", classes=names, data=data)


def noise(size: int, *, channels: int = 3, frames: int = FRAMES) -> SequenceBatch:
    """Clips of smooth noise, uint8, 1 / STREAM_FPS seconds between frames."""
    draw = np.random.default_rng(0)
    coarse = torch.from_numpy(draw.integers(0, 256, (CALIBRATION * frames, channels, 8, 8)).astype(np.float32))
    pictures = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").round().byte()
    lengths, gaps = torch.full((CALIBRATION,), frames), torch.full((CALIBRATION, frames), 1 / STREAM_FPS)
    return SequenceBatch(pictures.unflatten(0, (CALIBRATION, frames)), lengths, torch.arange(CALIBRATION), gaps=gaps)


def difference(folder: Path, classifier: Classifier, clips: Sequence[SequenceBatch]) -> float:
    """Largest of a probability from PyTorch's, at some shapes."""
    cases = cases_of(clips, uses_gaps=False, shapes=((1, FRAMES), (3, 5)))
    pairs = zip(replay(folder, cases), answers_of(classifier, cases), strict=True)
    return max(float(np.abs(said["probabilities"] - wanted).max()) for said, wanted in pairs)


def table(
    found: Bench, size: int, temporal: str, differences: Sequence[float], left_out: dict[str, str]
) -> dict[str, Any]:
    """The rows, with shares of the first."""
    eager = found.entries[0]
    rows = [
        asdict(one)
        | {
            "size_ratio": one.bytes / eager.bytes,
            "largest_difference": gap,
            "frame_p50_ms": one.latency_p50_ms / FRAMES,
            "frame_p95_ms": one.latency_p95_ms / FRAMES,
            "streams_a_core": 1e3 / STREAM_FPS * FRAMES / one.latency_p50_ms / found.threads,
        }
        for one, gap in zip(found.entries, differences, strict=True)
    ]
    return {"size": size, "temporal": temporal, "note": found.note(), "rows": rows, "not_run": left_out}


def markdown(content: dict[str, Any]) -> str:
    """The tables with what they were made of."""
    lines = ["# Exports: size and speed", "", machine_sentence(content["machine"]), ""]
    lines += [
        "ResNet-18 per frame and a 2-layer GRU of 256 units (or as the command says), random weights; made by "
        "`tools/benchmarks/bench_export.py`. Times as fast: eager float32 of the same model, interleaved, median over "
        "the turns. Difference: largest of a probability from PyTorch's.",
        "",
    ]
    for one in content["tables"]:
        stepwise = one["temporal"] == "causal"
        what = "frame by frame (eager: the whole clip)" if stepwise else "whole clips, bidirectional"
        unit, rate = ("frame", f"streams a core at {STREAM_FPS} frames/s") if stepwise else ("clip", "clips/s")
        lines += [f"## {one['size']} x {one['size']} pixels, {what}", "", one["note"] + ".", ""]
        lines.append(
            f"| runs on | MB | of eager | ms a {unit} p50 | p95 | times as fast | {rate} | MiB peak | difference |"
        )
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for row in one["rows"]:
            middle, high = (row[f"{'frame' if stepwise else 'latency'}_{p}_ms"] for p in ("p50", "p95"))
            rate = row["streams_a_core"] if stepwise else row["clips_per_second"]
            lines.append(
                f"| {row['runs_on']} | {row['bytes'] / 1e6:.2f} | {row['size_ratio']:.3f} | {middle:.2f} | {high:.2f} "
                f"| {row['speedup']:.2f} | {rate:.1f} | {row['peak_mebibytes']:.0f} | {row['largest_difference']:.1e} |"
            )
        lines += [f"| {name} | not run: {why} | | | | | | | |" for name, why in one["not_run"].items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

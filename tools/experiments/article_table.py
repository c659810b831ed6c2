"""The table of the article's comparison: accuracy, cost and latency of the trained nets; JSON, Markdown, picture."""

import csv
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tools.experiments.article import (
    INTERVALS,
    NETS,
    OTHERS,
    OURS,
    finished_seeds,
    interval,
    points,
    run_folder,
    samples,
    shared_settings,
    verdict,
)
from tools.measuring import machine, machine_sentence, progress, write_json, write_picture, write_text
from videogru.errors import DataError
from videogru.inference.predictions import read_csv
from videogru.inference.predictor import Predictor
from videogru.models.cost import count_macs

ROUNDS = 30
TURN_SECONDS = 0.05  # a turn repeats the forward pass for at least this long
LATENCY_SECONDS = 90.0  # for one batch size; at least 5 rounds


def measure(budget: str, work: Path, seeds: Sequence[int], command: Sequence[str]) -> dict[str, Any]:
    """Everything in the table of one budget, from the runs of `seeds` that are finished.

    Accuracy: top-1 on the test split, per seed and with its `interval`; a difference is paired over the seeds that both
    nets have. Training seconds: the median epoch times the epochs, since a busy hour of the machine would count.
    command: the words of the call. Raises DataError where no run is finished or test rows differ, ConfigError where
    runs differ in more than the net and the seed.
    """
    facts = machine(command)
    finished = finished_seeds(work)
    there = {net: [seed for seed in seeds if seed in finished[net]] for net in NETS}
    runs = {(net, seed): run_folder(work, net, seed) for net, found in there.items() for seed in found}
    if not runs:
        raise DataError("no finished run", where=work, hint="Train first, without --only measure.")
    settings = shared_settings(runs)
    hits, labels = {}, None
    for key, run in progress(list(runs.items()), "reading predictions"):
        hits[key], seen = _hits(run)
        labels = seen if labels is None else labels
        if not np.array_equal(seen, labels):
            raise DataError("has other test rows or labels than the runs before it", where=run)
    predictors = {net: Predictor.from_file(runs[net, found[0]]) for net, found in there.items() if found}
    nets: dict[str, Any] = {}
    for net, found in there.items():
        nets[net] = {"title": NETS[net].title, "claimed": NETS[net].claimed, "seeds": found}
        nets[net]["not_run"] = [seed for seed in seeds if seed not in found]
        if found:
            per_seed = [float(hits[net, seed].mean()) for seed in found]
            (sample,) = samples(np.stack([hits[net, seed] for seed in found])[None])
            seconds = [_training_seconds(runs[net, seed]) for seed in found]
            nets[net] |= {
                "accuracy": {
                    "per_seed": per_seed,
                    "sd": statistics.stdev(per_seed) if len(per_seed) > 1 else None,
                    **interval(sample, len(found)),
                },
                "parameters": predictors[net].classifier.describe(),
                "macs": count_macs(predictors[net].classifier),
                "training_seconds": {"per_seed": seconds, "mean": statistics.mean(seconds)},
            }
    differences = {}
    for other in OTHERS:
        both = [seed for seed in there[OURS] if seed in there[other]]
        if both:
            pairs = np.stack([[hits[net, seed] for seed in both] for net in (OURS, other)])
            ours, theirs = samples(pairs)
            found_difference = interval(ours - theirs, len(both))
            claimed = NETS[OURS].claimed - NETS[other].claimed
            differences[other] = {"claimed": claimed, "seeds": both, **found_difference}
            differences[other]["verdict"] = verdict(found_difference)
    return {
        "budget": budget,
        "settings": settings,
        "images": len(next(iter(hits.values()))),
        "nets": nets,
        "differences": differences,
        "latency": {str(batch): latency(predictors, batch) for batch in (1, 128)},
        "machine": facts,
    }


def _hits(run: Path) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which test images a run got right, (N,), and its rows and labels, (2 N)."""
    predictions, evaluation = read_csv(run / "predictions-test.csv"), run / "evaluation-test.json"
    try:
        wanted = int(json.loads(evaluation.read_text(encoding="utf-8"))["total"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"no evaluation of a run ({type(error).__name__})", where=evaluation) from error
    if predictions.failed.any() or (np.diff(predictions.rows) <= 0).any() or len(predictions.rows) != wanted:
        raise DataError(f"not the whole test split of {wanted} in its order", where=run / "predictions-test.csv")
    return np.asarray(predictions.predicted == predictions.labels), np.stack((predictions.rows, predictions.labels))


def _training_seconds(run: Path) -> float:
    path = run / "metrics.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        return statistics.median(seconds) * len(seconds)
    except (OSError, ValueError, KeyError, TypeError) as error:  # of no row the median is a ValueError
        raise DataError(f"no log of a training ({type(error).__name__})", where=path) from error


@torch.inference_mode()
def latency(predictors: Mapping[str, Predictor], batch: int) -> dict[str, Any]:
    """Milliseconds of a forward pass per net, eager, in float32, which is what Predictor runs; pixels in, logits out.

    Rounds of one turn per net, beginning with another net each time, so that a change of the machine's load meets all.
    Median and quartiles over rounds; ratios are those within a round.
    """
    sides = {net: predictor.classifier.frame_size for net, predictor in predictors.items()}
    frames = {
        net: torch.randint(0, 256, (batch, 1, 3, side, side), dtype=torch.uint8).to(predictors[net].device)
        for net, side in sides.items()
    }
    lengths = {net: torch.ones(batch, dtype=torch.int64, device=frames[net].device) for net in predictors}

    def turn(net: str, repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            predictors[net].classifier(frames[net], lengths[net])
        if frames[net].is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1000 / repeats

    repeats = {}
    for net in predictors:
        turn(net, 2)
        repeats[net] = max(1, round(TURN_SECONDS * 1000 / turn(net, 3)))
    order, rounds, limit = list(predictors), [], time.monotonic() + LATENCY_SECONDS
    for number in progress(range(ROUNDS), f"latency at batch {batch}"):
        first = number % len(order)
        rounds.append({net: turn(net, repeats[net]) for net in order[first:] + order[:first]})
        if number >= 4 and time.monotonic() > limit:
            break
    pairs = [(net, "resnet") for net in order if net != "resnet"] + [(OURS, "lstm-cnn")]
    return {
        "rounds": len(rounds),
        "device": str(next(iter(predictors.values())).device),
        "mode": f"{arithmetic(next(iter(predictors.values())).device)}, eager, inference mode, as Predictor runs it",
        "milliseconds": {net: _quartiles([row[net] for row in rounds]) for net in order},
        "ratio": {
            f"{above} / {below}": _quartiles([row[above] / row[below] for row in rounds])
            for above, below in pairs
            if above in order and below in order
        },
    }


def arithmetic(device: torch.device) -> str:
    """What a float32 product is on a device: on a GPU TF32, with 10 bits of mantissa, may stand in for it."""
    if device.type != "cuda":
        return "float32"
    convolutions = "allowed" if torch.backends.cudnn.allow_tf32 else "not allowed"
    return (
        f"float32, TF32 {convolutions} in cuDNN (convolutions, recurrent layers), precision of matrix products "
        f"{torch.get_float32_matmul_precision()!r}"
    )


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


def write_table(out: Path, table: dict[str, Any]) -> None:
    """Write table-BUDGET.json, table-BUDGET.md and accuracy-BUDGET.png into `out`, and tell the rows."""
    budget = table["budget"]
    write_json(out / f"table-{budget}.json", table)
    text = markdown(table, {other: _other_table(out, other) for other in ("cpu", "gpu") if other != budget})
    write_text(out / f"table-{budget}.md", text)
    write_picture(out / f"accuracy-{budget}.png", picture(table))
    print(text)
    print(f"written: {out / f'table-{budget}'}.json, .md and {out / f'accuracy-{budget}.png'}")


def _other_table(out: Path, budget: str) -> dict[str, Any] | None:
    path = out / f"table-{budget}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown(table: Mapping[str, Any], others: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The tables as Markdown; budgets that never ran say so."""
    facts, epochs = table["machine"], table["settings"]["train.epochs"]
    lines = [
        f"# ResNet, LSTM-CNN and GRU-CNN on CIFAR-100, budget {table['budget']}",
        "",
        f"{machine_sentence(facts)} Encoder {table['settings']['model.encoder']}, epochs: {epochs}, the same recipe "
        f"for all. Top-1 accuracy on the {table['images']:,} test images in percent; {INTERVALS}. "
        "The recurrent part includes the LayerNorm behind it; MACs are those of convolutions and matrix "
        "products; training is the median epoch times the epochs.",
        "",
        "| net | article | top-1 | by seed | sd | parameters (recurrent) | MACs | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget, rows in ((table["budget"], table), *others.items()):
        for net in NETS:
            lines.append(_row(net, budget, rows["nets"][net] if rows else None))
    lines += [
        "",
        "| difference of top-1, paired | article | measured | seeds | GRU-CNN is better |",
        "|---|---|---|---|---|",
    ]
    for other in OTHERS:
        found = table["differences"].get(other)
        claimed = 100 * (NETS[OURS].claimed - NETS[other].claimed)
        said = f"{', '.join(map(str, found['seeds']))} | {found['verdict']}" if found else "– | –"
        title = f"{NETS[OURS].title} − {NETS[other].title}"
        lines.append(f"| {title} | {claimed:+.1f} | {points(found, signed=True)} | {said} |")
    for batch, measured in table["latency"].items():
        lines += [
            "",
            f"Forward pass at batch {batch} on {measured['device']}, {measured['mode']}; threads: "
            f"{facts['threads']}; {measured['rounds']} rounds that alternate the nets; medians (quartiles).",
            "",
            "| | milliseconds | to ResNet | to LSTM-CNN |",
            "|---|---|---|---|",
        ]
        for net, spent in measured["milliseconds"].items():
            ratios = [measured["ratio"].get(f"{net} / {below}") for below in ("resnet", "lstm-cnn")]
            cells = [_spread(spent), *("–" if ratio is None else _spread(ratio) for ratio in ratios)]
            lines.append(f"| {NETS[net].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(net: str, budget: str, found: Mapping[str, Any] | None) -> str:
    cells = [f"{NETS[net].title}, {budget}", f"{100 * NETS[net].claimed:.1f}"]
    if found is None or "accuracy" not in found:
        return f"| {' | '.join(cells)} | not run{' (GPU)' if budget == 'gpu' else ''} | – | – | – | – | – |"
    accuracy, parameters = found["accuracy"], found["parameters"]
    by_seed = [
        f"{seed}: {100 * value:.1f}" for seed, value in zip(found["seeds"], accuracy["per_seed"], strict=True)
    ] + [f"{seed}: not run" for seed in found["not_run"]]
    cells += [points(accuracy), ", ".join(by_seed), "–" if accuracy["sd"] is None else f"{100 * accuracy['sd']:.2f}"]
    cells += [f"{parameters['total']:,} ({parameters['recurrent']:,})", f"{found['macs']['total'] / 1e6:.1f} M"]
    return f"| {' | '.join(cells)} | {found['training_seconds']['mean']:.0f} s |"


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})"


def picture(table: Mapping[str, Any]) -> Any:
    """Top-1 of every seed, the mean with its interval, and the article's claim, per net."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (net, fixed) in enumerate(NETS.items()):
        axes.plot(place, 100 * fixed.claimed, "D", color="black", fillstyle="none", markersize=8)
        axes.annotate(f"{100 * fixed.claimed:.1f}", (place + 0.12, 100 * fixed.claimed), va="center", fontsize=9)
        accuracy = table["nets"][net].get("accuracy")
        if accuracy is None:
            continue
        values = [100 * value for value in accuracy["per_seed"]]
        spread = np.linspace(-0.08, 0.08, len(values)) if len(values) > 1 else [0.0]
        mean, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
        axes.plot(place + np.asarray(spread), values, "o", color=fixed.color, markersize=6, alpha=0.7)
        axes.errorbar(place + 0.2, mean, [[mean - low], [high - mean]], fmt="_", color=fixed.color, capsize=4, ms=14)
        axes.annotate(f"{mean:.1f}", (place + 0.27, mean), va="center", fontsize=9, color=fixed.color)
    axes.plot([], [], "D", color="black", fillstyle="none", markersize=8, label="article's claim")
    axes.plot([], [], "o", color="#444444", alpha=0.7, label="one seed")
    axes.errorbar([], [], [], fmt="_", color="#444444", capsize=4, ms=14, label="mean, 95 % interval")
    axes.set_xticks(range(len(NETS)), [net.title for net in NETS.values()])
    axes.set_xlim(-0.5, len(NETS) - 0.4)
    axes.set_ylabel("top-1 accuracy on CIFAR-100's test split, %")
    encoder, epochs = table["settings"]["model.encoder"], table["settings"]["train.epochs"]
    axes.set_title(f"Budget {table['budget']}: encoder {encoder}, {epochs} epochs", loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure

"""The table of the AdrenalMNIST3D benchmark: AUC, time and size of what was trained; JSON, Markdown, picture."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import nn

from tools.experiments.adrenal_rows import PLAIN, PUBLISHED, ROWS, SHIFTS, THINNED, Row, rows_of_size, run_folder
from tools.experiments.article import interval
from tools.experiments.train_r3d import R3D, WEIGHTS
from tools.experiments.video_table import Net, cost
from tools.experiments.video_table import measure as measure_times
from tools.measuring import (
    machine,
    machine_sentence,
    median_range,
    progress,
    write_json,
    write_picture,
    write_text,
)
from videogru.checkpoint.model_file import MODEL_FILE_NAME, read_model
from videogru.config import Config
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.errors import DataError
from videogru.inference.metrics import resample_counts
from videogru.inference.predictions import Predictions, read_csv
from videogru.inference.predictor import Change, Predictor
from videogru.sequence import SequenceBatch
from videogru.workflows.run_folder import run_config

RESAMPLES, ROUNDS, BATCH = 1000, 5, 16


def measure(work: Path, size: int, data: Path | None, command: Sequence[str]) -> dict[str, Any]:
    """Everything in the table of one size, from the runs that are finished. Raises DataError where none is."""
    facts = machine(command)
    seeds = {name: _finished(work, size, name) for name in rows_of_size(size)}
    if not seeds["default"]:
        raise DataError("no finished run of the default", where=work, hint="Train first, without --only measure.")
    config = run_config(run_folder(work, size, "default", seeds["default"][0]))
    here = config.data.model_copy(update={} if data is None else {"data_dir": data})
    config = config.model_copy(update={"data": here.for_kind("volume")})
    corpus = open_corpus(config.data, seed=config.data.split_seed)
    counts = np.concatenate(
        list(resample_counts(len(corpus.manifest.rows("test")), resamples=RESAMPLES, seed=0)), axis=1
    )
    rows: dict[str, Any] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    for name, found in progress(list(seeds.items()), "reading predictions"):
        rows[name] = {"title": rows_of_size(size)[name].title, "settings": dict(ROWS[name].settings), "seeds": found}
        if found:
            runs = [run_folder(work, size, name, seed) for seed in found]
            drawn[name] = _samples([read_csv(run / "predictions-test.csv") for run in runs], counts)
            rows[name] |= {
                "test_auc": _described(drawn[name], len(found)),
                "val_auc": statistics.mean(_auc(read_csv(run / "predictions-val.csv")) for run in runs),
                "epochs": len(_log(runs[0])),
            }
            if name != "default":
                rows[name]["default_minus_this"] = _difference(drawn, seeds, name)
    content = {"size": size, "test_rows": len(counts), "published": PUBLISHED if size == 28 else {}, "rows": rows}
    content |= _more(work, size, seeds["default"], counts, corpus)
    content["thinned"] = _thinned(work, size, seeds, config, corpus)
    content |= {"times": _times(work, size, seeds, config, len(corpus.manifest.rows("train"))), "machine": facts}
    return content


def _finished(work: Path, size: int, name: str) -> list[int]:
    found = []
    for path in work.glob(f"{size}-{name}-seed*/evaluation-test.json"):
        number = path.parent.name.rpartition("seed")[2]
        if number.isdecimal() and (path.parent / "predictions-test.csv").is_file():
            found.append(int(number))
    return sorted(found)


def _auc(said: Predictions, weights: NDArray[Any] | None = None) -> float:
    """NaN where a resample has volumes of one class only."""
    if weights is not None and len(np.unique(said.labels[weights > 0])) < 2:
        return float("nan")
    return float(roc_auc_score(said.labels, said.probabilities[:, 1], sample_weight=weights))


def _samples(said: Sequence[Predictions], counts: NDArray[Any]) -> NDArray[np.float64]:
    """(1 + S + R): the mean AUC over seeds, of each seed, and the mean on each resample of the test volumes."""
    own = [_auc(one) for one in said]
    drawn = [statistics.mean(_auc(one, counts[:, r]) for one in said) for r in range(counts.shape[1])]
    return np.array([statistics.mean(own), *own, *drawn])


def _described(sample: NDArray[np.float64], seeds: int) -> dict[str, Any]:
    own = sample[1 : 1 + seeds].tolist()
    return {"per_seed": own, "sd": statistics.stdev(own) if seeds > 1 else None, **interval(sample, seeds)}


def _difference(drawn: dict[str, NDArray[np.float64]], seeds: dict[str, list[int]], name: str) -> dict[str, Any] | None:
    """Default minus this, over the seeds that both have."""
    both = [seed for seed in seeds["default"] if seed in seeds[name]]
    if not both:
        return None
    parts = []
    for key in ("default", name):
        own, sample = [drawn[key][1 + seeds[key].index(seed)] for seed in both], drawn[key]
        parts.append(np.array([statistics.mean(own), *own, *sample[1 + len(seeds[key]) :]]))
    return {"seeds": both, **interval(parts[0] - parts[1], len(both))}


def _more(work: Path, size: int, seeds: Sequence[int], counts: NDArray[Any], corpus: Corpus) -> dict[str, Any]:
    """The default's seeds together, and each with test-time augmentation."""
    runs = [run_folder(work, size, "default", seed) for seed in seeds]
    said = [read_csv(run / "predictions-test.csv") for run in runs]
    together = replace(said[0], probabilities=np.mean([one.probabilities for one in said], axis=0))
    rows = corpus.manifest.rows("test")
    shifted = [
        Predictor.from_file(run).predict_changed(corpus, rows, {"": _shifts}, batch_size=20, num_workers=0)[""]
        for run in progress(runs, "shifted volumes")
    ]
    return {
        "ensemble": {"seeds": list(seeds), **_described(_samples([together], counts), 1)},
        "shifts": {"seeds": list(seeds), **_described(_samples(shifted, counts), len(seeds))},
    }


def _shifts(batch: SequenceBatch) -> SequenceBatch:
    """Each clip and four copies, moved by a pixel."""
    frames = torch.stack([batch.frames.roll(shift, (-2, -1)) for shift in SHIFTS], dim=1).flatten(0, 1)
    optional = (batch.labels, batch.gaps)
    labels, gaps = (None if t is None else t.repeat_interleave(len(SHIFTS), 0) for t in optional)
    lengths, rows = (t.repeat_interleave(len(SHIFTS)) for t in (batch.lengths, batch.indices))
    return SequenceBatch(frames, lengths, rows, labels, gaps=gaps)


def thin(batch: SequenceBatch, every: int) -> SequenceBatch:
    """The steps 0, every, 2 * every, ... of each clip, with the gaps that are then between them."""
    assert batch.gaps is not None
    places = batch.gaps.cumsum(1)[:, ::every]
    lengths = (batch.lengths + every - 1) // every
    gaps = torch.diff(places, dim=1, prepend=places[:, :1])
    gaps = gaps * (torch.arange(gaps.shape[1]) < lengths[:, None])
    return replace(batch, frames=batch.frames[:, ::every], lengths=lengths, gaps=gaps)


def _thinned(
    work: Path, size: int, seeds: dict[str, list[int]], config: Config, corpus: Corpus
) -> dict[str, dict[str, Any]]:
    changes: dict[str, Change] = {
        "every slice": lambda batch: batch,
        "every second": lambda batch: thin(batch, 2),
        "every third": lambda batch: thin(batch, 3),
    }
    found: dict[str, dict[str, Any]] = {}
    for name in THINNED:
        aucs: dict[str, list[float]] = {change: [] for change in changes}
        for seed in progress(seeds[name], f"thinned volumes, {name}"):
            predictor = Predictor.from_file(run_folder(work, size, name, seed))
            said = predictor.predict_changed(corpus, corpus.manifest.rows("test"), changes, num_workers=0)
            for change, predictions in said.items():
                aucs[change].append(_auc(predictions))
        found[name] = {"seeds": seeds[name], "auc": aucs}
    return found


def _log(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _times(work: Path, size: int, seeds: dict[str, list[int]], config: Config, train_rows: int) -> dict[str, Any]:
    """Cost of each net, times in turns, and the training seconds to the peers' best validation AUC."""
    nets = [_net(name, run_folder(work, size, name, found[0]), config) for name, found in seeds.items() if found]
    same = [net for net in nets if _is_of_a_kind(ROWS[net.name])]
    steps = config.data.num_frames
    measured = measure_times(same, config, frames=steps, batch=BATCH, rounds=ROUNDS)
    found: dict[str, Any] = {net.name: cost(net, steps) | times for net, times in zip(same, measured, strict=True)}
    epoch = {net.name: statistics.median(found[net.name]["train_ms"]) * train_rows / 1000 for net in same}
    for name, seconds in epoch.items():
        found[name]["epoch_seconds"] = seconds
        if ROWS[name].peer:
            found[name]["to_its_best"] = [_race(work, size, name, seed, epoch) for seed in seeds[name]]
    return found


def _is_of_a_kind(row: Row) -> bool:
    """Whether a row differs from the plain one in what takes time: the net, on clips that it can read."""
    return {key for key, value in row.settings.items() if PLAIN.get(key) != value} <= {"model.cell", "model.seq"}


def _race(work: Path, size: int, peer: str, seed: int, epoch: dict[str, float]) -> dict[str, Any]:
    """Seconds of training until the peer's best validation AUC, by itself and by our default of the same seed."""
    theirs = _log(run_folder(work, size, peer, seed))
    ours = _log(run_folder(work, size, "default", seed))
    goal = max(row["val_auroc"] for row in theirs)
    after = 1 + next(place for place, row in enumerate(theirs) if row["val_auroc"] == goal)
    reached = next((1 + place for place, row in enumerate(ours) if row["val_auroc"] >= goal), None)
    mine = None if reached is None else reached * epoch["default"]
    return {
        "seed": seed,
        "val_auc": goal,
        "epoch": after,
        "seconds": after * epoch[peer],
        "our_epoch": reached,
        "ours": mine,
    }


def _net(name: str, run: Path, config: Config) -> Net:
    predictions = read_csv(run / "predictions-test.csv")
    row: Row = ROWS[name]
    module: nn.Module
    if row.peer:
        scale = (0.25,)  # of one channel; mean and std change no time; the scores come from the predictions
        data = config.data
        module = R3D(2, scale, scale, data.num_frames, net=row.peer, own_channels=True, frame_size=data.frame_size)
        module.load_state_dict(load_file(run / WEIGHTS))
    else:
        module = read_model(run / MODEL_FILE_NAME)[0]
    return Net(name, run, predictions, module.eval(), len(_log(run)))


def write_table(out: Path, content: dict[str, Any]) -> None:
    """Write all three files, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"adrenal-{content['size']}"
    write_json(stem.with_suffix(".json"), content)
    write_picture(stem.with_suffix(".png"), picture(content))
    text = markdown(content)
    write_text(stem.with_suffix(".md"), text)
    print(text)


def _number(one: dict[str, Any] | None, *, signed: bool = False) -> str:
    if one is None:
        return "not run"
    form = "{:+.3f}" if signed else "{:.3f}"
    value, low, high = (form.format(one[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high}{', volumes alone' if one['over'] == 'images alone' else ''})"


def markdown(content: dict[str, Any]) -> str:
    """The tables and what they rest on."""
    size, rows, times = content["size"], content["rows"], content["times"]
    lines = [f"# AdrenalMNIST3D, {size}x{size}x{size}", "", machine_sentence(content["machine"]), ""]
    lines += [
        f"Test AUC on the official {content['test_rows']} test volumes, of the epoch with the best AUC on the 98 "
        "validation volumes, mean over seeds. In brackets 95 % intervals: the union of a bootstrap over the test "
        "volumes and of Student's t over the seeds. Differences are of the same seeds and volumes.",
        "",
        "| net | seeds | test AUC | sd over seeds | validation AUC | default minus this |",
        "|---|---:|---|---:|---:|---|",
    ]
    published = content["published"].items()
    lines += [f"| {name}, published (as recalled, not looked up) | | {auc:.3f} | | | |" for name, auc in published]
    for row in rows.values():
        if not row["seeds"]:
            lines.append(f"| {row['title']} | 0 | not run | | | |")
            continue
        auc, gap = row["test_auc"], row.get("default_minus_this")
        sd = "" if auc["sd"] is None else f"{auc['sd']:.3f}"
        ahead = "" if gap is None else _number(gap, signed=True)
        lines.append(
            f"| {row['title']} | {len(row['seeds'])} | {_number(auc)} | {sd} | {row['val_auc']:.3f} | {ahead} |"
        )
    for key, title in (
        ("ensemble", "default, mean of its seeds' probabilities"),
        ("shifts", "default, mean of 5 shifts"),
    ):
        one = content[key]
        lines.append(f"| {title} | {len(one['seeds'])} | {_number(one)} | | | |")
    lines += [
        "",
        f"Times in turns on this machine, {BATCH} volumes a training step, one in inference (float32): medians "
        "(least–greatest) of the rounds; ratios to the default round by round.",
        "",
        "| net | parameters | MACs a volume | training, s an epoch | inference, ms a volume | ratio |",
        "|---|---:|---:|---:|---|---|",
    ]
    first = times["default"]["infer_ms"]
    for name, one in times.items():
        ratios = [mine / base for mine, base in zip(one["infer_ms"], first, strict=True)]
        lines.append(
            f"| {rows[name]['title']} | {one['parameters'] / 1e6:.2f} M | {one['macs'] / 1e9:.2f} G | "
            f"{one['epoch_seconds']:.1f} | {median_range(one['infer_ms'], '{:.1f}')} | "
            f"{median_range(ratios, '{:.2f}')} |"
        )
    lines.append("")
    for name, one in times.items():
        for race in one.get("to_its_best", ()):
            mine = "never reaches it"
            if race["ours"] is not None:
                share = race["ours"] / race["seconds"]
                mine = f"reaches it after {race['our_epoch']}, {race['ours']:.0f} s: {share:.2f} of it"
            lines.append(
                f"- {rows[name]['title']}, seed {race['seed']}: best validation AUC {race['val_auc']:.3f} after "
                f"{race['epoch']} epochs, {race['seconds']:.0f} s; our default {mine}."
            )
    lines += ["", "Slices left out at test time, mean test AUC (per seed):", ""]
    lines += ["| trained | every slice | every second | every third |", "|---|---|---|---|"]
    for name, one in content["thinned"].items():
        cells = [
            f"{statistics.mean(aucs):.3f} ({', '.join(f'{auc:.3f}' for auc in aucs)})" if aucs else "not run"
            for aucs in one["auc"].values()
        ]
        lines.append(f"| {rows[name]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(content: dict[str, Any]) -> Any:
    """A dot for each seed, the interval of the mean, and the published figures as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"].values() if row["seeds"]]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    for place, row in enumerate(rows):
        auc = row["test_auc"]
        peer = row["title"].startswith("3-D ResNet")
        color = "#c55418" if peer else "#2563be" if place == 0 else "#6b7280"
        axes.plot(
            [auc["low"], auc["high"]], [place, place], color=color, alpha=0.35, linewidth=6, solid_capstyle="round"
        )
        axes.plot(auc["per_seed"], [place] * len(auc["per_seed"]), "o", color=color, markersize=4, alpha=0.7)
        axes.plot(auc["value"], place, "|", color=color, markersize=16, markeredgewidth=2)
    for value in content["published"].values():
        axes.axvline(value, color="#9ca3af", linestyle=":", linewidth=1)
    if content["published"]:
        best = max(content["published"], key=content["published"].__getitem__)
        value = content["published"][best]
        said = f"published, as recalled: {best} {value:.3f}"
        axes.annotate(said, (value, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=min(axes.get_xlim()[0], 0.78))
    axes.set_xlabel("test AUC: seeds (dots), mean (bar), 95 % interval (band)")
    axes.set_title(f"AdrenalMNIST3D, {content['size']}x{content['size']}x{content['size']}", loc="left", pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    return figure

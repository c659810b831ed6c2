"""Does `videogru infer --explain` find what was planted? Marks in known slices of AdrenalMNIST3D.

    python -m tools.benchmarks.bench_explain RUNS --out docs/volume/explain [--epochs N] [--seed S] [--volumes N] \
        [--judged N]

Half of the volumes, drawn by the seed, get a smooth bright blob of a few voxels in one to three adjacent slices, at a
random place, its brightness jittered from volume to volume and slice to slice; in all, glands are dimmed and there is
noise. Labels say whether a volume is marked; the splits are the official ones. Three models are trained in RUNS (a run
that is there is gone on with): bi (bidirectional, mean), causal (mean), and attention (bidirectional,
model.pooling=attention), all smaller than the recipe's, without augmentation and dropout.

On the marked test volumes that a model calls marked, for each order of slices:

- hit: the first slice is a marked one; rank: the place of the first marked slice in the order, 1 at best;
- area: the probability of "marked" as the slices are taken out in that order, the mean over 0 to T - 1 of them (the
  deletion curve of Petsiuk et al. 2018, arXiv:1806.07421, section 3.3, with slices removed; smaller is better).

Orders: contributions, by how many neighbors are left out at a time; the softmax weights of the attention model; random
ones, of which a volume gets the mean of several. For the map over the strongest slice, where that is a marked one:
how often its largest cell holds the middle of the mark. Intervals: 95 %, percentile bootstrap over the volumes.
Writes OUT.json, OUT.md, OUT.png and OUT-example.png.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tools.experiments.grad_cam import class_map
from tools.measuring import (
    Parser,
    exit_code,
    machine,
    machine_sentence,
    progress,
    write_json,
    write_picture,
    write_text,
)
from videogru.config import Config
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.worker_pool import Watch
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.errors import DataError
from videogru.inference.explain.explain import PATCHES, Variants, covering_map, explain
from videogru.inference.explain.figure import draw_explanation
from videogru.inference.metrics import interval, resample_counts
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Classifier
from videogru.sequence import FrameSequence
from videogru.settings import resolve_config
from videogru.training.fit import fit
from videogru.training.state import STATE_FILE
from videogru.workflows.settings import settings_for_training

CLASSES = ("plain", "marked")
RESAMPLES = 1000
TISSUE = 0.35  # of the full range: how bright the masks of glands are, below most marks
RANDOM_ORDERS = 3
MODELS: dict[str, dict[str, Any]] = {
    "bi": {},
    "causal": {"model.temporal": "causal"},
    "attention": {"model.pooling": "attention"},
}
QUICKER = {
    "model.encoder_width": 8,
    "model.input_dropout": 0.0,
    "model.dropout": 0.0,
    "train.lr": 2e-3,
    "train.batch_size": 16,
    "train.precision": "fp32",
}
WIDTHS = ((1,), (3,), (1, 3))
RANDOM, ATTENTION, PREFIXES = "random", "attention weights", "prefixes"


@dataclass(frozen=True, eq=False)
class Marks:
    """Of N volumes: slices [first, first + count), count 0 where there is none, and the middle (N, 2) in pixels."""

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    middle: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """Of V volumes and one order each: hit (V,) 0 or 1, rank (V,) from 1, curve (V T) of probabilities."""

    hit: NDArray[np.float64]
    rank: NDArray[np.float64]
    curve: NDArray[np.float64]

    @property
    def area(self) -> NDArray[np.float64]:
        """(V,) mean of the curve."""
        return np.asarray(self.curve.mean(axis=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant, train, explain, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_explain.py", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder for the trained models")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--epochs", type=int, default=12, help="of each model, default 12")
    parser.add_argument("--seed", type=int, default=0, help="of marks, weights and random orders")
    parser.add_argument("--judged", type=int, default=0, help="only N marked test volumes of each model; default: all")
    parser.add_argument("--volumes", type=int, default=0, help="only the first N of each split; default: all")
    options = parser.parse_args(words)
    if options.epochs < 1 or min(options.volumes, options.seed, options.judged) < 0:
        parser.error("--epochs wants 1 or more, --volumes, --judged and --seed 0 or more")
    facts = machine(["python", "-m", "tools.benchmarks.bench_explain", *words])
    return exit_code("bench_explain.py", lambda: work(options, facts), kept="runs go on where they were saved")


def work(options: Any, facts: dict[str, object]) -> None:
    """All of it."""
    config = settings_for_training("adrenalmnist3d", {}, {"data.dataset": "adrenalmnist3d"})
    corpus, marks = marked_corpus(open_corpus(config.data), seed=options.seed, volumes=options.volumes)
    predictors, trained = {}, {}
    for name, changed in MODELS.items():
        own = settings(config, changed, epochs=options.epochs, seed=options.seed)
        predictors[name], trained[name] = train(own, corpus, options.runs / f"{name}-{options.seed}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = corpus.manifest.rows("test")
    clips = read_clips(corpus, rows, predictors["bi"])
    tables, maps = {}, {}
    for name, predictor in predictors.items():
        sure = called_marked(predictor.classifier, clips)
        marked = marks.count[rows] > 0
        trained[name]["test accuracy"] = float(np.mean(sure == marked))
        if name == "attention":  # only its weights are asked
            continue
        judged = np.flatnonzero(sure & marked)[: options.judged or None]
        if not len(judged):
            raise DataError(f"the model {name} finds no marked volume; train it longer", where=options.runs)
        truth = [range(int(marks.first[row]), int(marks.first[row] + marks.count[row])) for row in rows[judged]]
        attention = predictors["attention"].classifier
        tables[name] = judge(name, predictor.classifier, attention, [clips[k] for k in judged], truth, options.seed)
        maps[name] = judge_maps(predictor.classifier, [clips[k] for k in judged], truth, marks.middle[rows[judged]])
        if name == "bi":
            chosen = clips[int(judged[0])]
            told = draw_explanation(
                explain(predictor.classifier, chosen), chosen.frames, title=f"test {judged[0]}", label="marked"
            )
            options.out.with_name(options.out.name + "-example.png").write_bytes(told)
    content = {
        "machine": facts,
        "epochs": options.epochs,
        "seed": options.seed,
        "volumes": {split: len(corpus.manifest.rows(split)) for split in ("train", "val", "test")},
        "models": trained,
        "orders": {name: summary(table) for name, table in tables.items()},
        "maps": maps,
    }
    write_json(options.out.with_name(options.out.name + ".json"), content)
    text = markdown(content, options.out.name)
    write_text(options.out.with_name(options.out.name + ".md"), text)
    write_picture(options.out.with_name(options.out.name + ".png"), figure(tables))
    print(text)


def marked_corpus(corpus: Corpus, *, seed: int, volumes: int = 0) -> tuple[Corpus, Marks]:
    """The volumes with noise, half of each split marked, and what was planted; volumes: 0 or how many of each split."""
    assert corpus.arrays is not None
    rows = np.concatenate([corpus.manifest.rows(split)[: volumes or None] for split in ("train", "val", "test")])
    splits, count = corpus.manifest.splits[rows], len(rows)
    generator = np.random.default_rng(seed)
    marked = np.zeros(count, bool)
    for split in np.unique(splits):
        members = np.flatnonzero(splits == split)
        marked[generator.permutation(members)[: len(members) // 2]] = True
    arrays = corpus.arrays[rows].copy()
    marks = Marks(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros((count, 2)))
    for row in range(count):
        volume = arrays[row, :, 0].astype(np.float32) * TISSUE
        if marked[row]:
            marks.first[row], marks.count[row], marks.middle[row] = plant(volume, generator)
        volume += generator.normal(0, 8, volume.shape)
        arrays[row, :, 0] = volume.round().clip(0, 255).astype(np.uint8)
    sources = [str(corpus.manifest.sources[row]) for row in rows]
    manifest = build_manifest(corpus.manifest.root, CLASSES, sources, marked.astype(np.int64), splits)
    return replace(corpus, name="marked", classes=CLASSES, manifest=manifest, arrays=arrays, card=None), marks


def plant(volume: NDArray[np.float32], generator: np.random.Generator) -> tuple[int, int, tuple[float, float]]:
    """Add a blob to a volume (T H W) in place: (first slice, how many, middle)."""
    T, H, W = volume.shape
    ys, xs = np.mgrid[:H, :W]
    count = int(generator.integers(1, 4))
    first = int(generator.integers(0, T - count + 1))
    y, x = (float(generator.uniform(4, side - 5)) for side in (H, W))
    away = (ys - y) ** 2 + (xs - x) ** 2
    blob = np.exp(-away / (2 * generator.uniform(1.5, 2.2) ** 2)) * generator.uniform(130, 230)
    for step in range(first, first + count):
        volume[step] += blob * generator.uniform(0.8, 1.2)
    return first, count, (y, x)


def settings(config: Config, changed: Mapping[str, Any], *, epochs: int, seed: int) -> Config:
    """The recipe without augmentation, which would smear a mark over slices, and at a rate that learns sooner."""
    own = config.model_dump(mode="json")
    own["data"]["augment"] = {}
    flat = {f"{section}.{key}": value for section, values in own.items() for key, value in values.items()}
    flat |= {"train.epochs": epochs, "train.seed": seed, "train.num_workers": 0, **QUICKER, **changed}
    resolved = resolve_config(("bench_explain.py", flat))
    return resolved.model_copy(update={"data": resolved.data.for_kind("volume")})


def train(config: Config, corpus: Corpus, run: Path) -> tuple[Predictor, dict[str, Any]]:
    """A model trained in `run`, or gone on with there."""
    run.mkdir(parents=True, exist_ok=True)
    resume = (run / STATE_FILE).is_file()
    done = fit(config, corpus, run, resume=resume, progress=False, say=lambda text: print(text, file=sys.stderr))
    predictor = Predictor.from_file(done.model, device="cpu")
    return predictor, {"seconds of training": round(done.seconds, 1), "epochs": done.epochs}


def read_clips(corpus: Corpus, rows: NDArray[np.int64], predictor: Predictor) -> list[FrameSequence]:
    """The clips of the rows as a model reads them, with the places of their slices."""
    dataset = ClipDataset(corpus, data=predictor.data)
    batch = dataset.load([(0, int(row)) for row in rows], Watch()).batch
    assert batch is not None
    return [
        FrameSequence(frames[:length], torch.arange(length, dtype=torch.float64), "mm")
        for frames, length in zip(batch.frames, batch.lengths.tolist(), strict=True)
    ]


@torch.no_grad()
def called_marked(classifier: Classifier, clips: Sequence[FrameSequence]) -> NDArray[np.bool_]:
    """Which clips a model calls marked."""
    lengths = [torch.tensor([len(clip)]) for clip in clips]
    logits = [classifier(clip.frames[None], length)[0] for clip, length in zip(clips, lengths, strict=True)]
    return (torch.stack(logits).argmax(dim=1) == CLASSES.index("marked")).numpy()


@torch.no_grad()
def attention_weights(classifier: Classifier, clip: FrameSequence) -> NDArray[np.float64]:
    """(T,) the softmax weights by which pooling=attention weighs the steps."""
    outputs, _ = classifier.features(clip.frames[None], torch.tensor([len(clip)]))
    query = classifier.head.query
    assert query is not None
    scores = (outputs[0] * query).sum(-1) / math.sqrt(outputs.shape[-1])
    return scores.double().softmax(0).numpy()


def judge(
    name: str,
    classifier: Classifier,
    attention: Classifier,
    clips: Sequence[FrameSequence],
    truth: Sequence[range],
    seed: int,
) -> dict[str, Scores]:
    """Scores of each kind of order for a model's clips."""
    weighers: dict[str, Callable[[FrameSequence], NDArray[np.float64]]] = {}
    if name == "causal":
        weighers[PREFIXES] = lambda clip: explain(classifier, clip, code=1, method="prefixes").contributions
    for widths in WIDTHS:
        weighers[left_out(widths)] = partial(_left_out, classifier, widths)
    weighers[ATTENTION] = lambda clip: attention_weights(attention, clip)
    found: dict[str, list[tuple[float, float, NDArray[np.float64]]]] = {}
    generator = np.random.default_rng(seed)
    for clip, slices in progress(list(zip(clips, truth, strict=True)), name):
        variants = Variants(classifier, clip)
        for order, weigh in weighers.items():
            found.setdefault(order, []).append(score(variants, np.argsort(-weigh(clip), kind="stable"), slices))
        drawn = [score(variants, generator.permutation(len(clip)), slices) for _ in range(RANDOM_ORDERS)]
        hits, ranks, curves = zip(*drawn, strict=True)
        found.setdefault(RANDOM, []).append((float(np.mean(hits)), float(np.mean(ranks)), np.mean(curves, axis=0)))
    return {
        order: Scores(*(np.array([one[k] for one in scored], dtype=np.float64) for k in range(3)))
        for order, scored in found.items()
    }


def _left_out(classifier: Classifier, widths: Sequence[int], clip: FrameSequence) -> NDArray[np.float64]:
    return explain(classifier, clip, code=1, method="left out", widths=widths).contributions


def left_out(widths: Sequence[int]) -> str:
    """The name of an order by steps left out."""
    return f"left out, {' and '.join(map(str, widths))} at a time"


def score(variants: Variants, order: NDArray[np.int64], slices: range) -> tuple[float, float, NDArray[np.float64]]:
    """Hit, rank and deletion curve of one order."""
    rank = 1 + min(place for place, step in enumerate(order.tolist()) if step in slices)
    kept = [sorted(order[gone:].tolist()) for gone in range(len(order))]
    logits = variants.logits(kept)
    marked = np.exp(logits[:, 1] - np.logaddexp(logits[:, 0], logits[:, 1]))
    return float(rank == 1), float(rank), marked


def judge_maps(
    classifier: Classifier, clips: Sequence[FrameSequence], truth: Sequence[range], middles: NDArray[np.float64]
) -> dict[str, Any]:
    """How often the largest cell of a map points at the middle of the mark, over strongest slices that are marked ones.

    A cell of Grad-CAM has to hold it; a square that was covered, two cells of its map wide, too.
    """
    hits: dict[str, list[float]] = {"covered squares": [], "Grad-CAM": []}
    chance: dict[str, float] = {"covered squares": (2 / PATCHES) ** 2}
    for clip, slices, middle in zip(clips, truth, middles, strict=True):
        strongest = explain(classifier, clip, code=1).strongest
        if strongest not in slices:
            continue
        variants = Variants(classifier, clip)
        side = clip.frames.shape[-1]
        cam = class_map(variants, 1, strongest)
        assert cam is not None
        chance["Grad-CAM"] = 1 / cam.size
        y, x = (int(place * cells / side) for place, cells in zip(middle, cam.shape, strict=True))
        hits["Grad-CAM"].append(float(cam.max() > 0 and cam[y, x] == cam.max()))
        lost = covering_map(variants, 1, strongest)
        center = (np.array(np.unravel_index(int(lost.argmax()), lost.shape)) + 0.5) * side / PATCHES
        near = np.abs(center - middle) <= side / PATCHES
        hits["covered squares"].append(float(lost.max() > 0 and near.all()))
    return {"chance": chance, **{kind: spread(np.array(values)) for kind, values in hits.items()}}


def spread(values: NDArray[np.float64]) -> list[float] | None:
    """Mean, low and high of its interval; None without a value."""
    if not len(values):
        return None
    drawn = [values @ part / len(values) for part in resample_counts(len(values), resamples=RESAMPLES, seed=0)]
    found = interval(float(values.mean()), np.concatenate(drawn).astype(np.float64))
    return [found.value, found.low, found.high]


def summary(table: Mapping[str, Scores]) -> dict[str, Any]:
    """Per order: how many volumes, hit, rank, area, and by how much its area is below random's and attention's."""
    return {
        order: {
            "volumes": len(scores.hit),
            "hit": spread(scores.hit),
            "rank": spread(scores.rank),
            "area": spread(scores.area),
            "area minus random's": spread(scores.area - table[RANDOM].area),
            "area minus attention's": spread(scores.area - table[ATTENTION].area),
        }
        for order, scores in table.items()
    }


def markdown(content: Mapping[str, Any], stem: str) -> str:
    """The tables with what they were made of."""
    volumes = content["volumes"]
    lines = [
        "# Explanations against planted marks",
        "",
        machine_sentence(content["machine"]),
        "",
        f"AdrenalMNIST3D 28³, {volumes['train']} volumes to train, {volumes['val']} to choose the epoch, "
        f"{volumes['test']} to test, half of each with a mark in one to three slices; {content['epochs']} epochs, seed "
        f"{content['seed']}. What the columns mean: `tools/benchmarks/bench_explain.py`. Intervals: 95 %, bootstrap "
        "over the volumes; one training of each model, so nothing on the spread over seeds.",
        "",
        f"![hits and deletion curves]({stem}.png)",
        "",
        f"![one explanation]({stem}-example.png)",
        "",
    ]
    for name, orders in content["orders"].items():
        trained, first = content["models"][name], next(iter(orders.values()))
        lines += [
            f"## Model {name}",
            "",
            f"Test accuracy {trained['test accuracy']:.3f}, {trained['seconds of training']:.0f} s of training; "
            f"{first['volumes']} marked volumes called marked are judged.",
            "",
            "| order of slices | hit | rank | area | area minus random's | area minus attention's |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        columns = ("hit", "rank", "area", "area minus random's", "area minus attention's")
        lines += [f"| {order} | {' | '.join(shown(row[key]) for key in columns)} |" for order, row in orders.items()]
        maps = content["maps"][name]
        lines += [
            "",
            "The map points at the mark, where the strongest slice is a marked one: "
            + ", ".join(f"{kind} {shown(maps[kind])} (by chance {p:.3f})" for kind, p in maps["chance"].items())
            + ".",
            "",
        ]
    return "\n".join(lines)


def shown(values: Sequence[float] | None) -> str:
    """A value with its interval."""
    return "–" if values is None else f"{values[0]:.3f} ({values[1]:.3f}–{values[2]:.3f})".replace("–-", " to -")


def figure(tables: Mapping[str, Mapping[str, Scores]]) -> Any:
    """Hit rates as bars, and the deletion curves of each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(4.4 * len(tables), 6.4), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(2, len(tables), squeeze=False)
    for column, (name, table) in enumerate(tables.items()):
        bars, curves = axes[0, column], axes[1, column]
        spreads = [spread(scores.hit) or [0.0, 0.0, 0.0] for scores in table.values()]
        values = np.array(spreads).T
        places = np.arange(len(table))
        bars.barh(places, values[0], xerr=np.abs(values[1:] - values[0]), color="#5b7fa6", ecolor="#1d2733")
        bars.set_yticks(places, list(table), fontsize=7)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1.02), xlabel="strongest slice is a marked one", title=f"model {name}")
        for order in (*([PREFIXES] if PREFIXES in table else []), left_out((1, 3)), ATTENTION, RANDOM):
            curves.plot(table[order].curve.mean(axis=0), label=order)
        curves.set(ylim=(0, 1.02), xlabel="slices taken out", ylabel="probability of marked")
        curves.legend(fontsize=7)
    return made


if __name__ == "__main__":
    sys.exit(main())

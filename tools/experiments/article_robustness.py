"""Robustness and fine classes of the article's nets: CIFAR-100's test split spoiled in three ways, and superclasses.

    python -m tools.experiments.article_robustness --work runs/article-cpu --data-dir DIR [--out docs/article]

Every net sees the same spoiled pixels. What a model answers is kept as robustness.npz beside it, so that a second call
goes on where the first was stopped. Writes robustness.json, robustness.md and robustness.png.
"""

import hashlib
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.functional import gaussian_blur

from tools.experiments.article import (
    HOLDS,
    INTERVALS,
    NETS,
    OPPOSITE,
    OTHERS,
    OURS,
    UNDECIDED,
    cifar_corpus,
    cifar_folder,
    finished_seeds,
    interval,
    points,
    run_folder,
    samples,
    shared_settings,
    superclasses,
    verdict,
)
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
from videogru.checkpoint.model_file import MODEL_FILE_NAME
from videogru.data.manifests.corpus import Corpus
from videogru.errors import DataError
from videogru.files import atomic_path
from videogru.inference.predictor import Predictor

# Occlusion: share of the area; noise: sd of values in 0..1; blur: sd in pixels.
SEVERITIES = {
    "occlusion": (0.1, 0.2, 0.3, 0.4, 0.5),
    "noise": (0.02, 0.04, 0.08, 0.12, 0.18),
    "blur": (0.4, 0.6, 0.8, 1.2, 1.6),
}
CONDITIONS = [(kind, severity) for kind, severities in SEVERITIES.items() for severity in severities]
AXES = {
    "occlusion": "occluded share of the area, %",
    "noise": "sd of Gaussian noise, values in 0..1",
    "blur": "sd of Gaussian blur, pixels",
}
CACHE = "robustness.npz"
DAMAGE_VERSION = 1  # to be raised when `spoil` gives other pixels, or answers are counted otherwise
CLEAN, RESTRICTED, COARSE = "clean", "within superclass", "superclass"


def spoil(
    images: NDArray[np.uint8], kind: str, severity: float, rows: NDArray[np.int64], fill: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Images (N C H W), of the test rows `rows`, with one kind of damage; random parts depend on kind, severity, row.

    occlusion: one square of `occluded_side`, anywhere inside, in the color `fill` (C,); noise: Gaussian, clipped and
    rounded; blur: a Gaussian kernel cut at four sd, edges mirrored.
    """
    if kind == "blur":
        reach = 2 * math.ceil(4 * severity) + 1
        blurred: NDArray[np.uint8] = gaussian_blur(torch.from_numpy(images), [reach, reach], [severity] * 2).numpy()
        return blurred
    spoiled = images.copy()
    key = (list(SEVERITIES).index(kind), round(severity * 1000))
    for image, row in zip(spoiled, rows.tolist(), strict=True):
        rng = np.random.default_rng((*key, row))
        if kind == "noise":
            noisy = image / 255 + rng.normal(0.0, severity, image.shape)
            image[:] = np.rint(noisy.clip(0.0, 1.0) * 255)
        else:
            height, width = image.shape[1:]
            side = occluded_side(severity, height, width)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            image[:, top : top + side, left : left + side] = fill[:, None, None]
    return spoiled


def occluded_side(share: float, height: int, width: int) -> int:
    """Pixels of the side of the square whose area comes nearest to a share of the image."""
    return min(range(min(height, width) + 1), key=lambda side: abs(side * side - share * height * width))


def cache_key(model: Path, fill: NDArray[np.uint8]) -> str:
    """What kept answers belong to: the weights, the damage and its color."""
    with model.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{weights} {DAMAGE_VERSION} {','.join(map(str, fill.tolist()))}"


def answers(run: Path, test: Corpus, fill: NDArray[np.uint8]) -> dict[str, NDArray[np.bool_]]:
    """Which test images a model gets right, (N,) for every condition; what was kept under its key is not asked again.

    Named "KIND SEVERITY", and for clean images "clean" (fine class right), "superclass" (the class named lies in the
    right superclass), "within superclass" (right where only the five classes of the true superclass may be named).
    """
    cache, model = run / CACHE, run / MODEL_FILE_NAME
    key = cache_key(model, fill)
    hits = _kept(cache, key, len(test.manifest))
    missing = [(kind, severity) for kind, severity in CONDITIONS if f"{kind} {severity}" not in hits]
    labels, images = test.manifest.labels, _images(test)
    rows = np.arange(len(labels), dtype=np.int64)
    if missing or not {CLEAN, COARSE, RESTRICTED} <= set(hits):
        predictor = Predictor.from_file(model)
        if predictor.card.classes != test.classes:
            raise DataError("has other classes than CIFAR-100", where=model)

    def probabilities(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        said = predictor.predict(replace(test, arrays=pixels[:, None]), rows, batch_size=128)
        return said.probabilities.astype(np.float64)

    if not {CLEAN, COARSE, RESTRICTED} <= set(hits):
        groups, _ = superclasses(test.classes)
        clean = probabilities(images)
        among = np.where(groups == groups[labels][:, None], clean, -1.0)
        hits[CLEAN] = clean.argmax(1) == labels
        hits[COARSE] = groups[clean.argmax(1)] == groups[labels]
        hits[RESTRICTED] = among.argmax(1) == labels
    for kind, severity in progress(missing, run.name):
        hits[f"{kind} {severity}"] = probabilities(spoil(images, kind, severity, rows, fill)).argmax(1) == labels
        _keep(cache, key, hits)
    spoiled = np.mean([hits[f"{kind} {severity}"].mean() for kind, severity in CONDITIONS])
    print(f"{run.name}: clean {100 * hits[CLEAN].mean():.1f} %, spoiled {100 * spoiled:.1f} %", flush=True)
    return hits


def _keep(cache: Path, key: str, hits: Mapping[str, NDArray[np.bool_]]) -> None:
    with atomic_path(cache) as part, part.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), names=np.array(list(hits)), hits=np.stack(list(hits.values())))


def _kept(cache: Path, key: str, count: int) -> dict[str, NDArray[np.bool_]]:
    """What `_keep` wrote under the same key for as many images, else nothing."""
    if not cache.is_file():
        return {}
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "key" not in arrays or str(arrays["key"]) != key or arrays["hits"].shape[1] != count:
                return {}
            return dict(zip(arrays["names"].tolist(), arrays["hits"], strict=True))
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, BadZipFile, zlib.error) as error:
        print(f"{cache}: cannot be read ({type(error).__name__}); asking anew", file=sys.stderr)
        return {}


def _images(test: Corpus) -> NDArray[np.uint8]:
    assert test.arrays is not None, "CIFAR-100 lies in memory"
    return np.asarray(test.arrays[:, 0])


def compare(hits: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """Accuracies, differences and verdicts, from the answers of each net as (S N) per condition, by "NET CONDITION".

    Intervals are those of `article.interval`, from one draw of seeds and images for all quantities at once; ratios and
    averages are taken for each seed and each resample as for the whole. Relative accuracy is that under damage over
    that of the same net on clean images; per kind, both are averaged over severities. The share of right fine classes
    given a right superclass is a ratio of means. Raises DataError where a net gets no clean image right with some seed.
    """
    seeds = len(next(iter(hits.values())))
    # (1+S+R,) each
    means = dict(zip(hits, samples(np.stack(list(hits.values()))), strict=True))
    nets = [net for net in NETS if f"{net} {CLEAN}" in means]
    for net in nets:
        if not (means[f"{net} {CLEAN}"][: 1 + seeds] > 0).all():
            raise DataError(f"{NETS[net].title} gets no clean image right with some seed; there is nothing to compare")

    def said(sample: NDArray[np.float64]) -> dict[str, Any]:
        return interval(sample, seeds)

    measures: dict[str, dict[str, NDArray[np.float64]]] = {}
    for kind, severities in SEVERITIES.items():
        absolute = {
            net: np.mean([means[f"{net} {kind} {severity}"] for severity in severities], axis=0) for net in nets
        }
        measures[f"{kind}: accuracy"] = absolute
        measures[f"{kind}: relative accuracy"] = {net: _ratio(absolute[net], means[f"{net} {CLEAN}"]) for net in nets}
    measures["fine class within the true superclass"] = {net: means[f"{net} {RESTRICTED}"] for net in nets}
    measures["fine class given a right superclass"] = {
        net: _ratio(means[f"{net} {CLEAN}"], means[f"{net} {COARSE}"]) for net in nets
    }
    claims = []
    for title, by_net in measures.items():
        for other in OTHERS:
            if OURS in nets and other in nets:
                difference = said(by_net[OURS] - by_net[other])
                claims.append({"measure": title, "against": other, **difference, "verdict": verdict(difference)})
    return {
        "conditions": {
            net: {name: said(means[f"{net} {name}"]) for name in (CLEAN, *(f"{k} {s}" for k, s in CONDITIONS))}
            for net in nets
        },
        "measures": {
            title: {net: said(sample) for net, sample in by_net.items()} for title, by_net in measures.items()
        },
        "claims": claims,
        "verdicts": {one: sum(claim["verdict"] == one for claim in claims) for one in (HOLDS, OPPOSITE, UNDECIDED)},
    }


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where a resample drew none: it does not count."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def sentence(claim: Mapping[str, Any]) -> str:
    """One claim put to the test, as a sentence."""
    title, other = claim["measure"], NETS[claim["against"]].title
    return (
        f"{title}: {NETS[OURS].title} − {other} = {points(claim, signed=True)} points; "
        f"that {NETS[OURS].title} is better: {claim['verdict']}."
    )


def markdown(table: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    found = table["nets"]
    nets = list(table["conditions"])
    lines = [
        "# Robustness and fine classes on CIFAR-100",
        "",
        f"{machine_sentence(table['machine'])} Test images: {table['images']:,}; seeds "
        + "; ".join(f"{NETS[net].title} {', '.join(map(str, seeds)) or 'not run'}" for net, seeds in found.items())
        + f"; compared: {', '.join(map(str, table['seeds']))}. Percent, {INTERVALS}. All nets see the same pixels.",
        "",
        f"| | {' | '.join(NETS[net].title for net in nets)} |",
        f"|---|{'---|' * len(nets)}",
    ]
    for name in table["conditions"][nets[0]]:
        cells = [points(table["conditions"][net][name]) for net in nets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for title, by_net in table["measures"].items():
        lines.append(f"| **{title}** | {' | '.join(points(by_net[net]) for net in nets)} |")
    lines += ["", "Sides of the occluding square and the share they are: ", ""]
    lines[-2] += ", ".join(f"{side} px ({100 * share:.1f} %)" for side, share in table["occlusion"]) + "."
    counts = ", ".join(f"{said}: {count}" for said, count in table["verdicts"].items())
    lines += [
        "",
        f"{len(table['claims'])} comparisons; {counts}. Each interval is of 95 % by itself, without a correction for "
        "their number: where nothing differs, about one comparison in twenty would still be decided.",
        "",
        *(f"- {sentence(claim)}" for claim in table["claims"]),
    ]
    return "\n".join(lines) + "\n"


def picture(table: Mapping[str, Any]) -> Any:
    """Accuracy over severity, a panel per kind of damage, with interval bands; severity 0 is clean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(SEVERITIES), sharey=True)
    for axes, (kind, severities) in zip(panels, SEVERITIES.items(), strict=True):
        scale = 100 if kind == "occlusion" else 1
        x = [0.0, *(scale * severity for severity in severities)]
        for net, marker in zip(NETS, "s^o", strict=True):
            if net not in table["conditions"]:
                continue
            found = [table["conditions"][net][name] for name in (CLEAN, *(f"{kind} {s}" for s in severities))]
            value, low, high = ([100 * one[key] for one in found] for key in ("value", "low", "high"))
            label = NETS[net].title if kind == "occlusion" else None
            axes.plot(x, value, marker=marker, markersize=4, linewidth=1.6, color=NETS[net].color, label=label)
            axes.fill_between(x, low, high, color=NETS[net].color, alpha=0.15, linewidth=0)
        axes.set_xlabel(AXES[kind])
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 accuracy, %")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, title="mean over seeds, band: 95 % interval")
    return figure


def measure(work: Path, folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """Let all finished models answer, and compare them over the seeds that every net has.

    command: the words of the call. Raises DataError where no model is finished, or no seed is common to the nets that
    are there, ConfigError where runs differ in more than the net and the seed.
    """
    facts = machine(command)
    found = finished_seeds(work)
    if not any(found.values()):
        raise DataError("no finished run", where=work, hint="Train first: tools/experiments/reproduce_article.py")
    shared = sorted(set.intersection(*(set(seeds) for seeds in found.values() if seeds)))
    if not shared:
        raise DataError("no seed that all nets have", where=work)
    shared_settings(
        {(net, seed): run_folder(work, net, seed) for net, seeds in found.items() if seeds for seed in shared}
    )
    corpus = cifar_corpus(folder)
    rows = corpus.manifest.rows("test")
    assert corpus.arrays is not None, "CIFAR-100 lies in memory"
    fill = np.rint(corpus.arrays[corpus.manifest.rows("train")].mean(axis=(0, 1, 3, 4))).astype(np.uint8)
    test = replace(corpus, manifest=corpus.manifest.take(rows), arrays=corpus.arrays[rows])
    by_net = {
        net: [answers(run_folder(work, net, seed), test, fill) for seed in shared]
        for net, seeds in found.items()
        if seeds
    }
    hits = {f"{net} {name}": np.stack([one[name] for one in runs]) for net, runs in by_net.items() for name in runs[0]}
    height, width = test.arrays.shape[-2:] if test.arrays is not None else (0, 0)
    sides = [occluded_side(share, height, width) for share in SEVERITIES["occlusion"]]
    return {
        "nets": found,
        "seeds": shared,
        "images": len(rows),
        "fill": fill.tolist(),
        "occlusion": [(side, side * side / (height * width)) for side in sides],
        **compare(hits),
        "machine": facts,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="article_robustness.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--work", type=Path, required=True, help="run folders of tools/experiments/reproduce_article.py"
    )
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-100 lies")
    parser.add_argument("--out", type=Path, default=Path("docs/article"), help="where the results are written")
    options = parser.parse_args(words)

    def work_on() -> None:
        table = measure(
            options.work,
            cifar_folder(options.data_dir),
            ["python", "-m", "tools.experiments.article_robustness", *words],
        )
        text = markdown(table)
        write_json(options.out / "robustness.json", table)
        write_text(options.out / "robustness.md", text)
        write_picture(options.out / "robustness.png", picture(table))
        print(text)
        print(f"written: {options.out / 'robustness'}.json, .md and .png")

    return exit_code(
        "article_robustness.py", work_on, kept="answers to whole conditions are kept, run me again to go on"
    )


if __name__ == "__main__":
    sys.exit(main())

"""What the article's tools share: its nets and claims, intervals over seeds and images, the runs that compare."""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videogru.checkpoint.model_file import MODEL_FILE_NAME
from videogru.config import Config, DataConfig
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.manifests.dataset_card import load_card
from videogru.errors import ConfigError, DataError
from videogru.inference.metrics import resample_counts
from videogru.resources import data_root
from videogru.settings import parse_assignments
from videogru.workflows.run_folder import run_config

CIFAR_FOLDER = "cifar-100-python"
RESAMPLES = 2000
# The 0.975 quantiles of Student's t with 1 to 9 degrees of freedom; for more, the last is a little too wide.
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
INTERVALS = (
    "in brackets 95 % intervals over seeds and images: the union of a two-level bootstrap's and of Student's t over "
    'the seeds, as a bootstrap of few seeds is too narrow; one seed has no interval over seeds, and "images alone" '
    "marks those over images"
)


@dataclass(frozen=True)
class Net:
    """One row of the article's table: name, what sets it apart from the recipe, top-1 the article claims, color."""

    title: str
    settings: Mapping[str, str]
    claimed: float
    color: str


# Keys are the names of run folders; the last one is the article's own. A ResNet ends in the mean of its map as it is.
NETS = {
    "resnet": Net(
        "ResNet", {"model.cell": "none", "model.pooling": "mean", "model.layer_norm": "false"}, 0.763, "#6b7280"
    ),
    "lstm-cnn": Net("LSTM-CNN", {"model.cell": "lstm", "model.pooling": "last"}, 0.748, "#c55418"),
    "gru-cnn": Net("GRU-CNN", {"model.cell": "gru", "model.pooling": "last"}, 0.781, "#2563be"),
}
OURS = "gru-cnn"
OTHERS = tuple(net for net in NETS if net != OURS)


def cifar_folder(named: Path | None) -> Path:
    """The absolute folder that holds CIFAR-100, the named or the usual one. Raises DataError where it does not."""
    place = (named or data_root() / "cifar100").resolve()
    place = place.parent if place.name == CIFAR_FOLDER else place
    if not (place / CIFAR_FOLDER).is_dir():
        raise DataError(f"{place}: no folder {CIFAR_FOLDER}; name the one that holds it with --data-dir")
    return place


def cifar_corpus(folder: Path) -> Corpus:
    """All of CIFAR-100, train and test, from a folder that `cifar_folder` found."""
    return open_corpus(DataConfig(dataset="cifar100", data_dir=folder, frame_size=32, val_fraction=0.0), seed=0)


def seeds_of(text: str) -> tuple[int, ...]:
    """'0,1,2' as numbers. Raises argparse's error where they are none, or one repeats."""
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"seeds are numbers with commas, such as 0,1,2; not {text!r}") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"seeds must differ and not be negative; got {text}")
    return seeds


def run_folder(work: Path, net: str, seed: int) -> Path:
    """Where one training lies."""
    return work / f"{net}-seed{seed}"


def finished_seeds(work: Path) -> dict[str, list[int]]:
    """The seeds of each net whose model was trained and evaluated, rising."""
    found: dict[str, list[int]] = {net: [] for net in NETS}
    for net, seeds in found.items():
        for path in work.glob(f"{net}-seed*/evaluation-test.json"):
            number = path.parent.name.removeprefix(f"{net}-seed")
            if number.isdecimal() and (path.parent / MODEL_FILE_NAME).is_file():
                seeds.append(int(number))
        seeds.sort()
    return found


def flat_settings(config: Config) -> dict[str, object]:
    """All settings by their dotted keys."""
    pairs: dict[str, object] = {}
    for section, values in config.model_dump(mode="json").items():
        for key, value in values.items():
            inner = value if isinstance(value, Mapping) else {"": value}
            pairs |= {f"{section}.{key}.{name}".rstrip("."): v for name, v in inner.items()}
    return pairs


def shared_settings(runs: Mapping[tuple[str, int], Path]) -> dict[str, object]:
    """What all runs have in common; only what makes the net, the seed and the place of the data may differ.

    Raises ConfigError where more does, or a folder holds another net than its name says.
    """
    free = {"train.seed", "data.data_dir", *(key for net in NETS.values() for key in net.settings)}
    shared: dict[str, object] = {}
    for (net, _), run in runs.items():
        settings = flat_settings(run_config(run))
        for key, text in parse_assignments(f"{k}={v}" for k, v in NETS[net].settings.items()).items():
            if settings[key] != text:
                raise ConfigError(f"{key}={settings[key]}, but a {NETS[net].title} has {text}", where=run)
        fixed = {key: value for key, value in settings.items() if key not in free}
        for key, value in fixed.items():
            if shared.setdefault(key, value) != value:
                raise ConfigError(f"{key}={value}, but {shared[key]} in another run; they do not compare", where=run)
    return shared


def resampled_means(
    values: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of (G S N) values over S seeds and N images: (G,) of all, and (G R) of R resamples.

    Two-level bootstrap: a resample draws seeds and images with replacement, independently, and both draws are the same
    for all G quantities, so that differences and ratios between them are paired by seed and by image (seeds and images
    are crossed: Owen 2007, "The pigeonhole bootstrap", whose intervals err to the wide side). Of N images N are drawn;
    of S seeds S - 1, which makes the seeds' part of the variance unbiased where there are few (McCarthy and Snowden
    1985). One seed stays itself: the interval then covers the images alone.
    """
    G, S, N = values.shape
    flat = values.reshape(G * S, N).astype(np.float32)
    drawn = max(S - 1, 1)
    picks = np.random.default_rng((seed, 1)).integers(S, size=(resamples, drawn))
    shares = np.stack([(picks == s).mean(axis=1) for s in range(S)])
    by_seed = np.concatenate([flat @ counts for counts in resample_counts(N, resamples=resamples, seed=seed)], axis=1)
    means = (by_seed.reshape(G, S, resamples) * shares).sum(axis=1) / N
    return values.mean(axis=(1, 2), dtype=np.float64), means


def samples(values: NDArray[Any]) -> NDArray[np.float64]:
    """(G 1+S+R) of (G S N) values: the mean of all, of each seed, and of each of R resamples by `resampled_means`.

    Differences and ratios of such rows, element by element, are rows of their own for `interval`.
    """
    means, drawn = resampled_means(values)
    return np.concatenate([means[:, None], values.mean(axis=2, dtype=np.float64), drawn], axis=1)


def interval(sample: NDArray[np.float64], seeds: int) -> dict[str, Any]:
    """A value with its 95 % interval, from one row of `samples` over that many seeds.

    With several seeds it is the union of two: the percentile interval of the resamples, which knows the images but of
    few seeds falls short, and that of Student (1908), t with S - 1 degrees of freedom over the seeds, which knows the
    seeds but not that all see the same images. The union holds the true value in about 95 % of cases whichever of the
    two prevails. With one seed it is the percentile interval over images alone, and `over` says so. Undefined
    resamples (NaN) do not count.
    """
    value, by_seed, drawn = float(sample[0]), sample[1 : 1 + seeds], sample[1 + seeds :]
    low, high = (float(bound) for bound in np.nanquantile(drawn, [0.025, 0.975]))
    if seeds > 1:
        half = T_QUANTILES[min(seeds - 1, len(T_QUANTILES)) - 1] * float(by_seed.std(ddof=1)) / math.sqrt(seeds)
        low, high = min(low, value - half), max(high, value + half)
    return {"value": value, "low": low, "high": high, "over": "seeds and images" if seeds > 1 else "images alone"}


HOLDS, OPPOSITE, UNDECIDED = "the claim holds", "the claim does not hold: the opposite does", "undecided"


def verdict(difference: Mapping[str, Any]) -> str:
    """Whether "ours is better" stands, by the interval of ours minus theirs."""
    if difference["low"] > 0:
        return HOLDS
    return OPPOSITE if difference["high"] < 0 else UNDECIDED


def points(number: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A share with its interval in percent, as 76.3 (75.9 to 76.8), or (75.9 to 76.8, images alone) of one seed."""
    if number is None:
        return "not run"
    sign = "+" if signed else ""
    value, low, high = (f"{100 * number[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high}{', images alone' if number['over'] == 'images alone' else ''})"


def superclasses(classes: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The superclass of each class as a code (K,), and their names in alphabetical order, from the card's table.

    Raises DataError where the table does not name exactly these classes.
    """
    path = load_card("cifar100").folder / "superclasses.csv"
    with path.open(encoding="utf-8", newline="") as file:
        table = {row["class"]: row["superclass"] for row in csv.DictReader(file)}
    if set(table) != set(classes):
        raise DataError("names other classes than the model", where=path)
    names = tuple(sorted(set(table.values())))
    return np.array([names.index(table[name]) for name in classes], dtype=np.int64), names

"""What the article's tools share: its nets and claims, bootstrap intervals over seeds and images, facts, files."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from videogru.config import Config, DataConfig
from videogru.data.card import load_card
from videogru.data.layouts import Corpus, open_corpus
from videogru.errors import DataError
from videogru.inference.metrics import resample_counts
from videogru.modelfile import MODEL_FILE_NAME
from videogru.resources import data_root

CIFAR_FOLDER = "cifar-100-python"
RESAMPLES = 2000
_Item = TypeVar("_Item")


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


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """The line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message}\n")


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


def interval(value: float, drawn: NDArray[np.float64]) -> dict[str, float]:
    """A value with its 95 % percentile interval; undefined resamples (NaN) do not count."""
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def verdict(difference: Mapping[str, float]) -> str:
    """Whether "ours is better" stands, by the interval of ours minus theirs."""
    if difference["low"] > 0:
        return "the claim holds"
    return "the claim does not hold: the opposite does" if difference["high"] < 0 else "undecided"


def points(number: Mapping[str, float] | None, *, signed: bool = False) -> str:
    """A share with its interval in percent, as 76.3 (75.9 to 76.8)."""
    if number is None:
        return "not run"
    sign = "+" if signed else ""
    value, low, high = (f"{100 * number[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def published(words: Sequence[str]) -> str:
    """A command as it may be printed in a result: where this machine keeps its data is left out."""
    shown = list(words)
    for place, word in enumerate(words):
        if word == "--data-dir" and place + 1 < len(words):
            shown[place + 1] = "DIR"
        elif word.startswith("--data-dir="):
            shown[place] = "--data-dir=DIR"
    return shlex.join(shown)


def machine(command: str) -> dict[str, object]:
    """Where, when and with what something was measured."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        check=False,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git.stdout.strip() or None,
        "command": command,
    }


def progress(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    """The items, with a bar on a terminal."""
    return track(items, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def write_picture(path: Path, figure: Any) -> None:
    """Save a Matplotlib figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def superclasses(classes: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The superclass of each class as a code (K,), and their names in alphabetical order, from the card's table.

    Raises DataError where the table does not name exactly these classes.
    """
    import csv

    path = load_card("cifar100").folder / "superclasses.csv"
    with path.open(encoding="utf-8", newline="") as file:
        table = {row["class"]: row["superclass"] for row in csv.DictReader(file)}
    if set(table) != set(classes):
        raise DataError("names other classes than the model", where=path)
    names = tuple(sorted(set(table.values())))
    return np.array([names.index(table[name]) for name in classes], dtype=np.int64), names

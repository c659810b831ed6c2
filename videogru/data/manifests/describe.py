"""What `videogru data` shows: a corpus in plain values, and the list of cards."""

import numpy as np

from videogru.config import SPLITS, DataConfig
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.dataset_card import Card, load_card
from videogru.data.readers.open import open_source
from videogru.errors import SourceError
from videogru.resources import card_names


def describe_corpus(corpus: Corpus, *, data: DataConfig, probe: int = 8) -> dict[str, object]:
    """Counts for each split and class, and what `probe` evenly chosen sources hold; plain values, ready for JSON.

    splits: {split: rows}; labels: {class: {split: rows}}; sources: ranges over the probed ones (steps, height, width,
    length and step in the source's unit); unreadable: {source: reason} of those that could not be opened.
    """
    manifest = corpus.manifest
    counts = {
        split: np.bincount(manifest.labels[manifest.rows(split)] + 1, minlength=len(corpus.classes) + 1)
        for split in SPLITS
    }
    rows = {
        name: {split: int(counts[split][code]) for split in SPLITS} for code, name in enumerate(corpus.classes, start=1)
    }
    unlabeled = sum(int(counts[split][0]) for split in SPLITS)
    described: dict[str, object] = {
        "name": corpus.name,
        "title": corpus.card.title if corpus.card else None,
        "kind": corpus.kind,
        "license": corpus.card.license if corpus.card else None,
        "root": str(manifest.root),
        "classes": len(corpus.classes),
        "rows": len(manifest),
        "groups": manifest.groups.distinct(),
        "unlabeled": unlabeled,
        "missing": corpus.missing,
        "splits": {split: int(counts[split].sum()) for split in SPLITS},
        "labels": rows,
        "notes": list(corpus.notes),
    }
    if corpus.arrays is not None:
        _, steps, channels, height, width = corpus.arrays.shape
        described["sources"] = {"steps": steps, "channels": channels, "height": height, "width": width}
        return described
    return described | _probe(corpus, data, probe)


def _probe(corpus: Corpus, data: DataConfig, probe: int) -> dict[str, object]:
    """First steps of evenly chosen rows, read as training would read them."""
    manifest = corpus.manifest
    measured: dict[str, list[int | float]] = {}
    unreadable: dict[str, str] = {}
    units: set[str] = set()
    for row in np.unique(np.linspace(0, len(manifest) - 1, min(probe, len(manifest))).astype(int)).tolist():
        try:
            with open_source(manifest.path(row), data=data, kind=corpus.kind) as source:
                frame = source.read([0])
                facts: dict[str, int | float] = {
                    "steps": len(source.positions),
                    "channels": frame.shape[1],
                    "height": frame.shape[2],
                    "width": frame.shape[3],
                    f"length_{source.unit}": float(source.extent[1] - source.extent[0]),
                }
                if len(source.positions) > 1:
                    facts[f"step_{source.unit}"] = float(np.median(np.diff(source.positions)))
                units.add(source.unit)
        except SourceError as error:
            unreadable[str(manifest.sources[row])] = error.what
            continue
        for name, value in facts.items():
            measured.setdefault(name, []).append(value)
    ranges = {name: _range(values) for name, values in measured.items()}
    if "seconds" in units and "step_seconds" in measured:
        ranges["frames_per_second"] = _range([1 / step for step in measured["step_seconds"]])
    return {"sources": ranges, "unreadable": unreadable}


def _range(values: list[int | float]) -> int | float | list[int | float]:
    """One value where all agree, else [smallest, largest], to six digits."""
    low, high = (value if isinstance(value, int) else float(f"{value:.6g}") for value in (min(values), max(values)))
    return low if low == high else [low, high]


def list_cards() -> list[dict[str, object]]:
    """One entry for each card: name, title, kind, classes, license, bundled, and the folder its data lie in or None."""
    return [_listed(load_card(name)) for name in card_names()]


def _listed(card: Card) -> dict[str, object]:
    found = card.home.is_dir() and any(not entry.name.startswith(".") for entry in card.home.iterdir())
    return {
        "name": card.name,
        "title": card.title,
        "kind": card.kind,
        "classes": len(card.classes),
        "license": card.license,
        "bundled": card.bundled,
        "found": str(card.home) if found else None,
    }

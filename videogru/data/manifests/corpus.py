"""Opens a data set, however its files lie: a card, a folder with a subfolder per class, a BIDS folder, a manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videogru.config import SPLITS, DataConfig, Split
from videogru.data.manifests.bids import is_bids, read_bids
from videogru.data.manifests.class_folders import SPLIT_FOLDERS, one_kind, read_class_folders
from videogru.data.manifests.columns import Coded, hand_over
from videogru.data.manifests.dataset_card import Card, load_card
from videogru.data.manifests.file_tree import first_of_each_suffix
from videogru.data.manifests.kinetics import kinetics_clips, kinetics_rows, kinetics_table
from videogru.data.manifests.manifest import Manifest, build_manifest, missing_rows, read_manifest
from videogru.data.manifests.npz import read_npz
from videogru.data.manifests.splits import assign_splits
from videogru.data.manifests.table import TABLE_SUFFIXES
from videogru.data.readers.file_types import kind_of_name
from videogru.errors import ConfigError, DataError
from videogru.kinds import Kind
from videogru.resources import card_names, data_root

_CIFAR_FOLDER = "cifar-100-python"
_LOOKED_THROUGH = 100_000


@dataclass(frozen=True, eq=False)
class Corpus:
    """A data set ready for reading: every row of the manifest has a split.

    arrays: (N T C H W) uint8, aligned with the manifest's rows, where the set is one of arrays; its sources then only
    name the rows. missing: files that the data set names but that are absent; notes: what its user should know;
    left_out: reasons by row, of those that a check found bad and training leaves out.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    manifest: Manifest
    arrays: NDArray[np.uint8] | None
    card: Card | None
    missing: int
    notes: tuple[str, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)

    def training_rows(self, split: Split) -> NDArray[np.int64]:
        """Indices of the rows of a split that are read in training: all but those left out."""
        rows = self.manifest.rows(split)
        return rows[~np.isin(rows, np.fromiter(self.left_out, np.int64))] if self.left_out else rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"arrays": None if self.arrays is None else hand_over(self.arrays)}

    def __repr__(self) -> str:
        shape = "" if self.arrays is None else f", arrays {self.arrays.shape}"
        return f"Corpus({self.name}: {self.kind}, {self.manifest!r}{shape}, missing={self.missing})"


def open_corpus(data: DataConfig, *, seed: int = 0, for_training: bool = True, empty_classes: bool = False) -> Corpus:
    """Open data.dataset: a card's name, a folder with a subfolder per class or in BIDS, or a manifest (.csv, .parquet,
    .arrow).

    Unset splits are drawn by `assign_splits` from data.val_fraction, data.test_fraction and `seed`. Without
    `for_training`, a set without any split is all test, and one whose splits are all set may lack training rows.
    empty_classes: class folders may be empty.
    A manifest keeps rows whose file is absent (reading them fails, row by row); Kinetics drops them, as clips vanish
    from their publisher; both count them.
    Raises ConfigError for an unknown name, DataError for data that are absent, damaged or contradict themselves.
    """
    name = data.dataset
    if not name:
        raise ConfigError(
            "no data set is named", hint=f"--dataset takes a folder, a .csv, or: {', '.join(card_names())}"
        )
    path = Path(name)
    folder = path.is_dir() and name not in card_names()
    bids = folder and is_bids(path)
    if not bids and (data.suffix is not None or data.label_column is not None):
        raise ConfigError(
            f"--suffix and --label go with a BIDS folder, and {name} has no participants.tsv",
            hint="Leave them out; where a settings file has them: --set data.suffix=null --set data.label_column=null",
        )
    if folder and data.data_dir is not None:
        raise ConfigError(f"--data-dir goes with a card or a manifest, but {name} is a folder")
    if bids:
        manifest = read_bids(path, data)
        bare = replace(manifest, notes=())
        corpus = Corpus(manifest.root.name, "volume", manifest.classes, bare, None, None, 0, manifest.notes)
    elif folder:
        kind, manifest = read_class_folders(path, data, empty_classes)
        bare = replace(manifest, notes=())
        corpus = Corpus(manifest.root.name, kind, manifest.classes, bare, None, None, 0, manifest.notes)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        corpus = _from_manifest(path.stem, read_manifest(path, root=data.data_dir), None)
    elif path.is_file():
        raise DataError("not a folder and not a manifest .csv, .parquet or .arrow", where=path)
    else:
        card = load_card(name)
        corpus = _CARD_LAYOUTS[card.layout](card, data)
    if not for_training:
        unset = corpus.manifest.splits < 0
        if unset.all():
            everything = np.full(len(unset), SPLITS.index("test"), np.int8)
            return replace(corpus, manifest=replace(corpus.manifest, splits=everything))
        if not unset.any() and not len(corpus.manifest.rows("train")):
            return corpus
    split = assign_splits(corpus.manifest, val_fraction=data.val_fraction, test_fraction=data.test_fraction, seed=seed)
    return replace(corpus, manifest=split, notes=(*corpus.notes, *split.notes))


# Files with a table ---------------------------------------------------------------------------------------------


def _open_bundled(card: Card, data: DataConfig) -> Corpus:
    place = _place(card, data)
    return _from_manifest(card.name, read_manifest(place / "manifest.csv", card.classes), card)


def _from_manifest(name: str, manifest: Manifest, card: Card | None) -> Corpus:
    absent = missing_rows(manifest)
    rows = first_of_each_suffix(manifest.sources)
    rows += _first_folder_there(manifest, rows, absent)
    kind = one_kind((manifest.sources[row] for row in rows), manifest.root)
    if card is not None and kind != card.kind:
        raise DataError(f"holds {kind} files, but {card.name} is of kind {card.kind}", where=manifest.root)
    missing = len(absent)
    if missing == len(manifest):
        hint = (
            card.how_to_obtain if card else "Sources are relative to the manifest's folder; --data-dir names another."
        )
        raise DataError(
            f"none of the {missing} files is here, such as {manifest.sources[0]}", where=manifest.root, hint=hint
        )
    notes = (f"{missing} of {len(manifest)} rows name a file that is absent",) if missing else ()
    return Corpus(name, kind, manifest.classes, manifest, None, card, missing, notes)


def _first_folder_there(manifest: Manifest, rows: list[int], absent: NDArray[np.int64]) -> list[int]:
    """Where a nameless source that would be looked into is absent: the first that is there, and tells the kind."""
    gone = set(absent.tolist()) if len(absent) else set()
    if not any(row in gone and kind_of_name(manifest.sources[row]) is None for row in rows):
        return []
    there = (row for row in range(len(manifest)) if row not in gone)
    return [row for row in islice(there, _LOOKED_THROUGH) if kind_of_name(manifest.sources[row]) is None][:1]


# Kinetics -------------------------------------------------------------------------------------------------------


def _open_kinetics(card: Card, data: DataConfig) -> Corpus:
    """The publisher's tables, and clips <split>/[<label>/]<youtube_id>_<start:06d>_<end:06d>.<suffix>; or frames."""
    place = _place(card, data)
    codes = {name: code for code, name in enumerate(card.classes)}
    sources: list[str] = []
    groups: list[str] = []
    labels: list[int] = []
    splits: list[int] = []
    notes: list[str] = []
    missing = 0
    for code, split in enumerate(SPLITS):
        table = kinetics_table(place, SPLIT_FOLDERS[split])
        if table is None:
            continue
        clips = kinetics_clips(place, SPLIT_FOLDERS[split])
        absent = count = 0
        for youtube_id, start, end, label, where in kinetics_rows(table):
            if label and label not in codes:
                raise DataError(f"unknown class {label!r}", where=where)
            count += 1
            source = clips.get(f"{youtube_id}_{start:06d}_{end:06d}")
            if source is None:
                absent += 1
                continue
            sources.append(source)
            groups.append(youtube_id)
            labels.append(codes.get(label, -1))
            splits.append(code)
        missing += absent
        if absent:
            notes.append(f"{split}: {absent} of {count} clips are absent")
    if not sources:
        what = f"no clips: {'; '.join(notes)}" if notes else "no train.csv, val.csv or test.csv"
        raise DataError(what, where=place, hint=card.how_to_obtain)
    manifest = replace(build_manifest(place, card.classes, sources, labels, splits), groups=Coded.of(groups))
    return Corpus(card.name, card.kind, card.classes, manifest, None, card, missing, tuple(notes))


# Arrays ---------------------------------------------------------------------------------------------------------


def _open_cifar100(card: Card, data: DataConfig) -> Corpus:
    """The official pickles, (60000 1 3 32 32); they are fetched where nobody named a folder and none is there."""
    from torchvision.datasets import CIFAR100  # slow to import

    place = data.data_dir or data_root() / card.name
    root = place.parent if place.name == _CIFAR_FOLDER else place
    present = (root / _CIFAR_FOLDER).is_dir()
    if data.data_dir is not None and not present:
        raise DataError(f"no folder {_CIFAR_FOLDER}", where=place, hint=card.how_to_obtain)
    try:
        # These are pickles, but CIFAR100 compares their MD5 with the published ones before it unpickles.
        sets = [CIFAR100(root, train=train, download=not present) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot be read or downloaded: {error}", where=root, hint=card.how_to_obtain) from error
    if tuple(sets[0].classes) != card.classes:
        raise DataError("its class names differ from the card's", where=root)
    counts = [len(part.targets) for part in sets]
    arrays = np.empty((sum(counts), 1, 3, *sets[0].data.shape[1:3]), np.uint8)
    for part, start in zip(sets, (0, counts[0]), strict=True):
        np.copyto(arrays[start : start + len(part.targets), 0], part.data.transpose(0, 3, 1, 2))
    sources = [
        f"{_CIFAR_FOLDER}/{split}/{row}"
        for split, count in zip(("train", "test"), counts, strict=True)
        for row in range(count)
    ]
    labels = [label for part in sets for label in part.targets]
    splits = np.repeat([SPLITS.index("train"), SPLITS.index("test")], counts)
    manifest = build_manifest(root, card.classes, sources, labels, splits)
    return Corpus(card.name, card.kind, card.classes, manifest, arrays, card, 0, ())


def _open_medmnist(card: Card, data: DataConfig) -> Corpus:
    """One .npz of volumes (N X Y Z); each is unrolled along data.axis as the same voxels in a NIfTI file would be.

    They have no spacing, so axis=auto is axial.
    """
    from videogru.data.readers.volume.volume import chosen_axis, unroll

    if data.volume not in (None, 0, "mean"):
        raise DataError(
            f"its rows hold one volume each, there is no volume {data.volume}",
            where=card.name,
            hint="Leave --volume (data.volume) out.",
        )
    axis = chosen_axis(data.axis)

    path = _medmnist_file(card, data)
    card.check_file(path)
    members = read_npz(path, [f"{split}_{part}" for split in SPLITS for part in ("images", "labels")])
    rolled: list[NDArray[np.uint8]] = []
    sources: list[str] = []
    for split in SPLITS:
        images, labels = members[f"{split}_images"], members[f"{split}_labels"]
        if images.ndim != 4 or images.dtype != np.uint8 or not images.size or labels.shape != (len(images), 1):
            what = f"{split} holds images {images.shape} {images.dtype} with labels {labels.shape}"
            raise DataError(what, where=path, hint="Expected volumes (N, X, Y, Z) of uint8 with labels (N, 1).")
        if labels.dtype.kind not in "iu" or not 0 <= int(labels.min()) <= int(labels.max()) < len(card.classes):
            raise DataError(f"{split} labels are not all in 0..{len(card.classes) - 1}", where=path)
        rolled += [np.asarray(unroll(volume, axis)) for volume in images]
        sources += [f"{path.name}/{split}/{row}" for row in range(len(images))]
    if len({volume.shape for volume in rolled}) != 1:
        raise DataError("its splits differ in shape", where=path)
    arrays = np.stack(rolled)[:, :, None]
    labels = np.concatenate([members[f"{split}_labels"][:, 0] for split in SPLITS]).astype(np.int64)
    splits = np.repeat(range(len(SPLITS)), [len(members[f"{split}_images"]) for split in SPLITS])
    manifest = build_manifest(path.parent, card.classes, sources, labels, splits)
    return Corpus(card.name, card.kind, card.classes, manifest, arrays, card, 0, ())


def _medmnist_file(card: Card, data: DataConfig) -> Path:
    """<name>.npz, or the only <name>_<size>.npz, or the file that --data-dir names."""
    if data.data_dir is not None and data.data_dir.is_file():
        return data.data_dir
    place = _place(card, data)
    if (place / f"{card.name}.npz").is_file():
        return place / f"{card.name}.npz"
    sizes = sorted(place.glob(f"{card.name}_*.npz"))
    if len(sizes) > 1:
        raise DataError(
            f"several sizes: {', '.join(p.name for p in sizes)}", where=place, hint="Name one: --data-dir FILE.npz"
        )
    if not sizes:
        raise DataError(f"no {card.name}.npz", where=place, hint=card.how_to_obtain)
    return sizes[0]


def _place(card: Card, data: DataConfig) -> Path:
    place = data.data_dir or card.home
    if not place.is_dir():
        raise DataError(f"the data of {card.name} are not here", where=place, hint=card.how_to_obtain)
    return place.resolve()


_CARD_LAYOUTS = {
    "manifest": _open_bundled,
    "kinetics": _open_kinetics,
    "cifar100": _open_cifar100,
    "medmnist": _open_medmnist,
}

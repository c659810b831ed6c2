"""A BIDS folder: scans named by subject, labels from participants.tsv (Brain Imaging Data Structure 1.10).

participants.tsv                             participant_id, group, age, ...
sub-01/[ses-A/]anat/sub-01_[ses-A_]T1w.nii.gz   suffix T1w: what stands after the last underscore
"""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

from videogru.config import SPLITS, DataConfig
from videogru.data.manifests.columns import Coded
from videogru.data.manifests.manifest import UNSET, Manifest, build_manifest
from videogru.errors import ConfigError, DataError
from videogru.settings import nearest

TABLE = "participants.tsv"
_ENDINGS = (".nii.gz", ".nii")
_NOTHING = frozenset({"", "n/a"})  # the standard's word for a missing value
_MOST_CLASSES = 20
# Columns of the standard and of common use that describe a person, a place or a time, not what is to be told apart.
_NOT_LABELS = frozenset(
    {"participant_id", "species", "strain", "strain_rrid", "age", "sex", "gender", "handedness", "hand", "race"}
    | {"ethnicity", "education", "site", "scanner", "center", "session", "session_id", "cohort", "date", "split"}
)
_CODES: dict[str, int] = {split: code for code, split in enumerate(SPLITS)}


def is_bids(folder: Path) -> bool:
    """Whether a folder holds participants.tsv."""
    return (folder / TABLE).is_file()


def read_bids(root: Path, data: DataConfig) -> Manifest:
    """The scans with suffix `data.suffix` of all subjects, labeled by the column `data.label_column`.

    Every scan is a row; its participant is its group, so that no participant is in two splits. A column `split` (train,
    val, test) is kept to. Participants whose label is n/a give rows without label. What is chosen here because nobody
    named it, and what does not fit together, is told in `notes`. Raises DataError where participants.tsv cannot be
    used, ConfigError where there is no such suffix or column, or one has to be chosen; both list what is there.
    """
    root = root.resolve()
    header, people = _participants(root / TABLE)
    found, linked = _scans(root)
    suffix, notes = _suffix(root, found, data.suffix)
    column, said = _label_column(root / TABLE, header, people, data.label_column)
    notes += said
    labels = {person: cells.get(column, "") for person, cells in people.items()}
    labels = {person: "" if label in _NOTHING else label for person, label in labels.items()}
    splits = _splits(root / TABLE, people)
    classes = sorted({label for label in labels.values() if label})
    codes = {label: code for code, label in enumerate(classes)}
    scans = [(person, source) for person, name, source in found if name == suffix]
    rows = [(person, source) for person, source in scans if person in people]
    if not rows:
        raise DataError(f"no scan of a participant of {TABLE} has suffix {suffix}", where=root)
    with_scans = {person for person, _ in rows}
    strangers = Counter(person for person, _ in scans if person not in people)
    without = [person for person in people if person not in with_scans]
    unlabeled = [person for person in with_scans if not labels[person]]
    for count, what in (
        (len(without), f"participants without a {suffix} scan"),
        (sum(strangers.values()), f"scans of {len(strangers)} subjects that {TABLE} does not name: left out"),
        (len(unlabeled), f"participants without a {column} (n/a): their scans have no label"),
        (linked, "scans that are links to places outside of the folder, or to nothing: left out"),
    ):
        if count:
            notes.append(f"{count} {what}")
    manifest = build_manifest(
        root,
        classes,
        [source for _, source in rows],
        [codes.get(labels[person], UNSET) for person, _ in rows],
        [splits[person] for person, _ in rows],
        tuple(notes),
    )
    return replace(manifest, groups=Coded.of([person for person, _ in rows]))


def _participants(path: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(columns, {participant_id with "sub-": {column: cell}}) of participants.tsv."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read as a UTF-8 table: {error}", where=path) from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    if "participant_id" not in header:
        shown = ", ".join(header[:10]) or "nothing"
        raise DataError(f"no column participant_id, found {shown}", where=path, hint="Columns are set apart by tabs.")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"two columns {twice[0]!r}", where=path)
    people: dict[str, dict[str, str]] = {}
    for line, row in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise DataError(f"{len(row)} cells, the header has {len(header)}", where=f"{path}:{line}")
        cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
        person = "sub-" + cells["participant_id"].removeprefix("sub-")
        if person == "sub-" or person in people:
            what = "an empty participant_id" if person == "sub-" else f"{person} a second time"
            raise DataError(what, where=f"{path}:{line}")
        people[person] = cells
    if not people:
        raise DataError("has a header but no rows", where=path)
    return header, people


def _scans(root: Path) -> tuple[list[tuple[str, str, str]], int]:
    """(subject, suffix, path below the root) of all NIfTI files of subjects, sorted; and how many links lead out."""
    found: list[tuple[str, str, str]] = []
    linked = 0
    for subject in sorted(_folders(root, "sub-")):
        for session in ["", *sorted(_folders(root / subject, "ses-"))]:
            place = root / subject / session
            for kind in sorted(_folders(place, "")):
                if not session and kind.startswith("ses-"):
                    continue
                for name in sorted(_listed(place / kind)):
                    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
                    if ending is None or not name.startswith(f"{subject}_"):
                        continue
                    file = place / kind / name
                    try:
                        inside = file.resolve(strict=True).is_relative_to(root)
                    except (OSError, RuntimeError):
                        inside = False
                    if not inside:
                        linked += 1
                        continue
                    suffix = name.removesuffix(ending).rpartition("_")[2]
                    found.append((subject, suffix, file.relative_to(root).as_posix()))
    return found, linked


def _folders(place: Path, prefix: str) -> list[str]:
    return [
        name
        for name in _listed(place)
        if name.startswith(prefix) and not name.startswith(".") and (place / name).is_dir()
    ]


def _listed(place: Path) -> list[str]:
    try:
        return [entry.name for entry in place.iterdir()]
    except OSError as error:
        raise DataError(f"cannot be listed: {error.strerror}", where=place) from error


def _suffix(root: Path, found: list[tuple[str, str, str]], wanted: str | None) -> tuple[str, list[str]]:
    counts = Counter(suffix for _, suffix, _ in found)
    if not counts:
        raise DataError(
            "no scans sub-*/[ses-*/]<anat, func, ...>/sub-*_<suffix>.nii.gz", where=root, hint="Is it a BIDS folder?"
        )
    listed = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(counts.items()))
    if wanted is not None:
        if wanted not in counts:
            raise ConfigError(
                f"no scans with suffix {wanted}",
                where=root,
                hint=f"{nearest(wanted, counts)} There are: {listed}".strip(),
            )
        return wanted, []
    if len(counts) > 1:
        raise ConfigError(f"scans of several suffixes: {listed}", where=root, hint="Choose one: --suffix T1w")
    (only,) = counts
    return only, [f"scans are those with suffix {only}, the only one"]


def _label_column(
    path: Path, header: list[str], people: dict[str, dict[str, str]], wanted: str | None
) -> tuple[str, list[str]]:
    others = [name for name in header if name != "participant_id"]
    listed = ", ".join(others) or "none besides participant_id"
    if wanted is not None:
        if wanted not in others:
            hint = f"{nearest(wanted, others)} Columns: {listed}".strip()
            raise ConfigError(f"no column {wanted!r}", where=path, hint=hint)
        values = [cells[wanted] for cells in people.values() if cells[wanted] not in _NOTHING]
        distinct = set(values)
        if len(distinct) > max(2, len(values) // 2):
            raise ConfigError(
                f"{wanted!r} has {len(distinct)} values in {len(values)} participants: too many to be classes",
                where=path,
                hint="Add a column with a few classes, such as age in groups, and name it.",
            )
        return wanted, []
    plausible = [name for name in others if _may_be_label(name, [cells[name] for cells in people.values()])]
    if len(plausible) == 1:
        return plausible[0], [f"labels are the column {plausible[0]} of {TABLE} (--label names another)"]
    what = f"several columns may be the label: {', '.join(plausible)}" if plausible else "no column looks like a label"
    raise ConfigError(what, where=path, hint=f"Name it: --label COLUMN. Columns: {listed}")


def _may_be_label(name: str, cells: list[str]) -> bool:
    """Whether a column has 2 to 20 different values, on average each at least twice, that measure nothing."""
    values = [cell for cell in cells if cell not in _NOTHING]
    distinct = set(values)
    if name.lower() in _NOT_LABELS or not 2 <= len(distinct) <= min(_MOST_CLASSES, len(values) // 2):
        return False
    # Numbers with a fraction are measures; 0, 1, 2 may be codes.
    return not any("." in value and value.replace(".", "", 1).lstrip("-").isdigit() for value in distinct)


def _splits(path: Path, people: dict[str, dict[str, str]]) -> dict[str, int]:
    splits: dict[str, int] = {}
    for person, cells in people.items():
        word = cells.get("split", "").lower()
        if word in _NOTHING:
            splits[person] = UNSET
        elif word in _CODES:
            splits[person] = _CODES[word]
        else:
            raise DataError(
                f"{person}: unknown split {cells['split']!r}", where=path, hint=f"Splits: {', '.join(SPLITS)}, or n/a."
            )
    return splits

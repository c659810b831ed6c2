"""A folder with a subfolder per class, with or without folders for the splits, as a manifest."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from videogru.config import SPLITS, DataConfig
from videogru.data.manifests.columns import Coded
from videogru.data.manifests.file_tree import subfolders
from videogru.data.manifests.manifest import Manifest, build_manifest
from videogru.data.readers.file_types import SUFFIXES, kind_of_name, kind_of_source, media_files
from videogru.errors import DataError
from videogru.kinds import Kind

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}


def read_class_folders(root: Path, data: DataConfig, empty_classes: bool) -> tuple[Kind, Manifest]:
    """root/<class>/... or root/<train|val|test>/<class>/...; hidden files are ignored, other suffixes are counted.

    Images in a class folder are stills. A folder in a class folder that holds numbered images is one video; where there
    is one, every other folder of images counts as a video too, and fails with its reason when it is read. Scans below a
    folder of a class folder are of one patient, who is a group; where splits are not given by folders, equal names
    below several classes are one patient. Raises DataError where the folders hold no data set, or none of one kind.
    """
    root = root.resolve()
    tops = subfolders(root)
    split_of = {alias: code for code, split in enumerate(SPLITS) for alias in SPLIT_FOLDERS[split]}
    odd = [name for name in tops if name not in split_of]
    if "train" in tops and odd:
        raise DataError(
            f"folders named like splits beside others: {', '.join(odd[:4])}",
            where=root,
            hint="Expected FOLDER/<class>/files, or FOLDER/<train, val or test>/<class>/files; rename the others.",
        )
    if tops and not odd:
        places = [(split_of[top], root / top, label) for top in tops for label in subfolders(root / top)]
    else:
        places = [(-1, root, label) for label in tops]
    classes = sorted({label for _, _, label in places})
    if not classes:
        raise DataError(
            "no subfolders with classes",
            where=root,
            hint="Expected FOLDER/<class>/files, or FOLDER/<split>/<class>/files.",
        )
    found: list[tuple[Path, Path, str, int]] = []
    ignored: Counter[str] = Counter()
    series: set[Path] = set()
    for split, parent, label in places:
        place = parent / label
        found += [
            (path, place, label, split) for path in media_files(place, ignored, frame_folders=True, series=series)
        ]
    if not found:
        raise DataError("no videos, volumes or images in its class folders", where=root)
    notes = [f"ignored {count} files with suffix {suffix or '(none)'}" for suffix, count in sorted(ignored.items())]
    for path, place, *_ in found:
        if path == place and path in series:
            raise DataError(
                "DICOM files lie directly in the folder of their class, so nothing says which are one scan",
                where=path,
                hint="Give each series a folder of its own: FOLDER/<class>/<patient>/*.dcm",
            )
    if any(kind_of_name(path.name) is None and path not in series for path, *_ in found):
        rows = dict.fromkeys((_clip_of(path, place), label, split) for path, place, label, split in found)
        notes.append(
            f"folders of numbered images are videos of {data.folder_fps:g} frames per second (data.folder_fps)"
        )
    else:
        rows = dict.fromkeys((path, label, split) for path, _, label, split in found)
    sources = [path.relative_to(root).as_posix() for path, _, _ in rows]
    codes = {label: code for code, label in enumerate(classes)}
    labels = [codes[label] for _, label, _ in rows]
    splits = [split for *_, split in rows]
    # Not by looking into each of many folders a second time.
    kind = one_kind(sources, root, lambda path: "volume" if path in series else "video")
    if series:
        notes.append(f"{len(series)} folders of DICOM files are volumes")
    present = set(labels)
    empty = [name for code, name in enumerate(classes) if code not in present]
    if empty and not empty_classes:
        raise DataError(f"no files of class {', '.join(empty)}", where=root, hint="Remove the empty folders.")
    manifest = build_manifest(root, classes, sources, labels, splits, tuple(notes))
    if kind == "volume":
        patients = [_patient_of(path, where, split) for path, where, _, split in found]
        groups = [patient or source for patient, source in zip(patients, sources, strict=True)]
        manifest = replace(manifest, groups=Coded.of(groups), notes=(*notes, *_patient_notes(patients, labels)))
    return kind, manifest


def _patient_of(scan: Path, class_folder: Path, split: int) -> str:
    """The folder directly below the class folder in which a scan lies; after its split, where that is set. Else ""."""
    parts = scan.relative_to(class_folder).parts
    if len(parts) == 1 and not scan.is_dir():
        return ""
    return parts[0] if split < 0 else f"{SPLITS[split]}/{parts[0]}"


def _patient_notes(patients: Sequence[str], labels: Sequence[int]) -> list[str]:
    labels_of: dict[str, set[int]] = {}
    for patient, label in zip(patients, labels, strict=True):
        if patient:
            labels_of.setdefault(patient, set()).add(label)
    if not labels_of:
        return []
    several = sum(len(found) > 1 for found in labels_of.values())
    also = f"; {several} of them lie below several classes" if several else ""
    return [
        f"scans below one folder of a class are of one patient, who stays in one split: {len(labels_of)} patients{also}"
    ]


def _clip_of(path: Path, class_folder: Path) -> Path:
    """The folder of an image that lies in one below its class folder; what else is a source stays."""
    return path.parent if kind_of_name(path.name) == "image" and path.parent != class_folder else path


def one_kind(names: Iterable[str], where: Path, look: Callable[[Path], Kind | None] = kind_of_source) -> Kind:
    """The kind of all; look: of those whose name does not say it."""
    examples: dict[Kind, str] = {}
    unseen: list[str] = []
    for name in names:
        path = where / name
        kind = kind_of_name(name) or look(path)
        if kind is not None:
            examples.setdefault(kind, name)
        elif path.suffix or path.exists():
            known = " ".join(sorted(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
            raise DataError(f"{name}: no known suffix", where=where, hint=f"Known: {known}, and DICOM")
        else:
            unseen.append(name)
    if not examples and unseen:
        # A folder of frames, or of slices; nothing is there to tell.
        return "video"
    if len(examples) != 1:
        found = "; ".join(f"{kind}: {name}" for kind, name in examples.items())
        raise DataError(f"one data set, one kind, but there are {found}", where=where)
    return next(iter(examples))

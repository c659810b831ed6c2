"""The output folder of tools/data/prepare_kinetics.py: paths, finished work, and the tables written at the end."""

import csv
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from tools.measuring import write_json
from videogru.data.manifests.columns import Coded, Text
from videogru.data.manifests.manifest import Manifest, read_manifest
from videogru.data.manifests.table import TABLE_SUFFIXES
from videogru.data.readers.file_types import kind_of_name, media_files
from videogru.errors import DataError

SETTINGS, JOURNAL, BAD = "settings.json", "prepared.csv", "bad.csv"
# File names need not be valid text; these are written as the bytes they are.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


class Found(NamedTuple):
    """Videos below a root, and the manifest that names them, if one does; table: where its like is written."""

    root: Path
    sources: list[str]
    manifest: Manifest | None
    table: str


@dataclass(frozen=True)
class Done:
    """A line of prepared.csv; reason is '' where the output is good."""

    source: str
    output: str
    reason: str
    source_bytes: int
    source_mtime_ns: int
    output_bytes: int = 0
    frames: int = 0
    seconds: float = 0.0
    width: int = 0
    height: int = 0
    worst_psnr: float = 0.0


def find(source: Path) -> Found:
    """What SOURCE names. Raises DataError where it is neither a folder with a video nor a manifest."""
    if source.suffix.lower() in TABLE_SUFFIXES:
        if f"{source.stem}.csv" in (JOURNAL, BAD):
            hint = "Give the manifest another name."
            raise DataError("is the name of a table that this tool writes itself", where=source, hint=hint)
        manifest = read_manifest(source)
        return Found(manifest.root, sorted(set(manifest.sources)), manifest, f"{source.stem}.csv")
    if not source.is_dir():
        raise DataError("no such folder", where=source, hint="SOURCE is a folder, or a manifest .csv.")
    root = source.resolve()
    paths = [path for path in media_files(root) if kind_of_name(path.name) == "video"]
    if not paths:
        raise DataError("holds no video", where=source, hint="SOURCE is a folder of video files, or a manifest .csv.")
    return Found(root, [path.relative_to(root).as_posix() for path in paths], None, "")


def outputs_of(sources: list[str]) -> dict[str, str]:
    """{source: output}, all different. An .mp4 keeps its name; of others that would get the same, one gets it.

    The rest keep their suffix before the new one: a.avi becomes a.mp4, a.mkv then a.mkv.mp4.
    """
    outputs: dict[str, str] = {}
    taken: set[str] = set()
    for keeps in (True, False):
        for source in sources:
            plain = PurePosixPath(source)
            if (plain.suffix == ".mp4") is not keeps:
                continue
            output = plain.with_suffix(".mp4").as_posix()
            if output in taken:
                output = plain.as_posix()
            while output in taken or not output.endswith(".mp4"):
                output += ".mp4"
            outputs[source] = output
            taken.add(output)
    return outputs


def part_of(target: Path) -> Path:
    """Where an output is written until it is verified; no reader takes it for a video."""
    return target.with_name(f".{target.name}.part")


class Journal:
    """What became of each source, in prepared.csv: one line when it is over, the last one counts."""

    def __init__(self, out: Path) -> None:
        self.path = out / JOURNAL
        self.lines = self._read()

    def _read(self) -> dict[str, Done]:
        """A line that was cut off by a kill is left out."""
        if not self.path.is_file():
            return {}
        lines: dict[str, Done] = {}
        with self.path.open(**_TEXT) as file:
            for cells in csv.DictReader(file):
                try:
                    values = {field.name: field.type(cells[field.name]) for field in fields(Done)}  # type: ignore[operator]
                    lines[values["source"]] = Done(**values)
                except (TypeError, ValueError, KeyError):
                    continue
        return lines

    def note(self, line: Done) -> None:
        """Add a line, at once."""
        self.lines[line.source] = line
        with self.path.open("a", **_TEXT) as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Done)], lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(asdict(line))

    def mend(self) -> None:
        """Take away a line that a kill has cut off, so that the next one is not glued to it."""
        if self.path.is_file():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)

    def is_done(self, source: str, output: str, root: Path, out: Path) -> bool:
        """The output has its name and the size it was verified with, and the source is still the same."""
        line = self.lines.get(source)
        if line is None or line.reason or line.output != output:
            return False
        try:
            before, after = (root / source).stat(), (out / output).stat()
        except OSError:
            return False
        same = (before.st_size, before.st_mtime_ns) == (line.source_bytes, line.source_mtime_ns)
        return same and after.st_size == line.output_bytes


def bad(root: Path, source: str, reason: str) -> Done:
    """The line of a source that cannot be prepared."""
    path = root / source
    facts = path.stat() if path.is_file() else None
    return Done(source, "", reason, facts.st_size if facts else 0, facts.st_mtime_ns if facts else 0)


def check_settings(out: Path, settings: Mapping[str, Any], *, write: bool) -> None:
    """Raises DataError where the folder was filled with other settings; write: notes them down in a new one."""
    path = out / SETTINGS
    if path.is_file():
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise DataError(f"is damaged ({error})", where=path, hint="Remove it, or name another --out.") from error
        names = [name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)]
        if names:
            told = ", ".join(f"{name} {theirs.get(name)} instead of {settings.get(name)}" for name in names)
            raise DataError(f"was made with {told}", where=out, hint="Name another --out, or give the same settings.")
    elif write:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def write_tables(found: Found, outputs: Mapping[str, str], reasons: Mapping[str, str], out: Path) -> None:
    """bad.csv; and the manifest with the new names, or the tables that lie beside the videos, as they are.

    outputs: {source: output} of the good ones; reasons: {source: reason} of the others.
    """
    with (out / BAD).open("w", **_TEXT) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("source", "reason"))
        writer.writerows(reasons.items())
    if found.manifest is not None:
        _renamed(found.manifest, outputs, out).to_csv(out / found.table)
        return
    for table in [*found.root.glob("*.csv"), *found.root.glob("annotations/*.csv")]:
        place = table.relative_to(found.root)
        if place.as_posix() not in (JOURNAL, BAD):  # those of another run of this tool
            (out / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(table, out / place)


def _renamed(manifest: Manifest, outputs: Mapping[str, str], out: Path) -> Manifest:
    """The rows whose source was prepared, under its new name."""
    rows = np.array([row for row, source in enumerate(manifest.sources) if source in outputs], np.int64)
    kept = manifest.take(rows)
    sources = Text.of([outputs[source] for source in kept.sources])
    groups = Coded.of(sources) if kept.groups.is_column(kept.sources) else kept.groups
    return replace(kept, root=out, sources=sources, groups=groups)

"""`videogru data check`: settings, the folder of the results, the bar, and what is said at the end."""

import json
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from videogru.config import SPLITS, Config
from videogru.data.readers.dicom_files import holds_dicom
from videogru.data.readers.file_types import kind_of_name, kind_of_source
from videogru.data.readers.open import open_source
from videogru.data.readers.video.frame_folder import is_frame_folder
from videogru.data.readers.video.open import check_decoder
from videogru.data.readers.volume.describe import describe_scan, describe_steps, spacing_of
from videogru.data.readers.volume.volume import Volume, chosen_axis
from videogru.data_check.check import DUPLICATES, PROBLEMS, SHEET, Checked, check_corpus, header_of, open_for_check
from videogru.data_check.excluded_rows import CHECKS
from videogru.data_check.results import RECORDS, STATUSES, TABLE, Finding
from videogru.data_check.scan_sheet import write_frame_sheet, write_scan_sheet
from videogru.errors import ConfigError
from videogru.resources import card_names
from videogru.settings import parse_assignments, resolve_config
from videogru.workflows.run_folder import folder_stem
from videogru.workflows.settings import settings_for_training

_SHOWN = 5  # findings of a kind
Say = Callable[[str], None]


def check_data(
    name: str, data_dir: Path | None, assignments: list[str], out: Path | None, *, progress: bool, say: Say
) -> Checked:
    """Check a data set into `out`, or checks/<name>; goes on where it was ended before.

    Raises ConfigError, DataError where it cannot be opened or the folder is another's; Interrupted on Ctrl-C.
    """
    settings = _settings(name, data_dir, assignments)
    opened = open_for_check(settings.data, seed=settings.data.split_seed)
    corpus = opened.corpus
    settings.data.check_read(corpus.kind)
    data = settings.data.for_kind(corpus.kind)
    if corpus.kind == "video":
        check_decoder(data.decoder)
    folder = _folder(name, header_of(corpus, data), out)
    for note in corpus.notes:
        say(f"note: {note}")
    say(f"checking {len(corpus.manifest)} rows of {corpus.name}; the results go to {folder}")
    workers = settings.train.num_workers
    with _Bar(shown=progress) as tick:
        return check_corpus(opened, folder, data=data, num_workers=_cores() if workers is None else workers, tick=tick)


def _settings(name: str, data_dir: Path | None, assignments: list[str]) -> Config:
    flags = {"data.dataset": name} | ({} if data_dir is None else {"data.data_dir": str(data_dir)})
    assigned = parse_assignments(assignments)
    if name in card_names():
        return settings_for_training(None, flags, assigned)
    # Without the recipe of its kind, to know which it would have to be opened.
    return resolve_config(("flags", flags), ("--set", assigned))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder(name: str, header: dict[str, Any], out: Path | None) -> Path:
    """`out`, or checks/<name>, with a number where that holds the check of another root."""
    if out is not None:
        if not _is_free(out, header):
            raise ConfigError("holds the check of other data, or other files", where=out, hint="Name another --out.")
        return out
    stem = folder_stem(name)
    number = 1
    while not _is_free(folder := CHECKS / (stem if number == 1 else f"{stem}-{number}"), header):
        number += 1
    return folder


def _is_free(folder: Path, header: dict[str, Any]) -> bool:
    """Nothing of ours or others would be overwritten but an earlier check of the same data."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    try:
        with (folder / RECORDS).open(encoding="utf-8") as file:
            written = json.loads(file.readline())
        return all(written.get(key) == header[key] for key in ("root", "kind"))
    except FileNotFoundError:
        return not (folder / TABLE).exists()
    except (ValueError, AttributeError):
        # Cut off before its first line was whole.
        return (folder / RECORDS).stat().st_size == 0
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=folder) from error


class _Bar:
    """A bar on the terminal."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        self._bar = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not shown,
        )
        self._task = self._bar.add_task("check", total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def summary_lines(checked: Checked) -> list[str]:
    """What a check found, for the terminal: counts, the worst of each kind, where the tables lie, what to do next."""
    corpus = checked.corpus
    counts = "  ".join(f"{split} {len(corpus.manifest.rows(split))}" for split in SPLITS)
    status: Counter[str] = Counter(record.status for record in checked.records)
    known = len(checked.records) - checked.decoded if corpus.arrays is None else 0
    lines = [
        f"{corpus.name}: {len(checked.records)} {corpus.kind}s, {len(corpus.manifest)} rows, "
        f"{len(corpus.classes)} classes  ({counts})",
        "sources:  "
        + "  ".join(f"{name} {status[name]}" for name in STATUSES if status[name])
        + (f"  ({known} unchanged since the last check)" if known else ""),
        *_ranges(checked),
    ]
    for bad, title in ((True, "bad"), (False, "warning")):
        lines += _told([finding for finding in checked.findings if finding.bad == bad], title)
    if checked.duplicates.leaking:
        lines.append(f"{checked.duplicates.leaking} validation and test sources show what training sources show")
    lines.append(f"table:    {checked.folder / TABLE}")
    if checked.findings:
        lines.append(f"problems: {checked.folder / PROBLEMS}")
    if checked.duplicates.pairs:
        sheet = checked.folder / SHEET
        lines.append(f"copies:   {checked.folder / DUPLICATES}" + (f", shown in {sheet}" if sheet.is_file() else ""))
    return lines + _next(checked, status)


def _ranges(checked: Checked) -> list[str]:
    """Smallest and largest of what the sources are."""
    good = [record for record in checked.records if record.status == "ok"]
    parts = []
    for name in ("frames", "seconds", "fps", "width", "height"):
        values = [value for record in good if (value := getattr(record, name)) is not None]
        if values and not (name == "frames" and max(values) == 1):
            low, high = (f"{value:.6g}" for value in (min(values), max(values)))
            parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    for name in ("codec", "rate"):
        found = Counter(value for record in good if (value := getattr(record, name)))
        if found:
            parts.append(" ".join(f"{value} {count}" for value, count in found.most_common(4)))
    turned = sum(bool(record.rotation_degrees) for record in good)
    return ["each:     " + "  ".join(parts + ([f"turned {turned}"] if turned else []))] if parts else []


def _told(findings: list[Finding], title: str) -> list[str]:
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    lines = []
    for kind, found in kinds.items():
        lines.append(f"{title}:  {kind} ({len(found)})")
        lines += [f"  {_printable(one.where)}: {_printable(one.what)}" for one in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  ... and {len(found) - _SHOWN} more")
    return lines


def _printable(text: str) -> str:
    """On one line, and without what would steer the terminal."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _next(checked: Checked, status: Counter[str]) -> list[str]:
    if not checked.bad:
        return ["all is good"]
    kinds = {finding.kind for finding in checked.findings if finding.bad}
    advice = []
    if status["bad"] + status["hung"] + status["missing"]:
        inside = checked.folder.parent == CHECKS
        said = "training leaves it out" if inside else f"training looks for tables in {CHECKS}/ only, not here"
        advice.append(f"what cannot be read: mend or remove it; as long as it is there, {said}")
    if "leak" in kinds:
        advice.append("leaks: remove one of each pair, or give both the same group in the manifest")
    if kinds & {"label typo", "label", "row", "window", "group in two splits", "conflict"}:
        advice.append("rows and labels: correct them, in the manifest or by the folder that a file lies in")
    if "empty class" in kinds:
        advice.append("empty classes: fill or remove the folders")
    return ["next:"] + [f"  {line}" for line in advice] + [f"  then again: {_again(checked)}"]


def _again(checked: Checked) -> str:
    data_set = checked.name
    own = [] if checked.folder.parent == CHECKS else ["--out", str(checked.folder)]
    return shlex.join(["videogru", "data", "check", data_set, *own])


def is_source(name: str) -> bool:
    """Whether `data info` was given one source to look at, and no data set; it need not be there.

    One source is a file of a known kind, a folder of DICOM slices, or one of numbered images.
    """
    path = Path(name)
    if path.is_dir():
        return holds_dicom(path) or is_frame_folder(path)
    return (kind_of_source(path) if path.is_file() else kind_of_name(name)) is not None


def source_info(path: Path, assignments: list[str], out: Path | None) -> tuple[dict[str, object], Path | None]:
    """What `videogru data info FILE` shows, and the picture it writes (None: an image is one itself).

    out: default scan-info/<name>.png here. Raises SourceError where the file cannot be read, ConfigError where a
    setting is for another kind.
    """
    kind = kind_of_source(path) or "video"  # a file that is not there; its reader says so
    asked = resolve_config(("--set", parse_assignments(assignments))).data
    asked.check_read(kind)
    data = asked.for_kind(kind)
    # A folder may be typed as "."; a link goes by its own name.
    sheet = out or Path("scan-info") / f"{(path.resolve() if path.is_dir() else path).name}.png"
    # All planes come from one reading; the axis that a model would see is chosen from its spacing.
    with open_source(path, data=data.model_copy(update={"axis": "axial"}), kind=kind) as source:
        if isinstance(source, Volume):
            write_scan_sheet(sheet, source, axis=chosen_axis(data.axis, spacing_of(source)))
            return describe_scan(source, data=data), sheet
        facts = describe_steps(source)
        if kind == "image":
            if out is not None:
                raise ConfigError("--out is for scans and videos; an image is a picture itself", hint="Leave it out.")
            return facts, None
        write_frame_sheet(sheet, source)
        return facts, sheet

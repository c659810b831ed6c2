"""The folder of a run: made, read again, and checked against the data it was made with."""

import hashlib
import re
import tempfile
from pathlib import Path

import numpy as np

from videogru.checkpoint.model_file import MODEL_FILE_NAME
from videogru.config import Config, Split
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.errors import ConfigError, DataError, VideogruError
from videogru.files import atomic_text
from videogru.settings import read_settings_file, resolve_config
from videogru.training.processes import Group


def new_run(name: str, out: Path | None) -> Path:
    """A new folder: `out`, or runs/<name>-NNNN with the next free number."""
    try:
        if out is not None:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ConfigError(
                    "is there already, and a new run never overwrites",
                    where=out,
                    hint=f"Go on with it: videogru train --resume {out}   or choose another --out",
                )
            out.mkdir(parents=True, exist_ok=True)
            return out
        stem = folder_stem(name)
        runs = Path("runs")
        runs.mkdir(exist_ok=True)
        taken = [int(m[1]) for p in runs.iterdir() if (m := re.fullmatch(re.escape(stem) + r"-(\d{4,})", p.name))]
        number = max(taken, default=0) + 1
        while True:
            run = runs / f"{stem}-{number:04}"
            try:
                run.mkdir()
                return run
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigError(f"the run folder cannot be made: {error}", where=out or "runs") from error


def folder_stem(name: str) -> str:
    """A data set's name or path as the beginning of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem or Path(name).name).strip("-") or "run"


def run_config(run: Path) -> Config:
    """The settings a run was made with. Raises ConfigError where this is no run folder."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            "no run folder: it has no config.yaml",
            where=run,
            hint="A run that was killed before it began has none either: remove the folder, and start anew.",
        )
    return resolve_config((str(path), read_settings_file(path)))


def begun_run(config: Config, corpus: Corpus, out: Path | None) -> Path:
    """A new folder with splits and settings. Settings last: with them it is a run, and `resume` takes it."""
    run = new_run(config.data.dataset, out)
    corpus.manifest.to_csv(run / "splits.csv")
    with atomic_text(run / "config.yaml") as file:
        file.write(config.to_yaml())
    return run


def remove_unfinished(run: Path) -> None:
    """Files that a killed training was writing. Folders are exports in the making, of others and maybe alive."""
    for part in (*run.glob(".*.partial"), *run.glob(f".{MODEL_FILE_NAME}.*")):
        if not part.is_dir():
            part.unlink(missing_ok=True)


def check_names(corpus: Corpus) -> None:
    """Names that are no valid text cannot stand in the run's tables."""
    try:
        "\n".join(corpus.manifest.sources.tolist()).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a file name is no valid text: {_line_around(error)!r}", where=corpus.name, hint="Rename it."
        ) from error


def _line_around(error: UnicodeEncodeError) -> str:
    start = error.object.rfind("\n", 0, error.start) + 1
    return error.object[start:].split("\n", 1)[0]


def check_same_rows(corpus: Corpus, group: Group) -> None:
    """Refuse machines that do not see the same data."""
    manifest = corpus.manifest
    seen = hashlib.sha256()
    for column in (manifest.sources.blob, manifest.sources.offsets, manifest.labels, manifest.splits):
        seen.update(np.ascontiguousarray(column).tobytes())
    others = group.gather((corpus.classes, seen.hexdigest()))
    differing = [rank for rank, other in enumerate(others) if other != others[0]]
    if differing:
        raise DataError(
            f"process {differing[0]} sees other rows, classes or splits than process 0",
            where=corpus.name,
            hint="Bring the same files to every machine.",
        )


def check_splits(corpus: Corpus, run: Path) -> None:
    """Refuse a corpus whose rows or splits are not those of the run: its test rows may have been trained on."""
    saved = run / "splits.csv"
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "splits.csv"
        corpus.manifest.to_csv(now)
        if saved.is_file() and saved.read_bytes() == now.read_bytes():
            return
    raise DataError(
        "the data set has other rows or splits than when the run began" if saved.is_file() else "no such file",
        where=saved,
        hint=f"Bring the files back, or start anew: videogru train --config {run / 'config.yaml'}",
    )


def note_on_training(run: Path, corpus: Corpus, split: Split) -> str:
    """What to say of rows of another data set that the run was trained on: how many there are; '' where none.

    A row counts by its file, also where it is another window of it. Where there is no run, nothing is known or said.
    """
    if not (run / "splits.csv").is_file() or not (run / "config.yaml").is_file():
        return ""
    data = run_config(run).data
    try:
        own = open_corpus(data, seed=data.split_seed)
        check_splits(own, run)
    except VideogruError as error:
        return (
            f"note: the run's own data are not as they were ({error.what}), so rows that it was trained on may be here"
        )
    trained = {own.manifest.path(row) for row in own.manifest.rows("train").tolist()}
    rows = corpus.manifest.rows(split).tolist()
    seen = sum(corpus.manifest.path(row) in trained for row in rows)
    return f"note: {seen} of these {len(rows)} rows are of files that {run} was trained on" if seen else ""

"""`videogru infer`: which files, which model, and how the answers are written."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videogru.checkpoint.model_file import MODEL_FILE_NAME, ModelCard, find_model, newest_model, read_card
from videogru.config import DataConfig
from videogru.data.clips.views import Views
from videogru.data.readers.file_types import kind_of_source, media_files
from videogru.data.readers.video.frame_folder import is_frame_folder
from videogru.errors import ConfigError, DataError, ModelFileError
from videogru.files import atomic_text
from videogru.inference.explain.explain import STRONGEST
from videogru.inference.predictions import Predictions
from videogru.inference.predictor import Predictor
from videogru.kinds import KINDS, Kind
from videogru.progress import Progress, Say
from videogru.settings import resolve_config

RUNS = Path("runs")
EXPLAINED = ("method", "logit", "baseline", "picture", "explanation")  # what --explain adds to a record


def answer(
    asked: Sequence[str],
    *,
    model: Path | None,
    out: Path | None,
    form: str,
    top_k: int,
    device: str,
    views: Views,
    settings: Mapping[str, Any],
    progress: bool,
    say: Say,
) -> int:
    """Classify what `asked` names and write it; returns how many inputs failed.

    form: table, jsonl or csv; views: clips times crops of each input, whose probabilities are averaged; settings:
    dotted data.* keys that differ from the model's own. Raises ModelFileError where no model fits, ConfigError for
    settings and outputs that cannot be used.
    """
    if out is not None:
        check_writable(out, [*asked, model])
    chosen = find_model(model) if model is not None else newest_fitting(asked, say)
    card = read_card(chosen)
    inputs = expand(asked, card.kind, say)
    files = [path for path, problem in inputs if problem is None]
    predictor = Predictor.from_file(chosen, device=device, data=data_settings(card, settings))
    with Progress(len(files), shown=progress) as tick:
        answered = iter(to_records(predictor.predict_paths(files, views=views, tick=tick), top_k=top_k))
    records = [next(answered) if problem is None else failed_record(path, problem) for path, problem in inputs]
    return write_records(records, out=out, form=form, say=say)


def write_records(records: list[dict[str, Any]], *, out: Path | None, form: str, say: Say) -> int:
    """Write one row per input to `out`, else to the terminal, and say it; returns how many have an error."""
    if out is None:
        print(_FORMS[form](records, sys.stdout.isatty()), end="")
    else:
        with atomic_text(out) as file:
            file.write(_FORMS[form](records, False))
        say(f"{len(records)} rows written to {out}")
    failed = sum(record["error"] is not None for record in records)
    if failed:
        rest = "; the others are done" if failed < len(records) else ""
        say(f"{failed} of {len(records)} input{'s' * (len(records) != 1)} failed{rest}")
    return failed


def expand(asked: Sequence[str], kind: Kind, say: Say) -> list[tuple[str, str | None]]:
    """Files, folders (searched for files of the model's kind) and globs as (path, None), each once, in order.

    To a video model, a folder of numbered images is one input, whether it is named or found in another; to a volume
    model, a folder of DICOM files is.

    What holds no such file stays as (text, problem): it gets its row, and the others are done.
    """
    inputs: dict[str, str | None] = {}
    for text in asked:
        matches = _matches(text)
        if not matches:
            inputs[text] = f"{text}: no file matches this pattern"
        for match in matches:
            if not os.path.isdir(match):
                inputs.setdefault(match, None)
                continue
            try:
                inside, fitting = _inside(Path(match), kind)
            except DataError as error:
                inputs[match] = str(error)
                continue
            if not fitting:
                inputs[match] = f"{match}: no {kind} files in this folder"
            if len(fitting) < len(inside):
                say(f"{match}: {len(inside) - len(fitting)} files are not {KINDS[kind].plural} and are left out")
            inputs |= dict.fromkeys((str(path) for path in fitting), None)
    return list(inputs.items())


def _inside(folder: Path, kind: Kind) -> tuple[list[Path], list[Path]]:
    """The sources in a folder, and those of them that are of this kind. Raises DataError where it cannot be listed."""
    if kind != "video":
        inside = media_files(folder)
        return inside, [path for path in inside if kind_of_source(path) == kind]
    if is_frame_folder(folder):
        return [folder], [folder]
    inside = media_files(folder, frame_folders=True)
    return inside, [path for path in inside if kind_of_source(path) == kind]


def _matches(text: str) -> list[str]:
    """What a typed path means: itself, or the files of a pattern."""
    if os.path.exists(text) or not glob.has_magic(text):
        return [text]
    return sorted(glob.glob(text, recursive=True))


def newest_fitting(asked: Sequence[str], say: Say) -> Path:
    """The newest run whose kind is that of the first input. Raises ModelFileError where there is none."""
    return newest_of_kind(_first_kind(asked), say)


def newest_of_kind(kind: Kind | None, say: Say) -> Path:
    """The newest run of a kind, None: of any. Raises ModelFileError where there is none."""
    found = newest_model(RUNS, kind)
    if found is None:
        command = f"videogru train --dataset {KINDS[kind].example_dataset}" if kind else "videogru train --dataset NAME"
        raise ModelFileError(
            f"no trained model for {KINDS[kind].plural} in {RUNS}/" if kind else f"no trained model in {RUNS}/",
            hint=f"Name one with --model FILE, or train one: {command}",
        )
    say(f"using {found}, the newest run that fits")
    return found


def _first_kind(asked: Sequence[str]) -> Kind | None:
    for match in (match for text in asked for match in _matches(text)):
        try:
            paths = _inside(Path(match), "video")[0] if os.path.isdir(match) else [Path(match)]
            if any(path.is_dir() and kind_of_source(path) == "video" for path in paths):
                # Numbered images may be meant as stills: who only has a model of those, means that.
                return "video" if newest_model(RUNS, "video") else "image"
        except DataError:  # gets its row when the inputs are listed
            continue
        kind = next((found for path in paths if (found := kind_of_source(path))), None)
        if kind is not None:
            return kind
    return None


def data_settings(card: ModelCard, settings: Mapping[str, Any]) -> DataConfig:
    """The model's way of reading with changed data.* keys. Raises ConfigError where a key cannot be changed."""
    strangers = [key for key in settings if not key.startswith("data.")]
    if strangers:
        raise ConfigError(
            f"{strangers[0]} belongs to training; infer takes data.* keys only", hint="Example: --set data.decoder=pyav"
        )
    fixed = {
        "data.frame_size": card.frame_size,
        "data.channels": card.in_channels,
        # As many channels may be a slice with its neighbors or a gray slice repeated.
        "data.slab": card.data.slab,
    }
    for key, value in fixed.items():
        if key in settings and settings[key] != value:
            raise ConfigError(f"{key} = {settings[key]!r}, but the model was trained with {value}")
    # Which series was read for training says nothing about other folders.
    own = {f"data.{key}": value for key, value in card.data.model_dump(mode="json").items() if key != "series"}
    data = resolve_config(("model file", own), ("--set", settings)).data
    data.check_read(card.kind, settings)
    return data


def to_records(predictions: Predictions, *, top_k: int) -> list[dict[str, Any]]:
    """One plain record per row: source, predicted, confidence, top (list of class and probability), error."""
    records: list[dict[str, Any]] = []
    for row in range(len(predictions)):
        source, error = str(predictions.sources[row]), str(predictions.errors[row])
        if error:
            records.append(failed_record(source, error))
            continue
        probabilities = predictions.probabilities[row]
        order = np.argsort(-probabilities, kind="stable")[: min(top_k, len(predictions.classes))]
        top = [{"class": predictions.classes[k], "probability": round(float(probabilities[k]), 6)} for k in order]
        best = top[0]
        records.append(
            {"source": source, "predicted": best["class"], "confidence": best["probability"], "top": top, "error": None}
        )
    return records


def failed_record(source: str, error: str) -> dict[str, Any]:
    """The record of an input without a prediction."""
    return {"source": source, "predicted": None, "confidence": None, "top": [], "error": error}


def _as_jsonl(records: list[dict[str, Any]], terminal: bool) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _as_csv(records: list[dict[str, Any]], terminal: bool) -> str:
    deepest = max((len(record["top"]) for record in records), default=1)
    extra = [f"{name}_{place}" for place in range(2, deepest + 1) for name in ("class", "probability")]
    explained = [name for name in EXPLAINED if any(name in record for record in records)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "predicted", "confidence", "error", *extra, *explained])
    for record in records:
        rest = [value for entry in record["top"][1:] for value in (entry["class"], entry["probability"])]
        # One line for one input, as line tools expect.
        error = record["error"] and " ".join(record["error"].split())
        own = [record["source"], record["predicted"], record["confidence"], error]
        evidence = [_cell(record.get(name)) for name in explained]
        writer.writerow(own + rest + [None] * (len(extra) - len(rest)) + evidence)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A list as compact JSON, which one cell holds."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value


def _as_table(records: list[dict[str, Any]], terminal: bool) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    explained = any("explanation" in record for record in records)
    columns = ("source", "class", "probability", *(["spoke for it most"] * explained))
    table = Table(*columns, box=None, pad_edge=False)
    for record in records:
        source = Text(record["source"])
        if record["error"]:
            # The reason names the file again only where it stands elsewhere.
            reason = record["error"].removeprefix(f"{record['source']}: ")
            table.add_row(source, Text("error: " + reason, style="red"), "")
        for place, entry in enumerate(record["top"]):
            evidence = [_strongest(record["explanation"])] if explained and place == 0 else []
            first = source if place == 0 else ""
            table.add_row(first, Text(entry["class"]), f"{entry['probability']:.3f}", *evidence)
    # Piped, a table is never folded or cut.
    console = Console() if terminal else Console(width=10_000, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get() if terminal else "".join(line.rstrip() + "\n" for line in captured.get().splitlines())


def _strongest(explanation: list[dict[str, Any]]) -> str:
    """The few steps with the largest contributions above 0, as text."""
    ranked = sorted((step for step in explanation if step["contribution"] > 0), key=lambda step: -step["contribution"])
    shown = [f"{s['position']:g} {s['unit']} {s['contribution']:+.2g}" for s in ranked[:STRONGEST]]
    return ", ".join(shown) or "no step"


_FORMS = {"jsonl": _as_jsonl, "csv": _as_csv, "table": _as_table}


def check_writable(out: Path, read: Iterable[str | Path | None] = ()) -> None:
    """Raises ConfigError where `out` cannot be written, or would replace a video, scan, picture or model, or one of
    the files `read`; before the work.
    """
    if out.is_dir():
        raise ConfigError("--out names a folder; name a file", where=out)
    parent = out.parent
    if not parent.is_dir():
        raise ConfigError("the folder of --out does not exist", where=parent, hint=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK) or (out.exists() and not os.access(out, os.W_OK)):
        raise ConfigError("--out cannot be written", where=out)
    if out.is_file() and (
        kind_of_source(out) is not None
        or out.suffix == Path(MODEL_FILE_NAME).suffix
        or any(os.path.exists(path) and out.samefile(path) for path in read if path is not None)
    ):
        raise ConfigError(
            "--out names a file that answers must not replace", where=out, hint="Name another: --out answers.csv"
        )

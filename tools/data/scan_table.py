"""What comes out for every scan below a folder: how it was read, and what `infer` says of it; errors too.

    python -m tools.data.scan_table FOLDER [FOLDER ...] --model RUN --out docs/volume/files

Every file gets a row, whatever it is; a folder of DICOM slices is one scan. A file that holds several volumes gets
another row for its first one (--volume 0) and one for their mean (--volume mean). The class means nothing where the
model was trained on other organs: what counts is that there is a prediction or one clear error for every file. Writes
OUT.json and OUT.md.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.measuring import Parser, exit_code, machine, machine_sentence, progress, write_json, write_text
from videogru.config import DataConfig
from videogru.data.readers.dicom_files import holds_dicom
from videogru.data.readers.open import open_source
from videogru.errors import SourceError
from videogru.inference.predictor import Predictor

_SCAN = ("format", "shape", "dtype", "orientation", "orientation_from", "spacing_mm_ras", "axis")
_NOT_SCANS = {".md", ".bval", ".bvec", ".txt"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, predict, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="scan_table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="searched with all below them")
    parser.add_argument("--model", type=Path, required=True, help="model file or run folder of a volume model")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    options = parser.parse_args(words)
    facts = machine(["python", "-m", "tools.data.scan_table", *words])
    return exit_code("scan_table.py", lambda: work(options, facts), kept="nothing was written")


def work(options: Any, facts: dict[str, object]) -> int:
    """All of it."""
    predictor = Predictor.from_file(options.model, device="cpu")
    scans = [(folder, path) for folder in options.folders for path in scans_below(folder)]
    rows = [row for folder, path in progress(scans, "scans") for row in rows_of(path, folder, predictor)]
    content = {"machine": facts, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_suffix(".json"), content)
    text = markdown(content)
    write_text(options.out.with_suffix(".md"), text)
    print(text)
    return 0


def scans_below(folder: Path) -> Iterator[Path]:
    """Files, sorted; of a header and image pair the header; a folder that holds DICOM slices, as a whole."""
    if holds_dicom(folder):
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from scans_below(path)
        elif path.suffix in _NOT_SCANS or not path.suffix:
            continue
        elif not (path.suffix == ".img" and path.with_suffix(".hdr").exists()):
            yield path


def rows_of(path: Path, folder: Path, predictor: Predictor) -> list[dict[str, Any]]:
    """One row, or three where the file holds several volumes."""
    name = path.relative_to(folder.parent).as_posix()
    first = _row(name, path, predictor.data, predictor)
    if "--volume" not in (first["error"] or ""):
        return [first]
    return [
        first,
        *(
            _row(f"{name} --volume {volume}", path, predictor.data.model_copy(update={"volume": volume}), predictor)
            for volume in (0, "mean")
        ),
    ]


def _row(name: str, path: Path, data: DataConfig, predictor: Predictor) -> dict[str, Any]:
    row: dict[str, Any] = {"file": name, "error": None}
    try:
        with open_source(path, data=data, kind="volume") as source:
            row |= {key: source.details.get(key) for key in _SCAN}
            row |= {"steps": len(source.positions), "length_mm": source.extent[1] - source.extent[0]}
    except SourceError as error:
        row["error"] = error.what + (f" ({error.hint})" if error.hint else "")
    said = Predictor(predictor.classifier, predictor.card, device="cpu", data=data).predict_paths([path])
    # Reading and predicting must agree on what is an error.
    if bool(said.errors[0]) != bool(row["error"]):
        raise AssertionError(f"{path}: {said.errors[0]!r}, but read as {row}")
    if not row["error"]:
        row["class"], row["probability"] = said.classes[said.predicted[0]], float(said.confidence[0])
    return row


def markdown(content: dict[str, Any]) -> str:
    """The table."""
    rows = content["rows"]
    read = sum(row["error"] is None for row in rows)
    lines = ["# What came out of every scan", "", machine_sentence(content["machine"]), ""]
    lines += [
        f"{len(rows)} rows: {read} predicted, {len(rows) - read} refused with one message.",
        "",
        "| file | format | shape | type | orientation (from) | spacing, mm | steps | class (probability), or error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["error"]:
            lines.append(f"| {row['file']} | | | | | | | error: {_cell(row['error'])} |")
            continue
        shape = " x ".join(str(side) for side in row["shape"])
        spacing = " x ".join(f"{size:.3g}" for size in row["spacing_mm_ras"])
        lines.append(
            f"| {row['file']} | {row['format']} | {shape} | {row['dtype']} | {row['orientation']} "
            f"({row['orientation_from']}) | {spacing} | {row['steps']} {row['axis']} | "
            f"{row['class']} ({row['probability']:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())

"""What int8 costs trained models in accuracy: exports of runs against PyTorch, on validation and test.

    python -m tools.experiments.int8_accuracy RUN... [--formats onnx,openvino] [--precision int8] [--data-dir DIR] \
        [--out DIR]

Each run is exported as `videogru export` does it, with all checks but the one of accuracy, which is what is measured
here; the folders are removed again. Goals: accuracy falls by no more than 0.5 points on the test split; for two
classes AUROC, which does not hang on single samples near the boundary, by no more than 0.005. Writes int8.json and .md.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.measuring import Parser, exit_code, machine, machine_sentence, write_json, write_text
from videogru.config import Split
from videogru.data.manifests.corpus import Corpus
from videogru.export.acceptance import check_split
from videogru.inference.predictor import Predictor
from videogru.runtime.export_folder import FORMATS, PRECISIONS
from videogru.workflows.evaluate import open_run, with_classes_of
from videogru.workflows.export import export_model

POINTS, AREA = 0.5, 0.005  # that may be lost
SPLITS: tuple[Split, ...] = ("val", "test")


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, compare, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="int8_accuracy.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders or model files, trained")
    parser.add_argument("--formats", default="onnx,openvino", help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8", help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="where the data lie, if elsewhere than at training")
    parser.add_argument("--out", type=Path, default=Path("docs/deploy"), help="folder; default: %(default)s")
    options = parser.parse_args(words)
    formats = options.formats.split(",")
    if not set(formats) <= set(FORMATS):
        parser.error(f"--formats wants names of {', '.join(FORMATS)}")
    facts = machine(["python", "-m", "tools.experiments.int8_accuracy", *words])

    def work() -> int:
        rows = []
        for run in options.runs:
            for form in formats:
                print(f"{run}: {form} {options.precision}", file=sys.stderr, flush=True)
                rows += compared(run, form, options.precision, options.data_dir)
        content = {"machine": facts, "precision": options.precision, "rows": rows}
        write_json(options.out / f"{options.precision}.json", content)
        text = markdown(content)
        write_text(options.out / f"{options.precision}.md", text)
        print(text)
        return 0

    return exit_code("int8_accuracy.py", work, kept="nothing was written")


def compared(run: Path, form: str, precision: str, data_dir: Path | None) -> list[dict[str, Any]]:
    """A row for each split that has labels: scores of the export and of PyTorch, both by `videogru eval`'s reading."""
    model, settings, corpus = open_run(run, dataset=None, data_dir=data_dir)
    predictor = Predictor.from_file(model, device="cpu", data=settings.data)
    corpus = with_classes_of(corpus, predictor.card.classes, model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "exported"
        made = export_model(
            run,
            format=form,
            precision=precision,
            step=False,
            max_drop=math.inf,
            out=folder,
            data_dir=data_dir,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        exported = Predictor.from_file(folder, device="cpu", data=settings.data)
        return [
            {
                "data": predictor.card.dataset,
                "model": f"{predictor.card.model.encoder}, {predictor.card.model.cell}",
                "classes": len(predictor.card.classes),
                "format": form,
                "size_ratio": made.bytes / made.model_bytes,
                **check_split(
                    predictor,
                    exported,
                    corpus,
                    split=split,
                    batch_size=settings.train.batch_size,
                    num_workers=settings.train.num_workers,
                    max_drop=math.inf,
                    precision=precision,
                ),
            }
            for split in labeled_splits(corpus)
        ]


def labeled_splits(corpus: Corpus) -> list[Split]:
    """Validation and test, as far as they have labels."""
    return [split for split in SPLITS if (corpus.manifest.labels[corpus.manifest.rows(split)] >= 0).any()]


def verdict(row: dict[str, Any]) -> str:
    """Whether the goal is met: AUROC where there are two classes, else accuracy."""
    if row["classes"] == 2:
        return "met" if row["auroc_of_pytorch"] - row["auroc"] <= AREA else "NOT met"
    return "met" if 100 * (row["accuracy_of_pytorch"] - row["accuracy"]) <= POINTS else "NOT met"


def markdown(content: dict[str, Any]) -> str:
    """The table."""
    lines = [f"# What {content['precision']} costs in accuracy", "", machine_sentence(content["machine"]), ""]
    lines += [
        "Exports of trained models against the same model in PyTorch, float32. Flips: samples of another class. Goal: "
        f"accuracy falls by at most {POINTS} points, for two classes AUROC by at most {AREA}. Size: of the graph, "
        "weights of the runtime's format, over the model file.",
        "",
        "| data | model | format | size | split | samples | flips | accuracy | PyTorch | drop, points | AUROC "
        "| PyTorch | drop | goal |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in content["rows"]:
        drop = 100 * (row["accuracy_of_pytorch"] - row["accuracy"])
        lines.append(
            f"| {row['data']} | {row['model']} | {row['format']} | {row['size_ratio']:.3f} | {row['split']} "
            f"| {row['samples']} | {row['flips']} | {row['accuracy']:.4f} | {row['accuracy_of_pytorch']:.4f} "
            f"| {drop:+.2f} | {row['auroc']:.4f} | {row['auroc_of_pytorch']:.4f} "
            f"| {row['auroc_of_pytorch'] - row['auroc']:+.4f} | {verdict(row)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

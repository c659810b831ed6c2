"""`videogru export`: a trained model as a folder that runs without it, kept only where the checks pass."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from videogru.checkpoint.model_file import read_model
from videogru.config import Config
from videogru.data.loading.batching import OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, DataError
from videogru.export.acceptance import SHAPES, Checked, cases_of, check_shapes, check_split, split_to_check
from videogru.export.build import build, check_wanted, golden_answer, write_card
from videogru.export.example_script import example_for
from videogru.inference.predictor import Predictor
from videogru.runtime.export_folder import (
    EXAMPLE_NAME,
)
from videogru.sequence import SequenceBatch
from videogru.workflows.evaluate import open_run, with_classes_of

CALIBRATION_CLIPS = 64
_CLIPS_AT_ONCE = 8
_CALIBRATION_SEED = 0

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportOutcome:
    """The folder that was written, its size in bytes, that of the model file, and the figures of the checks."""

    folder: Path
    bytes: int
    model_bytes: int
    checked: dict[str, Any]

    def lines(self) -> list[str]:
        """What the command prints."""
        share = self.bytes / self.model_bytes
        kept, before = self.checked["accuracy"], self.checked["accuracy_of_pytorch"]
        areas = self.checked.get("auroc"), self.checked.get("auroc_of_pytorch")
        said = [
            f"exported: {self.folder} ({self.bytes / 1e6:.2f} MB, {share:.2f} of the model file)",
            f"{self.checked['split']}: accuracy {kept:.4f}, PyTorch {before:.4f}; {self.checked['flips']} of "
            f"{self.checked['samples']} get another class",
        ]
        if None not in areas:
            said.append(f"{self.checked['split']}: AUROC {areas[0]:.4f}, PyTorch {areas[1]:.4f}")
        return [*said, f"run it: python {self.folder / EXAMPLE_NAME} FRAMES.npy"]


def export_model(
    path: Path,
    *,
    format: str,
    precision: str,
    step: bool,
    max_drop: float,
    out: Path | None,
    data_dir: Path | None,
    say: Say,
) -> ExportOutcome:
    """Export the model of a run or model file to `out`, else beside it, and prove it; nothing stays where it fails.

    step: the graph of one frame of a stream; max_drop: percentage points of accuracy on the validation split that may
    be lost below fp32. Raises GateRefused where a check fails, ConfigError and DataError where it cannot be made or
    compared.
    """
    model, settings, corpus = open_run(path, dataset=None, data_dir=data_dir)
    classifier, card = read_model(model)
    check_wanted(classifier, format=format, precision=precision, step=step)
    target = new_folder(model, out, f"{format}-{precision}{'-step' * step}")
    corpus = with_classes_of(corpus, card.classes, model)
    split = split_to_check(corpus)
    predictor = Predictor(classifier, card, device="cpu", data=settings.data)
    clips = calibration_clips(corpus, predictor, settings)
    say(f"exporting {model} to {format} {precision}")
    with written_whole(target) as folder:
        made = build(folder, classifier, card, clips, format=format, precision=precision, step=step)
        cases = cases_of(clips, classifier.config.use_gaps)
        largest, mean, padding = check_shapes(folder, classifier, cases, precision)
        say(f"probabilities differ from PyTorch's by up to {largest:.2g} at {len(cases)} shapes, in a fresh process")
        scores = check_split(
            predictor,
            Predictor.from_file(folder, device="cpu", data=settings.data),
            corpus,
            split=split,
            batch_size=settings.train.batch_size,
            num_workers=settings.train.num_workers,
            max_drop=max_drop,
            precision=precision,
        )
        if precision != "fp32" and (one := 100 / scores["samples"]) > max_drop:
            few = f"of {scores['samples']} {split} samples one is {one:.3g} points"
            say(f"note: {few}: too few to tell a drop of {max_drop:g} from none")
        checked = Checked(SHAPES, largest, mean, padding, **scores).to_dict() | {"max_drop_points": max_drop}
        if precision == "int8":
            checked["calibration_clips"] = sum(len(batch) for batch in clips)
        made = replace(made, checks=checked, golden=golden_answer(folder, card))
        write_card(made, card)
        (folder / EXAMPLE_NAME).write_text(example_for(made), encoding="utf-8")
        size = sum((folder / name).stat().st_size for name in made.files)
    return ExportOutcome(target, size, model.stat().st_size, checked)


def calibration_clips(corpus: Corpus, predictor: Predictor, settings: Config) -> list[SequenceBatch]:
    """CALIBRATION_CLIPS training clips, or all there are, drawn once and read as for inference.

    Raises DataError where none can be read.
    """
    rows = corpus.manifest.rows("train")
    chosen = np.random.default_rng(_CALIBRATION_SEED).permutation(rows)[:CALIBRATION_CLIPS]
    dataset = ClipDataset(corpus, data=predictor.data)
    workers = default_workers(corpus, settings.train.num_workers, rows=len(chosen))
    loader = ClipLoader(dataset, OrderedBatches(np.sort(chosen), batch_size=_CLIPS_AT_ONCE), num_workers=workers)
    found = [loaded.batch for loaded in loader if loaded.batch is not None]
    if not found:
        raise DataError("no training clip can be read to export with", where=corpus.name)
    return found


def new_folder(model: Path, out: Path | None, name: str) -> Path:
    """Where the export goes: `out`, else beside the model. Raises ConfigError where something is there already."""
    target = out if out is not None else model.parent / name
    if target.resolve() == Path.cwd():
        raise ConfigError("--out names the folder you are in; name a new one", where=target, hint=f"--out {name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            "is there already, and an export never overwrites", where=target, hint="Remove it, or choose another --out."
        )
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, which takes its name at the end; nothing stays where something fails."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if left.is_dir() and not _is_alive(left.suffixes[-2]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.is_dir():
            target.rmdir()  # empty
        partial.rename(target)
    except OSError as error:
        raise ConfigError(f"the export cannot be written: {error.strerror or error}", where=target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(suffix: str) -> bool:
    """Whether the process runs whose number is in the name of a folder; of other names nothing is known."""
    try:
        os.kill(int(suffix.lstrip(".")), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True

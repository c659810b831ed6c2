"""`videogru infer --explain`: answers with what each step said for the predicted class, and a picture of each input."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from videogru.checkpoint.model_file import find_model, read_card
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.loading.frame_cache import FrameCache, check_cache
from videogru.data.loading.worker_pool import watched_map
from videogru.data.readers.open import open_source
from videogru.data.readers.video.open import check_decoder
from videogru.errors import SourceError
from videogru.inference.explain.explain import Explanation, explain
from videogru.inference.explain.figure import draw_explanation
from videogru.inference.predictions import Predictions
from videogru.inference.predictor import Predictor
from videogru.inference.timeline.figure import write_picture
from videogru.kinds import Kind
from videogru.progress import Progress, Say
from videogru.sequence import FrameSequence
from videogru.workflows.predict import (
    EXPLAINED,
    check_writable,
    data_settings,
    expand,
    failed_record,
    newest_fitting,
    to_records,
    write_records,
)
from videogru.workflows.timeline import Pictures

PICTURES = Path("explanations")


def answer_explained(
    asked: Sequence[str],
    *,
    model: Path | None,
    out: Path | None,
    form: str,
    top_k: int,
    device: str,
    settings: Mapping[str, Any],
    progress: bool,
    say: Say,
) -> int:
    """As `answers.answer`, and for each input what its steps said for its class; returns how many failed.

    Pictures go beside `out`, else into explanations/. Raises what `answers.answer` raises, and ConfigError where a
    picture cannot be written.
    """
    if out is not None:
        check_writable(out, [*asked, model])
    chosen = find_model(model) if model is not None else newest_fitting(asked, say)
    card = read_card(chosen)
    inputs = expand(asked, card.kind, say)
    files = [Path(path) for path, problem in inputs if problem is None]
    predictor = Predictor.from_file(chosen, device=device, data=data_settings(card, settings))
    pictures = Pictures(out, PICTURES)
    with Progress(len(files), shown=progress) as tick:
        clips = read_clips_of(files, predictor)
        records = []
        for path, problem in inputs:
            if problem is not None:
                records.append(_failed(path, problem))
                continue
            records.append(_answer(path, next(clips), predictor, pictures, top_k))
            tick(1)
    drawn = sum(record["picture"] is not None for record in records)
    say(f"{drawn} picture{'' if drawn == 1 else 's'} in {PICTURES if out is None else out.parent}/")
    return write_records(records, out=out, form=form, say=say)


def read_clips_of(files: Sequence[Path], predictor: Predictor) -> Iterator[FrameSequence | SourceError]:
    """The clip of each file as the model reads it, or why there is none; read in a process of its own.

    Raises ConfigError where the decoder or the cache cannot be used.
    """
    data, kind = predictor.data, predictor.card.kind
    if kind == "video":
        check_decoder(data.decoder)
        check_cache(data)
    read = partial(_read, data=data, kind=kind)
    for _, clip in watched_map(read, files, num_workers=1, timeout_seconds=data.decode_timeout_seconds):
        yield clip


def explanation_fields(explanation: Explanation, picture: Path) -> dict[str, Any]:
    """What a record tells of an explanation: EXPLAINED, with one entry per step."""
    steps = [
        {"position": round(position, 6), "unit": explanation.unit, "contribution": round(part, 6)}
        for position, part in zip(explanation.positions.tolist(), explanation.contributions.tolist(), strict=True)
    ]
    return {
        "method": explanation.method,
        "logit": round(float(explanation.logits[explanation.code]), 6),
        "baseline": None if explanation.baseline is None else round(explanation.baseline, 6),
        "picture": str(picture),
        "explanation": steps,
    }


def _answer(
    path: str, clip: FrameSequence | SourceError, predictor: Predictor, pictures: Pictures, top_k: int
) -> dict[str, Any]:
    if isinstance(clip, SourceError):
        return _failed(path, str(SourceError(clip.what, where=clip.where or path, hint=clip.hint)))
    try:
        explanation = explain(predictor.classifier, clip)
    except FloatingPointError as error:
        return _failed(path, f"{path}: {error}")
    (record,) = to_records(_prediction(path, explanation, predictor.card.classes), top_k=top_k)
    # scan.nii.gz -> scan.png
    picture = pictures.path(Path(path.removesuffix(".gz")))
    drawn = draw_explanation(explanation, clip.frames, title="/".join(Path(path).parts[-2:]), label=record["predicted"])
    write_picture(picture, drawn)
    return record | explanation_fields(explanation, picture)


def _prediction(path: str, explanation: Explanation, classes: tuple[str, ...]) -> Predictions:
    scores = np.exp(explanation.logits - explanation.logits.max())
    return Predictions(
        classes=classes,
        sources=np.array([path]),
        labels=np.array([-1]),
        probabilities=(scores / scores.sum())[None].astype(np.float32),
        errors=np.array([""]),
        rows=np.array([0]),
    )


def _failed(path: str, error: str) -> dict[str, Any]:
    return failed_record(path, error) | dict.fromkeys(EXPLAINED) | {"explanation": []}


def _read(path: Path, *, data: DataConfig, kind: Kind) -> FrameSequence:
    cached = kind == "video" and data.cache != "none"
    opened = FrameCache(data).open(path) if cached else open_source(path, data=data, kind=kind)
    with opened as source:
        clip = read_clip(source, data=data)
    return prepare_clip(clip, data=data, pixel_aspect=source.pixel_aspect)

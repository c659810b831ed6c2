"""`videogru encode`: the data set, the folder of the features, what is known of before, and what is said."""

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videogru.checkpoint.model_file import MODEL_FILE_NAME, ModelCard, find_model
from videogru.config import SPLITS, DataConfig
from videogru.data.loading.feature_store import ARRAY, FeatureWriter
from videogru.data.manifests.bids import is_bids
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.readers.video.open import check_decoder
from videogru.errors import ConfigError, DataError, Interrupted, ModelFileError
from videogru.files import atomic_text
from videogru.inference.encode_frames import encode_rows
from videogru.inference.predictor import Predictor
from videogru.progress import Progress
from videogru.resources import card_names
from videogru.training.features import SETTINGS, FeatureSettings, RowKeys, open_features, settings_of
from videogru.workflows.run_folder import folder_stem, run_config

FEATURES = Path("features")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Encoding:
    """What an encoding leaves: rows in all, encoded now, and those that cannot be read; bytes of the array."""

    folder: Path
    rows: int
    done: int
    bad: int
    bytes: int


def encode_data(
    dataset: str, model: Path, data_dir: Path | None, out: Path | None, *, progress: bool, say: Say
) -> Encoding:
    """Encode what is not encoded yet, into `out` or features/<data set>-<key>; goes on where it was ended before.

    Raises ConfigError, DataError, ModelFileError where that cannot be; Interrupted on Ctrl-C, what is done being kept.
    """
    path = find_model(model)
    predictor = Predictor.from_file(path)
    asked = _data(predictor.card, dataset, data_dir, model)
    corpus = open_corpus(asked, seed=asked.split_seed)
    if corpus.kind != predictor.card.kind:
        raise ModelFileError(f"this model reads {predictor.card.kind}s, {dataset} holds {corpus.kind}s", where=path)
    data = asked.for_kind(corpus.kind)
    if corpus.kind == "video":
        check_decoder(data.decoder)
    settings = settings_of(predictor.classifier, predictor.card, data)
    folder = out or FEATURES / f"{folder_stem(dataset)}-{settings.key[:12]}"
    _begin(folder, settings, path)
    for note in corpus.notes:
        say(f"note: {note}")
    with closing(FeatureWriter(folder, settings.step)) as writer:
        return _encode(predictor, corpus, settings, folder, writer, progress=progress, say=say)


def _data(card: ModelCard, dataset: str, data_dir: Path | None, model: Path) -> DataConfig:
    """How the model reads, of this data set; of its own run's where that is asked for."""
    update: dict[str, object] = {"dataset": dataset, "data_dir": data_dir}
    if dataset not in card_names():
        path = Path(dataset)
        update["dataset"] = str(path.absolute()) if path.exists() else dataset
        if not is_bids(path):
            update |= {"suffix": None, "label_column": None}
    if data_dir is not None:
        update["data_dir"] = data_dir.absolute()
    elif model.is_dir() and (model / "config.yaml").is_file():
        own = run_config(model).data
        if own.dataset == dataset and own.data_dir is not None:
            update["data_dir"] = own.data_dir.absolute()
    return card.data.model_copy(update=update)


def _begin(folder: Path, settings: FeatureSettings, model: Path) -> None:
    """The folder with settings and model, made or found. Settings last: with them it is one."""
    if (folder / SETTINGS).is_file():
        found = open_features(folder).settings
        if found.key != settings.key or found.data.dataset != settings.data.dataset:
            raise ConfigError(
                "holds the features of another data set, encoder or reading", where=folder, hint="Name another --out."
            )
        if found == settings:
            return
    elif folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {MODEL_FILE_NAME}):
        raise ConfigError("is there already, and holds no features", where=folder, hint="Name another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MODEL_FILE_NAME).exists() or not model.samefile(folder / MODEL_FILE_NAME):
            part = folder / f".{MODEL_FILE_NAME}.partial"
            shutil.copyfile(model, part)
            part.replace(folder / MODEL_FILE_NAME)
    except OSError as error:
        raise DataError(f"the folder cannot be made: {error.strerror or error}", where=folder) from error
    with atomic_text(folder / SETTINGS) as file:
        file.write(settings.model_dump_json(indent=2) + "\n")


def _encode(
    predictor: Predictor,
    corpus: Corpus,
    settings: FeatureSettings,
    folder: Path,
    writer: FeatureWriter,
    *,
    progress: bool,
    say: Say,
) -> Encoding:
    rows = np.sort(np.concatenate([corpus.manifest.rows(split) for split in SPLITS])).tolist()
    keys = RowKeys(corpus, settings.data, writer.entries)
    entries = {row: keys.of(row) for row in rows}
    # What could not be read is tried again: a disk may be back.
    kept = {entry.key for entry in writer.entries.values() if not entry.error}
    wanted = {row: entry for row, entry in entries.items() if entry.key not in kept}
    say(f"{corpus.name}: {len(rows)} rows, {len(rows) - len(wanted)} of them known; the features go to {folder}")
    try:
        with Progress(len(wanted), shown=progress) as tick:
            encode_rows(
                predictor.classifier,
                corpus,
                wanted,
                writer,
                data=settings.data,
                means=settings.form == "means",
                tick=tick,
            )
    except KeyboardInterrupt:
        done = sum(entry.key in writer.entries for entry in entries.values())
        raise Interrupted(
            f"interrupted; {done} of {len(rows)} rows are done", where=folder, hint="The same command goes on."
        ) from None
    failed = [row for row, entry in entries.items() if writer.entries[entry.key].error]
    for row in failed[:5]:
        say(f"cannot be read: {writer.entries[entries[row].key].error}")
    done = sum(not writer.entries[entry.key].error for entry in wanted.values())
    return Encoding(folder, len(rows), done, len(failed), (folder / ARRAY).stat().st_size)

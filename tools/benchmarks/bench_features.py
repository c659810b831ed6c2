"""Seconds an epoch of training on `videogru encode`'s features, beside the same training that runs the encoder.

    python -m tools.benchmarks.bench_features MODEL DATASET [--data-dir DIR] [--work runs/features] [--rounds 5] \
        [--out DIR]

Encodes first (what is there already is kept), then trains the same recurrent part and head from the features, and from
the files with the encoder frozen: no gradients in it, its norms in eval mode, nothing augmented. Both read whole epochs
in the same order, alternating round by round. Then the largest difference between their logits on the validation rows.
Writes features-DATASET.json and .md.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tools.measuring import (
    Parser,
    Row,
    alternate,
    exit_code,
    machine,
    machine_sentence,
    median_range,
    write_json,
    write_text,
)
from videogru.config import Config
from videogru.data.loading.batching import EpochBatches, Loaded, OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.loading.feature_dataset import FeatureDataset
from videogru.data.loading.feature_store import FeatureRows
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.errors import DataError
from videogru.models.classifier import Classifier
from videogru.training.features import Encoded, classifier_over, features_of, open_features, settings_over_features
from videogru.training.fit import precision
from videogru.workflows.extract_features import encode_data
from videogru.workflows.run_folder import folder_stem

FEATURES, FILES = "from features", "from files, encoder frozen"


@dataclass(frozen=True, eq=False)
class Bench:
    """What both contenders share: settings, data, rows of an epoch, features."""

    config: Config
    encoded: Encoded
    corpus: Corpus
    rows: NDArray[np.int64]
    features: FeatureRows

    def dataset(self, name: str) -> ClipDataset:
        """What a contender reads."""
        if name == FEATURES:
            return FeatureDataset(self.corpus, self.features, data=self.config.data)
        return ClipDataset(self.corpus, data=self.config.data)

    def workers(self, name: str) -> int:
        """Readers, as training has them."""
        return 0 if name == FEATURES else default_workers(self.corpus, self.config.train.num_workers)


def logits_of(classifier: Classifier, loaded: Loaded, name: str) -> torch.Tensor:
    """Logits (B K) of a batch; the encoder, where it runs, without gradients."""
    batch = loaded.batch
    assert batch is not None
    maps = batch.frames
    if name == FILES:
        with torch.no_grad():
            maps = classifier.maps(maps, batch.lengths)
    return classifier.from_maps(maps, batch.lengths, batch.gaps)


def turn_of(bench: Bench, name: str, device: torch.device) -> Callable[[Row], None]:
    """One epoch; readers start within it, as in a training's first."""
    classifier = classifier_over(bench.encoded, bench.config, len(bench.corpus.classes)).to(device).train()
    classifier.encoder.eval()
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=bench.config.train.lr)
    bf16 = precision(bench.config.train.precision) == "bf16-mixed"
    done = [0]

    def turn(row: Row) -> None:
        train = bench.config.train
        batches = EpochBatches(bench.rows, batch_size=train.batch_size, seed=train.seed, epoch=lambda: done[0])
        loader = ClipLoader(bench.dataset(name), batches, num_workers=bench.workers(name))
        started, clips = time.perf_counter(), 0
        for loaded in loader:
            if loaded.batch is None:
                continue
            here = loaded.to(device)
            assert here.batch is not None and here.batch.labels is not None
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(logits_of(classifier, here, name), here.batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clips += len(here.batch)
        float(loss.detach())  # waits for a GPU
        row.rates.append(clips / (time.perf_counter() - started))
        done[0] += 1

    return turn


@torch.inference_mode()
def largest_difference(bench: Bench, rows: NDArray[np.int64]) -> float:
    """Of logits in float32, between both ways to read `rows`."""
    classifier = classifier_over(bench.encoded, bench.config, len(bench.corpus.classes)).eval()
    readers = [
        ClipLoader(bench.dataset(name), OrderedBatches(rows, batch_size=32), num_workers=0)
        for name in (FEATURES, FILES)
    ]
    largest = 0.0
    for one, other in zip(*readers, strict=True):
        if one.batch is not None and other.batch is not None:
            both = [logits_of(classifier, one, FEATURES), logits_of(classifier, other, FILES)]
            largest = max(largest, float((both[0] - both[1]).abs().max()))
    return largest


def measure(options: Any, words: Sequence[str]) -> dict[str, Any]:
    """Encode, train in turns, compare. Raises DataError where there is nothing to train on."""
    facts = machine(["python", "-m", "tools.benchmarks.bench_features", *words])
    started = time.perf_counter()
    folder = options.work / f"bench-{folder_stem(options.dataset)}"
    done = encode_data(
        options.dataset,
        options.model,
        options.data_dir,
        folder,
        progress=sys.stderr.isatty(),
        say=lambda text: print(text, file=sys.stderr),
    )
    seconds = time.perf_counter() - started
    layers = [("benchmark", {"train.features": str(folder), "train.batch_size": options.batch})]
    config = settings_over_features(folder, layers)
    encoded = open_features(folder)
    corpus = open_corpus(config.data, seed=config.data.split_seed)
    rows, val = corpus.manifest.rows("train")[: options.rows], corpus.manifest.rows("val")[: options.rows]
    if not len(rows):
        raise DataError("no training rows", where=corpus.name)
    # A set without validation rows is compared on its training rows.
    compared = val if len(val) else rows[:1000]
    features = features_of(encoded, corpus, np.concatenate([rows, compared]))
    bench = Bench(config, encoded, corpus, rows, features)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    turns = [(Row(name), turn_of(bench, name, device)) for name in (FEATURES, FILES)]
    for row, turn in turns:  # once uncounted: files come into memory
        turn(row)
        row.rates.clear()
    group = alternate(f"{corpus.name}, an epoch", turns, options.rounds)
    epochs = {row.name: [len(rows) / rate for rate in row.rates] for row in group.rows}
    ratios = [files / ours for ours, files in zip(epochs[FEATURES], epochs[FILES], strict=True)]
    return {
        "dataset": corpus.name,
        "rows": len(rows),
        "batch_size": options.batch,
        "model": {key: str(value) for key, value in config.model.model_dump().items()},
        "form": encoded.settings.form,
        "megabytes": done.bytes / 1e6,
        "encoding_seconds": seconds if done.done == done.rows else None,
        "epoch_seconds": epochs,
        "ratios": ratios,
        "largest_difference": largest_difference(bench, compared),
        "compared_rows": len(compared),
        "machine": facts,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table and what it rests on."""
    model, epochs = found["model"], found["epoch_seconds"]
    encoding = found["encoding_seconds"]
    once = "was done before" if encoding is None else f"took {encoding:.1f} s, once"
    lines = [
        f"# Features of {found['dataset']}: an epoch in seconds",
        "",
        machine_sentence(found["machine"]),
        "",
        f"Encoder {model['encoder']} (width {model['encoder_width']}), seq {model['seq']}, cell {model['cell']} of "
        f"{model['hidden_size']}; {found['rows']} clips an epoch, batches of {found['batch_size']}. The features "
        f"({found['form']}) fill {found['megabytes']:.1f} MB; encoding train, validation and test rows {once}. Medians "
        f"(least–greatest) of {len(found['ratios'])} epochs each, alternating, after an uncounted one.",
        "",
        "| | seconds an epoch | times as fast |",
        "|---|---|---|",
        f"| {FILES} | {median_range(epochs[FILES], '{:.2f}')} | 1 |",
        f"| {FEATURES} | {median_range(epochs[FEATURES], '{:.2f}')} | {median_range(found['ratios'], '{:.1f}')} |",
        "",
        f"Largest difference of a logit between both, over {found['compared_rows']} rows in float32: "
        f"{found['largest_difference']:.1e} (at most 1e-4 is wanted).",
    ]
    if encoding is not None:
        saved = statistics.median(epochs[FILES]) - statistics.median(epochs[FEATURES])
        lines += ["", f"Encoding pays from epoch {max(1, int(np.ceil(encoding / saved)))} on." if saved > 0 else ""]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_features.py", description=__doc__)
    parser.add_argument("model", type=Path, help="model file or run whose encoder reads")
    parser.add_argument("dataset", help="as videogru encode takes it")
    parser.add_argument("--data-dir", type=Path, help="where a named data set lies")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/features"), help="of the features; default: %(default)s"
    )
    parser.add_argument("--rows", type=int, help="of the splits, at most; default: all")
    parser.add_argument("--batch", type=int, default=32, help="clips of a step; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/deploy"), help="folder; default: %(default)s")
    options = parser.parse_args(words)
    if min(options.batch, options.rounds) < 1 or (options.rows is not None and options.rows < 1):
        parser.error("--batch, --rounds and --rows take whole numbers from 1 on")

    def work_on() -> None:
        found = measure(options, words)
        text = markdown(found)
        stem = options.out / f"features-{folder_stem(options.dataset)}"
        write_json(stem.with_suffix(".json"), found)
        write_text(stem.with_suffix(".md"), text)
        print(text)

    return exit_code("bench_features.py", work_on, kept="the features that are done are kept")


if __name__ == "__main__":
    sys.exit(main())

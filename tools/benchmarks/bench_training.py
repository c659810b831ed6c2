"""Images per second of training on CIFAR-100: our loading against torchvision's, and the options of a training step.

    python -m tools.benchmarks.bench_training --data-dir ~/.cache/videogru/cifar100 --out results
    python -m tools.benchmarks.bench_training --what options --steps 30 --rounds 3 --out results

loading: whole training loops (order, fetch, flip and shift, forward, backward, optimizer step) of two small models and
of configs/cifar100.yaml, and the loading alone. options: the training step alone on a batch of noise. All contenders
alternate in each round, so that the machine's load meets all of them; each turn begins with steps that are not counted:
workers start, and what they had read ahead is used up. Writes training-speed.json and .md.
"""

import argparse
import gc
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from tools.experiments.training_loops import (
    Clock,
    Counts,
    LoadingAlone,
    Step,
    TorchvisionModule,
    make_task,
    plain_train,
    train,
)
from tools.measuring import (
    Group,
    Parser,
    Row,
    alternate,
    exit_code,
    last_error,
    machine,
    machine_lines,
    write_json,
    write_text,
)
from videogru.config import Config
from videogru.data.loading.datamodule import CorpusModule
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.models.classifier import Classifier
from videogru.resources import resource_dir
from videogru.settings import read_settings_file, resolve_config
from videogru.training.compiling import check_compiles
from videogru.training.fit import build_classifier
from videogru.training.memory import keep_freed_memory

# Changes to the recipe. Muon wants convolutions behind the first, which the smallest net does not have.
_SMALL: dict[str, object] = {"model.seq": "rows", "model.hidden_size": 32, "train.optimizer": "adamw"}
TINY: dict[str, object] = {**_SMALL, "model.encoder": "pixels", "model.encoder_width": 1, "model.cell": "mingru"}
NARROW: dict[str, object] = {**_SMALL, "model.encoder": "small", "model.encoder_width": 8}
RESIDUAL: dict[str, object] = {"model.encoder": "small", "model.encoder_width": 64}
PADDING = 4  # pixels on each side: the recipe's translate of 0.125 at 32 pixels
# Names of glibc's tunables, MALLOC_..._: what is freed then stays with the process.
KEEP_MEMORY = {"MMAP_THRESHOLD": 4294967296, "TRIM_THRESHOLD": 17179869184, "TOP_PAD": 268435456}


def torchvision_pictures(root: Path, classifier: Classifier) -> Any:
    """CIFAR-100's training images with the customary transforms."""
    from torchvision import datasets, transforms  # slow to import, and only loading needs it

    steps = [transforms.RandomCrop(classifier.frame_size, padding=PADDING), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(classifier.mean, classifier.std)]
    return datasets.CIFAR100(root, train=True, transform=transforms.Compose(steps))


def compare_loading(
    title: str, config: Config, corpus: Corpus, pictures: Any, workers: list[int], counts: Counts, alone: bool = False
) -> Group:
    """Our array-backed loading, then torchvision's; `alone`: without a model.

    All train the same classifier in Lightning's loop, torchvision's data in a plain loop too. torchvision normalizes
    in its transforms, so its classifiers do not.
    """

    def contender(name: str, module: pl.LightningDataModule, *, loop: Any = train) -> tuple[Row, Callable[[Row], None]]:
        classifier = build_classifier(config, len(corpus.classes))
        if isinstance(module, TorchvisionModule):
            classifier.normalize = torch.nn.Identity()  # type: ignore[assignment]
        task = LoadingAlone() if alone else make_task(classifier, config)

        def turn(row: Row) -> None:
            clock = Clock(counts)
            loop(task, module, config, clock)
            row.rates.append(clock.rate)
            if torch.cuda.is_available() and not alone:
                clock = Clock(counts, sync=True)
                loop(task, module, config, clock)
            if not alone:
                row.shares.append(clock.data_share)
            gc.collect()  # ends the workers now, not in the next contender's turn

        return Row(name), turn

    turns = [contender("videogru", CorpusModule(corpus, config))]
    for count in workers:
        module = TorchvisionModule(pictures, config.train.batch_size, count)
        turns.append(contender(f"torchvision, num_workers={count}", module))
        if not alone:
            turns.append(contender(f"torchvision, num_workers={count}, plain loop", module, loop=plain_train))
    return alternate(title, turns, counts.rounds)


class Contiguous(Classifier):
    """The classifier as it would be without channels_last."""

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.encoder(self.normalize(frames).contiguous())
        return maps


def option_steps(config: Config, classes: int) -> dict[str, Step]:
    """The variants of the training step, all with the same weights; compilation waits for the first step."""
    plain, *others = (build_classifier(config, classes) for _ in range(4))
    plain.__class__ = Contiguous
    plain.encoder.to(memory_format=torch.contiguous_format)
    check_compiles(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    others[2].encoder.compile()
    return {
        "fp32, contiguous": Step(plain, config, bf16=False),
        "fp32, channels_last": Step(others[0], config, bf16=False),
        "bf16 autocast, channels_last": Step(others[1], config, bf16=True),
        "bf16 autocast, channels_last, compiled encoder": Step(others[2], config, bf16=True),
    }


def compare_options(title: str, variants: dict[str, Step], counts: Counts) -> Group:
    """The variants on a batch of noise; notes say how long the first two steps took, with what was compiled."""
    turns: list[tuple[Row, Callable[[Row], None]]] = []
    for name, step in variants.items():
        started = time.perf_counter()
        for _ in range(2):
            float(step(*step.noise()))
        row = Row(name, f"first two steps {time.perf_counter() - started:.1f} s")
        turns.append((row, lambda row: row.rates.append(variants[row.name].rate(counts))))
        print(f"{title}: {name}: {row.note}", file=sys.stderr, flush=True)
    return alternate(title, turns, counts.rounds)


def compare_malloc(title: str, counts: Counts) -> Group:
    """The bf16 step in processes of their own: glibc's malloc as it is, as `fit` sets it, and set by environment."""
    command = [
        sys.executable,
        "-m",
        "tools.benchmarks.bench_training",
        f"--warmup={counts.warmup}",
        f"--steps={counts.steps}",
        "--malloc-child",
    ]
    keep = {f"MALLOC_{name}_": str(count) for name, count in KEEP_MEMORY.items()}
    usual = {name: value for name, value in os.environ.items() if name not in keep}

    def turn(row: Row) -> None:
        mode, environment = ("fit" if row.name == "as fit sets it" else "usual"), usual | (keep if row.note else {})
        done = subprocess.run([*command, mode], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{title}: {last_error(done.stderr)}")
        row.rates.append(float(done.stdout.splitlines()[-1]))

    by_environment = Row("by environment", " ".join(f"{name}={value}" for name, value in keep.items()))
    rows = (Row("malloc as it is"), Row("as fit sets it"), by_environment)
    return alternate(title, [(row, turn) for row in rows], counts.rounds)


def recipe(data_dir: Path | None, **changes: object) -> Config:
    """configs/cifar100.yaml in batches of 128 and without CutMix, no transform of one image; then `changes`."""
    path = resource_dir("configs") / "cifar100.yaml"
    given = {"data.dataset": "cifar100", "data.data_dir": data_dir, "data.augment.cutmix": 0.0, "train.batch_size": 128}
    config = resolve_config((str(path), read_settings_file(path)), ("benchmark", given | changes))
    return config.model_copy(update={"data": config.data.for_kind("image")})


def size(config: Config) -> str:
    """The model in words."""
    model = config.model
    return f"encoder {model.encoder} of width {model.encoder_width}, {model.seq}, {model.cell} of {model.hidden_size}"


def report(groups: Sequence[Group], facts: Mapping[str, object], counts: Counts) -> str:
    """All tables in Markdown."""
    text = (
        f"CIFAR-100, batches of 128. Median (least to greatest) over {counts.rounds} rounds of "
        f"{counts.steps} steps, after {counts.warmup} uncounted ones each; contenders alternate within a round, and "
        "ratios are taken within it. Training: our data and torchvision's go through the same Lightning loop (no "
        f"logs, no checkpoints) to the same model; torchvision's transforms are RandomCrop with {PADDING} pixels, "
        "RandomHorizontalFlip, ToTensor, Normalize. Waiting for data: share of the time from the end of a step to the "
        "next batch, moved and augmented; on a GPU measured in turns that wait for it. "
        "On a CPU all keep freed memory, as `fit` does, but for the last table."
    )
    tables = [line for group in groups for line in group.markdown()]
    return "\n".join(["# Speed of training", "", *machine_lines(facts), "", text, "", *tables]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_training.py", description=__doc__)
    parser.add_argument("--what", default="loading,options", help="loading, options or both; default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="folder with cifar-100-python, for loading")
    parser.add_argument("--steps", type=int, default=60, help="counted steps of a turn; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=10, help="uncounted steps before; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender; default: %(default)s")
    parser.add_argument("--workers", default="0,1,2", help="of torchvision's loaders; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/article"), help="folder; default: %(default)s")
    parser.add_argument("--malloc-child", choices=("usual", "fit"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    counts = Counts(options.warmup, options.steps, options.rounds)
    what, workers = options.what.split(","), options.workers.split(",")
    if min(counts) < 1 or not set(what) <= {"loading", "options"} or not all(text.isdecimal() for text in workers):
        parser.error("--what takes loading, options; --steps, --warmup, --rounds, --workers whole numbers")
    if not torch.cuda.is_available() and options.malloc_child != "usual":
        keep_freed_memory()
    if options.malloc_child:
        print(Step(build_classifier(recipe(None), 100), recipe(None), bf16=True).rate(counts))
        return 0
    if "loading" in what and options.data_dir is None:
        parser.error("loading needs --data-dir, the folder with cifar-100-python; or choose --what options")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    facts = machine(["python", "-m", "tools.benchmarks.bench_training", *words])

    def work_on() -> None:
        groups = compare_all(what, options.data_dir, [int(count) for count in workers], counts)
        figures = {"facts": facts, "settings": counts._asdict(), "groups": [group.figures() for group in groups]}
        text = report(groups, facts, counts)
        write_json(options.out / "training-speed.json", figures)
        write_text(options.out / "training-speed.md", text)
        print(text)

    return exit_code("bench_training.py", work_on, kept="nothing is written")


def compare_all(what: Sequence[str], data_dir: Path | None, workers: list[int], counts: Counts) -> list[Group]:
    """The groups of --what, in the order of the report."""
    tiny, narrow, usual, residual = (recipe(data_dir, **changes) for changes in (TINY, NARROW, {}, RESIDUAL))
    groups: list[Group] = []
    if "loading" in what:
        corpus = open_corpus(usual.data)
        pictures = torchvision_pictures(corpus.manifest.root, build_classifier(usual, len(corpus.classes)))
        rest = corpus, pictures, workers, counts
        groups += [compare_loading(f"Training, {size(config)}", config, *rest) for config in (tiny, narrow, usual)]
        groups.append(compare_loading("Loading alone", usual, *rest, alone=True))
    if "options" in what:
        # Without what was compiled before, as its note is to say how long that takes.
        with tempfile.TemporaryDirectory() as os.environ["TORCHINDUCTOR_CACHE_DIR"]:
            for c in (usual, residual):
                groups.append(compare_options(f"Training step, {size(c)}", option_steps(c, 100), counts))
        if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
            groups.append(compare_malloc(f"bf16 training step in its own process, {size(usual)}", counts))
    return groups


if __name__ == "__main__":
    sys.exit(main())

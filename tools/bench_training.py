"""Images per second of training on CIFAR-100: our loading against torchvision's, and the options of a training step.

    python tools/bench_training.py --data-dir ~/.cache/videogru/cifar100 --out results
    python tools/bench_training.py --what options --steps 30 --rounds 3 --out results

loading: whole training loops (order, fetch, flip and shift, forward, backward, optimizer step) of configs/cifar100.yaml
with `--seq rows`, and the loading alone. options: the training step alone on a batch of noise. All contenders alternate
in each round, so that the machine's load meets all of them; each turn begins with steps that are not counted: workers
start, and what they had read ahead is used up. Writes training-speed.json and .md.
"""

import argparse
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from bench_length import Group, Row, alternate, facts, facts_lines, last_error
from torch.nn import functional as F
from torch.utils.data import DataLoader

from videogru.config import Config, read_settings_file, resolve_config
from videogru.data.batching import Loaded
from videogru.data.datamodule import CorpusModule
from videogru.data.layouts import Corpus, open_corpus
from videogru.errors import VideogruError
from videogru.models.classifier import Classifier
from videogru.resources import resource_dir
from videogru.sequence import SequenceBatch
from videogru.training.compiling import compile_encoder
from videogru.training.fit import build_classifier, precision
from videogru.training.memory import keep_freed_memory
from videogru.training.task import SequenceTask

NARROW = {"model.encoder_width": 8, "model.hidden_size": 32}
WIDE = {"model.encoder_width": 64}
OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
PADDING = 4  # pixels on each side: the recipe's translate of 0.125 at 32 pixels
# Names of glibc's tunables, MALLOC_..._: what is freed then stays with the process.
KEEP_MEMORY = {"MMAP_THRESHOLD": 4294967296, "TRIM_THRESHOLD": 17179869184, "TOP_PAD": 268435456}


class Counts(NamedTuple):
    """Uncounted and counted steps of a turn, and turns of each contender."""

    warmup: int
    steps: int
    rounds: int


class Clock(pl.Callback):
    """Counts the images and the time of `steps` steps after `warmup`, and how much of it was waiting for data.

    sync: wait for the GPU at both ends of each step, which tells the waiting for data apart from the GPU's work; that
    slows training, so that rates come from a clock without.
    """

    def __init__(self, counts: Counts, *, sync: bool = False) -> None:
        self.counts, self.sync = counts, sync
        self.seen = self.images = 0
        self.waiting = self.started = self.last = 0.0

    @property
    def done(self) -> bool:
        """Whether all steps were counted."""
        return self.seen == self.counts.warmup + self.counts.steps

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / (self.last - self.started)

    @property
    def data_share(self) -> float:
        """Share of the time from the end of a step to the next batch, on its device and augmented."""
        return self.waiting / (self.last - self.started)

    def end(self, images: int) -> None:
        """The step is over."""
        self.seen += 1
        self.last = self._now(self.sync or self.seen == self.counts.warmup or self.done)
        if self.seen <= self.counts.warmup:
            self.started, images = self.last, 0
        self.images += images

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch is on the device, augmented."""
        if self.seen >= self.counts.warmup:
            self.waiting += self._now(self.sync) - self.last

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Loaded, batch_idx: int) -> None:
        """Lightning stepped the optimizer and the schedule."""
        self.end(0 if batch.batch is None else len(batch.batch))
        trainer.should_stop = self.done

    def _now(self, sync: bool) -> float:
        if sync and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class LoadingAlone(pl.LightningModule):
    """Takes batches and does nothing with them."""

    automatic_optimization = False

    def training_step(self, loaded: Loaded, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> None:
        """No optimizer."""


class TorchvisionModule(pl.LightningDataModule):
    """(image, label) pairs of a torchvision data set with its transforms, through torch's DataLoader."""

    def __init__(self, pictures: Any, batch_size: int, workers: int) -> None:
        super().__init__()
        self.pictures, self.batch_size, self.workers = pictures, batch_size, workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs of images (B C H W) and labels (B,)."""
        how: dict[str, Any] = {"pin_memory": torch.cuda.is_available(), "persistent_workers": self.workers > 0}
        return DataLoader(self.pictures, self.batch_size, shuffle=True, num_workers=self.workers, **how)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Loaded:
        """Stills as clips of one frame, as the classifier takes them."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        ones = torch.ones_like(labels)
        return Loaded(0, SequenceBatch(images.unsqueeze(1), ones, ones, labels), ())


def torchvision_pictures(root: Path, classifier: Classifier) -> Any:
    """CIFAR-100's training images with the customary transforms."""
    from torchvision import datasets, transforms  # slow to import, and only loading needs it

    steps = [transforms.RandomCrop(classifier.frame_size, padding=PADDING), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(classifier.mean, classifier.std)]
    return datasets.CIFAR100(root, train=True, transform=transforms.Compose(steps))


def train(task: pl.LightningModule, module: pl.LightningDataModule, config: Config, clock: Clock) -> None:
    """Lightning's loop, as `fit` runs it but without logs, scores, checkpoints and progress bar, until clock.done."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        trainer = pl.Trainer(
            max_epochs=-1,
            devices=1,
            precision=precision(config.train.precision),
            gradient_clip_val=(config.train.clip_norm or None) if task.automatic_optimization else None,
            callbacks=[clock],
            limit_val_batches=0,
            **dict.fromkeys(OFF, False),
        )
        trainer.fit(task, module)


def plain_train(task: SequenceTask, module: TorchvisionModule, config: Config, clock: Clock) -> None:
    """The loop of a script without Lightning, until clock.done."""
    step = Step(task.classifier, config, bf16=precision(config.train.precision) == "bf16-mixed")
    loader = module.train_dataloader()
    while not clock.done:
        for batch in loader:
            images, labels = (tensor.to(step.device, non_blocking=True) for tensor in batch)
            clock.on_train_batch_start()
            step(images.unsqueeze(1), labels)
            clock.end(len(labels))
            if clock.done:
                break


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


def make_task(classifier: Classifier, config: Config) -> SequenceTask:
    """The task as `fit` makes it, with a schedule that is long enough for any benchmark."""
    counts = [1] * classifier.num_classes
    return SequenceTask(classifier, config.train, class_counts=counts, total_steps=100_000, failed=lambda *_: None)


class Step:
    """One training step on its device: forward, backward, clipping, optimizer, schedule."""

    def __init__(self, classifier: Classifier, config: Config, *, bf16: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier, self.config, self.bf16 = classifier.to(self.device).train(), config, bf16
        made = make_task(classifier, config).configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def __call__(self, frames: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss before the step; frames (B 1 C H W), labels (B,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.classifier(frames, torch.ones_like(labels))
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.train.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), self.config.train.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch as augmentation leaves it: float32 frames (B 1 C H W) in 0..1, and labels (B,)."""
        generator = torch.Generator().manual_seed(0)
        side, batch = self.classifier.frame_size, self.config.train.batch_size
        frames = torch.rand(batch, 1, self.classifier.in_channels, side, side, generator=generator)
        labels = torch.randint(0, self.classifier.num_classes, (batch,), generator=generator)
        return frames.to(self.device), labels.to(self.device)

    def rate(self, counts: Counts) -> float:
        """Images per second, on the same batch again and again."""
        clock, batch = Clock(counts), self.noise()
        while not clock.done:
            self(*batch)
            clock.end(len(batch[1]))
        return clock.rate


def option_steps(config: Config, classes: int) -> dict[str, Step]:
    """The variants of the training step, all with the same weights; compilation waits for the first step."""
    plain, *others = (build_classifier(config, classes) for _ in range(4))
    plain.__class__ = Contiguous
    plain.encoder.to(memory_format=torch.contiguous_format)
    compile_encoder(others[2], "cuda" if torch.cuda.is_available() else "cpu")
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
    command = [sys.executable, __file__, f"--warmup={counts.warmup}", f"--steps={counts.steps}", "--malloc-child"]
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


def recipe(data_dir: Path | None, **model: object) -> Config:
    """configs/cifar100.yaml with `--seq rows`, and changes to it."""
    path = resource_dir("configs") / "cifar100.yaml"
    given = {"data.dataset": "cifar100", "data.data_dir": data_dir, "model.seq": "rows", **model}
    config = resolve_config((str(path), read_settings_file(path)), ("benchmark", given))
    return config.model_copy(update={"data": config.data.for_kind("image")})


def size(config: Config) -> str:
    """The model in words."""
    return f"encoder {config.model.encoder} of width {config.model.encoder_width}, {config.model.hidden_size} units"


def report(groups: Sequence[Group], known: dict[str, str], counts: Counts) -> str:
    """All tables in Markdown."""
    text = (
        f"CIFAR-100, batches of 128, `--seq rows`. Median (least to greatest) over {counts.rounds} rounds of "
        f"{counts.steps} steps, after {counts.warmup} uncounted ones each; contenders alternate within a round, and "
        "ratios are taken within it. Training: our data and torchvision's go through the same Lightning loop (no "
        f"logs, no checkpoints) to the same model; torchvision's transforms are RandomCrop with {PADDING} pixels, "
        "RandomHorizontalFlip, ToTensor, Normalize. Waiting for data: share of the time from the end of a step to the "
        "next batch, moved and augmented; on a GPU measured in turns that wait for it. "
        "On a CPU all keep freed memory, as `fit` does, but for the last table."
    )
    tables = [line for group in groups for line in group.markdown()]
    return "\n".join(["# Speed of training", "", *facts_lines(known), "", text, "", *tables]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="loading,options", help="loading, options or both; default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="folder with cifar-100-python, for loading")
    parser.add_argument("--steps", type=int, default=60, help="counted steps of a turn; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=10, help="uncounted steps before; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender; default: %(default)s")
    parser.add_argument("--workers", default="0,1,2", help="of torchvision's loaders; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/article"), help="folder; default: %(default)s")
    parser.add_argument("--malloc-child", choices=("usual", "fit"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    counts = Counts(options.warmup, options.steps, options.rounds)
    what, workers = options.what.split(","), options.workers.split(",")
    if min(counts) < 1 or not set(what) <= {"loading", "options"} or not all(text.isdecimal() for text in workers):
        parser.error("--what takes loading, options; --steps, --warmup, --rounds, --workers whole numbers")
    if not torch.cuda.is_available() and options.malloc_child != "usual":
        keep_freed_memory()
    if options.malloc_child:
        print(Step(build_classifier(recipe(None), 100), recipe(None), bf16=True).rate(counts))
        return
    if "loading" in what and options.data_dir is None:
        parser.error("loading needs --data-dir, the folder with cifar-100-python; or choose --what options")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    narrow, usual, wide = (recipe(options.data_dir, **changes) for changes in (NARROW, {}, WIDE))
    groups: list[Group] = []
    if "loading" in what:
        corpus = open_corpus(usual.data)
        pictures = torchvision_pictures(corpus.manifest.root, build_classifier(usual, len(corpus.classes)))
        rest = corpus, pictures, [int(count) for count in workers], counts
        groups += [compare_loading(f"Training, {size(config)}", config, *rest) for config in (narrow, usual)]
        groups.append(compare_loading("Loading alone", usual, *rest, alone=True))
    if "options" in what:
        # Without what was compiled before, as its note is to say how long that takes.
        with tempfile.TemporaryDirectory() as os.environ["TORCHINDUCTOR_CACHE_DIR"]:
            for c in (usual, wide):
                groups.append(compare_options(f"Training step, {size(c)}", option_steps(c, 100), counts))
        if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
            groups.append(compare_malloc(f"bf16 training step in its own process, {size(usual)}", counts))
    known = facts([sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])
    text = report(groups, known, counts)
    figures = {"facts": known, "settings": counts._asdict(), "groups": [group.figures() for group in groups]}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training-speed.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (options.out / "training-speed.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except VideogruError as error:
        raise SystemExit(f"bench_training.py: {error}") from None

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from tests.support.thinning import thinned
from videogru.config import Config
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.errors import ConfigError, DataError, Interrupted
from videogru.settings import resolve_config
from videogru.training.callbacks import Scores
from videogru.training.fit import fit, precision

SETTINGS = {
    "data.dataset": "synthetic",
    "data.frame_size": 8,
    "data.channels": 1,
    "data.augment.flip": 0.5,
    "data.augment.noise": 0.1,
    "model.encoder": "pixels",
    "model.encoder_width": 4,
    "model.seq": "rows",
    "model.hidden_size": 8,
    "train.epochs": 3,
    "train.batch_size": 8,
    "train.lr": 0.01,
    "train.num_workers": 0,
    "train.precision": "fp32",
}


def bars(rows: int = 60) -> Corpus:
    """Stills with a bright bar in the upper (class 0) or lower half (class 1)."""
    generator = np.random.default_rng(0)
    labels = np.arange(rows) % 2
    arrays = generator.integers(0, 60, (rows, 1, 1, 8, 8), dtype=np.uint8)
    for row, label in enumerate(labels):
        top = int(generator.integers(0, 3)) + 4 * int(label)
        arrays[row, 0, 0, top, :] = 255
    splits = np.where(np.arange(rows) < rows * 2 // 3, 0, 1)
    manifest = build_manifest(Path(), ("up", "down"), [f"bars/{row}" for row in range(rows)], labels, splits)
    return Corpus("bars", "image", ("up", "down"), manifest, arrays, None, 0, ())


def settings(**changes: object) -> Config:
    config = resolve_config(("test", {**SETTINGS, **{key.replace("__", "."): v for key, v in changes.items()}}))
    return config.model_copy(update={"data": config.data.for_kind("image")})


def train(
    run: Path,
    config: Config,
    corpus: Corpus | None = None,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, torch.Tensor]:
    run.mkdir(exist_ok=True)
    trained = fit(config, corpus or bars(), run, resume=resume, progress=False, say=say)
    return load_file(trained.model)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_learns_and_logs(tmp_path: Path) -> None:
    lines: list[str] = []
    train(tmp_path, settings(train__epochs=12, data__augment__flip=0), say=lines.append)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(12))
    assert max(float(row["val_accuracy"]) for row in rows) > 0.9
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert sum(line.startswith("epoch") for line in lines) == 12
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_same_seed_same_weights(tmp_path: Path) -> None:
    config = settings()
    first, second = train(tmp_path / "a", config), train(tmp_path / "b", config)
    other = train(tmp_path / "c", settings(train__seed=1))
    assert same(first, second)
    assert not same(first, other)


TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="torch warns of more workers than cores")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=TWO_CORES)])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    config = settings(train__epochs=2)
    alone = train(tmp_path / "a", config)
    assert same(alone, train(tmp_path / "b", settings(train__epochs=2, train__num_workers=workers)))


class StopAt:
    """Says stop (Ctrl-C) as the terminal would, in the given call of the augmentation, that is at that step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
        from videogru.data.loading import datamodule

        self.calls, real = 0, datamodule.augment_batch

        def counted(*args: object, **kwargs: object) -> torch.Tensor:
            self.calls += 1
            if self.calls == step:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        monkeypatch.setattr(datamodule, "augment_batch", counted)


# 40 training rows in batches of 8: five steps an epoch.
@pytest.mark.parametrize(
    ("step", "changes"),
    thinned(
        [1, 3, 5, 7, 10],
        [
            {},
            {"train__ema_decay": 0.9},
            {"train__keep": "last"},
            {"train__optimizer": "muon", "model__encoder": "conv2", "data__augment__cutmix": 0.5},
        ],
        every=3,
    ),
)
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, changes: dict
) -> None:
    config = settings(**changes)
    whole = train(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        StopAt(patch, step)
        with pytest.raises(Interrupted, match="resume"):
            train(tmp_path / "cut", config)
    resumed = train(tmp_path / "cut", config, resume=True)
    assert same(whole, resumed)
    with (tmp_path / "whole" / "metrics.csv").open() as one, (tmp_path / "cut" / "metrics.csv").open() as other:
        ours, theirs = list(csv.DictReader(one)), list(csv.DictReader(other))
    for name in ("val_loss", "train_loss", "train_accuracy", "lr"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name


@pytest.mark.parametrize("changes", [{}, {"train__ema_decay": 0.9}, {"train__keep": "last"}])
def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, changes: dict) -> None:
    config = settings(**changes)
    assert same(train(tmp_path, config), train(tmp_path, config, resume=True))


def test_sigterm_saves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    StopAt(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(tmp_path, settings())
    assert (tmp_path / "last.ckpt").is_file()
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_validation_rows_the_last_epoch_is_kept(tmp_path: Path) -> None:
    corpus = bars()
    manifest = corpus.manifest.take(corpus.manifest.rows("train"))
    only = Corpus("bars", "image", corpus.classes, manifest, corpus.arrays, None, 0, ())
    train(tmp_path, settings(train__epochs=1), only)
    assert "val_loss" not in (tmp_path / "metrics.csv").read_text()


def test_early_stopping(tmp_path: Path) -> None:
    train(tmp_path, settings(train__epochs=40, train__lr=1e-9, train__early_stopping=2))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) < 12


def test_no_training_rows(tmp_path: Path) -> None:
    corpus = bars()
    manifest = corpus.manifest.take(corpus.manifest.rows("val"))
    with pytest.raises(DataError, match="no training rows"):
        train(tmp_path, settings(), Corpus("bars", "image", corpus.classes, manifest, corpus.arrays, None, 0, ()))


def test_early_stopping_without_validation_rows(tmp_path: Path) -> None:
    corpus = bars()
    manifest = corpus.manifest.take(corpus.manifest.rows("train"))
    only = Corpus("bars", "image", corpus.classes, manifest, corpus.arrays, None, 0, ())
    with pytest.raises(ConfigError, match="early_stopping"):
        train(tmp_path, settings(train__early_stopping=2), only)


def test_early_stopping_works_where_the_last_epoch_is_kept(tmp_path: Path) -> None:
    train(tmp_path, settings(train__epochs=40, train__lr=1e-9, train__early_stopping=2, train__keep="last"))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) < 12


def test_a_diverged_training_is_an_error_and_leaves_no_model(tmp_path: Path) -> None:
    wild = settings(train__optimizer="sgd", train__lr=1e30, train__clip_norm=0, train__warmup=0)
    with pytest.raises(DataError, match="diverged"):
        train(tmp_path, wild)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_validation_saves_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from videogru.training.task import SequenceTask

    whole = train(tmp_path / "whole", settings())
    real = SequenceTask.validation_step

    def stopped(self: SequenceTask, *args: object) -> None:
        if self.trainer.current_epoch == 1 and args[-1] == 0:
            os.kill(os.getpid(), number)
        real(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SequenceTask, "validation_step", stopped)
        with pytest.raises(Interrupted):
            train(tmp_path / "cut", settings())
    assert same(whole, train(tmp_path / "cut", settings(), resume=True))


def test_named_precisions() -> None:
    assert precision("fp32") == "32-true"
    assert precision("bf16") == "bf16-mixed"
    assert precision("auto") in ("32-true", "bf16-mixed")


def test_gradient_checkpointing_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from videogru.models import recurrent

    real, sizes = recurrent.in_chunks, []

    def noted(layer: torch.nn.Module, steps: torch.Tensor, size: int) -> torch.Tensor:
        sizes.append(size)
        return real(layer, steps, size)

    monkeypatch.setattr(recurrent, "in_chunks", noted)
    same_for_both = {"model__encoder": "small", "model__num_layers": 2, "train__epochs": 2}
    plain = train(tmp_path / "plain", settings(**same_for_both))
    assert not sizes
    on = {"train__gradient_checkpointing": True, "train__checkpoint_steps": 3}
    saving = train(tmp_path / "saving", settings(**same_for_both, **on))
    assert sizes == [3] * (2 * 5 * 4)  # epochs, batches, layers and directions; none in validation
    assert plain.keys() == saving.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=0, atol=1e-4, msg=name)


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) for name in ("train_loss", "val_loss")]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_compiled_encoder_learns_the_same(tmp_path: Path, ema_decay: float) -> None:
    changes = {"model__encoder": "small", "train__epochs": 1, "train__ema_decay": ema_decay}
    plain = train(tmp_path / "plain", settings(**changes))
    # A process of its own: the checks of shapes in the tests cannot be compiled.
    code = f"""
from pathlib import Path
import torch
from tests.training.test_fit import same, settings, train
run, config = Path({str(tmp_path / "compiled")!r}), settings(**{changes!r}, train__compile=True)
first = train(run, config)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # the first is the probe
assert same(first, train(run, config, resume=True))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=600)
    compiled = load_file(tmp_path / "compiled" / "model.safetensors")
    assert plain.keys() == compiled.keys()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_without_a_compiler_compiling_is_a_plain_error(tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (None, "/nonexistent/g++")}), pytest.raises(ConfigError) as caught:
        train(tmp_path, settings(train__compile=True))
    assert "train.compile" in str(caught.value) and "/nonexistent/g++" in str(caught.value)
    assert "--set train.compile=false" in str(caught.value)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize("change", [{"data__augment__cutmix": 0.5}, {"train__optimizer": "muon"}])
def test_cutmix_and_muon_change_a_training_and_repeat(tmp_path: Path, change: dict[str, object]) -> None:
    usual = {"model__encoder": "conv2", "train__epochs": 1}
    plain = train(tmp_path / "plain", settings(**usual))
    once = train(tmp_path / "once", settings(**usual, **change))
    again = train(tmp_path / "again", settings(**usual, **change))
    assert same(once, again)
    assert not same(once, plain)


def test_an_interrupted_epoch_counts_all_its_seconds(tmp_path: Path) -> None:
    config = settings(train__epochs=1)

    class Clock:
        """One second a call."""

        now = 0.0

        def __call__(self) -> float:
            self.now += 1.0
            return self.now

    trainer, module = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), pl.LightningModule()
    clock = Clock()
    first = Scores(tmp_path, config.train, say=print, save=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videogru.training.callbacks.time.monotonic", clock)
        first.on_train_start(trainer, module)
        first.on_train_epoch_start(trainer, module)
        started = clock.now
        clock.now += 50
        state = first.state_dict()
        assert state["elapsed"] == clock.now - started
        second = Scores(tmp_path, config.train, say=print, save=lambda _: None)
        second.load_state_dict(state)
        second.on_train_start(trainer, module)
        clock.now += 30
        assert second.state_dict()["elapsed"] == 51 + 31

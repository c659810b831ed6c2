"""What happens around the optimization: scores per epoch, the best model, the saved state, a graceful stop."""

import csv
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint

from videogru.config import TrainConfig
from videogru.errors import DataError, Interrupted
from videogru.training.task import SequenceTask

STATE_FILE = "last.ckpt"
BAD_FILES = "bad_files.csv"
BY_CHECK = "check"


class Scores(Callback):
    """Writes metrics.csv, tells the terminal, and has the model saved whenever the validation score is the best so far.

    Must stand before weight averaging among the callbacks: it then sees the averaged weights that were validated.
    Score: AUROC for two classes, else accuracy; equal scores are decided by the lower loss.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        *,
        say: Callable[[str], None],
        save: Callable[[dict[str, float]], None],
    ) -> None:
        self.run, self.config, self.say, self.save = run, config, say, save
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.seconds = 0.0
        self._started = 0.0  # of the epoch in progress; 0 between epochs
        self._before = 0.0  # seconds of that epoch before the run was interrupted
        self._val: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the epochs before."""
        elapsed = self._before + (time.monotonic() - self._started if self._started else 0.0)
        return {"history": self.history, "best": self.best, "seconds": self.seconds, "elapsed": elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.history, self.best, self.seconds = state_dict["history"], state_dict["best"], state_dict["seconds"]
        self._before = state_dict.get("elapsed", 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an epoch that goes on in its middle, which Lightning does not start again."""
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the validated weights; keep them if they are the best."""
        assert isinstance(pl_module, SequenceTask)
        self._val = pl_module.validation_scores()
        if trainer.sanity_checking or not self._val or not math.isfinite(self._val["val_loss"]):
            return
        scores = {"epoch": float(trainer.current_epoch), **self._val}
        if not self.best or rank(scores) > rank(self.best):
            self.best = scores
            if trainer.is_global_zero and self.config.keep == "best":
                self.save(scores)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One row in the log, one line in the terminal; stop early if asked to."""
        assert isinstance(pl_module, SequenceTask)
        seconds = self._before + time.monotonic() - self._started
        self._started = self._before = 0.0
        self.seconds += seconds
        row = {
            "epoch": float(trainer.current_epoch),
            "step": float(trainer.global_step),
            **pl_module.training_scores(),
            **self._val,
            "lr": float(trainer.optimizers[0].param_groups[-1]["lr"]),  # Muon's groups stand first
            "seconds": seconds,
        }
        if "train_loss" not in row:
            raise DataError(
                "not one training clip could be read",
                where=self.run / BAD_FILES,
                hint="The reasons stand in this file; mend the files or the manifest.",
            )
        if not math.isfinite(row["train_loss"]):
            raise DataError(
                f"the training diverged: the loss is {row['train_loss']} in epoch {trainer.current_epoch + 1}",
                where=self.run,
                hint="Lower the learning rate (--lr), or clip the gradient (--set train.clip_norm=1).",
            )
        self.history.append(row)
        for name, value in row.items():
            if name not in ("epoch", "step"):
                pl_module.log(name, value, rank_zero_only=True, sync_dist=False)
        if trainer.is_global_zero:
            self._write()
            self.say(self._line(row, trainer))
        patience = self.config.early_stopping
        if patience and self.best and row["epoch"] - self.best["epoch"] >= patience:
            self.say(f"no better validation score for {patience} epochs: stopping")
            trainer.should_stop = True

    def _write(self) -> None:
        names = list(dict.fromkeys(name for row in self.history for name in row))
        part = self.run / "metrics.csv.part"
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in self.history:
                writer.writerow({n: int(v) if n in ("epoch", "step") else f"{v:.6g}" for n, v in row.items()})
        part.replace(self.run / "metrics.csv")

    def _line(self, row: dict[str, float], trainer: pl.Trainer) -> str:
        done, epochs = int(row["epoch"]) + 1, self.config.epochs
        shown = {
            "loss": row.get("train_loss"),
            "accuracy": row.get("train_accuracy"),
            "val loss": row.get("val_loss"),
            "val accuracy": row.get("val_accuracy"),
            "val AUROC": row.get("val_auroc"),
        }
        scores = "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
        left = (epochs - done) * self.seconds / max(1, len(self.history))
        best = "  * best" if self.best.get("epoch") == row["epoch"] else ""
        return f"epoch {done:>{len(str(epochs))}}/{epochs}  {scores}  {row['seconds']:.1f} s  left {_clock(left)}{best}"


def rank(scores: dict[str, float]) -> tuple[float, float]:
    """What is compared between epochs: AUROC where there is one, else accuracy; then the loss."""
    return scores.get("val_auroc", scores["val_accuracy"]), -scores["val_loss"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to `handler`, and back to their own at the end; in the main thread only."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


class SaveState(Checkpoint):
    """Saves all that a resumed run needs after every epoch, and in mid-epoch when the user or the system asks to stop.

    The first Ctrl-C (SIGINT) or SIGTERM ends the run after the step in progress, with its state saved; the second ends
    it at once. A Checkpoint by type, so that Lightning calls it after all others.
    """

    def __init__(self, run: Path, *, say: Callable[[str], None]) -> None:
        self.path, self.say = run / STATE_FILE, say
        self.stop: int | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take the two signals, where this is the main thread (only there Python allows it); give them back after.

        Around the trainer, not in a hook: Lightning puts back, as it ends, the handlers it found.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with stop_signals(self._ask):
            yield

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back from Lightning, which would leave in mid-validation without saving."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = number
        self.say("stopping after this step, then saving; once more to stop at once")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave if asked to; the last batch of an epoch is left to the end of the epoch."""
        if self.stop is not None and not trainer.is_last_batch:
            self._save(trainer)
            raise Interrupted("interrupted; the state is saved", where=self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; leave if asked to."""
        self._save(trainer)
        if self.stop is not None:
            raise Interrupted("interrupted; the state is saved", where=self.path)

    def _save(self, trainer: pl.Trainer) -> None:
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.path)


def check_resumable(path: Path) -> None:
    """Raises DataError where a saved state is damaged; opens it without running what a pickle might hold."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    # A cut file raises nearly anything.
    except Exception as error:
        # Not in torch's words, which advise to unpickle it.
        hint = f"Start anew: videogru train --config {path.parent / 'config.yaml'}"
        raise DataError(
            f"the saved state is damaged or foreign ({type(error).__name__})", where=path, hint=hint
        ) from error


class BadFiles:
    """Training files that could not be read: listed in bad_files.csv, counted once each, and too many stop the run.

    left_out: reasons by row of those that a check found and training never opens; they are listed, but do not count.
    """

    def __init__(
        self,
        run: Path,
        sources: Callable[[int], str],
        *,
        limit: int,
        say: Callable[[str], None],
        left_out: Mapping[int, str] | None = None,
    ) -> None:
        self.path, self.sources, self.limit, self.say = run / BAD_FILES, sources, limit, say
        self.left_out = left_out or {}
        self.reasons: dict[int, str] = {}
        if self.path.exists():
            self.reasons = {row: reason for row, reason, found_by in _bad_files(self.path) if found_by != BY_CHECK}
        elif self.left_out:
            self._append([(row, reason, BY_CHECK) for row, reason in sorted(self.left_out.items())])

    def add(self, row: int, reason: str) -> None:
        """Note one; raises DataError when there are more than `limit`."""
        if row in self.reasons:
            return
        self.reasons[row] = reason
        self._append([(row, reason, "training")])
        self.say(f"skipped, cannot be read: {reason}")
        if len(self.reasons) > self.limit:
            raise DataError(
                f"more than data.max_bad = {self.limit} training files cannot be read",
                where=self.path,
                hint="Mend or remove them, or raise the bound: --set data.max_bad=N",
            )

    def _append(self, found: list[tuple[int, str, str]]) -> None:
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["row", "source", "reason", "found_by"])
            writer.writerows([row, self.sources(row), reason, found_by] for row, reason, found_by in found)


def _bad_files(path: Path) -> list[tuple[int, str, str]]:
    """(row, reason, found_by) of each line."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(line["row"]), line["reason"], line.get("found_by") or "training") for line in csv.DictReader(file)]


def rows_left_out(run: Path) -> dict[int, str]:
    """Reasons by row of what a run leaves out: a resumed one must not read other rows than it began with."""
    path = run / BAD_FILES
    if not path.exists():
        return {}
    return {row: reason for row, reason, found_by in _bad_files(path) if found_by == BY_CHECK}

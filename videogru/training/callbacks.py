"""What happens around the optimization: scores per epoch, the best model, early stopping, files that cannot be read."""

import csv
import io
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from videogru.config import TrainConfig
from videogru.errors import DataError
from videogru.training.task import SequenceTask

NEWS_SECONDS = 60.0
BAD_FILES = "bad_files.csv"
BY_CHECK = "check"
_BAD_FILE_HEADER = "row,source,reason,found_by\n"


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
        self.stopped = False  # early
        self._started = 0.0  # of the epoch in progress; 0 between epochs
        self._before = 0.0  # seconds of that epoch before the run was interrupted
        self._val: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the epochs before."""
        elapsed = self._before + (time.monotonic() - self._started if self._started else 0.0)
        return {
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "elapsed": elapsed,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.history, self.best, self.seconds = state_dict["history"], state_dict["best"], state_dict["seconds"]
        self._before, self.stopped = state_dict.get("elapsed", 0.0), state_dict.get("stopped", False)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to train."""
        return self.stopped or (bool(self.history) and self.history[-1]["epoch"] + 1 >= self.config.epochs)

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
            self.stopped = trainer.should_stop = True

    def _write(self) -> None:
        names = list(dict.fromkeys(name for row in self.history for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        for row in self.history:
            writer.writerow({n: int(v) if n in ("epoch", "step") else f"{v:.6g}" for n, v in row.items()})
        _replace(self.run / "metrics.csv", text.getvalue())

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


class StepNews(Callback):
    """Says now and then how far an epoch is, where no bar shows it: a log must not stand still for an hour."""

    def __init__(self, say: Callable[[str], None], steps: int) -> None:
        self.say, self.steps, self._told = say, steps, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Short epochs tell of themselves."""
        self._told = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A line where the last one is long ago."""
        if time.monotonic() - self._told >= NEWS_SECONDS:
            self._told = time.monotonic()
            done = trainer.global_step - trainer.current_epoch * self.steps
            self.say(f"epoch {trainer.current_epoch + 1}, step {done} of {self.steps}")


def rank(scores: dict[str, float]) -> tuple[float, float]:
    """What is compared between epochs: AUROC where there is one, else accuracy; then the loss."""
    return scores.get("val_auroc", scores["val_accuracy"]), -scores["val_loss"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.partial")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


def _one_line(text: str) -> str:
    return " ".join(text.split())


class BadFiles:
    """Training files that could not be read: listed in bad_files.csv, counted once each, and too many stop the run.

    writes: False in a process that leaves the file to another; it counts all the same; left_out: reasons by row of
    those that a check found and training never opens; they are listed, but do not count.
    """

    def __init__(
        self,
        run: Path,
        sources: Callable[[int], str],
        *,
        limit: int,
        say: Callable[[str], None],
        writes: bool = True,
        left_out: Mapping[int, str] | None = None,
    ) -> None:
        self.path, self.sources, self.limit, self.say = run / BAD_FILES, sources, limit, say
        self.writes = writes
        self.reasons: dict[int, str] = {}
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            whole = _whole_lines(self.path)
            if writes and whole != lines:
                _replace(self.path, "".join(whole))
            self.reasons = {row: reason for row, reason, found_by in _bad_files(whole) if found_by != BY_CHECK}
        elif left_out and writes:
            listed = [_bad_file(row, sources(row), reason, BY_CHECK) for row, reason in sorted(left_out.items())]
            _replace(self.path, _BAD_FILE_HEADER + "".join(listed))

    def add(self, row: int, reason: str) -> None:
        """Note one; raises DataError when there are more than `limit`."""
        if row in self.reasons:
            return
        self.reasons[row] = reason
        if self.writes:
            fresh = not self.path.exists() or not self.path.stat().st_size
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write((_BAD_FILE_HEADER if fresh else "") + _bad_file(row, self.sources(row), reason, "training"))
        self.say(f"skipped, cannot be read: {reason}")
        if len(self.reasons) > self.limit:
            raise DataError(
                f"more than data.max_bad = {self.limit} training files cannot be read",
                where=self.path,
                hint="Mend or remove them, or raise the bound: --set data.max_bad=N",
            )


def rows_left_out(run: Path) -> dict[int, str]:
    """Reasons by row of what a run leaves out: a resumed one must not read other rows than it began with."""
    path = run / BAD_FILES
    if not path.exists():
        return {}
    return {row: reason for row, reason, found_by in _bad_files(_whole_lines(path)) if found_by == BY_CHECK}


def _whole_lines(path: Path) -> list[str]:
    """A line without an end was being written when the run was killed; its file will be met again."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _bad_file(row: int, source: str, reason: str, found_by: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([row, _one_line(source), _one_line(reason), found_by])
    return line.getvalue()


def _bad_files(lines: list[str]) -> list[tuple[int, str, str]]:
    """(row, reason, found_by) of each line."""
    return [(int(line["row"]), line["reason"], line.get("found_by") or "training") for line in csv.DictReader(lines)]

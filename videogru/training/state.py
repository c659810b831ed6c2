"""What a run needs to go on after it was stopped or killed: last.ckpt, written whole or not at all, and read safely."""

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch import nn

from videogru.errors import DataError, Interrupted, VideogruError
from videogru.training.processes import ALONE, Group

STATE_FILE = "last.ckpt"

# A state inside an epoch is saved so seldom that saving takes at most a twentieth of the time.
_SHARE_OF_TIME = 20


class StateFile(CheckpointIO):
    """How Lightning writes and reads the state: on the disk before it takes its name, so a kill leaves a whole one.

    state: what `read_state` gave, for Lightning to go on from. An error in writing is kept until `check` raises it:
    only the first process writes, and the others must learn of it.
    """

    def __init__(self, state: dict[str, Any] | None) -> None:
        self._state = state
        self._error: VideogruError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state."""
        path = Path(path)
        part = path.with_name(f".{path.name}.partial")
        # torch writes to a file in pieces, and hides what the system says of a full disk.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            older = " The state saved before it is whole." if path.exists() else ""
            self._error = VideogruError(
                f"the state of the training cannot be saved: {error.strerror}",
                where=path,
                hint=f"Make space or mend the folder, then: videogru train --resume {path.parent}.{older}",
            )

    def check(self) -> None:
        """Raise what went wrong in the last writing."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The state that was read before."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a state."""
        Path(path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a new name in `folder` to the disk, where the system can do so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_state(path: Path, task: nn.Module, facts: dict[str, Any]) -> dict[str, Any]:
    """A saved state, opened without running what a pickle might hold.

    task: its tensors, of the classifier and of what is trained beside it, must be those of the state; facts: what must
    be as it was when the run began. Raises DataError where the file is damaged, foreign or of another run.
    """
    hint = f"Put it aside, and --resume begins the training anew: mv {path} {path}.damaged"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A cut file raises nearly anything.
    except Exception as error:
        # Not in torch's words, which advise to unpickle it.
        kind = type(error).__name__
        raise DataError(f"the saved state is damaged or foreign ({kind})", where=path, hint=hint) from error
    wanted = {"state_dict", "callbacks", "loops", "optimizer_states", "pytorch-lightning_version"}
    if not isinstance(state, dict) or not wanted <= state.keys() or "Scores" not in state["callbacks"]:
        raise DataError("the saved state is damaged or foreign (parts are missing)", where=path, hint=hint)
    then = state.get("facts", {"processes": 1})
    for name, value in facts.items():
        if name in then and then[name] != value:
            raise DataError(f"the saved state is of a run with {name} {then[name]}, not {value}", where=path, hint=hint)
    shapes = {name: tensor.shape for name, tensor in task.state_dict().items()}
    if {name: tensor.shape for name, tensor in state["state_dict"].items()} != shapes:
        raise DataError("the saved state is of a run with another model", where=path, hint=hint)
    return state


def load_classifier(model: nn.Module, state: dict[str, Any]) -> None:
    """Give `model` the weights of a state: the averaged ones, where weights are averaged."""
    prefix = "classifier."
    own = {name: tensor for name, tensor in state["state_dict"].items() if name.startswith(prefix)}
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in own.items()})


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
    """Saves all that a resumed run needs: after every epoch, some minutes after the last time, and when asked to stop.

    The first Ctrl-C (SIGINT) or SIGTERM, to whichever process, ends the run after the step in progress, with its state
    saved; the second ends the process at once. A Checkpoint by type, so that Lightning calls it after all others.
    """

    def __init__(
        self,
        run: Path,
        file: StateFile,
        *,
        every_minutes: float,
        facts: dict[str, Any],
        say: Callable[[str], None],
        group: Group = ALONE,
    ) -> None:
        self.path, self.file, self.facts, self.say, self.group = run / STATE_FILE, file, facts, say, group
        self.every_seconds = 60 * every_minutes
        self.stop: int | None = None
        self._saved, self._cost = time.monotonic(), 0.0

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take the two signals, where this is the main thread (only there Python allows it); give them back after."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with stop_signals(self._ask):
            yield

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = number
        self.say("stopping after this step, then saving; once more to stop at once")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say whose state it is."""
        checkpoint["facts"] = self.facts

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; save and leave if asked to. At the last batch, the end of the epoch does it."""
        if trainer.is_last_batch:
            return
        waited = time.monotonic() - self._saved
        due = bool(self.every_seconds) and waited >= max(self.every_seconds, _SHARE_OF_TIME * self._cost)
        # The clock of the first process counts, a signal to any.
        stops, times = self.group.total(self.stop is not None, due and self.group.is_first)
        if stops or times:
            self._save(trainer)
        if stops:
            raise Interrupted("interrupted; the state is saved", where=self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; leave if asked to."""
        self._save(trainer)
        if self.group.total(self.stop is not None)[0]:
            raise Interrupted("interrupted; the state is saved", where=self.path)

    def _save(self, trainer: pl.Trainer) -> None:
        started = time.monotonic()
        trainer.save_checkpoint(self.path)
        self.group.by_first(self.file.check)
        self._saved = time.monotonic()
        self._cost = self._saved - started

"""Trainings one after the other in processes of their own: stopped in time, gone on with, never two in one folder."""

import fcntl
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from tools.experiments.article import flat_settings
from tools.measuring import INTERRUPTED
from videogru.config import Config
from videogru.errors import ConfigError, DataError
from videogru.training.state import STATE_FILE, stop_signals
from videogru.workflows.run_folder import run_config

VIDEOGRU = (sys.executable, "-m", "videogru")
STOPPED = (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)


class Stopper:
    """Hands SIGINT, SIGTERM and the end of the time on to the training in progress, which then saves and leaves.

    minutes: for all trainings together; 0: no limit.
    """

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + minutes * 60 if minutes else math.inf
        self.asked = 0
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Stop after the step in progress; asked again, the training ends at once."""
        self.asked += 1
        if self.child is not None:
            self.child.terminate()

    def due(self) -> bool:
        """Nothing more may be started."""
        return self.asked > 0 or time.monotonic() >= self.deadline

    def run(self, command: Sequence[str], lock: int) -> int:
        """The exit code of a command that ends by itself, or is told to when the time is up."""
        # In a session of its own it gets no Ctrl-C besides ours, which it would take for the second one.
        # It holds the lock too: a training that outlives this tool is not joined by another in its folder.
        child = subprocess.Popen(command, start_new_session=True, pass_fds=(lock,))
        self.child = child
        try:
            if self.asked:  # before there was a child to hand it to
                child.terminate()
            if self.deadline < math.inf:
                try:
                    return child.wait(timeout=max(0.0, self.deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.ask()
            return child.wait()
        finally:
            self.child = None


class Job(NamedTuple):
    """One training: what it is called, its run folder, and the command, asked for when its turn comes."""

    title: str
    run: Path
    command: Callable[[], list[str]]


def run_jobs(jobs: Sequence[Job], minutes: float, again: str) -> int:
    """Run what is not finished, in order; 0 when all are, else the exit code: 130 when stopped.

    A folder at which another process works is left to it. minutes: for all together, 0: no limit; again: the command
    that goes on. Raises DataError where a training ends without an evaluation of the test split.
    """
    stopper = Stopper(minutes)
    with stop_signals(stopper.ask):
        for number, job in enumerate(jobs, start=1):
            if _finished(job.run):
                continue
            if stopper.due():
                return _stopped(again)
            try:
                with locked(job.run) as lock:
                    if _finished(job.run):
                        continue
                    command = job.command()
                    print(f"\n[{number}/{len(jobs)}] {job.title}\n$ {shlex.join(command)}", flush=True)
                    code = stopper.run(command, lock.fileno())
            except Busy as busy:
                print(f"[{number}/{len(jobs)}] {job.title}: {busy.what}", flush=True)
                continue
            if code in STOPPED:
                return _stopped(again)
            if code:
                print(f"the training of {job.run} ended with {code}; nothing more is started", file=sys.stderr)
                return code if code > 0 else 128 - code
            if not _finished(job.run):
                raise DataError("the training ended without an evaluation of the test split", where=job.run)
    return 0


def _finished(run: Path) -> bool:
    return (run / "evaluation-test.json").is_file()


def _stopped(again: str) -> int:
    print(f"\nstopped; run me again to go on:\n  {again}", flush=True)
    return INTERRUPTED


def train_command(videogru: Sequence[str], run: Path, words: Sequence[str]) -> list[str]:
    """`videogru train` into `run`; it goes on where a state was saved, and a folder without one starts anew.

    videogru: the words that start it; words: those of a new training, without --out.
    """
    if (run / STATE_FILE).is_file():
        return [*videogru, "train", "--resume", str(run)]
    if (run / "config.yaml").is_file():
        # Stopped before its first save; only what the training itself wrote is there.
        shutil.rmtree(run)
    return [*videogru, "train", *words, "--out", str(run)]


def check_settings(run: Path, wanted: Config) -> None:
    """Raise ConfigError where a run was made with other settings than these; where its data lay does not count."""
    if not (run / "config.yaml").is_file():
        return
    had, want = (flat_settings(config) for config in (run_config(run), wanted))
    for key, value in want.items():
        if had[key] != value and key != "data.data_dir":
            what = f"was trained with {key}={had[key]}, now it would be {value}"
            raise ConfigError(what, where=run, hint="Move it away, or name another folder with --work.")


class Busy(ConfigError):
    """Another process holds a folder."""


@contextmanager
def locked(work: Path) -> Iterator[IO[str]]:
    """Hold a folder, which need not exist, against other runs of these tools. Raises Busy where one holds it."""
    work.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder: a run folder that was stopped early is removed before it begins anew.
    with work.with_name(f".{work.name}.lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another run of this tool is at work here", where=work) from None
        yield file

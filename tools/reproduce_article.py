"""The article's table: ResNet, LSTM-CNN and GRU-CNN trained alike on CIFAR-100 with several seeds, then compared.

    python tools/reproduce_article.py --budget cpu --data-dir DIR [--minutes 9] [--seeds 0,1,2] [--only train|measure]

Trains in pieces: after --minutes (or Ctrl-C, SIGTERM) the training in progress saves its state and the tool exits with
130; run again, it goes on there. Where all are trained it measures accuracy, cost and latency and writes
table-BUDGET.json, table-BUDGET.md and accuracy-BUDGET.png. Every net has the same encoder, recipe, epochs and seeds;
without a recurrent part the pooling is the mean over cells, which is a ResNet's global average pooling.
"""

import fcntl
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from article import NETS, cifar_folder, flat_settings, run_folder, seeds_of
from measuring import INTERRUPTED, Parser, exit_code

from videogru.config import Config, parse_assignments
from videogru.errors import ConfigError, DataError
from videogru.runs import run_config, settings_for_training
from videogru.training.state import STATE_FILE, stop_signals

# cpu: about 4 minutes for a ResNet and 8 with a recurrent part on 2 quiet cores; gpu: the recipe, 40 epochs.
BUDGETS: dict[str, dict[str, str]] = {
    "cpu": {
        "model.encoder": "small",
        "model.encoder_width": "32",
        "model.hidden_size": "128",
        "train.epochs": "8",
    },
    "gpu": {"train.epochs": "40"},
}
RECIPE = "cifar100-article"
VIDEOGRU = (sys.executable, "-m", "videogru")
_STOPPED = (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)


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


def settings(budget: str, net: str) -> dict[str, str]:
    """What is set over the recipe, as --set wants it."""
    return {**BUDGETS[budget], **NETS[net].settings}


def train_all(budget: str, work: Path, data: Path, seeds: Sequence[int], minutes: float, again: str) -> int:
    """Train what is not trained yet, all nets of a seed before the next seed; 0 when all are there, else the exit code.

    again: the command that goes on. Raises ConfigError where a run folder was made with other settings.
    """
    jobs = [(net, seed) for seed in seeds for net in NETS]
    for net, seed in jobs:
        check_settings(run_folder(work, net, seed), wanted_config(budget, net, seed, data))
    stopper = Stopper(minutes)
    with locked(work) as lock, stop_signals(stopper.ask):
        for number, (net, seed) in enumerate(jobs, start=1):
            run = run_folder(work, net, seed)
            if (run / "evaluation-test.json").is_file():
                continue
            if stopper.due():
                return _stopped(again)
            command = command_for(budget, net, seed, run, data)
            print(f"\n[{number}/{len(jobs)}] {NETS[net].title}, seed {seed}\n$ {shlex.join(command)}", flush=True)
            code = stopper.run(command, lock.fileno())
            if code in _STOPPED:
                return _stopped(again)
            if code:
                print(f"the training of {run} ended with {code}; nothing more is started", file=sys.stderr)
                return code if code > 0 else 128 - code
            if not (run / "evaluation-test.json").is_file():
                raise DataError("the training ended without an evaluation of the test split", where=run)
    return 0


def _stopped(again: str) -> int:
    print(f"\nstopped; run me again to go on:\n  {again}", flush=True)
    return INTERRUPTED


def wanted_config(budget: str, net: str, seed: int, data: Path) -> Config:
    """The settings that `command_for` asks for."""
    assigned = parse_assignments(f"{key}={value}" for key, value in settings(budget, net).items())
    config = settings_for_training(RECIPE, {"data.data_dir": str(data), "train.seed": seed}, assigned)
    return config.model_copy(update={"data": config.data.for_kind("image")})


def command_for(budget: str, net: str, seed: int, run: Path, data: Path) -> list[str]:
    """The training as a command; it goes on where a state was saved, and a folder without one starts anew."""
    if (run / STATE_FILE).is_file():
        return [*VIDEOGRU, "train", "--resume", str(run)]
    if (run / "config.yaml").is_file():
        # Stopped before its first save; only what the training itself wrote is there.
        shutil.rmtree(run)
    assigned = [word for key, value in settings(budget, net).items() for word in ("--set", f"{key}={value}")]
    fixed = ["--config", RECIPE, "--data-dir", str(data), "--seed", str(seed), "--out", str(run)]
    return [*VIDEOGRU, "train", *fixed, *assigned]


def check_settings(run: Path, wanted: Config) -> None:
    """Raise ConfigError where a run was made with other settings than these; where its data lay does not count."""
    if not (run / "config.yaml").is_file():
        return
    had, want = (flat_settings(config) for config in (run_config(run), wanted))
    for key, value in want.items():
        if had[key] != value and key != "data.data_dir":
            what = f"was trained with {key}={had[key]}, now it would be {value}"
            raise ConfigError(what, where=run, hint="Move it away, or name another folder with --work.")


@contextmanager
def locked(work: Path) -> Iterator[IO[str]]:
    """Hold WORK against a second run of this tool. Raises ConfigError where another holds it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another run of this tool is at work here", where=work) from None
        yield file


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="reproduce_article.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", required=True, choices=BUDGETS, help="cpu: a small encoder, few epochs; gpu: all")
    parser.add_argument("--out", type=Path, default=Path("docs/article"), help="where table and picture are written")
    parser.add_argument("--work", type=Path, help="run folders; default: runs/article-BUDGET")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-100 lies")
    parser.add_argument("--minutes", type=float, default=9, help="of training in this call; 0: no limit; default 9")
    parser.add_argument("--seeds", type=seeds_of, default=(0, 1, 2), help="default: 0,1,2")
    parser.add_argument("--only", choices=("train", "measure"), help="one half; measure takes what is there")
    options = parser.parse_args(words)
    if not options.minutes >= 0:  # nan is not either
        parser.error("--minutes must not be negative")
    work = (options.work or Path("runs") / f"article-{options.budget}").resolve()
    command = ["python", "tools/reproduce_article.py", *words]

    def work_on() -> int:
        data = cifar_folder(options.data_dir)
        if options.only != "measure":
            code = train_all(options.budget, work, data, options.seeds, options.minutes, shlex.join(command))
            if code or options.only == "train":
                return code
        from article_table import measure, write_table  # the training needs nothing of it

        write_table(options.out, measure(options.budget, work, options.seeds, command))
        return 0

    return exit_code("reproduce_article.py", work_on, kept="run me again to go on")


if __name__ == "__main__":
    sys.exit(main())

"""The command line killed with SIGKILL at ten random moments, resumed each time: the same bits as uninterrupted."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.command_line import KINDS
from tests.training.test_fit import same
from tests.training.test_launch import gone
from tests.training.test_processes import ROOT, environment

KILLS = 10
SMALL = [
    *("--set", "model.encoder_width=8", "--set", "model.hidden_size=16", "--set", "train.num_workers=1"),
    *("--set", "train.precision=fp32", "--set", "train.save_every_minutes=0.002", "--batch-size", "4"),
]
# Data set, and what makes it train for some ten seconds.
SETS: dict[str, list[str]] = {
    "grid_digits": ["--epochs", "3", "--set", "data.frame_size=32", "--set", "data.num_frames=8"],
    "volume": ["--epochs", "12", "--set", "data.frame_size=32", "--set", "data.num_frames=6"],
    "image": ["--epochs", "60", "--set", "data.frame_size=16", "--set", "train.ema_decay=0.9"],
}

pytestmark = pytest.mark.slow


def data(kind: str, folder: Path) -> Path:
    """Sixty clips of the bundled set, or forty made sources."""
    if kind == "grid_digits":
        bundled = ROOT / "datasets" / "grid_digits"
        head, *rows = (bundled / "manifest.csv").read_text().splitlines()
        few = random.Random(0).sample(rows, 60)
        table = folder / "digits.csv"
        shutil.copytree(bundled / "clips", folder / "clips")
        table.write_text("\n".join([head, *few]))
        return table
    suffix, write = KINDS[kind]
    for label, flag in (("a", True), ("b", False)):
        (folder / "data" / label).mkdir(parents=True)
        for number in range(20):
            write(folder / "data" / label / f"{number}{suffix}", flag, number + 100 * flag)
    return folder / "data"


def start(arguments: list[object], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "videogru", "train", *map(str, arguments)]
    # A shell's background job hands on that SIGINT is ignored.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with log.open("a") as file:
        return subprocess.Popen(
            command, env=environment(), stderr=file, stdout=file, start_new_session=True, preexec_fn=listen
        )


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            found.append(int(folder.name))
    return found


def says(log: Path, texts: tuple[str, ...], process: subprocess.Popen[bytes], times: int = 1) -> float:
    """Seconds until one of the texts stands in the log so many times; less where the process ends before."""
    started = time.monotonic()
    while sum(log.read_text().count(text) for text in texts) < times and process.poll() is None:
        time.sleep(0.05)
    return time.monotonic() - started


CASES = [(kind, signal.SIGKILL) for kind in SETS] + [("image", signal.SIGTERM), ("image", signal.SIGINT)]


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_ended_at_ten_random_moments(tmp_path: Path, kind: str, number: int) -> None:
    source, log = data(kind, tmp_path), tmp_path / "log"
    new = ["--dataset", source, *SMALL, *SETS[kind]]
    process = start([*new, "--out", tmp_path / "whole"], log)
    begins = ("training on", "finished already")
    startup = says(log, begins, process)
    training = says(log, ("Accuracy",), process)
    assert process.wait() == 0, log.read_text()
    run, moments, codes = tmp_path / "cut", random.Random(7), []
    while sum(code != 0 for code in codes) < KILLS:
        begun = (run / "config.yaml").exists()
        before = sum(log.read_text().count(text) for text in begins)
        process = start(["--resume", run] if begun else [*new, "--out", run], log)
        # Three of ten before the training begins, the others inside it. A finished one is only evaluated: too short.
        seconds = moments.uniform(0, startup)
        if moments.random() < 0.7 and "finished already" not in log.read_text():
            says(log, begins, process, before + 1)
            seconds = moments.uniform(0, training / 5)
        try:
            codes.append(process.wait(seconds))
            assert codes[-1] == 0, log.read_text()[-3000:]
        except subprocess.TimeoutExpired:
            everyone = members(process.pid)
            # The parent alone, or all of its group, as a terminal does.
            if moments.random() < 0.5:
                process.send_signal(number)
            else:
                os.killpg(process.pid, number)
            codes.append(process.wait(120))
            assert gone(everyone, 10), "readers stay behind"
        if not begun and run.exists() and not (run / "config.yaml").exists():
            shutil.rmtree(run)
    assert (run / "config.yaml").exists()
    assert start(["--resume", run], log).wait() == 0, log.read_text()[-3000:]
    said = log.read_text()
    print(kind, codes, f"{startup:.0f} + {training:.0f} s,", said.count("going on with"), "resumed,", end=" ")
    print(said.count("no state was saved"), "begun anew,", said.count("finished already"), "only evaluated")
    assert set(codes) <= {0, -number} | ({130} if number != signal.SIGKILL else set())
    assert same(*(load_file(place / "model.safetensors") for place in (tmp_path / "whole", run)))
    one, other = ((place / "predictions-test.csv").read_bytes() for place in (tmp_path / "whole", run))
    assert one == other

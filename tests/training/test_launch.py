"""Real commands with two processes, ended in every way there is: nothing stays behind, and --resume goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.command_line import KINDS, QUICK
from tests.training.test_fit import same
from tests.training.test_processes import environment

SIZE = ("--set", "data.frame_size=16", "--batch-size", "4", "--epochs", "150", "--set", "train.precision=fp32")
VIDEOGRU = [sys.executable, "-m", "videogru"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "videogru"]
WAIT_SECONDS = 240

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    suffix, write = KINDS["image"]
    for label, flag in (("a", True), ("b", False)):
        (folder / label).mkdir()
        for number in range(10):
            write(folder / label / f"{number}{suffix}", flag, number + 100 * flag)
    return folder


class Training:
    """A command in a session of its own, with what it says in a file."""

    def __init__(self, command: list[str], arguments: list[object], said: Path) -> None:
        self.said = said
        with said.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "train", *map(str, arguments)],
                env=environment(),
                stderr=file,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def until(self, text: str) -> None:
        limit = time.monotonic() + WAIT_SECONDS
        while text not in self.said.read_text():
            assert self.process.poll() is None and time.monotonic() < limit, self.said.read_text()
            time.sleep(0.1)

    def ranks(self) -> list[int]:
        """The processes that train, in the order of their ranks."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == self.process.pid:
                    variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                    if "RANK" in variables:
                        found[int(variables["RANK"])] = int(folder.name)
        return [found[rank] for rank in sorted(found)]

    def end(self) -> int:
        return self.process.wait(WAIT_SECONDS)


@pytest.fixture
def started() -> Iterator[list[Training]]:
    trainings: list[Training] = []
    yield trainings
    for training in trainings:
        with contextlib.suppress(OSError):
            os.killpg(training.process.pid, signal.SIGKILL)
        training.process.wait()


def gone(pids: list[int], seconds: float = 60) -> bool:
    """Whether these processes end by then; zombies have ended."""
    limit = time.monotonic() + seconds

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    while any(map(alive, pids)):
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def test_every_way_to_end_two_processes(pictures: Path, tmp_path: Path, started: list[Training]) -> None:
    run = tmp_path / "run"
    new = ["--dataset", pictures, *QUICK, *SIZE, "--out", run, "--devices", 2]

    def train(*arguments: object, until: str) -> Training:
        started.append(Training(VIDEOGRU, list(arguments), tmp_path / f"said-{len(started)}"))
        started[-1].until(until)
        return started[-1]

    # Ctrl-C and SIGTERM, to the command: saved, 130, said once.
    for number, arguments, epoch in ((signal.SIGINT, new, 2), (signal.SIGTERM, ["--resume", run], 4)):
        training = train(*arguments, until=f"epoch   {epoch}/")
        ranks = training.ranks()
        assert len(ranks) == 2
        training.process.send_signal(number)
        assert training.end() == 130
        assert gone(ranks)
        said = training.said.read_text()
        assert said.count("the state is saved") == 1 and "Traceback" not in said

    # One of the processes is killed: the others end, with a word on what happened.
    for rank in (1, 0):
        training = train("--resume", run, until="epoch ")
        ranks = training.ranks()
        os.kill(ranks[rank], signal.SIGKILL)
        assert training.end() == 1
        assert gone(ranks, 5)
        said = training.said.read_text()
        assert f"process {rank} was ended by SIGKILL" in said and "Traceback" not in said

    # The command itself is killed: its processes save and end.
    training = train("--resume", run, until="epoch ")
    ranks = training.ranks()
    training.process.kill()
    assert gone(ranks)
    assert "the state is saved" in training.said.read_text()

    training = train("--resume", run, until="epoch 150/150")
    assert training.end() == 0
    uncut = tmp_path / "uncut"
    started.append(Training(TORCHRUN, ["--dataset", pictures, *QUICK, *SIZE, "--out", uncut], tmp_path / "said"))
    assert started[-1].end() == 0, started[-1].said.read_text()
    assert same(*(load_file(place / "model.safetensors") for place in (run, uncut)))
    assert {file.name for file in run.iterdir()} == {file.name for file in uncut.iterdir()}


def test_torchrun_hands_sigterm_on_to_readers_too(pictures: Path, tmp_path: Path, started: list[Training]) -> None:
    """It sends to whole process groups: the readers must not die before the state is saved."""
    run = tmp_path / "run"
    arguments = ["--dataset", pictures, *QUICK, *SIZE, "--out", run, "--set", "train.num_workers=1"]
    started.append(Training(TORCHRUN, list(arguments), tmp_path / "said"))
    started[0].until("epoch   2/")
    started[0].process.send_signal(signal.SIGTERM)
    started[0].end()
    said = started[0].said.read_text()
    assert said.count("the state is saved") == 1
    assert "DataLoader worker" not in said
    assert (run / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "code", "words"),
    [
        (TORCHRUN, ["--devices", 3], None, "contradict|settings say"),
        (TORCHRUN, ["--dataset", "nowhere"], None, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_once(
    pictures: Path, tmp_path: Path, started: list[Training], command: list[str], arguments: list, code: int, words: str
) -> None:
    out = tmp_path / "run"
    given = ["--dataset", pictures, *QUICK, *SIZE, "--out", out, *arguments]
    started.append(Training(command, given, tmp_path / "said"))
    ended = started[0].end()
    assert ended == code or (code is None and ended)
    said = started[0].said.read_text()
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert any(word in errors[0] for word in words.split("|"))
    assert not out.exists()

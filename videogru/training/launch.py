"""Starts the processes of a training on this machine for --devices and --nodes, and looks after them.

Each is this same command in a session of its own. Ctrl-C and SIGTERM are handed on, once for each time they come; when
one process fails the others are ended; and when this one is killed, they save and end.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from videogru.errors import ConfigError

PARENT = "VIDEOGRU_LAUNCHED_BY"  # in the environment of a started process: the id of this one

# After one process failed, the others may take this long to notice and end by themselves.
_GRACE_SECONDS = 15.0


def launch(arguments: Sequence[str], *, devices: int, nodes: int, say: Callable[[str], None]) -> int:
    """Run `videogru ARGUMENTS` in `devices` processes; the exit code is that of the first that fails, else 0.

    With several nodes the command is given on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment.
    Raises ConfigError where they are missing.
    """
    address, port, node = _meeting_point(nodes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        # Else each process would take all cores.
        "OMP_NUM_THREADS": str(max(1, cores // devices)),
        **os.environ,
        "WORLD_SIZE": str(devices * nodes),
        "LOCAL_WORLD_SIZE": str(devices),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }
    signals = _Signals()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for local in range(devices):
            own = {"RANK": str(node * devices + local), "LOCAL_RANK": str(local)}
            processes.append(subprocess.Popen([*_command(), *arguments], env=shared | own, start_new_session=True))
        return _watch(processes, signals, first=node * devices, say=say)
    finally:
        for process in processes:
            _kill(process)
        signals.give_back()


def _meeting_point(nodes: int) -> tuple[str, int, int]:
    """Address and port of the first machine, and the number of this one."""
    if nodes == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return "127.0.0.1", int(free.getsockname()[1]), 0
    try:
        address, port, node = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["NODE_RANK"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{nodes} machines need MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment: {error}",
            where="--nodes",
            hint="On the first: MASTER_ADDR=ITS-NAME MASTER_PORT=29500 NODE_RANK=0 videogru train ...; or torchrun.",
        ) from error
    if not 0 <= node < nodes:
        raise ConfigError(f"NODE_RANK={node} is not in 0..{nodes - 1}", where="--nodes")
    return address, port, node


def _command() -> list[str]:
    """How this process was started: as a module, or as a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.executable, "-m", spec.parent] if spec and spec.parent else [sys.executable, sys.argv[0]]


def _watch(
    processes: list[subprocess.Popen[bytes]], signals: "_Signals", *, first: int, say: Callable[[str], None]
) -> int:
    failed, deadline = 0, 0.0
    handed_on = 0
    while any(process.poll() is None for process in processes):
        if signals.count > handed_on:
            handed_on += 1
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signals.number)
        if not failed:
            failed = next((process.returncode for process in processes if process.returncode), 0)
            if failed and failed != 130:
                rank = first + next(n for n, process in enumerate(processes) if process.returncode == failed)
                if failed < 0:
                    say(f"error: process {rank} was ended by {signal.Signals(-failed).name}; ending the others")
                deadline = time.monotonic() + _GRACE_SECONDS
        if deadline and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failed = failed or next((process.returncode for process in processes if process.returncode), 0)
    if handed_on and failed < 0:
        return 130
    return 1 if failed < 0 else failed


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and its readers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Signals:
    """Counts Ctrl-C and SIGTERM; what they do is the processes' matter."""

    def __init__(self) -> None:
        self.count, self.number = 0, int(signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count, self.number = self.count + 1, number

    def give_back(self) -> None:
        for number, usual in self._before.items():
            signal.signal(number, usual)

"""The processes of one training: who they are, and what they tell each other besides gradients.

They are started by `torchrun`, or by `training/launch.py` for --devices and --nodes; both leave the same variables in
the environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from videogru.config import TrainConfig
from videogru.errors import ConfigError, VideogruError

T = TypeVar("T")

# One process may wait this long for another: for a slow disk, or a last validation batch.
_TIMEOUT = timedelta(minutes=30)


class ProcessLost(VideogruError):
    """Another process of the training ended, and this one cannot go on alone."""

    exit_code = 1


@dataclass(frozen=True)
class Group:
    """The processes of a training as one of them sees it; alone by default, and then nothing is sent.

    Every method must be called by all processes, in the same order. What is sent stays among them.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world // self.local_world

    def total(self, *numbers: float | int) -> list[float]:
        """The sums over all processes, in float64."""
        if self.world == 1:
            return [float(number) for number in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(number) for number in sums]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agreed(self, work: Callable[[], T]) -> T:
        """`work()` in every process; where it raises a VideogruError in any, the first one is raised in all."""
        result, error = _tried(work)
        for rank, raised in enumerate(self.gather(error)):
            if raised is not None:
                if rank:
                    raised.what = f"process {rank}: {raised.what}"
                raise raised
        assert error is None
        return result  # type: ignore[return-value]

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work()` gives or raises in the first process, in every process."""
        if self.world == 1:
            return work()
        told: list[Any] = [_tried(work) if self.is_first else None]
        dist.broadcast_object_list(told, src=0)
        result, error = told[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def _tried(work: Callable[[], T]) -> tuple[T | None, VideogruError | None]:
    try:
        return work(), None
    except VideogruError as error:
        return None, error


ALONE = Group()


def is_started() -> bool:
    """Whether torchrun, or `launch`, started this process as one of several (or as the only one)."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def this_group(train: TrainConfig) -> Group:
    """The processes this one was started with; alone where nobody started it as one of several.

    Raises ConfigError where the environment contradicts train.devices or train.nodes, or has no sense.
    """
    try:
        return _group(train)
    except ConfigError as error:
        error.is_echo = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def _group(train: TrainConfig) -> Group:
    if not is_started():
        if (train.devices or 1) * (train.nodes or 1) > 1:
            raise ConfigError(
                "this process was not started as one of several",
                where="train.devices, train.nodes",
                hint="Use the command line: videogru train --devices N, or torchrun.",
            )
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        values = [int(os.environ.get(name, 1)) for name in names]
    except ValueError as error:
        raise ConfigError(
            f"{', '.join(names)} in the environment must be numbers: {error}",
            hint="torchrun sets them; unset them to train with one process.",
        ) from error
    group = Group(*values)
    devices, nodes = group.local_world, group.nodes
    if group.world != devices * nodes or not 0 <= group.rank < group.world:
        raise ConfigError(
            f"process {group.rank} of {group.world}, {devices} on this machine: every machine must start as many",
            where="the environment (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE)",
        )
    if (train.devices or devices, train.nodes or nodes) != (devices, nodes):
        raise ConfigError(
            f"torchrun started {nodes} x {devices} processes (machines x processes on each), the settings say "
            f"{train.nodes or nodes} x {train.devices or devices}",
            where="train.nodes, train.devices",
            hint="Leave --devices and --nodes out under torchrun; a run is resumed with as many processes as it began.",
        )
    if torch.cuda.is_available() and group.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{devices} processes, each with a GPU of its own, but here are {torch.cuda.device_count()} GPUs",
            where="train.devices",
            hint="Use --devices with as many, or hide the GPUs: CUDA_VISIBLE_DEVICES=",
        )
    return group


@contextmanager
def joined(group: Group) -> Iterator[Group]:
    """Connect the processes: gloo between CPUs, NCCL between GPUs. Raises ConfigError where they do not meet."""
    if group.world == 1:
        yield group
        return
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(group.local_rank)
    try:
        dist.init_process_group(backend, rank=group.rank, world_size=group.world, timeout=_TIMEOUT)
    # A port in use, an unknown host, nobody there: each has an error of its own.
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the {group.world} processes cannot meet: {_first_line(error)}",
            where=meeting,
            hint="MASTER_ADDR names the first machine, MASTER_PORT a free port on it; torchrun: --master-port=PORT.",
        ) from error
    try:
        yield group
    except VideogruError as error:
        error.is_echo = not group.is_first
        raise
    # Not after an error: the others may be waiting, and see the connection close when this process ends.
    dist.destroy_process_group()


@contextmanager
def noticing_lost_processes(group: Group) -> Iterator[None]:
    """Turn what the connection says when another process ended into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if group.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text):
            raise
        raise ProcessLost(
            f"process {group.rank} lost the others ({_first_line(error)})", hint="See above what ended them."
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

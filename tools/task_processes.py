"""Runs tasks in processes that may die or hang: such a task ends with an error, and its process is replaced."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

_Task = TypeVar("_Task")
_Answer = TypeVar("_Answer")


class TaskLost(Exception):
    """A task whose process died, or was ended as it took too long."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Any = None
    deadline: float = 0.0


def run_tasks(
    work: Callable[[_Task], _Answer], tasks: Iterator[_Task], processes: int, timeout_seconds: float
) -> Iterator[tuple[_Task, _Answer | Exception]]:
    """(task, what `work` returned or raised) as they end; TaskLost where its process died or did not end in time.

    work: a function that can be pickled by name. Tasks are taken from the iterator as processes become free. Processes
    end with the generator.
    """
    workers: list[_Worker] = []
    try:
        waiting = True
        while True:
            while waiting and (len(workers) < processes or any(worker.task is None for worker in workers)):
                task = next(tasks, None)
                if task is None:
                    waiting = False
                    break
                worker = next((worker for worker in workers if worker.task is None), None)
                if worker is None:
                    worker = _start(work)
                    workers.append(worker)
                worker.task, worker.deadline = task, time.monotonic() + timeout_seconds
                worker.pipe.send(task)
            busy = [worker for worker in workers if worker.task is not None]
            if not busy:
                return
            first = min(worker.deadline for worker in busy)
            ready = wait([worker.pipe for worker in busy], max(0.0, first - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready:
                    try:
                        answer = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        answer = TaskLost(f"its process died (exit code {worker.process.exitcode})")
                        workers.remove(worker)
                elif time.monotonic() >= worker.deadline:
                    answer = TaskLost(f"did not end within {timeout_seconds:g} s")
                    _end(worker)
                    workers.remove(worker)
                else:
                    continue
                task, worker.task = worker.task, None
                yield task, answer
    finally:
        for worker in workers:
            _end(worker)


def _start(work: Callable[[Any], Any]) -> _Worker:
    # Spawned: decoders that were opened before a fork hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.process.kill()  # a hanging decoder hears nothing else
    worker.process.join()
    worker.pipe.close()


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """The worker's side: one task after the other until the pipe closes."""
    while True:
        try:
            task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer: Any = work(task)
        except KeyboardInterrupt:
            return
        except Exception as error:  # noqa: BLE001  (a reason for the table, whatever it is)
            answer = error
        pipe.send(answer)

"""Reader processes that may hang or die: the row at work is refused with its reason, and a new process goes on.

  parent                     worker, with two pipes of its own: nothing is shared that a dying one could leave locked
  keys of a batch  ──────▶   before a row: its place into the slot, and the kernel's alarm set; after it: both cleared
  result           ◀──────
  end of file      ◀──────   ended by the alarm, a crash or the system: the slot names the row that was at work

The alarm (ITIMER_REAL, SIGALRM with its default action) ends a process whatever it does: a decoder that hangs inside C
and holds the interpreter lock is out of reach of threads and of Python's signal handlers.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch
import torch.multiprocessing  # teaches the pipes to hand tensors over in shared memory

from videogru.errors import DataError, SourceError

Row = TypeVar("Row")
Record = TypeVar("Record")

# Tasks that are handed out and not yet used, per worker.
_AHEAD = 4
# Below what any system's pipe holds: a parent must never wait in a send, a worker could be waiting for it.
_PIPE_BYTES = 16 * 1024
# A crash may be the system's doing (out of memory), so a row is tried again; a hang costs too much time for that.
_CRASHES_PER_ROW = 2
_DEATHS_PER_TASK = 3
_PLACE_BITS = 32
_IDLE = -1


class Watch:
    """Given to a job with its keys: tells which rows are refused, and is told which row is being read.

    refused: reasons by place in the keys. Without a slot (no worker process) nothing is watched.
    """

    def __init__(
        self, refused: Mapping[int, str] | None = None, *, slot: Any = None, number: int = 0, seconds: float = 0.0
    ) -> None:
        self._refused, self._slot, self._number, self._seconds = refused or {}, slot, number, seconds

    @contextlib.contextmanager
    def reading(self, place: int) -> Iterator[None]:
        """Around the reading of the row at `place`. Raises SourceError at once where that row is refused."""
        if place in self._refused:
            hint = "Check that other programs read it; where it is only slow, raise data.decode_timeout_seconds."
            raise SourceError(self._refused[place], hint=hint)
        if self._slot is None:
            yield
            return
        self._slot.value = self._number << _PLACE_BITS | place
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._slot.value = _IDLE


# (keys, watch) -> result; has to be picklable where processes are spawned.
Job = Callable[[Sequence[Any], Watch], Any]


def start_method(asked: str | None = None) -> str:
    """How workers start: as asked, else as set for the process, else by fork on Linux (the rest: Python's default)."""
    usual = "fork" if sys.platform == "linux" else multiprocessing.get_all_start_methods()[0]
    return asked or multiprocessing.get_start_method(allow_none=True) or usual


def may_have_workers() -> bool:
    """False in a daemonic process (a worker itself), which may start no others."""
    return not multiprocessing.current_process().daemon


def watched_call(function: Callable[[Row], Record], row: Row, *, timeout_seconds: float) -> Record:
    """What `function` gives for a row, in a process of its own. Raises SourceError where it refuses, hangs or dies."""
    ((_, answer),) = watched_map(function, [row], num_workers=1, timeout_seconds=timeout_seconds)
    if isinstance(answer, SourceError):
        raise answer
    return answer


def watched_map(
    function: Callable[[Row], Record],
    rows: Iterable[Row],
    *,
    num_workers: int,
    timeout_seconds: float = 60.0,
    in_order: bool = True,
    method: str | None = None,
) -> Iterator[tuple[Row, Record | SourceError]]:
    """(row, record) of each row, or (row, SourceError) where it was refused, hung or killed its process.

    function, rows and records have to be picklable; rows hashable. timeout_seconds: 0 is no limit; in_order: else as
    they get ready; num_workers: 0 reads here, unwatched. Other errors than SourceError end it.
    """
    job = partial(_one, function)
    tasks = ([row] for row in rows)
    if num_workers == 0:
        for task in tasks:
            yield job(task, Watch())
        return
    crew = Crew(job, num_workers=num_workers, timeout_seconds=timeout_seconds, method=method)
    with contextlib.closing(crew):
        yield from crew.run(tasks, in_order=in_order, held=1)


def _one(function: Callable[[Any], Any], rows: Sequence[Any], watch: Watch) -> tuple[Any, Any]:
    try:
        with watch.reading(0):
            return rows[0], function(rows[0])
    except SourceError as error:
        return rows[0], error


@dataclass(eq=False)
class _Task:
    number: int
    keys: Sequence[Any]
    deaths: int = 0  # of workers that had it before them and were between rows


@dataclass(frozen=True)
class _Failed:
    error: BaseException


@dataclass(eq=False)
class _Worker:
    process: Any
    inbox: Connection
    outbox: Connection
    slot: Any
    tasks: dict[int, _Task] = field(default_factory=dict)  # sent, not answered; in that order
    bytes_sent: dict[int, int] = field(default_factory=dict)


class Crew:
    """`num_workers` processes that run a job on tasks (sequences of keys); those that die are replaced.

    row_of: what stays the same of a key between epochs, so that a refused row is never opened again; file_of: what
    several rows share that hang alike (default: the row): one that took too long is not tried with its other windows.
    Close it, or use it up and drop it: its processes end with it, and with the parent.
    """

    def __init__(
        self,
        job: Job,
        *,
        num_workers: int,
        timeout_seconds: float,
        row_of: Callable[[Any], Hashable] = lambda key: key,
        file_of: Callable[[Any], Hashable] | None = None,
        method: str | None = None,
        refused: dict[Hashable, str] | None = None,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"a crew needs at least one worker, not {num_workers}")
        self.job, self.timeout_seconds, self.row_of = job, timeout_seconds, row_of
        self.file_of = file_of or row_of
        self.refused: dict[Hashable, str] = {} if refused is None else refused
        self._crashes: dict[Hashable, int] = {}
        self._context: Any = multiprocessing.get_context(start_method(method))
        self._next = 0
        self._again: deque[_Task] = deque()
        self.running = False
        self._workers: list[_Worker] = []
        # Before the exit handler of multiprocessing, which would wait for daemons that ignore SIGTERM.
        self._finalizer = Finalize(self, _end, args=(self._workers,), exitpriority=10)
        for _ in range(num_workers):
            self._workers.append(self._start())

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes; may be called twice."""
        self._finalizer()

    def run(self, tasks: Iterable[Sequence[Any]], *, in_order: bool = True, held: int = _AHEAD) -> Iterator[Any]:
        """The job's result for each task, in their order or as they get ready; at most 4 per worker are read ahead.

        held: tasks that a worker has at a time; with 1, none waits behind one that hangs, but a worker idles until the
        parent comes by. Raises what the job raised (SourceErrors of single rows are the job's business), or DataError
        where workers die without reading anything. A run that is left early closes the crew.
        """
        source, done, started = iter(tasks), dict[int, Any](), self._next
        first, self.running = started, True
        try:
            while True:
                ready = first in done if in_order else bool(done)
                self._collect(done, block=not ready and any(worker.tasks for worker in self._workers))
                self._feed(source, held, limit=first + _AHEAD * len(self._workers))
                ready = first in done if in_order else bool(done)
                if ready:
                    result = done.pop(first if in_order else next(iter(done)))
                    first += 1
                    if isinstance(result, _Failed):
                        raise result.error
                    yield result
                elif not self._again and not any(worker.tasks for worker in self._workers):
                    break
            self.running = False
        finally:
            if self.running:
                self.close()

    def _start(self) -> _Worker:
        inbox, ours = self._context.Pipe(duplex=False)
        outbox, theirs = self._context.Pipe(duplex=False)
        slot = self._context.RawValue("q", _IDLE)
        # A forked worker inherits our ends of all pipes; held open there, they would hide the end of the parent.
        inherited: list[Connection] = []
        if self._context.get_start_method() == "fork":
            inherited = [ours, outbox] + [end for worker in self._workers for end in (worker.inbox, worker.outbox)]
        process = self._context.Process(
            target=_work, args=(self.job, inbox, theirs, slot, self.timeout_seconds, inherited), daemon=True
        )
        process.start()
        inbox.close()
        theirs.close()
        return _Worker(process, ours, outbox, slot)

    def _feed(self, source: Iterator[Sequence[Any]], held: int, *, limit: int) -> None:
        """Hand out tasks to the workers with the fewest, those of dead workers first."""
        while True:
            worker = min(self._workers, key=lambda one: len(one.tasks))
            if len(worker.tasks) >= held:
                return
            if self._again:
                task = self._again.popleft()
            elif self._next < limit:
                keys = next(source, None)
                if keys is None:
                    return
                task = _Task(self._next, keys)
                self._next += 1
            else:
                return
            refused = self._refused(task.keys) if self.refused else {}
            message = ForkingPickler.dumps((task.number, task.keys, refused))
            if worker.tasks and sum(worker.bytes_sent.values()) + len(message) > _PIPE_BYTES:
                self._again.appendleft(task)
                return
            worker.tasks[task.number] = task
            worker.bytes_sent[task.number] = len(message)
            # A dead worker's task is found again when its outbox ends.
            with contextlib.suppress(OSError):
                worker.inbox.send_bytes(message)

    def _refused(self, keys: Sequence[Any]) -> dict[int, str]:
        """Reasons by place."""
        reasons = ((self.refused.get(self.file_of(key)) or self.refused.get(self.row_of(key))) for key in keys)
        return {place: reason for place, reason in enumerate(reasons) if reason}

    def _collect(self, done: dict[int, Any], *, block: bool) -> None:
        """Take in what workers have sent; replace those that died."""
        outboxes = {worker.outbox: place for place, worker in enumerate(self._workers)}
        for outbox in wait(list(outboxes), timeout=None if block else 0):
            place = outboxes[outbox]  # type: ignore[index]
            worker = self._workers[place]
            try:
                while worker.outbox.poll():
                    number, result = worker.outbox.recv()
                    worker.bytes_sent.pop(number)
                    worker.tasks.pop(number)
                    done[number] = result
            # End of file; or the shared memory of a tensor went down with its worker.
            except (EOFError, OSError, RuntimeError):
                worker.process.join(1.0)
                if worker.process.is_alive():
                    raise
                self._bury(worker)
                self._workers[place] = self._start()

    def _bury(self, worker: _Worker) -> None:
        """Blame the row that was at work, if any, and take the tasks back."""
        code = worker.process.exitcode
        worker.inbox.close()
        worker.outbox.close()
        at_work = int(worker.slot.value)
        task = worker.tasks.get(at_work >> _PLACE_BITS) if at_work != _IDLE else None
        if task is not None:
            key = task.keys[at_work & (1 << _PLACE_BITS) - 1]
            row = self.row_of(key)
            if code == -signal.SIGALRM:
                self.refused[self.file_of(key)] = f"decoding took longer than {self.timeout_seconds:g} s"
            else:
                self._crashes[row] = self._crashes.get(row, 0) + 1
                if self._crashes[row] == _CRASHES_PER_ROW:
                    self.refused[row] = f"the reader process died ({_cause(code)})"
        elif worker.tasks:
            task = next(iter(worker.tasks.values()))
            task.deaths += 1
            if task.deaths == _DEATHS_PER_TASK:
                raise DataError(
                    f"reader processes die between two rows ({_cause(code)}), {_DEATHS_PER_TASK} times on one batch",
                    hint="Shared memory or memory may be full (see `df -h /dev/shm`, `free -h`): take a smaller batch "
                    "or fewer of them, e.g. --set train.num_workers=1; 0 reads in the main process, unwatched.",
                )
        self._again = deque(sorted([*worker.tasks.values(), *self._again], key=lambda one: one.number))


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _end(workers: list[_Worker]) -> None:
    """Idle workers leave when their inbox ends; what is still at work is of no use to anyone."""
    for worker in workers:
        worker.inbox.close()
    for worker in workers:
        worker.process.join(0.2)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.outbox.close()
    workers.clear()


def _work(
    job: Job, inbox: Connection, outbox: Connection, slot: Any, timeout_seconds: float, inherited: list[Connection]
) -> None:
    """The life of a worker process."""
    import faulthandler

    for end in inherited:
        end.close()
    # Ctrl-C and SIGTERM reach all processes of a terminal or a job; what becomes of them is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A crash is one row's error, not a core file and a page of stack on the terminal.
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    torch.set_num_threads(1)
    parent = os.getppid()
    try:
        while True:
            while not inbox.poll(1.0):
                if os.getppid() != parent:
                    return
            number, keys, refused = inbox.recv()
            result: Any
            try:
                result = job(keys, Watch(refused, slot=slot, number=number, seconds=timeout_seconds))
            # Told to the parent, which raises it.
            except BaseException as error:  # noqa: BLE001
                result = _Failed(_sendable(error))
            outbox.send((number, result))
            del result, keys
    # The parent has closed the crew, or is gone.
    except (EOFError, ConnectionError):
        return


def _sendable(error: BaseException) -> BaseException:
    """The error with its traceback as a note; one that cannot be pickled as a RuntimeError."""
    note = "".join(traceback.format_exception(error))
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    # Pickling runs the error's own code.
    except Exception:  # noqa: BLE001
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = None
    error.add_note(f"in a reader process:\n{note}")
    return error

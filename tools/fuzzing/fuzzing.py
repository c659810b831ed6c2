"""What the tools that damage files share: all numbers tried in watched processes, findings kept, memory measured."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tools.measuring import progress
from videogru.data.loading.worker_pool import watched_map
from videogru.errors import SourceError

_Finding = TypeVar("_Finding")


class Attempts(Protocol):
    """Damaged files by number, 0 to len - 1; called with one in a worker process, it says what became of the file."""

    def __len__(self) -> int: ...

    def __call__(self, number: int) -> Any:
        """What became of the file of that number."""


def findings_of(
    attempts: Attempts,
    work: Path,
    *,
    kind: type[_Finding],
    died: Callable[[int, str], _Finding],
    workers: int,
    timeout_seconds: float,
    what: str,
) -> list[_Finding]:
    """The findings of all numbers, in order; those of an earlier call with the same files are read back from `work`.

    kind: of a finding, a dataclass of plain values with a `number`; died: the finding of a number whose process hung or
    ended, with the reason.
    """
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "findings.jsonl"
    found: dict[int, _Finding] = {}
    if kept.exists():
        entries = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        found = {entry["number"]: kind(**entry) for entry in entries}
    left = [number for number in range(len(attempts)) if number not in found]
    with kept.open("a", encoding="utf-8") as file:
        answers = watched_map(attempts, left, num_workers=workers, timeout_seconds=timeout_seconds, in_order=False)
        for _ in progress(range(len(left)), what):
            number, answer = next(answers)
            if isinstance(answer, SourceError):
                answer = died(number, answer.what)
            found[number] = answer
            file.write(json.dumps(vars(answer)) + "\n")
            file.flush()
    return [found[number] for number in range(len(attempts))]


def reset_peak() -> float:
    """Forget the process's peak of memory; what it is now, in MiB. Linux alone."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mib()


def peak_mib() -> float:
    """The process's peak of memory since the last reset, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

"""What the tools share about measuring: the machine, contenders that alternate, tables, and files that are whole."""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from rich.console import Console
from rich.progress import track

from videogru.errors import VideogruError
from videogru.files import atomic_path, atomic_text

INTERRUPTED = 130
_Item = TypeVar("_Item")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2; takes no abbreviated flags, which `published` would not know."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **how})

    def error(self, message: str) -> NoReturn:
        """The line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def exit_code(tool: str, work: Callable[[], int | None], *, kept: str) -> int:
    """What a tool ends with: the code of its work, of an error told in one line, or 130 after Ctrl-C.

    kept: what an interrupt leaves, as that line says it. A file that the system refuses gives 2.
    """
    try:
        return work() or 0
    except VideogruError as error:
        print(f"{tool}: {'. '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{tool}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{tool}: stopped; {kept}", file=sys.stderr)
        return INTERRUPTED


def published(words: Sequence[str]) -> str:
    """A command as it may be printed in a result: where this machine keeps its things is left out.

    The folder of --data-dir becomes DIR; of any other absolute path the last part stays.
    """
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        # --flag=VALUE or NAME=VALUE, but not a path with an = in it
        split = "=" in word and before != "--data-dir" and not Path(word).is_absolute()
        name, equals, value = word.partition("=") if split else ("", "", word)
        if before == "--data-dir" or name == "--data-dir":
            value = "DIR"
        elif Path(value).is_absolute():
            value = Path(value).name
        shown.append(f"{name}{equals}{value}")
    return shlex.join(shown)


def machine(command: Sequence[str]) -> dict[str, object]:
    """Where, when and with what something is measured; to be asked before it, while the load is that of others.

    cores: those this process may use; command: the words of the call, shown as `published` does.
    """
    import torch  # whoever measures its own children keeps itself small

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # Tags would stand in for the hash.
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *describe], check=False, capture_output=True, text=True
    )
    present = os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present,
        "cores present": present,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git.stdout.strip() or None,
        "command": published(command),
    }


def machine_sentence(facts: Mapping[str, object]) -> str:
    """The facts in a line of Markdown."""
    return (
        f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}: {facts['gpu'] or 'no GPU'}, {facts['cpu']}, "
        f"{facts['cores']} of {facts['cores present']} cores, threads: {facts['threads']}, load before "
        f"{facts['load']}, torch {facts['torch']}, Python {facts['python']}."
    )


def machine_lines(facts: Mapping[str, object]) -> list[str]:
    """The facts as a list in Markdown."""
    shown = {name: "none" if value is None else value for name, value in facts.items()}
    return [f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}" for name, value in shown.items()]


@dataclass(frozen=True)
class Row:
    """A contender: images per second and share of time waiting for data, one per round."""

    name: str
    note: str = ""
    rates: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


class Group(NamedTuple):
    """Contenders that alternated; ratios are to the first of them, round by round."""

    title: str
    rows: list[Row]

    def ratios(self, row: Row) -> list[float]:
        """Its rate as a multiple of the first row's in the same round."""
        return [rate / first for rate, first in zip(row.rates, self.rows[0].rates, strict=True)]

    def markdown(self) -> list[str]:
        """A table: medians, with the least and greatest of the rounds."""
        shares, notes = (any(getattr(row, name) for row in self.rows) for name in ("shares", "note"))
        head = ["", "images/s", "ratio to the first", *["waiting for data"] * shares, *["note"] * notes]
        rule = f"|---|{'---:|' * (2 + shares)}{'---|' * notes}"
        lines = [f"## {self.title}", "", f"| {' | '.join(head)} |", rule]
        for row in self.rows:
            cells = [row.name, median_range(row.rates, "{:,.0f}"), median_range(self.ratios(row), "{:.2f}")]
            cells += [median_range(row.shares, "{:.0%}")] * shares + [row.note] * notes
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, ""]

    def figures(self) -> dict[str, Any]:
        """The same for JSON, with every round."""
        return {"title": self.title, "rows": [asdict(row) | {"ratios": self.ratios(row)} for row in self.rows]}


def median_range(values: Sequence[float], form: str) -> str:
    """Median (least–greatest), each in a form such as {:.2f}; a dash where there is none."""
    if not values:
        return "–"
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low}–{high})"


def alternate(title: str, turns: Sequence[tuple[Row, Callable[[Row], None]]], rounds: int) -> Group:
    """Every contender's turn, in order, `rounds` times; a turn adds what it measured to its row."""
    for round_ in range(1, rounds + 1):
        for row, turn in turns:
            turn(row)
            line = f"{title}, round {round_}/{rounds}: {row.name}: {row.rates[-1]:,.0f} images/s"
            print(line, file=sys.stderr, flush=True)
    return Group(title, [row for row, _ in turns])


def last_error(stderr: str) -> str:
    """The line of a traceback that names the error, else the last one."""
    lines = stderr.strip().splitlines() or ["ended without a word"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def progress(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    """The items, with a bar on a terminal."""
    return track(items, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises DataError where it cannot be written."""
    with atomic_text(path) as file:
        file.write(text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; NaN is no JSON. Raises DataError where it cannot be written."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_picture(path: Path, figure: Any) -> None:
    """Save a Matplotlib figure as PNG, whole or not at all. Raises DataError where it cannot be written."""
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})

"""Damaged model files by the thousand through the reader: each is refused with a reason, or read and verified.

    python -m tools.fuzzing.fuzz_models [--count 5000] [--models runs/a/model.safetensors ...] --out docs/deploy

Each file is one damage to one model file, a function of (--seed, number): to its header's length, bytes, JSON values
and table of tensors, to the tensors, to its end, or a pickle under its name. Bases are small models made here, and
those of --models. Each has to end as a reasoned ModelFileError or as a model whose golden sample can be replayed, in a
bounded time and memory, in a watched process; a pickle must not run. Findings are kept in --work, so that a second call
goes on after an interrupt. Writes fuzz-models.json and .md; exits with 1 where anything was wrong.
"""

import copy
import itertools
import json
import pickle
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.fuzzing.fuzzing import findings_of, peak_mib, reset_peak
from tools.measuring import Parser, exit_code, machine, machine_lines, write_json, write_text
from videogru.checkpoint.golden_sample import add_golden_sample, verify_model
from videogru.checkpoint.model_file import make_card, read_card, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.errors import ModelFileError
from videogru.models.classifier import Classifier

MOST_MIB = 512  # above what was: the largest golden clip at the largest frame that a card may ask for is not small
MOST_SECONDS = 30.0
_NUMBERS = (0, 1, -1, 2, 7, 255, 65_536, 10**6, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e-300, 1e308)
_OTHERS: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    "nan",
    "\u0000",
    "../../etc/passwd",
    "é" * 300,
    [],
    [[]],
    {},
    {"a": 1},
    [0] * 2000,
)
_LENGTHS = (0, 1, 7, 100, 10**6, 10**8, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0)
_MODELS: tuple[dict[str, Any], ...] = (
    {},
    {"cell": "lstm", "temporal": "causal", "pooling": "attention", "seq": "rows"},
    {"cell": "convgru", "use_gaps": True},
    {"encoder": "conv2", "cell": "mingru", "num_layers": 2, "residual": True, "pooling": "multihead"},
)
_KINDS: tuple[str, ...] = ("video", "volume", "image", "video")


@dataclass(frozen=True)
class Finding:
    """What became of one file: refused or read, and then whether its golden sample held; else died, or ran a pickle."""

    number: int
    base: str
    mutation: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0


def make_bases(folder: Path, models: Sequence[Path]) -> dict[str, bytes]:
    """Content of sound model files, by name."""
    found = {f"{place}-{path.parent.name}": path.read_bytes() for place, path in enumerate(models)}
    for place, (settings, kind) in enumerate(zip(_MODELS, _KINDS, strict=True)):
        torch.manual_seed(place)
        config = ModelConfig(**{"encoder_width": 4, "hidden_size": 8, **settings})
        shape = {"in_channels": 1, "frame_size": 16, "num_classes": 3, "mean": (0.4,), "std": (0.2,)}
        model = Classifier(config, **shape).eval()  # type: ignore[arg-type]
        data = DataConfig(frame_size=16, num_frames=4, channels=1).for_kind(kind)  # type: ignore[arg-type]
        card = make_card(model, kind=kind, classes=("a", "b", "c"), data=data)  # type: ignore[arg-type]
        path = folder / "base.safetensors"
        write_model(path, model, card.model_copy(update={"created": datetime(2026, 1, 1, tzinfo=UTC)}))
        add_golden_sample(path)
        found["-".join(["made", *map(str, settings.values())])] = path.read_bytes()
    return found


# Damage ---------------------------------------------------------------------------------------------------------

_Draws = np.random.Generator


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        found.append((value, key))
        if isinstance(inner, dict | list):
            _places(inner, found)
    return found


def _any_value(draws: _Draws, before: Any) -> Any:
    if isinstance(before, int | float) and draws.random() < 0.3:
        return before * 2 + 1
    pool = (*_NUMBERS, *_OTHERS)
    return copy.deepcopy(pool[int(draws.integers(len(pool)))])  # what is put in may be changed itself


def _change(value: Any, draws: _Draws) -> None:
    places = _places(value, [])
    container, key = places[int(draws.integers(len(places)))]
    if draws.random() < 0.2 and isinstance(container, dict):
        del container[key]
    elif draws.random() < 0.1 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        container[key] = _any_value(draws, container[key])


def _card(content: bytes, draws: _Draws) -> bytes:
    header, body = _split(content)
    card = json.loads(header["__metadata__"]["videogru"])
    for _ in range(int(draws.integers(1, 3))):
        _change(card, draws)
    header["__metadata__"]["videogru"] = json.dumps(card)
    return _join(header, body)


def _table(content: bytes, draws: _Draws) -> bytes:
    header, body = _split(content)
    _change(header, draws)
    return _join(header, body)


def _swap(content: bytes, draws: _Draws) -> bytes:
    header, body = _split(content)
    names = [name for name in header if name != "__metadata__"]
    one, other = (names[int(place)] for place in draws.choice(len(names), 2, replace=False))
    header[one], header[other] = header[other], header[one]
    return _join(header, body)


def _length(content: bytes, draws: _Draws) -> bytes:
    value = _LENGTHS[int(draws.integers(len(_LENGTHS)))]
    return value.to_bytes(8, "little") + content[8:]


def _flip(content: bytes, draws: _Draws, first: int, last: int) -> bytes:
    damaged = bytearray(content)
    for place in draws.integers(first, last, int(draws.integers(1, 5))):
        damaged[place] ^= 1 << int(draws.integers(8))
    return bytes(damaged)


def _header(content: bytes, draws: _Draws) -> bytes:
    return _flip(content, draws, 8, 8 + int.from_bytes(content[:8], "little"))


def _body(content: bytes, draws: _Draws) -> bytes:
    return _flip(content, draws, 8 + int.from_bytes(content[:8], "little"), len(content))


def _float(content: bytes, draws: _Draws) -> bytes:
    start = 8 + int.from_bytes(content[:8], "little")
    place = start + 4 * int(draws.integers((len(content) - start) // 4))
    value = np.float32(_FLOATS[int(draws.integers(len(_FLOATS)))]).tobytes()
    return content[:place] + value + content[place + 4 :]


def _cut(content: bytes, draws: _Draws) -> bytes:
    return content[: int(draws.integers(len(content)))]


def _more(content: bytes, draws: _Draws) -> bytes:
    return content + draws.bytes(int(draws.integers(1, 100)))


def _zeros(content: bytes, draws: _Draws) -> bytes:
    start, size = int(draws.integers(len(content))), int(draws.integers(1, 400))
    size = min(size, len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def _delete(content: bytes, draws: _Draws) -> bytes:
    start = int(draws.integers(len(content)))
    return content[:start] + content[start + int(draws.integers(1, 100)) :]


class _Runs:
    """Unpickled, it makes a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.marker),)


MARKER = "pickle-ran"
MUTATIONS: dict[str, Callable[[bytes, _Draws], bytes]] = {
    "card": _card, "table": _table, "swap": _swap, "length": _length, "header": _header, "body": _body,
    "float": _float, "cut": _cut, "more": _more, "zeros": _zeros, "delete": _delete,
}  # fmt: skip


class Attempt:
    """Damages and reads one model file; runs in a worker process."""

    def __init__(self, bases: dict[str, bytes], count: int, seed: int) -> None:
        self.bases, self.seed = bases, seed
        pairs = list(itertools.product(bases, [*MUTATIONS, *["card"] * 6, "table", "pickle"]))
        order = np.random.default_rng(seed).permutation(len(pairs))
        self.planned = list(itertools.islice(itertools.cycle([pairs[place] for place in order]), count))

    def __len__(self) -> int:
        return len(self.planned)

    def content(self, number: int, folder: Path) -> bytes:
        """The damaged file of that number."""
        base, kind = self.planned[number]
        draws = np.random.default_rng((self.seed, number))
        if kind == "pickle":
            return pickle.dumps(_Runs(str(folder / MARKER)), protocol=int(draws.integers(5)))
        return MUTATIONS[kind](self.bases[base], draws)

    def __call__(self, number: int) -> Finding:
        """What became of the file of that number."""
        base, kind = self.planned[number]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            path.write_bytes(self.content(number, Path(folder)))
            before, started = reset_peak(), time.perf_counter()
            reason = ""
            try:
                read_card(path)
                replay = verify_model(path)
                outcome = "no golden sample" if replay is None else "verified" if replay.holds else "not verified"
            except ModelFileError as error:
                outcome, reason = "refused", error.what
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
                outcome, reason = "crashed", f"{type(error).__name__}: {error}"
            seconds, peak = time.perf_counter() - started, peak_mib() - before
            if (Path(folder) / MARKER).exists():
                outcome = "ran a pickle"
        return Finding(number, base, kind, outcome, reason, round(seconds, 3), round(peak, 1))


# All of them ----------------------------------------------------------------------------------------------------


def run_all(attempt: Attempt, work: Path, *, workers: int) -> list[Finding]:
    """All findings; those of an earlier call with the same files are read back."""

    def died(number: int, reason: str) -> Finding:
        base, kind = attempt.planned[number]
        return Finding(number, base, kind, "died", reason)

    return findings_of(
        attempt,
        work,
        kind=Finding,
        died=died,
        workers=workers,
        timeout_seconds=MOST_SECONDS,
        what="damaged model files",
    )


def wrong(finding: Finding) -> bool:
    """Whether a file ended as it must not."""
    ok = finding.outcome in ("verified", "not verified", "no golden sample") or (
        finding.outcome == "refused" and finding.reason
    )
    return not ok or finding.peak_mib > MOST_MIB or finding.seconds > MOST_SECONDS


def summarize(findings: list[Finding]) -> dict[str, Any]:
    """Counts, the largest figures, and every finding that is wrong."""
    plain = [re.sub(r"\d+", "N", finding.reason)[:120] for finding in findings if finding.reason]
    return {
        "files": len(findings),
        "outcomes": dict(Counter(finding.outcome for finding in findings)),
        "by mutation": dict(sorted(Counter(f"{f.mutation}: {f.outcome}" for f in findings).items())),
        "most_seconds": max(finding.seconds for finding in findings),
        "most_peak_mib": max(finding.peak_mib for finding in findings),
        "reasons": dict(Counter(plain).most_common(30)),
        "wrong": [asdict(finding) for finding in findings if wrong(finding)],
    }


def to_markdown(facts: dict[str, object], summary: dict[str, Any]) -> str:
    """The summary as a page."""
    outcomes = ("refused", "verified", "not verified", "no golden sample", "crashed", "died", "ran a pickle")
    lines = ["# Damaged model files", "", *machine_lines(facts), ""]
    lines += [
        f"{summary['files']:,} files. "
        + ", ".join(f"{outcome}: {summary['outcomes'].get(outcome, 0):,}" for outcome in outcomes)
        + f". Longest: {summary['most_seconds']:.1f} s; most memory above the process's own: "
        f"{summary['most_peak_mib']:.0f} MiB. Wrong: {len(summary['wrong'])}.",
        "",
        f"| damage | {' | '.join(outcomes)} |",
        "|---|" + "---:|" * len(outcomes),
    ]
    by = summary["by mutation"]
    for kind in dict.fromkeys(key.partition(":")[0] for key in by):
        lines.append(f"| {kind} | {' | '.join(str(by.get(f'{kind}: {outcome}', 0)) for outcome in outcomes)} |")
    lines += ["", "| reason | files |", "|---|---:|"]
    lines += [f"| {' '.join(why.replace('|', '/').split())} | {count} |" for why, count in summary["reasons"].items()]
    return "\n".join([*lines, ""])


def main(words: Sequence[str] | None = None) -> int:
    """Damage, read, count; the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    parser = Parser(prog="fuzz_models.py", description=__doc__)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="model files to damage beside the made ones")
    parser.add_argument("--count", type=int, default=5000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for what is kept; default: runs/fuzz-models-SEED")
    parser.add_argument("--out", type=Path, required=True, help="folder for fuzz-models.json and fuzz-models.md")
    options = parser.parse_args(words)
    if options.count < 1 or options.workers < 1:
        parser.error("--count and --workers want whole numbers above 0")
    work = options.work or Path("runs") / f"fuzz-models-{options.seed}"
    facts = machine(["python", "-m", "tools.fuzzing.fuzz_models", *words])

    def work_on() -> int:
        with tempfile.TemporaryDirectory() as folder:
            bases = make_bases(Path(folder), options.models)
        summary = summarize(run_all(Attempt(bases, options.count, options.seed), work, workers=options.workers))
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "fuzz-models.json", {"machine": facts, **summary})
        page = to_markdown(facts, summary)
        write_text(options.out / "fuzz-models.md", page)
        print(page.split("| damage |")[0].strip())
        return 1 if summary["wrong"] else 0

    return exit_code("fuzz_models.py", work_on, kept=f"the findings so far are in {work}")


if __name__ == "__main__":
    sys.exit(main())

"""Damaged scans by the thousand through the reader; none may come out as other voxels than nibabel's.

    python -m tools.fuzzing.fuzz_volumes --shared ../shared/data [--count 2400] --out docs/volume

Each file is one damage to one small scan, a function of (--seed, number); all of SHARED/hostile/nifti come on top. Each
has to end as the voxels that nibabel reads (`np.asarray(nibabel.load(file).dataobj)`, turned and mapped to 0..1 here by
other means) or as a reasoned SourceError, in a bounded time and memory, in a watched process. Damage to a gzip stream
must give the voxels of the sound file or be refused: its checksum tells. Findings are kept in --work, so that a second
call goes on after an interrupt. Writes fuzz.json and fuzz.md; exits with 1 where anything was wrong.
"""

import itertools
import logging
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from tools.fuzzing.fuzzing import findings_of, peak_mib, reset_peak
from tools.fuzzing.volume_mutations import MUTATIONS, Base, collect_bases, mutate
from tools.measuring import Parser, exit_code, machine, machine_lines, write_json, write_text
from videogru.config import DataConfig
from videogru.data.readers.file_types import kind_of_name
from videogru.data.readers.open import open_source
from videogru.data.readers.volume.volume import Volume
from videogru.errors import DataError, SourceError

MOST_MIB = 256  # above what was; the largest base has 2 MiB of voxels
MOST_SECONDS = 20.0
DATA = DataConfig(percentile_low=0, percentile_high=100, volume=0).for_kind("volume")


@dataclass(frozen=True)
class Finding:
    """What became of one file; match: same, differs, nibabel refuses, other voxels than the sound file."""

    number: int
    base: str
    mutation: str
    outcome: str  # voxels, refused or died
    reason: str = ""
    match: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0


class Attempt:
    """Opens and reads one damaged scan; runs in a worker process."""

    def __init__(self, bases: dict[str, Base], count: int, seed: int, hostile: Sequence[Path] = ()) -> None:
        self.bases, self.seed, self.hostile = bases, seed, list(hostile)
        pairs = itertools.product(MUTATIONS, bases)
        fitting = [(base, kind) for kind, base in pairs if not kind.startswith("gzip") or bases[base].packed]
        # Mixed, so that a few of them are of all kinds.
        order = np.random.default_rng(seed).permutation(len(fitting))
        self.planned = list(itertools.islice(itertools.cycle([fitting[place] for place in order]), count))

    def __len__(self) -> int:
        return len(self.planned) + len(self.hostile)

    def write(self, number: int, folder: Path) -> Path:
        """Write the file of that number into a folder; returns what is to be opened."""
        base, kind = self.planned[number]
        return mutate(self.bases[base], kind, np.random.default_rng((self.seed, number)), folder)

    def __call__(self, number: int) -> Finding:
        """What became of the file of that number."""
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
        if number >= len(self.planned):
            path = self.hostile[number - len(self.planned)]
            return self._read(number, path.name, "hostile", path, None)
        base, kind = self.planned[number]
        with tempfile.TemporaryDirectory() as folder:
            path = self.write(number, Path(folder))
            sound = self.bases[base] if kind.startswith("gzip") else None
            return self._read(number, base, kind, path, sound)

    def _read(self, number: int, base: str, kind: str, path: Path, sound: Base | None) -> Finding:
        before, started = reset_peak(), time.perf_counter()
        reason = match = ""
        try:
            with open_source(path, data=DATA, kind="volume") as source:
                assert isinstance(source, Volume)
                read = source.read(range(len(source.positions)))[:, 0].numpy()
                ends, details = source.ends, source.details
            outcome = "voxels"
        except SourceError as error:
            outcome, reason = "refused", error.what
        seconds, peak = time.perf_counter() - started, peak_mib() - before
        if outcome == "voxels":
            match = compare(path, read, ends, str(details["axis"]))
            if match == "same" and sound is not None:
                with tempfile.TemporaryDirectory() as folder:
                    whole = truth(sound.write(Path(folder)))
                    # NaN is NaN here.
                    same = np.array_equal(truth(path), whole, equal_nan=whole.dtype.kind == "f")
                    match = "same" if same else "other voxels than the sound file"
        return Finding(number, base, kind, outcome, reason, match, round(seconds, 3), round(peak, 1))


def truth(path: Path) -> NDArray[Any]:
    """The first volume (X Y Z) as nibabel reads it, in RAS by nibabel's own turning."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        image: Any = nib.load(path)
        values = np.asarray(image.dataobj)
        values = values.reshape(*values.shape[:3], -1, order="F")[..., 0]
        turned: Any = nib.as_closest_canonical(nib.Nifti1Image(values.astype(np.float64), image.affine))
        return np.asarray(turned.dataobj)


def compare(path: Path, read: NDArray[np.float32], ends: tuple[float, float], axis: str) -> str:
    """Compare all slices (T H W) in 0..1 with nibabel's voxels; the ends have to be their least and greatest.

    Of large volumes the ends come from a part of the voxels, so they may lie inside.
    """
    try:
        values = truth(path)
    except Exception as error:  # noqa: BLE001 - whatever nibabel raises, we have read what it does not
        return f"nibabel refuses: {type(error).__name__}"
    finite = values[np.isfinite(values)]
    low, high = ends
    slack = 1e-6 * max(abs(float(finite.min())), abs(float(finite.max())), 1e-300)
    if low < finite.min() - slack or high > finite.max() + slack:
        return "differs: ends"
    if values.size < 1_000_000 and (abs(low - finite.min()) > slack or abs(high - finite.max()) > slack):
        return "differs: ends"
    # x to the right, y to anterior, z to superior; rows from the top of the picture.
    unrolled = {
        "axial": np.einsum("xyz->zyx", values)[:, ::-1, ::-1],
        "coronal": np.einsum("xyz->yzx", values)[:, ::-1, ::-1],
        "sagittal": np.einsum("xyz->xzy", values)[:, ::-1, ::-1],
    }[axis]
    if unrolled.shape != read.shape:
        return "differs: shape"
    with np.errstate(all="ignore"):
        expected = np.zeros(unrolled.shape) if low == high else np.clip((unrolled - low) / (high - low), 0, 1)
    expected[~np.isfinite(unrolled)] = 0
    return "same" if np.allclose(read, expected, rtol=0, atol=1e-5) else "differs: voxels"


def run_all(attempt: Attempt, work: Path, *, workers: int) -> list[Finding]:
    """All findings; those of an earlier call with the same files are read back."""

    def died(number: int, reason: str) -> Finding:
        if number < len(attempt.planned):
            base, kind = attempt.planned[number]
        else:
            base, kind = attempt.hostile[number - len(attempt.planned)].name, "hostile"
        return Finding(number, base, kind, "died", reason)

    return findings_of(
        attempt, work, kind=Finding, died=died, workers=workers, timeout_seconds=MOST_SECONDS, what="damaged scans"
    )


def wrong(finding: Finding) -> bool:
    """Whether a file ended as it must not."""
    ok = finding.match == "same" if finding.outcome == "voxels" else finding.outcome == "refused" and finding.reason
    return not ok or finding.peak_mib > MOST_MIB or finding.seconds > MOST_SECONDS


def summarize(findings: list[Finding]) -> dict[str, Any]:
    """Counts, the largest figures, and every finding that is wrong."""
    by: dict[str, Counter[str]] = {"base": Counter(), "mutation": Counter()}
    for finding in findings:
        if finding.mutation != "hostile":
            by["base"][f"{finding.base}: {finding.outcome}"] += 1
        by["mutation"][f"{finding.mutation}: {finding.outcome}"] += 1
    plain = [re.sub(r"\d+", "N", finding.reason)[:160] for finding in findings if finding.reason]
    return {
        "files": len(findings),
        "hostile": sum(finding.mutation == "hostile" for finding in findings),
        "outcomes": dict(Counter(finding.outcome for finding in findings)),
        "matches": dict(Counter(finding.match for finding in findings if finding.match)),
        "most_seconds": max(finding.seconds for finding in findings),
        "most_peak_mib": max(finding.peak_mib for finding in findings),
        "by": {name: dict(sorted(counts.items())) for name, counts in by.items()},
        "reasons": dict(Counter(plain).most_common(30)),
        "wrong": [asdict(finding) for finding in findings if wrong(finding)],
    }


def to_markdown(facts: dict[str, object], summary: dict[str, Any]) -> str:
    """The summary as a page."""
    outcomes, matches = summary["outcomes"], summary["matches"]
    bases = len({key.rpartition(":")[0] for key in summary["by"]["base"]})
    lines = ["# Damaged scans", "", *machine_lines(facts), ""]
    lines += [
        f"{summary['files'] - summary['hostile']:,} files, each one damage ({', '.join(MUTATIONS)}) to one of {bases} "
        f"small scans, and {summary['hostile']} hostile ones. {outcomes.get('voxels', 0):,} gave voxels, "
        f"{matches.get('same', 0):,} of them those that nibabel reads; {outcomes.get('refused', 0):,} were refused "
        f"with a reason; {outcomes.get('died', 0)} hung or killed their process. "
        f"Longest: {summary['most_seconds']:.1f} s; most memory above the process's own: "
        f"{summary['most_peak_mib']:.0f} MiB. Wrong: {len(summary['wrong'])}.",
        "",
    ]
    for name, counts in summary["by"].items():
        lines += [f"| {name} | voxels | refused | died |", "|---|---:|---:|---:|"]
        for key in dict.fromkeys(key.rpartition(":")[0] for key in counts):
            cells = [str(counts.get(f"{key}: {outcome}", 0)) for outcome in ("voxels", "refused", "died")]
            lines.append(f"| {key} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| reason | files |", "|---|---:|"]
    lines += [f"| {' '.join(why.replace('|', '/').split())} | {count} |" for why, count in summary["reasons"].items()]
    return "\n".join([*lines, ""])


def main(words: Sequence[str] | None = None) -> int:
    """Damage, read, count; the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    parser = Parser(prog="fuzz_volumes.py", description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with volumes/ and hostile/nifti/")
    parser.add_argument("--count", type=int, default=2400, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for what is kept; default: runs/fuzz-volumes-SEED")
    parser.add_argument("--out", type=Path, required=True, help="folder for fuzz.json and fuzz.md")
    options = parser.parse_args(words)
    if options.count < 1 or options.workers < 1:
        parser.error("--count and --workers want whole numbers above 0")
    work = options.work or Path("runs") / f"fuzz-volumes-{options.seed}"
    facts = machine(["python", "-m", "tools.fuzzing.fuzz_volumes", *words])

    def work_on() -> int:
        bases = collect_bases(options.shared / "volumes")
        if not bases:
            raise DataError("holds no small scan", where=options.shared / "volumes")
        found = sorted((options.shared / "hostile" / "nifti").iterdir())
        hostile = [path for path in found if kind_of_name(path.name) == "volume"]
        attempt = Attempt(bases, options.count, options.seed, hostile)
        summary = summarize(run_all(attempt, work, workers=options.workers))
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "fuzz.json", {"machine": facts, **summary})
        page = to_markdown(facts, summary)
        write_text(options.out / "fuzz.md", page)
        print(page.split("| base |")[0].strip())
        return 1 if summary["wrong"] else 0

    return exit_code("fuzz_volumes.py", work_on, kept=f"the findings so far are in {work}")


if __name__ == "__main__":
    sys.exit(main())

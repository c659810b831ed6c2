"""Damaged videos by the thousand through the default reader, and samples of them through the commands.

    python -m tools.fuzzing.fuzz_videos [--shared ../shared/data/videos] [--count 2400] [--sample 96] --out docs/video

Every file has to end as frames or as a reasoned SourceError, in a bounded time and memory; where frames come out, they
have to be those that a plain decode of the same file from its start gives for their time stamps. Files are functions of
(--seed, number). Findings are kept in --work, so that a second call goes on after an interrupt. Writes fuzz.json and
fuzz.md; exits with 1 where anything was wrong.
"""

import csv
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tools.fuzzing.video_mutations import MUTATIONS, collect_bases, mutate, plan
from tools.measuring import Parser, exit_code, machine, machine_lines, progress, write_json, write_text
from videogru.config import DataConfig
from videogru.data.clips.sampling import uniform
from videogru.data.loading.worker_pool import watched_map
from videogru.data.readers.open import open_source
from videogru.errors import SourceError

FRAMES = 8
MOST_MIB = 1024


@dataclass(frozen=True)
class Finding:
    """What became of one file; match: see `compare`; memory above what was."""

    number: int
    base: str
    mutation: str
    outcome: str  # frames, refused or died
    reason: str = ""
    access: str = ""
    match: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0


class Attempt:
    """Opens and reads one damaged file; runs in a worker process."""

    def __init__(self, bases: dict[str, bytes], planned: list[tuple[str, str]], seed: int) -> None:
        self.bases, self.planned, self.seed = bases, planned, seed

    def damaged(self, number: int) -> tuple[str, bytes]:
        """The suffix and the bytes of a file."""
        base, mutation = self.planned[number]
        return Path(base).suffix, mutate(self.bases[base], mutation, np.random.default_rng((self.seed, number)))

    def __call__(self, number: int) -> Finding:
        """What became of the file of that number."""
        suffix, data = self.damaged(number)
        base, mutation = self.planned[number]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"video{suffix}"
            path.write_bytes(data)
            before, started = _reset_peak(), time.perf_counter()
            access = match = ""
            try:
                with open_source(path, data=DataConfig(), kind="video") as source:
                    chosen = uniform(positions=source.positions, extent=source.extent, num_frames=FRAMES)
                    times = source.positions[chosen]
                    frames = source.read([int(index) for index in chosen]).numpy()
                    access = str(source.details["access"])
                outcome, reason = "frames", ""
            except SourceError as error:
                outcome, reason = "refused", error.what
            seconds, peak = time.perf_counter() - started, _peak_mib() - before
            if outcome == "frames":
                match = compare(path, frames, times, chosen, access)
        return Finding(number, base, mutation, outcome, reason, access, match, round(seconds, 3), round(peak, 1))


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mib()


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def compare(
    path: Path, frames: NDArray[np.uint8], times: NDArray[np.float64], orders: NDArray[np.int64], access: str
) -> str:
    """Compare frames (T 3 H W) with a decode from the start: by time stamp, or by order where stamps are no help.

    Damaged stamps may go back in the decode from the start; frames found by seeking have to be those of their stamps
    all the same, since the reader took them by these.

    "same": each equals the one of its stamp in one of the eight orientations. "undefined": the decode from the start
    gives other pixels itself when buffers are reused in another order, since the decoder leaves some of a damaged frame
    as they were. "concealed": nearest to the one of its stamp; decoders patch damage with what they decoded before,
    which is less after a seek. "differs" and "unknown stamp" are wrong frames.
    """
    truth, stamps = plain_decode(path)
    known = [stamp for stamp in stamps if stamp is not None]
    increasing = all(a < b for a, b in itertools.pairwise(known))
    by_time = len(known) == len(stamps) and (increasing or access == "by seeking")
    found = {"same"}
    others: list[list[NDArray[np.uint8]]] = []
    for frame, seconds, order in zip(frames, times, orders, strict=True):
        place = int(np.argmin(np.abs(np.array(known) - seconds))) if by_time else int(order)
        if place >= len(truth) or (by_time and abs(known[place] - seconds) > 1e-6):
            return "unknown stamp"
        if any(np.array_equal(frame, turned) for turned in _orientations(truth[place])):
            continue
        others = others or [plain_decode(path, held=held)[0] for held in (1, 2, 3, 10_000)]
        if any(not np.array_equal(truth[place], other[place]) for other in others):
            found.add("undefined")
            continue
        gaps = [min(_gap(frame, turned) for turned in _orientations(other)) for other in truth]
        found.add("differs" if gaps[place] > min(gaps) else "concealed")
    return next(match for match in ("differs", "concealed", "undefined", "same") if match in found)


def _orientations(frame: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """The frame (3 H W) turned and mirrored in all eight ways."""
    for turns in range(4):
        turned = np.rot90(frame, turns, axes=(1, 2))
        yield from (turned, turned[:, :, ::-1])


def _gap(frame: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    if frame.shape != other.shape:
        return float("inf")
    return float(np.abs(frame[:, ::2, ::2].astype(np.int16) - other[:, ::2, ::2]).mean())


def plain_decode(path: Path, *, held: int = 0) -> tuple[list[NDArray[np.uint8]], list[float | None]]:
    """All sound frames (3 H W) of the best stream in the size of the first, and their seconds; nothing is sought.

    held: frames whose buffers are kept from being reused.
    """
    kept: deque[Any] = deque(maxlen=held)
    frames: list[NDArray[np.uint8]] = []
    stamps: list[float | None] = []
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"
        # dav1d takes threads all the same, and loses the frames that they hold where the last packet is damaged.
        stream.codec_context.thread_count = 1
        size: tuple[int, int] | None = None
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                kept.append(frame)
                if frame.is_corrupt:
                    continue
                size = size or (frame.width, frame.height)
                picture = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
                frames.append(picture.transpose(2, 0, 1))
                stamps.append(None if frame.pts is None else float(frame.pts * stream.time_base))
    return frames, stamps


def run_all(attempt: Attempt, work: Path, *, count: int, workers: int, timeout_seconds: float) -> list[Finding]:
    """All findings; those of an earlier call with the same files are read back."""
    kept = work / "findings.jsonl"
    found: dict[int, Finding] = {}
    if kept.exists():
        lines = kept.read_text(encoding="utf-8").splitlines()
        found = {finding.number: finding for finding in (Finding(**json.loads(line)) for line in lines)}
    left = [number for number in range(count) if number not in found]
    with kept.open("a", encoding="utf-8") as file:
        answers = watched_map(attempt, left, num_workers=workers, timeout_seconds=timeout_seconds, in_order=False)
        for number, answer in progress_of(answers, len(left)):
            if isinstance(answer, SourceError):
                base, mutation = attempt.planned[number]
                answer = Finding(number, base, mutation, "died", answer.what)
            found[number] = answer
            file.write(json.dumps(asdict(answer)) + "\n")
            file.flush()
    return [found[number] for number in range(count)]


def progress_of(answers: Iterator[Any], total: int) -> Iterator[Any]:
    """The answers, with a bar on a terminal."""
    for _ in progress(range(total), "damaged files"):
        yield next(answers)


def through_commands(attempt: Attempt, findings: list[Finding], work: Path, sample: int) -> dict[str, Any]:
    """A training on a folder with damaged files, `infer` of all of them, and what was wrong with either."""
    folder, run = work / "clips", work / "run"
    chosen = findings[:: max(1, len(findings) // sample)][:sample] if sample else []
    names: dict[str, Finding] = {}
    for finding in chosen:
        suffix, data = attempt.damaged(finding.number)
        label = "ab"[finding.number % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{finding.number:05}{suffix}").write_bytes(data)
        names[f"{label}/{finding.number:05}{suffix}"] = finding
    for number, (name, data) in enumerate(attempt.bases.items()):
        label = "ab"[number % 2]
        (folder / label / f"sound-{name}").write_bytes(data)
    problems: list[str] = []
    quick = {"data.frame_size": 32, "data.num_frames": FRAMES, "data.max_bad": 10_000, "train.num_workers": 2}
    quick |= {"model.encoder_width": 8, "model.hidden_size": 8}
    settings = [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
    trained = _call(problems, (0,), "train", "--dataset", folder, "--epochs", "2", "--out", run, *settings)
    wrong_labels = 0
    for split in ("val", "test"):
        with (run / f"predictions-{split}.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        wrong_labels += sum(row["label"] != row["source"].split("/")[0] for row in rows)
    with (run / "bad_files.csv").open(newline="", encoding="utf-8") as file:
        skipped = list(csv.DictReader(file))
    problems += [f"skipped in training without a reason: {row['source']}" for row in skipped if not row["reason"]]
    problems += [
        f"skipped in training, but it is sound: {row['source']}" for row in skipped if "sound-" in row["source"]
    ]
    answers = work / "answers.jsonl"
    _call(problems, (0, 3), "infer", folder, "--model", run, "--format", "jsonl", "--out", answers)
    records = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    if len(records) != len(names) + len(attempt.bases):
        problems.append(f"infer gave {len(records)} rows for {len(names) + len(attempt.bases)} files")
    outcomes = Counter[str]()
    for record in records:
        place = "/".join(Path(record["source"]).parts[-2:])
        outcomes["error" if record["error"] else "prediction"] += 1
        read = place not in names or names[place].outcome == "frames"
        if read == bool(record["error"]):
            problems.append(f"{place}: infer says {record['error'] or record['predicted']}, the reader says otherwise")
    if wrong_labels:
        problems.append(f"{wrong_labels} labels of predictions are not those of their folders")
    return {
        "damaged": len(names), "sound": len(attempt.bases), "skipped_in_training": len(skipped),
        "infer": dict(outcomes), "wrong_labels": wrong_labels, "seconds_of_training": trained, "problems": problems,
    }  # fmt: skip


def _call(problems: list[str], codes: tuple[int, ...], *words: object) -> float:
    """Run a command of videogru; note an unexpected exit code or a traceback. Returns its seconds."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "videogru", *map(str, words)], capture_output=True, text=True)
    if done.returncode not in codes or "Traceback" in done.stderr:
        problems.append(f"{words[0]} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return round(time.perf_counter() - started, 1)


def summarize(findings: list[Finding]) -> dict[str, Any]:
    """Counts, the largest figures, and every finding that is no frames and no reasoned refusal."""
    bad = [
        finding for finding in findings
        if finding.outcome == "died" or finding.match in ("differs", "unknown stamp")
        or finding.peak_mib > MOST_MIB or (finding.outcome == "refused" and not finding.reason)
    ]  # fmt: skip
    plain = [re.sub(r"\d+", "N", finding.reason) for finding in findings if finding.reason]
    by = {"base": Counter[str](), "mutation": Counter[str]()}
    for finding in findings:
        by["base"][f"{finding.base}: {finding.outcome}"] += 1
        by["mutation"][f"{finding.mutation}: {finding.outcome}"] += 1
    return {
        "files": len(findings),
        "outcomes": dict(Counter(finding.outcome for finding in findings)),
        "matches": dict(Counter(finding.match for finding in findings if finding.match)),
        "access": dict(Counter(finding.access for finding in findings if finding.access)),
        "most_seconds": max(finding.seconds for finding in findings),
        "most_peak_mib": max(finding.peak_mib for finding in findings),
        "by": {name: dict(sorted(counts.items())) for name, counts in by.items()},
        "reasons": dict(Counter(plain).most_common(40)),
        "wrong": [asdict(finding) for finding in bad],
    }


def to_markdown(facts: dict[str, object], summary: dict[str, Any], commands: dict[str, Any] | None) -> str:
    """The summary as a page."""
    lines = ["# Damaged videos", "", *machine_lines(facts), ""]
    outcomes, matches = summary["outcomes"], summary["matches"]
    wrong = matches.get("differs", 0) + matches.get("unknown stamp", 0)
    lines += [
        f"{summary['files']:,} files, each one damage ({', '.join(MUTATIONS)}) to one of "
        f"{len({key.split(':')[0] for key in summary['by']['base']})} small videos. Opened and read ({FRAMES} frames) "
        f"by the default reader in a watched process: {outcomes.get('frames', 0):,} gave frames, "
        f"{outcomes.get('refused', 0):,} were refused with a reason, {outcomes.get('died', 0)} hung or killed their "
        f"process. Of those with frames, {matches.get('same', 0):,} gave exactly what a plain decode from the start "
        f"gives for the same time stamps, {matches.get('concealed', 0)} gave the frames of those times with damage "
        f"patched otherwise by the decoder, {matches.get('undefined', 0)} such frames whose pixels the decoder leaves "
        f"undefined (a plain decode does not repeat itself either), {wrong} gave wrong ones. "
        f"Longest: {summary['most_seconds']:.1f} s; most memory above the process's own: "
        f"{summary['most_peak_mib']:.0f} MiB.",
        "",
    ]
    if commands is not None:
        lines += [
            f"{commands['damaged']} of them and {commands['sound']} sound ones through `videogru train` (2 epochs, 2 "
            f"workers: {commands['skipped_in_training']} training files skipped with their reason, "
            f"{commands['wrong_labels']} wrong labels) and `videogru infer` ({commands['infer'].get('prediction', 0)} "
            f"predictions, {commands['infer'].get('error', 0)} errors). Problems: {len(commands['problems'])}.",
            "",
        ]
    for name, counts in summary["by"].items():
        lines += [f"| {name} | frames | refused | died |", "|---|---:|---:|---:|"]
        for key in dict.fromkeys(key.rpartition(":")[0] for key in counts):
            cells = [str(counts.get(f"{key}: {outcome}", 0)) for outcome in ("frames", "refused", "died")]
            lines.append(f"| {key} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| reason | files |", "|---|---:|"]
    lines += [
        f"| {' '.join(reason.replace('|', '/').split())} | {count} |" for reason, count in summary["reasons"].items()
    ]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Damage, read, count; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="fuzz_videos.py", description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with real videos; small ones are taken")
    parser.add_argument("--count", type=int, default=2400, help="damaged files")
    parser.add_argument("--sample", type=int, default=96, help="of them through the commands; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one file")
    parser.add_argument("--work", type=Path, help="folder for what is kept; default: runs/fuzz-SEED")
    parser.add_argument("--out", type=Path, required=True, help="folder for fuzz.json and fuzz.md")
    options = parser.parse_args(words)
    if options.count < 1 or options.workers < 1:
        parser.error("--count and --workers want whole numbers above 0")
    work = options.work or Path("runs") / f"fuzz-{options.seed}"
    facts = machine(["python", "-m", "tools.fuzzing.fuzz_videos", *words])

    def work_on() -> int:
        bases = collect_bases(work / "bases", options.shared)
        attempt = Attempt(bases, plan(bases, options.count), options.seed)
        findings = run_all(attempt, work, count=options.count, workers=options.workers, timeout_seconds=options.timeout)
        summary = summarize(findings)
        commands = through_commands(attempt, findings, work, options.sample) if options.sample else None
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "fuzz.json", {"machine": facts, **summary, "commands": commands})
        page = to_markdown(facts, summary, commands)
        write_text(options.out / "fuzz.md", page)
        print(page.split("| base |")[0].strip())
        return 1 if summary["wrong"] or (commands is not None and commands["problems"]) else 0

    return exit_code("fuzz_videos.py", work_on, kept=f"the findings so far are in {work}")


if __name__ == "__main__":
    sys.exit(main())

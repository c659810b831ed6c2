"""Whole-process time and memory of `videogru infer` on one large scan: start, imports, reading, prediction, answer.

    python -m tools.benchmarks.bench_infer --model runs/adrenalmnist3d-0001 [--scan SCAN.nii.gz] [--runs 5]

Without --scan, a 256x256x180 int16 .nii.gz of smooth noise is made (it compresses about as real scans do). Prints the
median, minimum and maximum of wall seconds and the peak resident memory, and JSON with --json FILE.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from tools.measuring import Parser, exit_code, machine, write_json

SHAPE = (256, 256, 180)


def make_scan(path: Path) -> None:
    """Smooth noise with a bright ball, as int16 with 1 mm voxels."""
    generator = np.random.default_rng(0)
    coarse = generator.normal(400, 150, tuple(side // 4 for side in SHAPE))
    voxels = np.kron(coarse, np.ones((4, 4, 4))) + generator.normal(0, 20, SHAPE)
    nibabel.Nifti1Image(voxels.clip(0, 4095).astype(np.int16), np.eye(4)).to_filename(path)


def run_once(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        message = process.stderr.read() if process.stderr else ""
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}: {message}")
    return seconds, usage.ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="bench_infer.py", description=__doc__)
    parser.add_argument("--model", required=True, help="model file or run folder")
    parser.add_argument("--scan", type=Path, help="scan to read; default: one is made")
    parser.add_argument("--runs", type=int, default=5, help="counted runs, after one that is not counted")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(words)
    if options.runs < 1:
        parser.error("--runs wants a whole number above 0")
    load = os.getloadavg()[0]

    def work_on() -> None:
        with tempfile.TemporaryDirectory() as folder:
            scan = options.scan or Path(folder) / "scan.nii.gz"
            if options.scan is None:
                make_scan(scan)
            command = [sys.executable, "-m", "videogru", "infer", str(scan), "--model", options.model]
            run_once(command)
            measured = [run_once(command) for _ in range(options.runs)]
            size = scan.stat().st_size
        seconds, mebibytes = [s for s, _ in measured], [m for _, m in measured]
        # Only now, as the peak of a process counts from that of its parent, which torch would raise.
        facts = machine(["python", "-m", "tools.benchmarks.bench_infer", *words]) | {"load": round(load, 1)}
        figures = {
            "wall_seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
            "peak_resident_mib": max(mebibytes),
            "file_mib": size / 2**20,
            "runs": options.runs,
            "machine": facts,
        }
        print(f"file of {figures['file_mib']:.1f} MiB, {options.runs} runs on {facts['cores']} cores")
        print(f"wall   {statistics.median(seconds):.2f} s (min {min(seconds):.2f}, max {max(seconds):.2f})")
        print(f"memory {max(mebibytes):.0f} MiB peak")
        if options.json:
            write_json(options.json, figures)

    return exit_code("bench_infer.py", work_on, kept="nothing is written")


if __name__ == "__main__":
    sys.exit(main())

"""Reading, orienting and resizing a scan: ours against MONAI and TorchIO, and from the cache of prepared slices.

    python -m tools.benchmarks.bench_volumes --scan ../shared/data/volumes/nilearn/mni*.nii.gz --out docs/volume

Every contender makes 32 slices of 224x224 pixels of the same file, canonically oriented:

  videogru          open, choose 32 slices (middles of equal segments), intensity window 0..1, antialiased 2-D resize
  videogru, cache   the same bits from data.cache=raw; "first in a process": the file's bytes are hashed too
  MONAI             LoadImage, EnsureChannelFirst, Orientation, Resize
  TorchIO           ScalarImage, ToCanonical, Resize

MONAI and TorchIO resample all voxels in three dimensions, without an intensity window. Files: the scan as it is, and a
256x256x180 int16 one made from it: resampled, times 16, with the noise of a seed. One process, one thread: medians over
rounds in which the contenders alternate. Then each contender in processes of its own: seconds of the first reading, and
the most memory above what was in use after the imports. Writes reading.json and reading.md.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.measuring import (
    Parser,
    exit_code,
    last_error,
    machine,
    machine_sentence,
    median_range,
    write_json,
    write_text,
)
from videogru.errors import DataError

SLICES, SIDE = 32, 224
SHAPE = (256, 256, 180)
OURS, CACHED, FIRST = "videogru", "videogru, cache", "videogru, cache, first in a process"
OTHERS = ("MONAI", "TorchIO")
FASTER, CACHE_FASTER, MEMORY_SHARE = 3.0, 20.0, 0.5  # what is wanted
Contender = Callable[[], Any]


# Contenders -----------------------------------------------------------------------------------------------------


def ours(path: Path) -> Contender:
    """The way of `ClipDataset` outside of training."""
    from videogru.config import DataConfig
    from videogru.data.clips.read_clip import read_clip
    from videogru.data.clips.transforms import prepare_clip
    from videogru.data.readers.open import open_source

    data = DataConfig(frame_size=SIDE, num_frames=SLICES).for_kind("volume")

    def clip() -> Any:
        with open_source(path, data=data, kind="volume") as source:
            chosen = read_clip(source, data=data)
        return prepare_clip(chosen, data=data, pixel_aspect=source.pixel_aspect).frames

    return clip


def from_cache(path: Path, folder: Path, *, first: bool = False) -> Contender:
    """The same through the cache; first: forgets the hash of the file before each clip."""
    from videogru.config import DataConfig
    from videogru.data.clips.read_clip import read_clip
    from videogru.data.clips.transforms import prepare_clip
    from videogru.data.loading.volume_cache import VolumeCache

    data = DataConfig(frame_size=SIDE, num_frames=SLICES, cache="raw", cache_dir=folder).for_kind("volume")
    kept = VolumeCache(data)

    def clip() -> Any:
        with (VolumeCache(data) if first else kept).open(path) as source:
            if source.details.get("access") != "cached as raw":
                raise DataError("the scan was not cached", where=path)
            chosen = read_clip(source, data=data)
        return prepare_clip(chosen, data=data, pixel_aspect=source.pixel_aspect).frames

    return clip


def by_monai(path: Path) -> Contender:
    """MONAI's transforms with their defaults."""
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Resize

    steps = [LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS"), Resize((SIDE, SIDE, SLICES))]
    composed = Compose(steps)
    return lambda: composed(str(path))


def by_torchio(path: Path) -> Contender:
    """TorchIO's transforms with their defaults."""
    try:
        import torchio
    except ImportError as error:
        raise DataError("TorchIO is not installed", hint="pip install torchio") from error
    turn, resize = torchio.ToCanonical(), torchio.Resize((SIDE, SIDE, SLICES))
    return lambda: resize(turn(torchio.ScalarImage(path))).data


def contender(name: str, path: Path, cache: Path) -> Contender:
    """The contender of that name."""
    if name in (CACHED, FIRST):
        return from_cache(path, cache, first=name == FIRST)
    return {OURS: ours, "MONAI": by_monai, "TorchIO": by_torchio}[name](path)


# Measuring ------------------------------------------------------------------------------------------------------


def synthetic(scan: Path, out: Path) -> None:
    """A 256x256x180 int16 .nii.gz of the scan's anatomy: linear between its voxels, times 16, noise of sd 8."""
    import nibabel as nib
    import torch

    image: Any = nib.load(scan)
    voxels = torch.from_numpy(np.asarray(image.dataobj).astype(np.float32))[None, None]
    larger = torch.nn.functional.interpolate(voxels, size=SHAPE, mode="trilinear", align_corners=False)[0, 0].numpy()
    larger *= 4080 / max(float(larger.max()), 1.0)
    noisy = larger + np.random.default_rng(0).normal(0, 8, SHAPE)
    sizes = [old / new for old, new in zip(image.shape, SHAPE, strict=True)]
    stored = np.clip(noisy, 0, 4095).round().astype(np.int16)
    nib.save(nib.Nifti1Image(stored, image.affine @ np.diag([*sizes, 1.0]), dtype=np.int16), out)


def in_one_process(path: Path, cache: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, which alternate."""
    names = (OURS, CACHED, FIRST, *OTHERS)
    found = {name: contender(name, path, cache) for name in names}
    for name, clip in found.items():  # what is set up once, and the cache
        if sorted(clip().shape[-3:]) != sorted((SLICES, SIDE, SIDE)) and tuple(clip().shape) != (SLICES, 1, SIDE, SIDE):
            raise DataError(f"{name} made {tuple(clip().shape)}", where=path)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(1, rounds + 1):
        for name, clip in found.items():
            start = time.perf_counter()
            clip()
            times[name].append(1000 * (time.perf_counter() - start))
        print(f"{path.name}, round {round_}/{rounds}: " + ", ".join(f"{n} {t[-1]:.0f} ms" for n, t in times.items()),
              file=sys.stderr, flush=True)  # fmt: skip
    return times


def in_own_processes(path: Path, cache: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """First reading in a process of its own: milliseconds, MiB above the imports, and MiB in all."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name in (OURS, CACHED, *OTHERS):
            words = [
                sys.executable,
                "-m",
                "tools.benchmarks.bench_volumes",
                "--alone",
                name,
                "--scan",
                str(path),
                "--out",
                str(cache),
            ]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DataError(f"{name} alone: {last_error(done.stderr)}", where=path)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    return found


def alone(name: str, path: Path, cache: Path) -> dict[str, float]:
    """What one contender takes here, in a fresh process."""
    clip = contender(name, path, cache)
    ours_too = contender(OURS, path, cache)  # torch is imported by all
    del ours_too
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = _mib("VmRSS"), time.perf_counter()
    made = clip()
    seconds = time.perf_counter() - start
    assert made is not None
    return {"ms": 1000 * seconds, "above_mib": _mib("VmHWM") - before, "peak_mib": _mib("VmHWM")}


def _mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


# Report ---------------------------------------------------------------------------------------------------------


def verdicts(times: dict[str, list[float]], alone_: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Each thing that is wanted, with what was measured; medians of the ratios of a round."""
    found: list[dict[str, Any]] = []
    for other in OTHERS:
        ratios = [b / a for a, b in zip(times[OURS], times[other], strict=True)]
        found.append({"what": f"times faster than {other}", "values": ratios, "wanted": FASTER})
    for other in OTHERS:
        pairs = zip(alone_[OURS]["above_mib"], alone_[other]["above_mib"], strict=True)
        found.append({"what": f"of {other}'s memory", "values": [a / b for a, b in pairs], "wanted": -MEMORY_SHARE})
    for name in (CACHED, FIRST):
        ratios = [b / a for a, b in zip(times[name], times[OURS], strict=True)]
        found.append({"what": f"{name}: times faster than our reading", "values": ratios, "wanted": CACHE_FASTER})
    for verdict in found:
        median, wanted = float(np.median(verdict["values"])), verdict["wanted"]
        verdict["reached"] = median >= wanted if wanted > 0 else median <= -wanted
    return found


def report(results: dict[str, Any], facts: dict[str, object]) -> str:
    """The figures in Markdown."""
    lines = ["# Reading a scan", "", machine_sentence(facts), ""]
    lines += [
        f"To {SLICES} slices of {SIDE}x{SIDE}; medians (least–greatest). MONAI and TorchIO resample all voxels in "
        "three dimensions; we choose slices first. Memory: most resident, above what was after the imports.",
        "",
    ]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines += [
        f"{results['rounds']} rounds in one process, {results['processes']} fresh processes each. {versions}.",
        "",
    ]
    for scan in results["scans"]:
        lines += [f"## {scan['title']}", "", scan["note"], ""]
        lines += [
            "| | ms | ms, first in a fresh process | MiB above the imports | MiB in all |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, times in scan["ms"].items():
            own = scan["alone"].get(name, {})
            cells = [median_range(own.get(key, []), "{:,.0f}") for key in ("ms", "above_mib", "peak_mib")]
            lines.append(f"| {name} | {median_range(times, '{:,.1f}')} | {' | '.join(cells)} |")
        lines += ["", "| | measured | wanted | |", "|---|---:|---:|---|"]
        for verdict in scan["verdicts"]:
            wanted = verdict["wanted"]
            goal = f"≥ {wanted:g}" if wanted > 0 else f"≤ {-wanted:g}"
            cells = [median_range(verdict["values"], "{:.2f}"), goal, "reached" if verdict["reached"] else "missed"]
            lines.append(f"| {verdict['what']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def note_of(path: Path) -> str:
    """Shape, type and size of a file."""
    import nibabel as nib

    image: Any = nib.load(path)
    sides = "x".join(str(side) for side in image.shape)
    return f"{sides} {image.get_data_dtype()}, {path.stat().st_size / 2**20:.1f} MiB of .nii.gz."


def measure(scan: Path, rounds: int, processes: int) -> list[dict[str, Any]]:
    """Both files through all contenders."""
    scans: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.nii.gz"
        synthetic(scan, made)
        time.sleep(3)  # a file that just changed is hashed at each opening
        for title, path in (("256x256x180, int16, made of the scan", made), ("The scan as it is", scan)):
            cache = Path(folder) / "cache"
            times = in_one_process(path, cache, rounds)
            alone_ = in_own_processes(path, cache, processes)
            scans.append({"title": title, "note": note_of(path), "ms": times, "alone": alone_,
                          "verdicts": verdicts(times, alone_)})  # fmt: skip
    return scans


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    parser = Parser(prog="bench_volumes.py", description=__doc__)
    parser.add_argument("--scan", type=Path, required=True, help="a .nii.gz, read as it is and made larger")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=5, help="fresh ones for each contender")
    parser.add_argument(
        "--alone", choices=(OURS, CACHED, *OTHERS), help="one contender here, told as JSON; --out: cache"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets reading.json and reading.md")
    options = parser.parse_args(words)
    if min(options.rounds, options.processes) < 1:
        parser.error("--rounds and --processes have to be at least 1")
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the others, about what they will change
    if options.alone:
        print(json.dumps(alone(options.alone, options.scan, options.out)))
        return 0
    facts = machine(["python", "-m", "tools.benchmarks.bench_volumes", *words])

    def work_on() -> None:
        from importlib.metadata import version

        if not options.scan.is_file():
            raise DataError("no such file", where=options.scan)
        versions = {name: version(name) for name in ("monai", "torchio", "nibabel", "isal")}
        scans = measure(options.scan.resolve(), options.rounds, options.processes)
        results = {"rounds": options.rounds, "processes": options.processes, "versions": versions, "scans": scans}
        text = report(results, facts)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "reading.json", {"facts": facts, **results})
        write_text(options.out / "reading.md", text)
        print(text)

    return exit_code("bench_volumes.py", work_on, kept="nothing is written")


if __name__ == "__main__":
    raise SystemExit(main())

"""Clips per second and core of our loader and of others, from video files and from the frame cache.

    python -m tools.benchmarks.bench_loading --videos VIDEOS --prepared PREPARED --out docs/video

Every contender reads the same videos in the same order, 16 frames spread over each, and makes what an encoder takes:

  videogru            ClipDataset in training: drawn times, resized, cropped; uint8, as the model normalizes.
                      "files": from the second opening on, when the index of each file is kept; "first opening": the
                      index is forgotten before each clip
  videogru, cache     the same from data.cache=raw and jpeg, filled before
  decord              VideoReader.get_batch at the same indices, then torchvision's transforms on PIL images or tensors
  torchcodec          clips_at_random_indices, exact and approximate seeks, then the tensor transforms
  PyAV in order       decoded from the start to the last frame that is wanted, then the tensor transforms

transforms: resize the short side, crop the center, to float, normalize. One process, one decoding thread; the
contenders alternate in each round. The rate counts the seconds of a core that the process used, so that others on the
machine do not matter much. --gop adds what the distance of key frames and B-frames do to a video's size and to the time
of a clip. Writes loading.json and loading.md.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from tools.data.prepare_kinetics import Settings, encode
from tools.measuring import (
    Parser,
    exit_code,
    machine,
    machine_sentence,
    median_range,
    write_json,
    write_text,
)
from videogru.config import DataConfig
from videogru.data.clips.augment import sampling_draws
from videogru.data.clips.sampling import random
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.frame_cache import FrameCache
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.data.readers.file_types import kind_of_name, media_files
from videogru.data.readers.open import open_source
from videogru.data.readers.video.open import open_video
from videogru.data.readers.video.packet_index import kept_indexes
from videogru.errors import DataError

FRAMES = 16
MEAN, SD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # Kinetics-400, as torchvision has them
GPU_RATES = (100, 300, 1000)  # clips a second that one GPU takes, assumed
GOPS = ((1, 0), (6, 0), (12, 0), (12, 2), (24, 0), (48, 0), (250, 0), (250, 3))  # key frame distance, B-frames
Contender = Callable[[int, int], torch.Tensor]  # (video, epoch) to a clip


# Contenders -----------------------------------------------------------------------------------------------------


def ours(paths: list[Path], data: DataConfig) -> Contender:
    """Our dataset in training, one clip at a time."""
    labels = [row % 2 for row in range(len(paths))]
    manifest = build_manifest(Path("/"), ("a", "b"), [str(path.resolve()) for path in paths], labels, [0] * len(paths))
    dataset = ClipDataset(Corpus("bench", "video", ("a", "b"), manifest, None, None, 0, ()), data=data, training=True)

    def clip(video: int, epoch: int) -> torch.Tensor:
        loaded = dataset.__getitems__([(epoch, video)])
        if loaded.batch is None:
            raise DataError(loaded.failures[0][1])
        return loaded.batch.frames[0]

    return clip


def forgetful(contender: Contender) -> Contender:
    """The same as if each video was opened for the first time."""

    def clip(video: int, epoch: int) -> torch.Tensor:
        kept_indexes.clear()
        return contender(video, epoch)

    return clip


def wanted_frames(paths: list[Path]) -> Callable[[int, int], list[int]]:
    """The indices that our dataset draws; those of the others that let themselves be told."""
    facts = []
    for path in paths:
        with open_video(path) as source:
            facts.append((source.positions, source.extent))

    def indices(video: int, epoch: int) -> list[int]:
        positions, extent = facts[video]
        draws = sampling_draws(0, epoch, video, FRAMES + 1)[:-1]
        found: list[int] = random(positions=positions, extent=extent, num_frames=FRAMES, draws=draws).tolist()
        return found

    return indices


def tensor_transforms(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Torchvision's transforms of a uint8 clip (T C H W)."""
    from torchvision.transforms import v2

    steps = [v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    composed: Callable[[torch.Tensor], torch.Tensor] = v2.Compose([*steps, v2.Normalize(MEAN, SD)])
    return composed


def picture_transforms(size: int) -> Callable[[np.ndarray], torch.Tensor]:
    """Torchvision's transforms frame by frame, through PIL; frames (T H W C)."""
    from torchvision import transforms

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    one = transforms.Compose([*steps, transforms.Normalize(MEAN, SD)])
    return lambda frames: torch.stack([one(Image.fromarray(frame)) for frame in frames])


def by_decord(paths: list[Path], size: int, *, pictures: bool) -> Contender:
    """Decord's reader, opened anew for each clip as a dataset does."""
    import decord

    indices = wanted_frames(paths)
    on_pictures, on_tensors = picture_transforms(size), tensor_transforms(size)

    def clip(video: int, epoch: int) -> torch.Tensor:
        reader = decord.VideoReader(str(paths[video]), ctx=decord.cpu(0), num_threads=1)
        frames = reader.get_batch(indices(video, epoch)).asnumpy()
        return on_pictures(frames) if pictures else on_tensors(torch.from_numpy(frames).permute(0, 3, 1, 2))

    return clip


def by_torchcodec(paths: list[Path], size: int, *, seek_mode: str) -> Contender:
    """Torchcodec's sampler over the whole video."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.samplers import clips_at_random_indices

    transform = tensor_transforms(size)

    def clip(video: int, epoch: int) -> torch.Tensor:
        decoder = VideoDecoder(str(paths[video]), num_ffmpeg_threads=1, seek_mode=seek_mode)
        stride = max(1, len(decoder) // FRAMES)
        torch.manual_seed(epoch)
        batch = clips_at_random_indices(
            decoder, num_clips=1, num_frames_per_clip=FRAMES, num_indices_between_frames=stride
        )
        return transform(batch.data[0])

    return clip


def by_pyav(paths: list[Path], size: int) -> Contender:
    """PyAV from the first frame to the last wanted one."""
    indices, transform = wanted_frames(paths), tensor_transforms(size)

    def clip(video: int, epoch: int) -> torch.Tensor:
        chosen = set(indices(video, epoch))
        last, frames = max(chosen), []
        with av.open(str(paths[video])) as container:
            container.streams.video[0].thread_type = "NONE"
            for index, frame in enumerate(container.decode(video=0)):
                if index in chosen:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if index == last:
                    break
        return transform(torch.stack(frames).permute(0, 3, 1, 2))

    return clip


def contenders(paths: list[Path], size: int, cache: Path) -> tuple[dict[str, Contender], dict[str, Any]]:
    """All that can run here by name, and what was said of filling the caches or of what cannot run."""
    data = DataConfig(frame_size=size, num_frames=FRAMES).for_kind("video")
    found: dict[str, Contender] = {"videogru, files": ours(paths, data)}
    found["videogru, files, first opening"] = forgetful(found["videogru, files"])
    notes: dict[str, Any] = {}
    for form in ("raw", "jpeg"):
        cached = data.model_copy(update={"cache": form, "cache_dir": cache})
        notes[f"cache={form}"] = fill(paths, cached)
        found[f"videogru, cache={form}"] = ours(paths, cached)
    if importlib.util.find_spec("decord"):
        found["decord, transforms on PIL images"] = by_decord(paths, size, pictures=True)
        found["decord, transforms on tensors"] = by_decord(paths, size, pictures=False)
    else:
        notes["decord"] = "not run: not installed"
    try:
        for mode in ("exact", "approximate"):
            contender = by_torchcodec(paths, size, seek_mode=mode)
            contender(0, 0)
            found[f"torchcodec, {mode}"] = contender
    except (ImportError, RuntimeError, OSError) as error:
        notes["torchcodec"] = f"not run: {str(error).splitlines()[0]}"
    found["PyAV in order"] = by_pyav(paths, size)
    return found, notes


def fill(paths: list[Path], data: DataConfig) -> dict[str, float]:
    """Seconds of a core to fill the cache, and its bytes per frame."""
    cache = FrameCache(data)
    start, frames = time.process_time(), 0
    for path in paths:
        with cache.open(path) as source:
            frames += len(source.positions)
    seconds = time.process_time() - start
    files = [entry for path in paths if (entry := cache.entry_of(path)) is not None and entry.is_file()]
    if len(files) != len(set(paths)):
        raise DataError("not every video could be cached", where=cache.folder)
    return {"core seconds": seconds, "frames": frames, "bytes": sum(entry.stat().st_size for entry in files)}


# Measuring ------------------------------------------------------------------------------------------------------


def measure(title: str, paths: list[Path], size: int, epochs: int, rounds: int) -> dict[str, Any]:
    """Clips a second and core of all contenders, which alternate round by round."""
    with tempfile.TemporaryDirectory() as cache:
        found, notes = contenders(paths, size, Path(cache))
        rates: dict[str, list[float]] = {name: [] for name in found}
        for contender in found.values():
            for video, path in enumerate(paths):
                clip = contender(video, 0)  # what is set up once
                if tuple(clip.shape) != (FRAMES, 3, size, size):
                    raise DataError(f"a clip of shape {tuple(clip.shape)}", where=path)
        for round_ in range(rounds):
            for name, contender in found.items():
                if name == "videogru, files":
                    for video in range(len(paths)):
                        contender(video, 0)  # the one before or after it has forgotten the indexes
                start = time.process_time()
                for epoch in range(epochs):
                    for video in range(len(paths)):
                        contender(video, round_ * epochs + epoch)
                rates[name].append(epochs * len(paths) / (time.process_time() - start))
                line = (
                    f"{title}, {size} pixels, round {round_ + 1}/{rounds}: {name}: {rates[name][-1]:,.1f} clips/s/core"
                )
                print(line, file=sys.stderr, flush=True)
    return {"title": title, "size": size, "videos": len(paths), "rates": rates, "notes": notes}


def gop_variants(paths: list[Path], folder: Path, size: int, rounds: int, epochs: int) -> list[dict[str, Any]]:
    """Bytes and clips a second and core for each distance of key frames, of the same videos at short side 256."""
    variants: list[dict[str, Any]] = []
    turns: list[tuple[Contender, list[float]]] = []
    for gop, b_frames in GOPS:
        place = folder / f"{gop}-{b_frames}"
        place.mkdir()
        made = []
        for path in paths:
            made.append(place / f"{path.stem}.mp4")
            with open_source(path, data=DataConfig(), kind="video") as source:
                encode(source, made[-1], Settings(gop=gop), b_frames=b_frames)
        data = DataConfig(frame_size=size, num_frames=FRAMES).for_kind("video")
        size_bytes = sum(path.stat().st_size for path in made)
        rates: list[float] = []
        variants.append({"gop": gop, "b_frames": b_frames, "bytes": size_bytes, "rates": rates})
        turns.append((ours(made, data), rates))
    for round_ in range(rounds):
        for contender, rates in turns:
            start = time.process_time()
            for epoch in range(epochs):
                for video in range(len(paths)):
                    contender(video, round_ * epochs + epoch)
            rates.append(epochs * len(paths) / (time.process_time() - start))
    return variants


# Report ---------------------------------------------------------------------------------------------------------


def best_other(rates: dict[str, list[float]]) -> str:
    """The contender that is not ours with the best median."""
    return max(
        (name for name in rates if not name.startswith("videogru")), key=lambda name: float(np.median(rates[name]))
    )


def report(results: dict[str, Any], facts: dict[str, object]) -> str:
    """The figures in Markdown."""
    lines = ["# Loading clips of 16 frames", "", machine_sentence(facts), ""]
    lines += [
        f"Clips a second and core: median (least–greatest) of {results['rounds']} rounds; ratio to the best other.",
        "",
    ]
    for group in results["groups"]:
        rates = group["rates"]
        best = best_other(rates)
        lines += [f"## {group['title']}, {group['size']} pixels ({group['videos']} videos)", ""]
        lines += ["| | clips/s/core | ratio to the best other |", "|---|---:|---:|"]
        for name, values in rates.items():
            ratios = [value / other for value, other in zip(values, rates[best], strict=True)]
            lines.append(f"| {name} | {median_range(values, '{:,.1f}')} | {median_range(ratios, '{:.2f}')} |")
        for name, note in group["notes"].items():
            if isinstance(note, str):
                lines += ["", f"{name}: {note}."]
            else:
                rate, frame = note["frames"] / note["core seconds"], note["bytes"] / note["frames"]
                lines += ["", f"{name}: filled at {rate:,.0f} frames/s/core, {frame:,.0f} bytes a frame."]
        lines.append("")
    lines += cores_table(results["groups"])
    if results["gops"]:
        lines += ["## Distance of key frames", ""]
        lines += ["The same videos at short side 256, crf 21, read at 112 pixels.", ""]
        lines += ["| key frame every | B-frames | MB | clips/s/core |", "|---:|---:|---:|---:|"]
        for variant in results["gops"]:
            rate = median_range(variant["rates"], "{:,.1f}")
            lines.append(f"| {variant['gop']} | {variant['b_frames']} | {variant['bytes'] / 1e6:.2f} | {rate} |")
    return "\n".join(lines) + "\n"


def cores_table(groups: list[dict[str, Any]]) -> list[str]:
    """How many cores feed a GPU: its clips a second over those of a core."""
    lines = [
        "## Cores that feed one GPU",
        "",
        "cores = clips/s that the GPU takes / clips/s/core, rounded up. The GPU's rate",
    ]
    lines += ["is an assumption (measure yours: its training step alone); the core's is measured above.", ""]
    heads = " | ".join(f"GPU at {rate:,} clips/s" for rate in GPU_RATES)
    lines += [f"| clips from | {heads} |", f"|---|{'---:|' * len(GPU_RATES)}"]
    for group in groups:
        for name, values in group["rates"].items():
            if name.startswith("videogru"):
                cores = " | ".join(f"{int(np.ceil(rate / np.median(values)))}" for rate in GPU_RATES)
                lines.append(
                    f"| {name.removeprefix('videogru, ')}, {group['title']}, {group['size']} pixels | {cores} |"
                )
    return [*lines, ""]


def videos_in(folder: Path, limit: int) -> list[Path]:
    """The videos below a folder, at most `limit` evenly chosen ones."""
    paths = [path for path in media_files(folder.resolve()) if kind_of_name(path.name) == "video"]
    if not paths:
        raise DataError("holds no video", where=folder)
    return [paths[place] for place in np.unique(np.linspace(0, len(paths) - 1, limit).astype(int))]


def groups_of(options: argparse.Namespace) -> Iterator[tuple[str, list[Path]]]:
    """(title, videos) of what is compared."""
    yield "files as they are", videos_in(options.videos, options.limit)
    if options.prepared:
        yield "files prepared", videos_in(options.prepared, options.limit)


def main(words: list[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    parser = Parser(prog="bench_loading.py", description=__doc__)
    parser.add_argument("--videos", type=Path, required=True, help="folder with videos that are read as they are")
    parser.add_argument("--prepared", type=Path, help="folder that prepare_kinetics.py made of them")
    parser.add_argument("--limit", type=int, default=12, help="videos of a folder that are read")
    parser.add_argument("--sizes", default="112,224", help="pixels, separated by commas")
    parser.add_argument("--epochs", type=int, default=2, help="clips of each video in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gop", action="store_true", help="compare distances of key frames too")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets loading.json and loading.md")
    options = parser.parse_args(words)
    sizes = options.sizes.split(",")
    if min(options.epochs, options.rounds, options.limit) < 1 or not all(s.isdigit() and int(s) >= 4 for s in sizes):
        parser.error("--epochs, --rounds and --limit have to be at least 1, --sizes numbers from 4 on")
    torch.set_num_threads(1)
    facts = machine(["python", "-m", "tools.benchmarks.bench_loading", *words])

    def work_on() -> None:
        groups = [
            measure(title, paths, int(size), options.epochs, options.rounds)
            for title, paths in groups_of(options)
            for size in sizes
        ]
        gops: list[dict[str, Any]] = []
        if options.gop:
            with tempfile.TemporaryDirectory() as folder:
                paths = videos_in(options.videos, options.limit)
                gops = gop_variants(paths, Path(folder), 112, options.rounds, options.epochs)
        results = {"rounds": options.rounds, "groups": groups, "gops": gops}
        text = report(results, facts)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "loading.json", {"facts": facts, **results})
        write_text(options.out / "loading.md", text)
        print(text)

    return exit_code("bench_loading.py", work_on, kept="nothing is written")


if __name__ == "__main__":
    raise SystemExit(main())

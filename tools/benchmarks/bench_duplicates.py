"""What `videogru data check` takes for near-duplicates: clips encoded anew in known ways, against all different clips.

    python -m tools.benchmarks.bench_duplicates
        the digits that ship: 1,000 clips of one mouth
    python -m tools.benchmarks.bench_duplicates --dataset FOLDER --every 10    any videos

For each change: how many changed clips are found beside their originals, and the shares of differing signs.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from tools.measuring import Parser
from videogru.config import DataConfig
from videogru.data.manifests.corpus import open_corpus
from videogru.data_check import near_duplicates as near
from videogru.data_check.perceptual_hash import SCENE_BITS, places, signatures, small_gray

Frames = NDArray[np.uint8]  # (T H W 3)


def main() -> None:
    """Measure and print."""
    parser = Parser(prog="bench_duplicates.py", description=__doc__)
    parser.add_argument("--dataset", default="grid_digits")
    parser.add_argument("--every", type=int, default=20, help="every n-th clip is encoded anew")
    options = parser.parse_args()
    manifest = open_corpus(DataConfig(dataset=options.dataset), for_training=False).manifest
    paths = [manifest.root / source for source in dict.fromkeys(manifest.sources)]
    base = np.stack([signature(decode(path)) for path in paths])
    found = near.near_pairs(base)
    pairs = len(paths) * (len(paths) - 1) // 2
    print(f"{len(paths)} clips, {pairs} pairs of different ones, {len(found.first)} of them taken for duplicates")
    for first, second, distance in zip(found.first, found.second, found.distances, strict=True):
        print(f"  {paths[first].name} and {paths[second].name}: {distance:.3f}")
    print(f"{'change':<26} {'found':>7}   scene: median  largest   motion: median  largest")
    chosen = range(0, len(paths), options.every)
    for name, change in CHANGES.items():
        shares = np.array([apart(base[place], signature(change(decode(paths[place])))) for place in chosen])
        hits, scene, motion = int(shares[:, 0].sum()), shares[:, 1], shares[:, 2]
        print(
            f"{name:<26} {hits:>3}/{len(chosen):<3}   {np.median(scene):>13.3f}  {scene.max():>7.3f}"
            f"   {np.median(motion):>14.3f}  {motion.max():>7.3f}"
        )


def decode(source: Path | io.BytesIO) -> Frames:
    """All frames of a video."""
    with av.open(source if isinstance(source, io.BytesIO) else str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode(frames: Frames, *, crf: int = 23, scale: float = 1.0) -> Frames:
    """Through H.264 and back."""
    height, width = (round(side * scale / 2) * 2 for side in frames.shape[1:3])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(width, height, "yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    return decode(file)


def crop(frames: Frames, share: float) -> Frames:
    """Without this share of each side's length at both ends."""
    rows, columns = (max(1, round(side * share)) for side in frames.shape[1:3])
    return encode(frames[:, rows:-rows, columns:-columns])


CHANGES: dict[str, Callable[[Frames], Frames]] = {
    "H.264, crf 28": lambda frames: encode(frames, crf=28),
    "H.264, crf 35": lambda frames: encode(frames, crf=35),
    "H.264, crf 45": lambda frames: encode(frames, crf=45),
    "half the size": lambda frames: encode(frames, scale=0.5),
    "twice the size": lambda frames: encode(frames, scale=2.0),
    "20 % brighter": lambda frames: np.clip(frames * 1.2 + 10, 0, 255).astype(np.uint8),
    "every second frame": lambda frames: frames[::2],
    "cropped by 1 % each side": lambda frames: crop(frames, 0.01),
    "cropped by 2 % each side": lambda frames: crop(frames, 0.02),
    "cropped by 4 % each side": lambda frames: crop(frames, 0.04),
    "mirrored": lambda frames: frames[:, :, ::-1],
}


def signature(frames: Frames) -> NDArray[np.uint8]:
    """The signature of a clip."""
    wanted = places(np.arange(len(frames), dtype=np.float64), (0.0, float(len(frames))))
    pictures = torch.from_numpy(np.ascontiguousarray(frames[wanted])).permute(0, 3, 1, 2)
    found: NDArray[np.uint8] = signatures(small_gray(pictures)[None])[0]
    return found


def apart(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> tuple[bool, float, float]:
    """(taken for duplicates, share of the scene's signs that differ, the same of the motion's worst quarter)."""
    taken = len(near.near_pairs(np.stack([first, second])).first) == 1
    one, other = near._signs(first[None]), near._signs(second[None])
    quarters = np.split(np.arange(SCENE_BITS, one.shape[1]), 4)
    motion = max(near._apart(one[:, quarter], other[:, quarter])[0].item() for quarter in quarters)
    return taken, near._apart(one[:, :SCENE_BITS], other[:, :SCENE_BITS])[0].item(), motion


if __name__ == "__main__":
    main()

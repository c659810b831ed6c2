"""One model or export in a process of its own, measured on request; the parent lets several take turns.

    python -m videogru.workflows.benchmark_worker PATH THREADS

Says one JSON line when it is loaded; then, for each line {"clips": B, "steps": T, "repeats": N} on stdin, one with the
seconds of N calls and the peak memory. Model files run in eager PyTorch, in float32.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from videogru.kinds import KINDS
from videogru.runtime.export_folder import is_exported


class Loaded(NamedTuple):
    """A model as a function of frames (B T C H W), lengths and gaps, and what frames it takes."""

    run: Callable[[NDArray[Any], NDArray[np.int64], NDArray[np.float32]], object]
    frame_shape: tuple[int, int, int]
    frame_type: str


def load(path: Path, threads: int) -> Loaded:
    """The model, with all that is imported for it."""
    if is_exported(path):
        from videogru.runtime.backends import open_exported

        exported = open_exported(path, threads=threads)
        card = exported.card
        return Loaded(exported.probabilities, card.frame_shape, card.frame_type)
    import torch

    from videogru.checkpoint.model_file import find_model, read_model

    torch.set_num_threads(threads)
    classifier, model_card = read_model(find_model(path))
    uses_gaps = classifier.config.use_gaps

    def run(frames: NDArray[Any], lengths: NDArray[np.int64], gaps: NDArray[np.float32]) -> object:
        given = [torch.from_numpy(array) for array in (frames, lengths, *[gaps] * uses_gaps)]
        with torch.inference_mode():
            return classifier(*given).softmax(dim=-1).numpy()

    side = model_card.frame_size
    kind = KINDS[model_card.kind].frame_type
    return Loaded(run, (model_card.in_channels, side, side), kind)


def peak_mebibytes() -> float:
    """Largest resident memory of this process so far; of this program alone, where the system tells it."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def clips_for(loaded: Loaded, clips: int, steps: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float32]]:
    """Noise as frames, whole lengths, and gaps of one."""
    draw = np.random.default_rng(0)
    shape = (clips, steps, *loaded.frame_shape)
    if loaded.frame_type == "uint8":
        frames: NDArray[Any] = draw.integers(0, 256, shape, dtype=np.uint8)
    else:
        frames = draw.random(shape, dtype=np.float32)
    gaps = np.ones((clips, steps), np.float32)
    gaps[:, 0] = 0
    return frames, np.full(clips, steps, dtype=np.int64), gaps


def main(words: Sequence[str]) -> int:
    """Load, then answer until stdin ends."""
    started = time.perf_counter()
    loaded = load(Path(words[0]), int(words[1]))
    _say({"load_seconds": time.perf_counter() - started, "torch": "torch" in sys.modules})
    for line in sys.stdin:
        asked = json.loads(line)
        given = clips_for(loaded, asked["clips"], asked["steps"])
        seconds = []
        for _ in range(asked["repeats"]):
            started = time.perf_counter()
            loaded.run(*given)
            seconds.append(time.perf_counter() - started)
        _say({"seconds": seconds, "peak_mebibytes": peak_mebibytes()})
    return 0


def _say(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

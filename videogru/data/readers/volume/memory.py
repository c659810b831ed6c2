"""How much memory a scan may take, decided from its header before anything is allocated."""

from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path

from videogru.config import DataConfig
from videogru.errors import SourceError


def check_memory(shape: Sequence[int], *, voxel_bytes: int, data: DataConfig, path: Path) -> None:
    """Raises SourceError where a scan of `shape` (X Y Z) would take more than `data.max_memory_gib`.

    voxel_bytes: what its reader holds at once for each voxel. On top of that comes one clip as float32: at most
    num_frames slices across the shortest axis, which are the largest. Work in blocks adds some tens of MB that are not
    counted.
    """
    voxels, shortest = prod(shape), min(shape)
    slices = shortest if data.sampling == "all" else min(data.num_frames, shortest)
    needed = voxels * voxel_bytes + 4 * (voxels // shortest) * slices
    if needed > data.max_memory_gib * 2**30:
        # Rounded up, so that the advice is enough.
        enough = ceil(needed / 2**30 * 10) / 10
        raise SourceError(
            f"its {' x '.join(map(str, shape))} voxels would take {needed / 2**30:.3g} GiB of memory, "
            f"the limit is {data.max_memory_gib:g}",
            where=path,
            hint=f"Allow more with --max-memory {enough:g} (data.max_memory_gib), or crop or resample it first.",
        )

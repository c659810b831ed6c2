"""How the C library hands memory back: for a training on a CPU, not after every tensor."""

import ctypes
import sys

# Parameter numbers of mallopt(3) in glibc.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed tensors for the next ones; True where that was possible (Linux with glibc).

    By default it maps each large tensor anew, and the kernel fills it with zeros page by page. What that costs depends
    on the machine (measured by tools/benchmarks/bench_training.py). The process keeps its largest size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # Other C libraries (musl) have the name and refuse.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

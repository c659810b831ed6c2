"""Counts page faults, the kernel's own measure of memory that is handed out anew."""

import subprocess
import sys

import pytest

from videogru.training import memory

FAULTS = """
import resource
import torch
from videogru.training.memory import keep_freed_memory
torch.set_num_threads(1)

def faults():
    for _ in range(20):
        torch.ones(16 << 20)  # an aligned block fits only once its neighbors are free
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
print(before, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_tensors_are_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert kept < 100 < default


def test_elsewhere_it_does_nothing(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False


def test_a_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert memory.keep_freed_memory() is False

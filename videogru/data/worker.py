"""How a reader process lives and ends: with the training it reads for, and not by a signal that is meant for that.

Torch's readers die of a SIGTERM that a scheduler sends to all processes of a job, and the training fails with them
before it can save its state. And readers that are busy outlive a parent that was killed.
"""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # of prctl(2) in Linux


def start_worker(worker_id: int) -> None:
    """For a DataLoader's worker_init_fn: leave Ctrl-C and SIGTERM to the parent, and end when it ends."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_parent_says, daemon=True).start()


def end_with_parent(number: int, parent: int | None = None) -> None:
    """Have the system send signal `number` to this process when its parent ends (Linux).

    parent: the process that counts as parent; where it is gone already, the signal comes at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def _end_if_parent_says() -> None:
    """DataLoader ends a reader that does not answer by SIGTERM; from anybody else it is meant for the training."""
    while True:
        told = signal.sigwaitinfo({signal.SIGTERM})
        if told.si_pid == os.getppid():
            os._exit(0)

"""Answer stored cases with an exported model, in a process of its own that knows nothing but the folder.

    python -m videogru.export.subprocess_run FOLDER CASES.npz ANSWERS.npz

CASES.npz holds arrays NUMBER/INPUT; ANSWERS.npz gets NUMBER/probabilities. No torch, unless the runtime is torch.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import videogru
from videogru.runtime.backends import open_exported

Arrays = dict[str, NDArray[Any]]


class ReplayFailed(Exception):
    """The process of an exported model ended without answers; the message is the last line that it said."""


def replay(folder: Path, cases: Sequence[Arrays]) -> list[Arrays]:
    """What the exported model in `folder` answers to each case (inputs by name), from a fresh process.

    Raises ReplayFailed where it cannot.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "cases.npz", Path(place) / "answers.npz"
        content: dict[str, Any] = {f"{n}/{k}": array for n, case in enumerate(cases) for k, array in case.items()}
        np.savez(asked, **content)
        command = [sys.executable, "-m", "videogru.export.subprocess_run", str(folder), str(asked), str(answered)]
        ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ReplayFailed(last_error(ended.stderr) or f"ended with status {ended.returncode}")
        return _numbered(answered, len(cases))


def last_error(stderr: str) -> str:
    """The line of a traceback that names the error, else the last one."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Fail|InvalidArgument|Refused)\b", line)]
    return (named or lines or [""])[-1]


def child_environment() -> dict[str, str]:
    """The environment of a fresh process that finds this very package, installed or not."""
    root = str(Path(videogru.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _numbered(path: Path, count: int) -> list[Arrays]:
    found: dict[int, Arrays] = defaultdict(dict)
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, _, name = key.partition("/")
            found[int(number)][name] = stored[key]
    return [found[number] for number in range(count)]


def main(words: Sequence[str]) -> int:
    """Read, answer, write."""
    folder, asked, answered = map(Path, words)
    exported = open_exported(folder)
    with np.load(asked, allow_pickle=False) as stored:
        count = len({key.partition("/")[0] for key in stored.files})
    answers: dict[str, Any] = {}
    for number, case in enumerate(_numbered(asked, count)):
        answers[f"{number}/probabilities"] = exported.probabilities(case["frames"], case["lengths"], case.get("gaps"))
    np.savez(answered, **answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""AdrenalMNIST3D, official splits: our default and its variants with several seeds, beside 3-D ResNets trained alike.

    python -m tools.experiments.reproduce_adrenal [--size 28|64] [--data-dir FILE.npz] [--rows default,convgru] \
        [--minutes 9]
                                      [--seeds 0,1,2,3,4] [--peer-seeds 0] [--only train|measure]

Trains in pieces: after --minutes (or Ctrl-C, SIGTERM) the training in progress saves its state and the tool exits with
130; run again, it goes on there. Several calls may train at once, as on several cores: a folder at which one works is
left to it. The kept epoch is the one with the best validation AUC, for every net; the test split is predicted once,
with it. Then adrenal-SIZE.json, .md and .png are written of what is there; what was not trained says so.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tools.experiments.adrenal_rows import DEFAULT_IS, RECIPES, ROWS, rows_of_size, run_folder
from tools.experiments.article import seeds_of
from tools.experiments.training_jobs import VIDEOGRU, Job, check_settings, run_jobs, train_command
from tools.measuring import Parser, exit_code
from videogru.config import Config
from videogru.settings import parse_assignments
from videogru.workflows.settings import settings_for_training

PEER = (sys.executable, "-m", "tools.experiments.train_r3d")


def jobs(
    work: Path, size: int, data: Path | None, rows: Sequence[str], seeds: Sequence[int], peer_seeds: Sequence[int]
) -> list[Job]:
    """All trainings, row by row. Raises ConfigError where a run folder was made with other settings."""
    found = []
    for name in rows:
        row = ROWS[name]
        for seed in peer_seeds if row.peer else seeds:
            run = run_folder(work, size, name, seed)
            if row.peer:
                command = partial(peer_command, run_folder(work, size, "plain", seed), row.peer, run)
            else:
                check_settings(run, wanted_config(size, name, seed, data))
                command = partial(own_command, size, name, seed, run, data)
            found.append(Job(f"{row.title}, {size}, seed {seed}", run, command))
    return found


def wanted_config(size: int, name: str, seed: int, data: Path | None) -> Config:
    """The settings that `own_command` asks for."""
    flags = {"data.dataset": "adrenalmnist3d", "train.seed": seed}
    if data is not None:
        flags["data.data_dir"] = str(data)
    assigned = parse_assignments(f"{key}={value}" for key, value in ROWS[name].settings.items())
    config = settings_for_training(RECIPES[size], flags, assigned)
    return config.model_copy(update={"data": config.data.for_kind("volume")})


def own_command(size: int, name: str, seed: int, run: Path, data: Path | None) -> list[str]:
    """One of our trainings."""
    assigned = [word for key, value in ROWS[name].settings.items() for word in ("--set", f"{key}={value}")]
    place = [] if data is None else ["--data-dir", str(data)]
    fixed = ["--dataset", "adrenalmnist3d", "--config", RECIPES[size], *place, "--seed", str(seed)]
    return train_command(VIDEOGRU, run, [*fixed, *assigned])


def peer_command(ours: Path, net: str, run: Path) -> list[str]:
    """A 3-D ResNet on what our plain run of the same seed read; it goes on by itself."""
    return [*PEER, str(ours), "--net", net, "--out", str(run)]


def rows_of(text: str) -> tuple[str, ...]:
    """'default,convgru' as keys of ROWS. Raises ValueError, which argparse tells."""
    rows = tuple(text.split(","))
    if not set(rows) <= set(ROWS):
        raise ValueError
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="reproduce_adrenal.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, choices=RECIPES, default=28, help="voxels along each axis, default 28")
    parser.add_argument("--data-dir", type=Path, help="adrenalmnist3d_64.npz for --size 64")
    parser.add_argument("--out", type=Path, default=Path("docs/volume"), help="where table and picture are written")
    parser.add_argument("--work", type=Path, default=Path("runs/adrenal"), help="run folders; default runs/adrenal")
    parser.add_argument("--rows", type=rows_of, help=f"of {','.join(ROWS)}; default: all")
    parser.add_argument("--seeds", type=seeds_of, default=(0, 1, 2, 3, 4), help="default: 0,1,2,3,4")
    parser.add_argument("--peer-seeds", type=seeds_of, default=(0,), help="of the 3-D ResNets, default: 0")
    parser.add_argument("--minutes", type=float, default=9, help="of training in this call; 0: no limit; default 9")
    parser.add_argument("--only", choices=("train", "measure"), help="one half; measure takes what is there")
    options = parser.parse_args(words)
    if not options.minutes >= 0:  # nan is not either
        parser.error("--minutes must not be negative")
    if options.size == 64 and options.data_dir is None:
        parser.error("--size 64 needs --data-dir FILE, adrenalmnist3d_64.npz of MedMNIST")
    known = rows_of_size(options.size)
    if not set(options.rows or known) <= set(known):
        parser.error(f"--rows: at --size {options.size} {DEFAULT_IS[options.size]} is what default does")
    data = None if options.data_dir is None else options.data_dir.resolve()
    work, command = options.work.resolve(), ["python", "-m", "tools.experiments.reproduce_adrenal", *words]

    def work_on() -> int:
        if options.only != "measure":
            wanted = jobs(work, options.size, data, options.rows or tuple(known), options.seeds, options.peer_seeds)
            code = run_jobs(wanted, options.minutes, shlex.join(command))
            if code or options.only == "train":
                return code
        from tools.experiments.adrenal_table import measure, write_table  # the training needs nothing of it

        write_table(options.out, measure(work, options.size, data, command))
        return 0

    return exit_code("reproduce_adrenal.py", work_on, kept="run me again to go on")


if __name__ == "__main__":
    sys.exit(main())

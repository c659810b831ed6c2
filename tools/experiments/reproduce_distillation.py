"""Distillation on GRID digits and CIFAR-100 (small budget): a student alone, the same one taught, and its teacher.

    python -m tools.experiments.reproduce_distillation [--what grid_digits,cifar100] [--data-dir DIR] [--minutes 9] \
        [--seeds 0,1,2]
                                           [--rows teacher,alone,distilled,matched] [--only train|measure]

Trains in pieces: after --minutes (or Ctrl-C, SIGTERM) the training in progress saves its state and the tool exits with
130; run again, it goes on there. Several calls may train at once: a folder at which one works is left to it, and a
student whose teacher is not finished waits for the next call. The student of seed N is taught by the teacher of seed N.
Then distillation.json and .md are written of what is there; what was not trained says so.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tools.experiments.article import cifar_folder, seeds_of
from tools.experiments.distillation_rows import ROWS, TASKS, own_command, run_folder, wanted_config
from tools.experiments.distillation_table import measure, write_table
from tools.experiments.training_jobs import Job, check_settings, run_jobs
from tools.measuring import Parser, exit_code


def jobs(work: Path, tasks: Mapping[str, Path | None], rows: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All trainings that can begin, teachers first; tasks: where their data lie.

    Raises ConfigError where a run folder was made with other settings.
    """
    found = []
    for task, data in tasks.items():
        for row in rows:
            for seed in seeds:
                run = run_folder(work, task, row, seed)
                check_settings(run, wanted_config(work, task, row, seed, data))
                title = f"{TASKS[task].title}, {ROWS[row].title}, seed {seed}"
                found.append(Job(title, run, partial(own_command, work, task, row, seed, data)))
    return found


def waiting(job: Job, work: Path) -> bool:
    """A student whose teacher is not finished."""
    task, row, seed = job.run.name.rsplit("-", 2)
    teacher = work / f"{task}-teacher-{seed}"
    return ROWS[row].taught and not (teacher / "evaluation-test.json").is_file()


def names_of(known: Mapping[str, object], text: str) -> tuple[str, ...]:
    """'a,b' as keys, in the order of `known`. Raises argparse's error where one is none."""
    names = set(text.split(","))
    if not names <= set(known):
        raise argparse.ArgumentTypeError(f"names of {','.join(known)}, not {text!r}")
    return tuple(name for name in known if name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="reproduce_distillation.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", type=lambda text: names_of(TASKS, text), default=tuple(TASKS), help="default: both")
    parser.add_argument("--data-dir", type=Path, help="folder with cifar-100-python; default: the usual one")
    parser.add_argument("--rows", type=lambda text: names_of(ROWS, text), default=tuple(ROWS), help="default: all")
    parser.add_argument("--seeds", type=seeds_of, default=(0, 1, 2), help="default: 0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"), help="run folders; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/deploy"), help="of the table; default %(default)s")
    parser.add_argument("--minutes", type=float, default=9, help="of training in this call; 0: no limit; default 9")
    parser.add_argument("--only", choices=("train", "measure"), help="one half; measure takes what is there")
    options = parser.parse_args(words)
    if not options.minutes >= 0:  # nan is not either
        parser.error("--minutes must not be negative")
    work, command = options.work.resolve(), ["python", "-m", "tools.experiments.reproduce_distillation", *words]

    def work_on() -> int:
        if options.only != "measure":
            tasks = {task: cifar_folder(options.data_dir) if task == "cifar100" else None for task in options.what}
            wanted = jobs(work, tasks, options.rows, options.seeds)
            teachers = [job for job in wanted if not ROWS[job.run.name.rsplit("-", 2)[1]].taught]
            code = run_jobs(teachers, options.minutes, shlex.join(command))
            ready = [job for job in wanted if job not in teachers and not waiting(job, work)]
            code = code or run_jobs(ready, options.minutes, shlex.join(command))
            for job in wanted:
                if job not in teachers and job not in ready:
                    print(f"{job.title}: its teacher is not finished; run me again", flush=True)
            if code or options.only == "train":
                return code
        write_table(options.out, measure(work, options.what, command))
        return 0

    return exit_code("reproduce_distillation.py", work_on, kept="run me again to go on")


if __name__ == "__main__":
    sys.exit(main())

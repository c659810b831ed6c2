"""The article's table: ResNet, LSTM-CNN and GRU-CNN trained alike on CIFAR-100 with several seeds, then compared.

    python -m tools.experiments.reproduce_article --budget cpu --data-dir DIR [--minutes 9] [--seeds 0,1,2] \
        [--only train|measure]

Trains in pieces: after --minutes (or Ctrl-C, SIGTERM) the training in progress saves its state and the tool exits with
130; run again, it goes on there. Where all are trained it measures accuracy, cost and latency and writes
table-BUDGET.json, table-BUDGET.md and accuracy-BUDGET.png. Every net has the same encoder, recipe, epochs and seeds;
without a recurrent part the pooling is the mean over cells, which is a ResNet's global average pooling.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tools.experiments.article import NETS, cifar_folder, run_folder, seeds_of
from tools.experiments.training_jobs import VIDEOGRU, Job, check_settings, locked, run_jobs, train_command
from tools.measuring import Parser, exit_code
from videogru.config import Config
from videogru.settings import parse_assignments
from videogru.workflows.settings import settings_for_training

# cpu: about 4 minutes for a ResNet and 8 with a recurrent part on 2 quiet cores; gpu: the recipe, 40 epochs.
BUDGETS: dict[str, dict[str, str]] = {
    "cpu": {
        "model.encoder": "small",
        "model.encoder_width": "32",
        "model.hidden_size": "128",
        "train.epochs": "8",
    },
    "gpu": {"train.epochs": "40"},
}
RECIPE = "cifar100-article"


def settings(budget: str, net: str) -> dict[str, str]:
    """What is set over the recipe, as --set wants it."""
    return {**BUDGETS[budget], **NETS[net].settings}


def train_all(budget: str, work: Path, data: Path, seeds: Sequence[int], minutes: float, again: str) -> int:
    """Train what is not trained yet, all nets of a seed before the next seed; 0 when all are there, else the exit code.

    again: the command that goes on. Raises ConfigError where a run folder was made with other settings.
    """
    jobs = [(net, seed) for seed in seeds for net in NETS]
    for net, seed in jobs:
        check_settings(run_folder(work, net, seed), wanted_config(budget, net, seed, data))
    found = [
        Job(
            f"{NETS[net].title}, seed {seed}",
            run_folder(work, net, seed),
            partial(command_for, budget, net, seed, run_folder(work, net, seed), data),
        )
        for net, seed in jobs
    ]
    with locked(work):
        return run_jobs(found, minutes, again)


def wanted_config(budget: str, net: str, seed: int, data: Path) -> Config:
    """The settings that `command_for` asks for."""
    assigned = parse_assignments(f"{key}={value}" for key, value in settings(budget, net).items())
    config = settings_for_training(RECIPE, {"data.data_dir": str(data), "train.seed": seed}, assigned)
    return config.model_copy(update={"data": config.data.for_kind("image")})


def command_for(budget: str, net: str, seed: int, run: Path, data: Path) -> list[str]:
    """The training as a command; it goes on where a state was saved, and a folder without one starts anew."""
    assigned = [word for key, value in settings(budget, net).items() for word in ("--set", f"{key}={value}")]
    fixed = ["--config", RECIPE, "--data-dir", str(data), "--seed", str(seed)]
    return train_command(VIDEOGRU, run, [*fixed, *assigned])


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="reproduce_article.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", required=True, choices=BUDGETS, help="cpu: a small encoder, few epochs; gpu: all")
    parser.add_argument("--out", type=Path, default=Path("docs/article"), help="where table and picture are written")
    parser.add_argument("--work", type=Path, help="run folders; default: runs/article-BUDGET")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-100 lies")
    parser.add_argument("--minutes", type=float, default=9, help="of training in this call; 0: no limit; default 9")
    parser.add_argument("--seeds", type=seeds_of, default=(0, 1, 2), help="default: 0,1,2")
    parser.add_argument("--only", choices=("train", "measure"), help="one half; measure takes what is there")
    options = parser.parse_args(words)
    if not options.minutes >= 0:  # nan is not either
        parser.error("--minutes must not be negative")
    work = (options.work or Path("runs") / f"article-{options.budget}").resolve()
    command = ["python", "-m", "tools.experiments.reproduce_article", *words]

    def work_on() -> int:
        data = cifar_folder(options.data_dir)
        if options.only != "measure":
            code = train_all(options.budget, work, data, options.seeds, options.minutes, shlex.join(command))
            if code or options.only == "train":
                return code
        from tools.experiments.article_table import measure, write_table  # the training needs nothing of it

        write_table(options.out, measure(options.budget, work, options.seeds, command))
        return 0

    return exit_code("reproduce_article.py", work_on, kept="run me again to go on")


if __name__ == "__main__":
    sys.exit(main())

"""Two gloo processes on CPU against one: started once with torchrun, all scenarios in it (see processes_worker.py)."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes_worker import ROWS, SCENARIOS, TEACHER, bad_rows, scenario, train
from tests.training.test_fit import bars
from tests.training.test_teacher import teacher_file
from videogru.config import TrainConfig
from videogru.errors import ConfigError, DataError
from videogru.training.fit import fit
from videogru.training.launch import launch
from videogru.training.processes import ALONE, this_group

# Muon orthogonalizes in bfloat16, where a difference in the last bit of a gradient becomes one in the third digit.
ATOL = {"muon": 0.03}

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """For child processes: this checkout's videogru, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    teacher = teacher_file(folder / TEACHER, model__seq="frames")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.support.processes_worker", str(folder)],
        env=environment(),
        cwd=teacher.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_get_the_weights_and_scores_of_one(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, seen = two
    monkeypatch.chdir(folder)  # where the teacher lies
    alone = train(name, tmp_path, ALONE)
    ours, theirs = (load_file(place / name / "model.safetensors") for place in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=ATOL.get(name, 1e-5), msg=f"{name}: {key}")
    for scores in (part[name]["scores"] for part in seen):
        assert len(scores) == len(alone["scores"]) == 2
        for one, other in zip(scores, alone["scores"], strict=True):
            assert one == pytest.approx(other, abs=ATOL.get(name, 1e-5))


def test_every_sample_once_an_epoch_and_every_validation_row_once(two: Any) -> None:
    _, seen = two
    corpus = bars(ROWS)
    for name in ("adam", "norms"):
        trained = Counter((epoch, row) for part in seen for epoch, row in part[name]["trained"])
        assert trained == {(epoch, int(row)): 1 for epoch in range(2) for row in corpus.manifest.rows("train")}
        validated = Counter(row for part in seen for row in part[name]["validated"])
        assert validated == {int(row): 2 for row in corpus.manifest.rows("val")}  # two epochs
        assert min(len(part[name]["trained"]) for part in seen) > 0


def test_a_signal_to_one_process_stops_all_and_they_resume_inside_the_epoch(two: Any) -> None:
    folder, seen = two
    assert all("the state is saved" in part["stopped"]["error"] for part in seen)
    again = Counter(
        (epoch, row) for part in seen for half in ("stopped", "resumed") for epoch, row in part[half]["trained"]
    )
    assert again == {(epoch, int(row)): 1 for epoch in range(2) for row in bars(ROWS).manifest.rows("train")}
    whole, resumed = (load_file(folder / place / "model.safetensors") for place in ("norms", "stopped/norms"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole_scores, resumed_scores = (
        (folder / place / "metrics.csv").read_text().splitlines() for place in ("norms", "stopped/norms")
    )
    assert len(whole_scores) == len(resumed_scores) == 3
    for one, other in zip(whole_scores[1:], resumed_scores[1:], strict=True):
        *numbers, _ = map(float, one.split(","))  # the last: seconds
        assert numbers == pytest.approx([float(n) for n in other.split(",")[:-1]], abs=1e-5)


def test_files_bad_in_any_process_are_listed_once_and_counted_for_all(two: Any) -> None:
    folder, seen = two
    listed = (folder / "bad" / "bad_files.csv").read_text().splitlines()[1:]
    assert {int(line.split(",")[0]) for line in listed} == bad_rows()
    assert len(listed) == len(bad_rows()) > 2
    assert all("max_bad = 1" in part["too many bad"]["error"] for part in seen)


def test_another_number_of_processes_cannot_resume(two: Any) -> None:
    folder, _ = two
    config = scenario("norms", processes=2)
    with pytest.raises(DataError, match="processes 2, not 1"):
        fit(config, bars(ROWS), folder / "norms", resume=True, progress=False, say=print)


@pytest.mark.parametrize(
    ("variables", "asked", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {"devices": 3}, "1 x 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {"nodes": 2}, "1 x 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {"devices": 1}, "say 1 x 1"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {}, "as many"),
        ({"RANK": "x", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, {}, "numbers"),
        ({}, {"devices": 2}, "not started"),
    ],
)
def test_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], asked: dict[str, int], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        this_group(TrainConfig(**asked))


def test_the_environment_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_group(TrainConfig()) == ALONE
    for name, value in {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    group = this_group(TrainConfig(nodes=2, devices=3))
    assert (group.rank, group.world, group.local_rank, group.nodes) == (5, 6, 2, 2)
    assert not group.is_first


def test_machines_need_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch(["train"], devices=1, nodes=2, say=print)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="NODE_RANK=2"):
        launch(["train"], devices=1, nodes=2, say=print)

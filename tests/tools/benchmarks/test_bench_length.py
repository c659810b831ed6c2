"""The benchmark of sequence lengths: cases, memory, tables, and what outlives an interrupt."""

import json
import mmap
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tools.benchmarks import bench_length
from tools.benchmarks.bench_length import Case, Result

LINUX = pytest.mark.skipif(
    bench_length.DEVICE != "cpu" or not Path("/proc/self/clear_refs").exists(), reason="memory of a CPU, on Linux"
)


def test_lengths_become_squares() -> None:
    assert [bench_length.side_of(length) for length in (16, 256, 512, 1024, 2048, 4096)] == [4, 16, 23, 32, 45, 64]
    cases = bench_length.length_cases([512, 16], ["gru", "lstm"], [False, True], 32)
    assert [(case.steps, case.checkpointing, case.cell) for case in cases] == [
        (steps, on, cell) for steps in (16, 529) for on in (False, True) for cell in ("gru", "lstm")
    ]
    assert [case.steps for case in bench_length.encoder_cases([False])] == [16, 32]


def test_the_recurrent_part_reads_as_many_steps_as_the_case_says() -> None:
    case = Case("pixels", "gru", "grid", 5, 1, 2, False)
    classifier = bench_length.build(case, 128)
    seen: list[torch.Size] = []
    classifier.recurrent.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    classifier(torch.zeros(2, 1, 3, 5, 5), torch.ones(2, dtype=torch.int64))
    assert seen == [(2, case.steps, bench_length.WIDTH)]
    assert classifier.recurrent.out_size == 2 * bench_length.HIDDEN


@LINUX
def test_peaks_are_counted_anew() -> None:
    take_and_give_back(32)
    held = bench_length.forget_peak()
    assert bench_length.peak() - held < 4
    take_and_give_back(64)
    assert 60 < bench_length.peak() - held < 72


def take_and_give_back(mebibytes: int) -> None:
    """Touch memory that malloc has no part in."""
    with mmap.mmap(-1, mebibytes * 2**20) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


def test_tables_set_checkpointing_beside_none() -> None:
    results = [
        Result(Case("pixels", "gru", "grid", 16, 1, 32, False), [1.0, 3.0, 2.0], [100.0]),
        Result(Case("pixels", "gru", "grid", 16, 1, 32, True), [4.0], [10.0, 30.0, 20.0]),
        Result(Case("pixels", "lstm", "grid", 64, 1, 32, False), [], [], killed=2),
        Result(Case("pixels", "lstm", "grid", 64, 1, 32, True), [9.0, 9.0], [5.0], killed=1),
        Result(Case("small", "gru", "frames", 112, 32, 2, True), [0.5], [7.0]),
    ]
    settings = {"checkpoint_steps": 128, "malloc": "fit", "rounds": 3, "rounds_done": 2}
    lines = bench_length.report(results, {"cpu": "abacus", "gpu": None, "command": "python x"}, settings).splitlines()
    assert "- cpu: abacus" in lines and "- gpu: none" in lines and "Rounds: 2 of 3." in lines[-1]
    assert "- command: `python x`" in lines
    assert "| gru | 256 | 2 (1–3) | 4 (4–4) | 100 (100–100) | 20 (10–30) |" in lines
    assert "| lstm | 4096 | killed 2 of 2 | 9 (9–9), killed 1 of 2 | killed 2 of 2 | 5 (5–5), killed 1 of 2 |" in lines
    assert "| small | 32 |  | 0.5 (0.5–0.5) |  | 7 (7–7) |" in lines
    assert results[1].summary["medians"] == {"s": 4, "MiB": 20}
    assert results[2].summary["medians"] == {"s": None, "MiB": None} and results[2].summary["killed"] == 2


def test_a_process_that_was_killed_leaves_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("pixels", "gru", "grid", 4, 1, 2, False)
    monkeypatch.setattr("subprocess.run", lambda command, **_: CompletedProcess(command, -9, "", ""))
    assert bench_length.run_case(case, repeats=1, checkpoint_steps=128) == ([], [])
    traceback = "Trace\nKeyError: 7\nand so on\n"
    monkeypatch.setattr("subprocess.run", lambda command, **_: CompletedProcess(command, 1, "", traceback))
    with pytest.raises(SystemExit, match="16 steps, no checkpointing: KeyError: 7"):
        bench_length.run_case(case, repeats=1, checkpoint_steps=128)


def test_checkpointing_is_what_the_case_says() -> None:
    off, on = (bench_length.build(Case("pixels", "gru", "grid", 4, 1, 2, flag), 7) for flag in (False, True))
    assert (off.encoder.checkpointing, off.recurrent.checkpoint_steps) == (False, 0)
    assert (on.encoder.checkpointing, on.recurrent.checkpoint_steps) == (True, 7)


@pytest.mark.slow
@LINUX
def test_bench_length_writes_its_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--what=lengths", "--lengths=16", "--cells=mingru", "--checkpointing=on", "--batch-size=2"]
    bench_length.main([*arguments, "--rounds=1", "--repeats=2", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "length.json").read_text())
    (result,) = figures["results"]
    assert (result["steps"], result["case"]["cell"], result["case"]["batch"]) == (16, "mingru", 2)
    assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0 and result["mib"][0] > 0
    assert (tmp_path / "length.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")


class Processes:
    """Stands in for `run_case`: figures of one process each, but for those that are killed or interrupted."""

    def __init__(self, killed: tuple[int, ...] = (), interrupted: int = 0) -> None:
        self.killed, self.interrupted, self.calls = killed, interrupted, 0

    def __call__(self, case: Case, **how: object) -> tuple[list[float], list[float]]:
        self.calls += 1
        if self.calls == self.interrupted:
            raise KeyboardInterrupt
        return ([], []) if self.calls in self.killed else ([1.0 * self.calls, 2.0 * self.calls], [10.0 * self.calls])


TWO_CASES = ["--what=lengths", "--lengths=16", "--cells=gru,lstm", "--checkpointing=off", "--rounds=3"]


def test_killed_processes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_length, "run_case", Processes(killed=(2, 3, 4, 6)))
    assert bench_length.main([*TWO_CASES, "--out", str(tmp_path)]) == 0
    gru, lstm = json.loads((tmp_path / "length.json").read_text())["results"]
    assert (gru["seconds"], gru["mib"], gru["killed"]) == ([1, 2, 5, 10], [10, 50], 1)
    assert (lstm["seconds"], lstm["mib"], lstm["killed"]) == ([], [], 3)
    text = (tmp_path / "length.md").read_text()
    assert "3.5 (1–10), killed 1 of 3" in text and "| lstm | 16 | killed 3 of 3 |" in text


@pytest.mark.parametrize(("interrupted", "whole"), [(1, 0), (2, 0), (4, 1), (5, 2)])
def test_whole_rounds_outlive_an_interrupt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interrupted: int,
    whole: int,
) -> None:
    monkeypatch.setattr(bench_length, "run_case", Processes(interrupted=interrupted))
    assert bench_length.main([*TWO_CASES, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("bench_length.py: stopped; ")
    if not whole:
        assert not (tmp_path / "out").exists()
        return
    figures = json.loads((tmp_path / "out/length.json").read_text())
    assert [len(result["mib"]) for result in figures["results"]] == [whole, whole]
    assert (figures["settings"]["rounds"], figures["settings"]["rounds_done"]) == (3, whole)
    assert f"Rounds: {whole} of 3." in (tmp_path / "out/length.md").read_text()
    assert (tmp_path / "out/length.png").is_file()

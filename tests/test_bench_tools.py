import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import bench_infer
import bench_length
import bench_training
from bench_length import Case, Result
from training_loops import Clock, Counts, TorchvisionModule

from videogru.config import Config
from videogru.data.datamodule import CorpusModule
from videogru.data.layouts import Corpus
from videogru.data.manifest import build_manifest
from videogru.models.encoder import Encoder
from videogru.training.fit import build_classifier

LINUX = pytest.mark.skipif(
    bench_length.DEVICE != "cpu" or not Path("/proc/self/clear_refs").exists(), reason="memory of a CPU, on Linux"
)
TINY = {
    "data.frame_size": 16,
    "model.encoder_width": 4,
    "model.hidden_size": 4,
    "train.batch_size": 8,
    "train.precision": "fp32",
}


def tiny(**changes: object) -> Config:
    return bench_training.recipe(None, **{**TINY, **{name.replace("__", "."): v for name, v in changes.items()}})


@pytest.fixture
def corpus() -> Corpus:
    """24 color stills of three classes, all for training."""
    arrays = np.random.default_rng(0).integers(0, 256, (24, 1, 3, 16, 16), dtype=np.uint8)
    sources = [f"noise/{row}" for row in range(24)]
    manifest = build_manifest(Path(), ("a", "b", "c"), sources, np.arange(24) % 3, np.zeros(24, np.int8))
    return Corpus("noise", "image", ("a", "b", "c"), manifest, arrays, None, 0, ())


@pytest.fixture
def pictures() -> TensorDataset:
    return TensorDataset(torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3)


class Ticks:
    """A clock to be set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_clock_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks()
    monkeypatch.setattr("time.perf_counter", ticks)
    clock = Clock(Counts(warmup=2, steps=3, rounds=1))
    for waits, works, images in ((50, 9, 7), (40, 9, 7), (1, 2, 8), (2, 3, 8), (3, 9, 4)):
        assert not clock.done
        ticks.now += waits
        clock.on_train_batch_start()
        ticks.now += works
        clock.end(images)
    assert clock.done
    assert clock.rate == pytest.approx(20 / 20)
    assert clock.data_share == pytest.approx(6 / 20)


def test_the_recipe_is_read(repository: Path) -> None:
    config = bench_training.recipe(None)
    assert (config.model.seq, config.model.encoder, config.train.batch_size) == ("rows", "small", 128)
    assert config.data.augment.translate * config.data.frame_size == bench_training.PADDING
    assert bench_training.recipe(None, **bench_training.WIDE).model.encoder_width == 64


def test_torchvision_batches_are_clips_of_one_frame(pictures: TensorDataset) -> None:
    module = TorchvisionModule(pictures, 5, 0)
    images, labels = pictures.tensors[0][:5], pictures.tensors[1][:5]
    batch = module.transfer_batch_to_device((images, labels), torch.device("cpu"), 0).batch
    assert batch is not None and batch.labels is not None
    assert torch.equal(batch.frames, images[:, None])
    assert torch.equal(batch.labels, labels)
    assert batch.lengths.tolist() == [1] * 5
    assert sorted(len(labels) for _, labels in module.train_dataloader()) == [4, 5, 5, 5, 5]


@pytest.mark.parametrize("ours", [True, False])
def test_the_clock_ends_lightning_after_its_steps(corpus: Corpus, pictures: TensorDataset, ours: bool) -> None:
    config = tiny()
    module = CorpusModule(corpus, config) if ours else TorchvisionModule(pictures, 8, 0)
    classifier = build_classifier(config, 3)
    before = classifier.head.state_dict()["linear.weight"].clone()
    clock = Clock(Counts(warmup=1, steps=4, rounds=1))  # more than the three batches of an epoch
    bench_training.train(bench_training.make_task(classifier, config), module, config, clock)
    assert (clock.seen, clock.images) == (5, 4 * 8)
    assert 0 < clock.data_share < 1
    assert not torch.equal(before, classifier.head.state_dict()["linear.weight"])


def test_lightning_and_the_plain_loop_train_alike() -> None:
    """A data set of one batch, so that the shuffling makes no difference."""
    config = tiny(train__optimizer="sgd", model__dropout=0.0, model__input_dropout=0.0)
    torch.manual_seed(0)
    module = TorchvisionModule(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 3), 8, 0)
    states = []
    for loop in (bench_training.train, bench_training.plain_train):
        task = bench_training.make_task(build_classifier(config, 3), config)
        loop(task, module, config, Clock(Counts(warmup=1, steps=3, rounds=1)))
        states.append(task.classifier.state_dict())
    fresh = build_classifier(config, 3).state_dict()
    moved = max(float((states[0][name] - fresh[name]).abs().max()) for name in fresh)
    apart = max(float((states[0][name] - states[1][name]).abs().max()) for name in fresh)
    assert apart < 1e-4 * moved


@pytest.mark.parametrize("alone", [False, True])
def test_loading_is_compared(corpus: Corpus, pictures: TensorDataset, alone: bool) -> None:
    group = bench_training.compare_loading("Try", tiny(), corpus, pictures, [0], Counts(1, 2, 2), alone)
    names = ["videogru", "torchvision, num_workers=0", "torchvision, num_workers=0, plain loop"]
    assert [row.name for row in group.rows] == names[: 2 if alone else 3]
    for row in group.rows:
        assert len(row.rates) == 2 and min(row.rates) > 0
        assert len(row.shares) == (0 if alone else 2)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> list[Encoder | None]:
    """No compiler runs, and malloc stays as it is; what would have been compiled, and None where malloc was set."""
    calls: list[Encoder | None] = []
    monkeypatch.setattr(bench_training, "check_compiles", lambda model, device: None)
    monkeypatch.setattr(Encoder, "compile", lambda encoder: calls.append(encoder))
    monkeypatch.setattr(bench_training, "keep_freed_memory", lambda: calls.append(None))
    return calls


def test_options_differ_in_what_they_say_only(untouched: list[Encoder | None]) -> None:
    config = tiny(model__dropout=0.0, model__input_dropout=0.0)
    steps = bench_training.option_steps(config, 3)
    losses, innermost = {}, {}
    for name, step in steps.items():
        layers = step.classifier.encoder.layers
        convolution = next(m for m in layers.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
        innermost[name] = [tensor_is_channels_last(convolution.weight)]
        if "compiled" in name:
            assert untouched == [step.classifier.encoder]
            continue
        layers.register_forward_hook(
            lambda _, inputs, maps, seen=innermost[name]: seen.extend(map(tensor_is_channels_last, (inputs[0], maps)))
        )
        losses[name] = float(step(*step.noise()))
        assert step.bf16 == name.startswith("bf16")
    assert innermost.pop("fp32, contiguous") == [False] * 3
    assert all(all(seen) for seen in innermost.values())
    first, second, third = losses.values()
    assert second == pytest.approx(first, rel=1e-5)
    assert third == pytest.approx(first, rel=0.02) and third != second


def tensor_is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_options_are_compared() -> None:
    steps = {name: step for name, step in bench_training.option_steps(tiny(), 3).items() if "compiled" not in name}
    group = bench_training.compare_options("Try", steps, Counts(1, 2, 2))
    assert [row.name for row in group.rows] == list(steps)
    assert all(len(row.rates) == 2 and "first two steps" in row.note for row in group.rows)


def test_the_environment_of_malloc_meets_its_own_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    seen: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> CompletedProcess[str]:
        assert command[-2] == "--malloc-child"
        modes.append(command[-1])
        seen.append({name: value for name, value in env.items() if name.startswith("MALLOC_")})
        return CompletedProcess(command, 0, f"{len(seen)}.5\n", "")

    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setattr("subprocess.run", run)
    group = bench_training.compare_malloc("Try", Counts(1, 2, 2))
    assert modes == ["usual", "fit", "usual"] * 2
    assert [len(names) for names in seen] == [0, 0, 3] * 2
    assert seen[2]["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
    assert [row.rates for row in group.rows] == [[1.5, 4.5], [2.5, 5.5], [3.5, 6.5]]
    assert os.environ["MALLOC_TOP_PAD_"] == "1"


def test_bench_training_writes_both_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    untouched: list[Encoder | None],
) -> None:
    real = bench_training.option_steps
    monkeypatch.setattr(bench_training, "option_steps", lambda *_: dict(list(real(tiny(), 3).items())[:2]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # is set by main, and so put back
    monkeypatch.setattr("platform.libc_ver", lambda *_: ("", ""))  # no processes of malloc
    bench_training.main(["--what", "options", "--warmup=1", "--steps=1", "--rounds=1", "--out", str(tmp_path)])
    text = (tmp_path / "training-speed.md").read_text()
    assert text in capsys.readouterr().out
    assert "- command: `python tools/" in text and "fp32, channels_last" in text
    figures = json.loads((tmp_path / "training-speed.json").read_text())
    assert [len(group["rows"]) for group in figures["groups"]] == [2, 2]
    assert figures["settings"] == {"warmup": 1, "steps": 1, "rounds": 1}
    assert (None in untouched) != torch.cuda.is_available()


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (bench_training.main, ["--what", "loading"], "--data-dir"),
        (bench_training.main, ["--what", "lodaing"], "takes loading, options"),
        (bench_training.main, ["--workers", "two"], "whole numbers"),
        (bench_training.main, ["--steps", "0"], "whole numbers"),
        (bench_length.main, ["--lengths", "256,9"], "from 16 on"),
        (bench_length.main, ["--lengths", "256,"], "from 16 on"),
        (bench_length.main, ["--cells", "rnn"], "gru, mingru, lstm"),
        (bench_length.main, ["--what", "all"], "lengths, encoders"),
        (bench_length.main, ["--rounds", "0"], "above 0"),
    ],
)
def test_mistakes_get_one_line(
    main: Callable[[list[str]], int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_an_empty_data_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--what", "loading", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    assert bench_training.main(words) == 2
    err = capsys.readouterr().err
    assert "no folder cifar-100-python" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Lengths ------------------------------------------------------------------------------------------------------------


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


def test_bench_infer_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([(99.0, 999.0), (3.0, 70.0), (1.0, 90.0)])
    monkeypatch.setattr(bench_infer, "run_once", lambda command: next(measured))
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(bytes(2**20))
    out = tmp_path / "figures.json"
    assert bench_infer.main(["--model=m", "--scan", str(scan), "--runs=2", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["wall_seconds"] == {"median": 2, "min": 1, "max": 3}
    assert (figures["peak_resident_mib"], figures["file_mib"], figures["runs"]) == (90, 1, 2)
    assert str(tmp_path) not in figures["machine"]["command"]

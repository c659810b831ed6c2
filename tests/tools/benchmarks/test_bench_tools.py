import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

from tools.benchmarks import bench_infer, bench_length, bench_training
from tools.experiments.training_loops import Clock, Counts, TorchvisionModule
from videogru.config import Config
from videogru.data.loading.datamodule import CorpusModule
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.models.encoders.encoder import Encoder
from videogru.training.fit import build_classifier

TINY = {
    "data.frame_size": 16,
    "model.encoder": "small",
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
    written = yaml.safe_load((repository / "configs" / "cifar100.yaml").read_text())
    assert written["model"].items() <= config.model.model_dump().items()
    assert (config.train.batch_size, config.data.augment.cutmix) == (128, 0.0)
    assert config.data.augment.translate * config.data.frame_size == bench_training.PADDING
    for changes in (bench_training.TINY, bench_training.NARROW, bench_training.RESIDUAL):
        changed = bench_training.recipe(None, **changes)
        bench_training.make_task(build_classifier(changed, 3), changed).configure_optimizers()


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
    assert "- command: `python -m tools.benchmarks.bench_training" in text and "fp32, channels_last" in text
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

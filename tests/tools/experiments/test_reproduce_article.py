import hashlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tools.experiments import article, reproduce_article
from videogru.data.manifests.dataset_card import load_card
from videogru.errors import ConfigError
from videogru.settings import parse_assignments
from videogru.workflows import train as runs
from videogru.workflows.settings import settings_for_training

# Apple, mushroom, orange; baby, bear, bed.
CODES = (0, 51, 53, 2, 3, 5)
COLORS = np.array([[0, 0, 0], [120, 0, 0], [0, 120, 0], [0, 0, 120], [120, 120, 0], [120, 120, 120]])
TINY = {"model.encoder": "small", "model.encoder_width": "4", "model.hidden_size": "4", "train.epochs": "3"}
RECIPE = """
data: {dataset: cifar100, frame_size: 32, val_fraction: 0.0}
model: {seq: grid, num_layers: 2}
train: {optimizer: adam, lr: 0.02, batch_size: 40, keep: last, precision: fp32}
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tool with a tiny recipe and budget; the folder that holds a tiny CIFAR-100 of 200 and 100 images."""
    prepare(tmp_path, monkeypatch)
    return tmp_path


def prepare(place: Path, patch: pytest.MonkeyPatch) -> None:
    (place / "recipe.yaml").write_text(RECIPE)
    patch.setattr(reproduce_article, "RECIPE", str(place / "recipe.yaml"))
    patch.setattr(reproduce_article, "BUDGETS", {"cpu": TINY, "gpu": {}})
    accept(patch.setattr, write_tiny_cifar(place / "data"))


def write_tiny_cifar(place: Path) -> dict[str, str]:
    """Pickles of CIFAR-100's form: six classes, three of one superclass, each with its color; their MD5 sums."""
    folder = place / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name, count in (("train", 200), ("test", 100), ("meta", 0)):
        content: dict[str, object] = {"fine_label_names": list(load_card("cifar100").classes)}
        if count:
            kinds = np.arange(count) % 6
            colors = rng.integers(0, 128, (count, 3, 1024)) + COLORS[kinds][:, :, None]
            pixels = colors.reshape(count, 3072).astype(np.uint8)
            content = {"data": pixels, "fine_labels": [CODES[kind] for kind in kinds.tolist()]}
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw).hexdigest()
    return sums


def accept(setter: Callable[..., None], sums: dict[str, str]) -> None:
    from torchvision.datasets import CIFAR100

    for key in ("train", "test"):
        setter(CIFAR100, f"{key}_list", [[key, sums[key]]])
    setter(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})


def train_tiny(tool: Path, names: list[str]) -> None:
    for name in names:
        net, _, seed = name.partition("-seed")
        pairs = [f"{key}={value}" for key, value in {**TINY, "train.epochs": 1, **article.NETS[net].settings}.items()]
        flags = {"data.data_dir": str(tool / "data"), "train.seed": int(seed)}
        config = settings_for_training(str(tool / "recipe.yaml"), flags, parse_assignments(pairs))
        runs.train(config, out=tool / "work" / name, progress=False, say=lambda text: None)


# The real command, but that it accepts the tiny pickles, and waits in its second step of all until it is told to stop.
WRAPPER = """
import sys, time
sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from tests.tools.experiments.test_reproduce_article import accept
accept(setattr, {sums!r})
from videogru.data import datamodule
from videogru.training.state import SaveState
real, ask, calls, told = datamodule.augment_batch, SaveState._ask, [], []
def slow(*a, **k):
    calls.append(1)
    if len(calls) == 7 and not Path({mark!r}).exists():
        Path({mark!r}).touch()
        while not told:
            time.sleep(0.01)
    return real(*a, **k)
def asked(*a):
    told.append(1)
    return ask(*a)
datamodule.augment_batch, SaveState._ask = slow, asked
from videogru.cli import main
main()
"""


def when(mark: Path, number: int) -> threading.Thread:
    """Send this process a signal once the file is there."""

    def watch() -> None:
        limit = time.monotonic() + 240
        while not mark.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_stopped_training_goes_on(
    tool: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sums = {name: hashlib.md5((tool / "data/cifar-100-python" / name).read_bytes()).hexdigest()
            for name in ("train", "test", "meta")}  # fmt: skip
    (tool / "wrapper.py").write_text(
        WRAPPER.format(tests=str(Path(__file__).parents[3]), sums=sums, mark=str(tool / "mark"))
    )
    monkeypatch.setattr(reproduce_article, "VIDEOGRU", (sys.executable, str(tool / "wrapper.py")))
    monkeypatch.setattr(reproduce_article, "NETS", {"gru-cnn": article.NETS["gru-cnn"]})
    words = ["--budget", "cpu", "--work", str(tool / "work"), "--data-dir", str(tool / "data"), "--seeds", "5"]
    thread = when(tool / "mark", signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    assert reproduce_article.main([*words, "--only", "train"]) == 130
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    run = tool / "work/gru-cnn-seed5"
    assert (run / "last.ckpt").is_file()
    assert not (run / "evaluation-test.json").exists()
    assert (
        f"run me again to go on:\n  python -m tools.experiments.reproduce_article {' '.join(words)}"
        in capfd.readouterr().out
    )
    assert reproduce_article.main([*words, "--only", "train"]) == 0
    said = capfd.readouterr()
    assert f"train --resume {run}" in said.out
    assert "going on with" in said.err
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3
    saved = json.loads((run / "evaluation-test.json").read_text())
    assert saved["evaluated"] == 100


# A training that only leaves what the tool looks at; mode is what the second one of all does.
STUB = """
import signal, sys, time
from pathlib import Path
words, place, mode = sys.argv[1:], Path({place!r}), {mode!r}
run = Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
with (place / "log").open("a") as log:
    log.write(run.name + (" resumed" if "--resume" in words else "") + chr(10))
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text({config!r})
if run.name == "lstm-cnn-seed4" and "--resume" not in words:
    if mode == "fail":
        sys.exit(7)
    if mode == "wait":
        def save(*_):
            (run / "last.ckpt").touch()
            sys.exit(130)
        signal.signal(signal.SIGTERM, save)
        (place / "mark").touch()
        time.sleep(60)
        sys.exit(9)
(run / "evaluation-test.json").write_text("{{}}")
"""


@pytest.fixture
def stub(tool: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    monkeypatch.setattr(reproduce_article, "check_settings", lambda run, wanted: None)

    def use(mode: str) -> list[str]:
        (tool / "stub.py").write_text(STUB.format(place=str(tool), mode=mode, config=RECIPE))
        monkeypatch.setattr(reproduce_article, "VIDEOGRU", (sys.executable, str(tool / "stub.py")))
        return [*called(tool), "--only", "train"]

    return use


def called(tool: Path) -> list[str]:
    return ["--budget", "cpu", "--work", str(tool / "work"), "--data-dir", str(tool / "data"), "--seeds", "4,2"]


def log(tool: Path) -> list[str]:
    return (tool / "log").read_text().split("\n")[:-1]


ORDER = [f"{net}-seed{seed}" for seed in (4, 2) for net in ("resnet", "lstm-cnn", "gru-cnn")]


def test_seed_by_seed_and_never_twice(tool: Path, stub: Callable[[str], list[str]]) -> None:
    words = stub("")
    assert reproduce_article.main(words) == 0
    assert log(tool) == ORDER
    (tool / "work/gru-cnn-seed4/evaluation-test.json").unlink()
    (tool / "work/resnet-seed2/evaluation-test.json").unlink()
    (tool / "work/resnet-seed2/last.ckpt").touch()
    (tool / "work/gru-cnn-seed4/half").touch()
    assert reproduce_article.main(words) == 0
    assert log(tool) == [*ORDER, "gru-cnn-seed4", "resnet-seed2 resumed"]
    # Without a saved state the training started in a new folder.
    assert not (tool / "work/gru-cnn-seed4/half").exists()


def test_a_failed_training_stops_the_tool_with_its_code(
    tool: Path, stub: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce_article.main(stub("fail")) == 7
    assert log(tool) == ORDER[:2]
    assert f"the training of {tool / 'work/lstm-cnn-seed4'} ended with 7" in capsys.readouterr().err


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, None])
def test_stops_and_goes_on(
    tool: Path, stub: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str], by: int | None
) -> None:
    words = stub("wait")
    if by is None:
        assert reproduce_article.main([*words, "--minutes", "0.05"]) == 130
    else:
        thread = when(tool / "mark", by)
        assert reproduce_article.main([*words, "--minutes", "0"]) == 130
        thread.join()
    assert log(tool) == ORDER[:2]
    assert "run me again to go on:" in capsys.readouterr().out
    assert reproduce_article.main(words) == 0
    assert log(tool) == [*ORDER[:2], "lstm-cnn-seed4 resumed", *ORDER[2:]]


def test_no_second_tool_in_the_same_folder(
    tool: Path, stub: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = stub("")
    with reproduce_article.locked(tool / "work"):
        assert reproduce_article.main(words) == 2
    assert "another run of this tool" in capsys.readouterr().err
    assert reproduce_article.main(words) == 0


def test_a_run_of_other_settings_is_refused(tool: Path) -> None:
    def wanted(net: str) -> object:
        return reproduce_article.wanted_config("cpu", net, 4, tool / "data")

    run = tool / "run"
    run.mkdir()
    (run / "config.yaml").write_text(wanted("gru-cnn").to_yaml().replace(str(tool), "elsewhere"))  # type: ignore[attr-defined]
    reproduce_article.check_settings(run, wanted("gru-cnn"))
    with pytest.raises(ConfigError, match="model.cell=gru, now it would be lstm"):
        reproduce_article.check_settings(run, wanted("lstm-cnn"))


def test_the_command_asks_for_the_settings_that_are_checked(tool: Path, tmp_path: Path) -> None:
    command = reproduce_article.command_for("cpu", "resnet", 3, tmp_path / "run", tool / "data")
    given = dict(zip(command[4::2], command[5::2], strict=True))
    assert given["--seed"] == "3" and given["--out"] == str(tmp_path / "run")
    config = reproduce_article.wanted_config("cpu", "resnet", 3, tool / "data")
    assigned = [value for flag, value in zip(command[4::2], command[5::2], strict=True) if flag == "--set"]
    flat = article.flat_settings(config)
    assert {key: str(flat[key]).lower() for key in (pair.partition("=")[0] for pair in assigned)} == dict(
        pair.split("=") for pair in assigned
    )
    model = config.model
    assert (model.cell, model.pooling, model.layer_norm, config.train.seed) == ("none", "mean", False, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "tpu"], "invalid choice: 'tpu'"),
        ([], "--budget"),
        (["--budget", "cpu", "--data-dir", "/nowhere"], "/nowhere: no folder cifar-100-python"),
        (["--budget", "cpu", "--seeds", "0,x"], "not '0,x'"),
        (["--budget", "cpu", "--seeds", "1,1"], "seeds must differ"),
        (["--budget", "cpu", "--minutes", "-3"], "--minutes"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = reproduce_article.main(words)
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_nothing_to_measure(tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce_article.main([*called(tool), "--only", "measure"]) == 2
    assert "no finished run" in capsys.readouterr().err

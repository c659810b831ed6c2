"""The command line as a user types it: flags, exit codes, one message for one mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from videogru.cli import main as cli


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["videogru", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Type a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_flags_grow_only_on_purpose() -> None:
    """The public flags. Everything else is a --set key."""
    command = typer.main.get_command(cli.app)
    flags = {}
    for name, sub in command.commands.items():
        for inner_name, inner in ({name: sub} if not hasattr(sub, "commands") else sub.commands).items():
            flags[f"{name} {inner_name}" if inner is not sub else name] = [
                parameter.opts[-1] for parameter in inner.params if parameter.name != "help"
            ]
    assert flags == {
        "train": [
            *("--dataset", "--data-dir", "--suffix", "--label", "--series"),
            *("--seq", "--encoder", "--config", "--epochs", "--batch-size", "--lr"),
            *("--devices", "--nodes", "--resume", "--seed", "--out", "--volume", "--max-memory"),
            *("--teacher", "--features", "--set"),
        ],
        "eval": ["run_or_model", "--split", "--dataset", "--data-dir", "--views", "--device", "--out"],
        "infer": [
            *("paths", "--model", "--out", "--format", "--top-k", "--views", "--series", "--windows"),
            *("--window-seconds", "--min-confidence", "--explain", "--device", "--volume", "--max-memory", "--set"),
        ],
        "stream": [
            *("source", "--model", "--out", "--every", "--top-k", "--size", "--fps"),
            *("--step-seconds", "--restart", "--exit-risk", "--device"),
        ],
        "probe": ["run_or_model", "--split", "--data-dir", "--device"],
        "export": ["run_or_model", "--format", "--precision", "--step", "--max-drop", "--out", "--data-dir"],
        "bench": ["models", "--split", "--threads", "--batch-size", "--rounds", "--data-dir", "--out"],
        "encode": ["dataset", "--model", "--data-dir", "--out"],
        "model show": ["run_or_model"],
        "model verify": ["runs_or_models", "--backend"],
        "model calibrate": ["run_or_model", "--split", "--dataset", "--data-dir", "--device"],
        "data list": [],
        "data info": [
            "name_or_folder",
            "--data-dir",
            "--out",
            "--volume",
            "--max-memory",
            "--series",
            "--suffix",
            "--label",
            "--set",
        ],
        "data check": ["name_or_folder", "--data-dir", "--out", "--suffix", "--label", "--set"],
    }


def test_help_is_light() -> None:
    """No torch, no Lightning, no NumPy before a command runs."""
    script = (
        "import sys; sys.argv = ['videogru', '--help']\n"
        "from videogru.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'pytorch_lightning', 'monai', 'matplotlib', 'pydantic')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert finished.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["eval"],
        ["infer"],
        ["stream"],
        ["export"],
        ["bench"],
        ["data", "list"],
        ["data", "info"],
        ["data", "check"],
        ["encode"],
        ["model", "show"],
        ["model", "verify"],
        ["model", "calibrate"],
    ],
)
def test_every_command_shows_examples(typed, command: list[str]) -> None:
    code, out, _ = typed(*command, "--help")
    assert code == 0
    assert f"videogru {' '.join(command)}" in out


def test_help_of_train_shows_the_defaults_of_the_settings(typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from videogru.config import Config

    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = typed("train", "--help")
    assert code == 0
    config = Config()
    for flag, value in (
        *(("--epochs", config.train.epochs), ("--batch-size", config.train.batch_size), ("--seed", config.train.seed)),
        *(("--encoder", config.model.encoder), ("--seq", config.model.seq), ("--lr", f"{config.train.lr:g}")),
    ):
        (line,) = [line for line in out.splitlines() if line.startswith(f"│ {flag} ")]
        assert f"Default: {value}." in line
    assert typed("train", "--help")[1] == out


@pytest.mark.parametrize("command", [["infer"], ["data", "info"], ["data", "check"]])
def test_help_names_no_setting_that_a_command_does_not_take(typed, command: list[str]) -> None:
    assert "model." not in typed(*command, "--help")[1].replace("model.safetensors", "")


def test_data_list_fits_a_narrow_terminal(typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    wide = typed("data", "list")[1].splitlines()
    monkeypatch.setattr("videogru.cli.terminal.console", lambda: Console(width=80))
    narrow = typed("data", "list")[1].splitlines()
    assert len(wide) == 10 and narrow[0] == "adrenalmnist3d"
    assert narrow[1].split() == [
        "title",
        "AdrenalMNIST3D,",
        "shapes",
        "of",
        "adrenal",
        "glands",
        "segmented",
        "from",
        "CT",
    ]
    assert {line.split()[0] for line in narrow if line.startswith("  ")} == set(wide[0].split()[1:])


def test_version(typed) -> None:
    import videogru

    assert typed("--version")[:2] == (0, f"videogru {videogru.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["no data set", "videogru train --dataset"]),
        (["train", "--dataset", "grid_digit"], ["grid_digit", "grid_digits"]),
        (["train", "--dataset", "no-such-folder/"], ["no-such-folder"]),
        (["train", "--dataset", "adrenalmnist3d", "--set", "model.hiden_size=3"], ["model.hidden_size"]),
        (["train", "--dataset", "adrenalmnist3d", "--seq", "columns"], ["model.seq", "columns"]),
        (["train", "--dataset", "adrenalmnist3d", "--config", "nope"], ["nope", "adrenalmnist3d"]),
        (["train", "--dataset", "adrenalmnist3d", "--config", "nope.yaml"], ["nope.yaml"]),
        (["train", "--dataset", "adrenalmnist3d", "--lr", "0"], ["train.lr"]),
        (["train", "--dataset", "adrenalmnist3d", "--volume", "median"], ["data.volume", "median"]),
        (["train", "--dataset", "adrenalmnist3d", "--volume", "-1"], ["data.volume", "-1"]),
        (["train", "--dataset", "adrenalmnist3d", "--volume", "2"], ["no volume 2"]),
        (["train", "--dataset", "adrenalmnist3d", "--max-memory", "0"], ["data.max_memory_gib"]),
        (["train", "--dataset", "grid_digits", "--volume", "0"], ["data.volume", "video"]),
        (["train", "--dataset", "grid_digits", "--max-memory", "9"], ["data.max_memory_gib", "video"]),
        (["train", "--dataset", "adrenalmnist3d", "--teacher", "absent"], ["absent", "videogru train"]),
        (["train", "--dataset", "adrenalmnist3d", "--set", "train.distill_alpha=0.5"], ["--teacher"]),
        (["train", "--features", "absent"], ["absent", "videogru encode"]),
        (["train", "--features", "absent", "--teacher", "absent"], ["--teacher", "--features"]),
        (["encode", "grid_digits", "--model", "absent"], ["absent"]),
        (["train", "--resume", "absent"], ["absent"]),
        (["train", "--resume", "absent", "--epochs", "3"], ["--resume"]),
        (["train", "--dataset", "kinetics400", "--data-dir", "."], ["train.csv"]),
        (["train", "--epochs", "many"], ["--epochs"]),
        (["train", "--no-such-flag"], ["no-such-flag"]),
        (["no-such-command"], ["no-such-command"]),
        (["eval", "absent"], ["absent"]),
        (["eval", "."], ["model.safetensors"]),
        (["infer", "scan.nii.gz"], ["videogru train --dataset adrenalmnist3d"]),
        (["infer", "clip.mp4"], ["videogru train --dataset grid_digits"]),
        (["infer", "cat.png"], ["videogru train --dataset cifar100 --seq rows"]),
        (["infer", "scan.nii.gz", "--model", "absent.safetensors"], ["absent.safetensors"]),
        (["infer", "scan.nii.gz", "--out", "no/such/folder.csv"], ["no/such"]),
        (["data", "info", "cifar10"], ["cifar100"]),
        (["data", "check", "cifar10"], ["cifar100"]),
        (["data", "check", "."], ["class"]),
        (["data", "check", "grid_digits", "--set", "data.decode_timeout_seconds=-1"], ["decode_timeout_seconds"]),
    ],
)
def test_mistakes_end_with_2_and_one_message(typed, arguments: list[str], words: list[str]) -> None:
    code, _, err = typed(*arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_a_mistake_leaves_no_run_folder(typed, tmp_path: Path) -> None:
    typed("train", "--dataset", "adrenalmnist3d", "--set", "model.weights=absent.safetensors")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_internal_errors_end_with_1(typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("videogru.workflows.settings.describe_dataset", broken)
    code, _, err = typed("data", "info", "adrenalmnist3d")
    assert code == 1
    assert "a mistake of ours" in err
    assert "please report" in err


def test_ctrl_c_ends_with_130(typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("videogru.workflows.settings.describe_dataset", interrupted)
    assert typed("data", "info", "adrenalmnist3d")[0] == 130


def test_data_list_and_info(typed) -> None:
    code, out, _ = typed("data", "list")
    assert code == 0
    assert all(name in out for name in ("adrenalmnist3d", "cifar100", "grid_digits", "kinetics400"))
    code, out, _ = typed("data", "info", "adrenalmnist3d")
    assert code == 0
    for word in ("1188", "98", "298", "CC BY 4.0"):
        assert word in out


def test_shell_completion_is_offered(tmp_path: Path) -> None:
    environment = {
        "_VIDEOGRU_COMPLETE": "complete_bash",
        "COMP_WORDS": "videogru tr",
        "COMP_CWORD": "1",
        "HOME": str(tmp_path),
    }
    finished = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['videogru']; from videogru.cli.main import main; main()"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert "train" in finished.stdout, finished.stderr


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_streams_that_were_closed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["videogru", "data", "list"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    getattr(sys, name).close()
    assert ended.value.code == 0

from pathlib import Path

import pytest

from videogru.config import Config, DataConfig
from videogru.errors import ConfigError
from videogru.settings import known_keys, parse_assignments, read_settings_file, resolve_config


def test_later_layers_win() -> None:
    config = resolve_config(
        ("recipe", {"model": {"hidden_size": 64, "cell": "lstm"}}),
        ("flags", {"model.hidden_size": 96}),
        ("--set", {"model.hidden_size": 256}),
    )
    assert (config.model.hidden_size, config.model.cell) == (256, "lstm")
    assert config.train == Config().train


def test_yaml_round_trip() -> None:
    import yaml

    config = resolve_config(("x", {"data.dataset": "clips", "data.augment.flip": 0.5, "train.lr": 0.01}))
    assert resolve_config(("file", yaml.safe_load(config.to_yaml()))) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"hiden_size": 3}}, ["model.hiden_size", "model.hidden_size", "here.yaml"]),
        ({"model": {"hidden_size": 0}}, ["model.hidden_size", "0", "here.yaml"]),
        ({"model": {"cell": "rnn"}}, ["model.cell", "rnn", "gru"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "fast"]),
        ({"data.augment.flip": 1.5}, ["data.augment.flip", "1.5"]),
    ],
)
def test_wrong_settings_name_key_value_and_origin(settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(("here.yaml", settings))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"data.percentile_low": 60, "data.percentile_high": 40}, {"data.window_low": 5, "data.window_high": 5}],
)
def test_empty_intensity_windows(settings: dict) -> None:
    with pytest.raises(ConfigError, match="must lie below"):
        resolve_config(("--set", settings))


def test_assignments_are_yaml_values() -> None:
    parsed = parse_assignments(["model.hidden_size=256", "data.augment.flip=0.5", "model.layer_norm=false"])
    assert parsed == {"model.hidden_size": 256, "data.augment.flip": 0.5, "model.layer_norm": False}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model.hiden_size=1", "model.hidden_size"),
        ("hidden_size=1", "model.hidden_size"),
        ("model.hidden_size", "key=value"),
        ("model.weights=[", "YAML"),
    ],
)
def test_wrong_assignments(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_assignments([text])


def test_every_key_can_be_set_to_its_default() -> None:
    """No key is known that the models would refuse."""
    flat = {}
    for key in known_keys():
        value: object = Config()
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    assert resolve_config(("all", flat)) == Config()


def test_defaults_by_kind() -> None:
    assert (DataConfig().for_kind("volume").channels, DataConfig().for_kind("volume").fit) == (1, "pad")
    assert (DataConfig().for_kind("video").channels, DataConfig().for_kind("video").fit) == (3, "crop")
    assert DataConfig().for_kind("image").for_kind("image").num_frames == 1
    DataConfig().for_kind("image").check_read("image")
    assert DataConfig(channels=1).for_kind("video").channels == 1


def test_an_empty_section_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("train:\nmodel: {cell: lstm}\n")
    assert resolve_config(("own", read_settings_file(tmp_path / "own.yaml"))).model.cell == "lstm"


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    for content in ("train: {", "- a list", "train: " + "[" * 5000, "train: &a {x: *a}"):
        (tmp_path / "own.yaml").write_text(content)
        with pytest.raises(ConfigError, match="own.yaml"):
            read_settings_file(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    "assignment",
    [
        *("model.hidden_size=1000000000", "model.num_layers=100000", "model.encoder_width=1000000000"),
        *("data.frame_size=1000000", "data.frame_size=1", "data.num_frames=10000000000"),
        *("train.epochs=true", "data.frame_size=false", "train.num_workers=true", "model.lookahead=true"),
        *("train.num_workers=1000", "train.seed=1700000000123", "train.lr=.inf", "train.devices=2000"),
    ],
)
def test_numbers_out_of_reason_are_refused(assignment: str) -> None:
    with pytest.raises(ConfigError):
        resolve_config(("--set", parse_assignments([assignment])))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("video", {"data.axis": "coronal"}, "data.axis is for volumes, not for videos"),
        ("image", {"data.intensity": "zscore"}, "data.intensity is for volumes, not for images"),
        ("volume", {"data.decoder": "pyav"}, "data.decoder is for videos, not for volumes"),
        ("image", {"data.augment.drop_steps": 0.2}, "drop_steps is for videos and volumes, not for images"),
        ("video", {"data.augment.gamma": 0.3}, "data.augment.gamma is for volumes"),
        ("image", {"data.num_frames": 8}, "data.num_frames is for videos and volumes"),
    ],
)
def test_what_a_kind_never_reads_is_refused(kind, settings, words):
    data = resolve_config(("--set", settings)).data
    with pytest.raises(ConfigError, match=words):
        data.check_read(kind)
    with pytest.raises(ConfigError, match=words):
        data.check_read(kind, settings)
    data.check_read(kind, ["data.frame_size"])  # what the model file says may stay
    DataConfig().check_read(kind)

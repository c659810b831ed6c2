"""Round trip, and every way a model file can be wrong."""

import json
import math
import os
import pickle
from datetime import UTC, datetime

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.small_models import rewrite
from videogru import __version__
from videogru.checkpoint.model_file import (
    ModelCard,
    find_model,
    make_card,
    newest_model,
    read_card,
    read_model,
    write_model,
)
from videogru.config import DataConfig, ModelConfig
from videogru.errors import ModelFileError, VideogruError
from videogru.models.classifier import Classifier

CLASSES = ("bin", "lay", "naïve 日本")
FRAMES, LENGTHS = torch.rand(2, 3, 1, 16, 16), torch.tensor([3, 2])


def make(data: DataConfig | None = None, kind="volume", **settings) -> tuple[Classifier, ModelCard]:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 8, "hidden_size": 6, "num_layers": 2, **settings})
    model = Classifier(config, in_channels=1, frame_size=16, num_classes=3, mean=(0.4,), std=(0.2,))
    model(FRAMES, LENGTHS)  # BatchNorm's statistics move
    data = data or DataConfig(dataset="adrenalmnist3d", frame_size=16, num_frames=28, channels=1)
    card = make_card(
        model,
        kind=kind,
        classes=CLASSES,
        data=data,
        dataset="AdrenalMNIST3D",
        license="CC BY 4.0",
        metrics={"auc": 0.81},
    )
    return model.eval(), card


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, *make())
    return path


def refuse(path, match: str) -> ModelFileError:
    with pytest.raises(ModelFileError, match=match) as caught:
        read_model(path)
    assert caught.value.where == str(path)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    "settings", [{}, {"cell": "lstm", "temporal": "causal", "pooling": "attention"}, {"seq": "grid"}]
)
def test_what_is_read_predicts_what_was_written(tmp_path, settings):
    model, card = make(**settings)
    write_model(tmp_path / "model.safetensors", model, card)
    state = torch.get_rng_state()
    again, same_card = read_model(tmp_path / "model.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    assert same_card == card
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        assert torch.equal(again(FRAMES, LENGTHS), model(FRAMES, LENGTHS))
        again.encoder.layers.stem.weight.zero_()
        again.recurrent.forward_layers[0].weight_ih_l0.zero_()  # the layer computes with what was loaded
        assert not torch.equal(again(FRAMES, LENGTHS), model(FRAMES, LENGTHS))


def test_the_card_tells_the_facts(written):
    card = read_card(written)
    assert card.classes == CLASSES
    assert card.kind == "volume"
    assert card.temporal == "bi"
    assert (card.mean, card.std, card.in_channels, card.frame_size) == ((0.4,), (0.2,), 1, 16)
    assert card.data.num_frames == 28
    assert card.versions["videogru"] == __version__
    assert card.versions["torch"] == torch.__version__.split("+")[0]
    assert abs((datetime.now(UTC) - card.created).total_seconds()) < 600
    assert card.metrics == {"auc": 0.81}


def test_a_model_that_was_read_can_be_written_and_trained(written, tmp_path):
    model, card = read_model(written)
    model.train()(FRAMES, LENGTHS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    write_model(tmp_path / "again.safetensors", model.eval(), card)
    assert read_card(tmp_path / "again.safetensors") == card


def test_paths_of_this_machine_stay_out(tmp_path):
    model, _ = make(encoder="conv2")
    weights = tmp_path / "secret" / "start.safetensors"
    weights.parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.encoder.layers.state_dict().items()}, weights)
    model, card = make(DataConfig(frame_size=16, data_dir=tmp_path / "secret"), encoder="conv2", weights=str(weights))
    path = tmp_path / "model.safetensors"
    write_model(path, model, card)
    weights.unlink()
    assert b"secret" not in path.read_bytes()
    again, card = read_model(path)
    assert card.model.weights == "start.safetensors"
    assert torch.equal(again(FRAMES, LENGTHS), model(FRAMES, LENGTHS))


def test_imagenet_weights_are_not_fetched_to_read_a_model(tmp_path, monkeypatch):
    model, card = make(encoder="mobilenet_v3_small")
    model.config = card.model.model_copy(update={"weights": "imagenet"})
    write_model(tmp_path / "model.safetensors", model, card.model_copy(update={"model": model.config}))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    again, _ = read_model(tmp_path / "model.safetensors")
    assert again.config.weights == "imagenet"
    assert torch.equal(again(FRAMES, LENGTHS), model(FRAMES, LENGTHS))
    assert not (tmp_path / "hub").exists()


def test_a_metric_without_a_value_survives(tmp_path):
    model, card = make()
    write_model(tmp_path / "model.safetensors", model, card.model_copy(update={"metrics": {"auc": math.nan}}))
    assert math.isnan(read_card(tmp_path / "model.safetensors").metrics["auc"])


def test_a_card_of_another_model_is_refused(tmp_path):
    model, card = make()
    for update in ({"model": ModelConfig()}, {"classes": ("a",)}, {"mean": (0.1,)}):
        with pytest.raises(ValueError, match="the card describes"):
            write_model(tmp_path / "model.safetensors", model, card.model_copy(update=update))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mean": [0.1, 0.2]}, "mean and std want 1 values"),
        ({"std": [0.0]}, "std above 0"),
        ({"classes": ["a", "a", "b"]}, "class names repeat"),
        ({"frame_size": 17}, "frame_size 17 but"),
        ({"kind": "sound"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"model__hidden_size": 0}, "model.hidden_size"),
        ({"model__recurrence": 1}, "model.recurrence"),
        ({"model__hidden_size": 7}, r"has shape \(18, 32\), not \(21, 32\)"),
        ({"model__hidden_size": 10**15}, "model.hidden_size"),
        ({"model__num_layers": 3}, "missing recurrent.forward_layers.2"),
        ({"model__num_layers": 1}, "unexpected recurrent.backward_layers.1"),
        ({"model__num_layers": 10**9}, "model.num_layers"),
        ({"model__num_layers": 60}, "missing recurrent"),
        ({"model__hidden_size": 16_000}, "fit"),
        ({"model__encoder": "resnet18"}, "missing encoder.layers.conv1.weight"),
        ({"classes": ["a", "b"]}, r"head.linear.weight has shape \(3, 12\), not \(2, 12\)"),
        ({"data__channels": None, "kind": "image"}, "1 channels, but of kind image 3 are read"),
        ({"data__max_memory_gib": 8, "kind": "video"}, "max_memory_gib is for volumes"),
        ({"format_version": 5}, "format version 5, and videogru"),
        ({"format_version": "1"}, "format version '1' does not exist"),
        ({"format_version": True}, "format version True does not exist"),
        ({"format_version": 0}, "format version 0 does not exist"),
    ],
)
def test_edited_headers_are_refused(written, changes, match):
    rewrite(written, **changes)
    refuse(written, match)


def test_missing_foreign_and_misshapen_tensors_are_named(written):
    tensors = load_file(written)
    refuse_with = [
        ({k: v for k, v in tensors.items() if k != "head.linear.bias"}, "missing head.linear.bias"),
        ({**tensors, "extra": torch.zeros(1)}, "unexpected extra"),
        ({**tensors, "head.linear.bias": torch.zeros(4)}, r"head.linear.bias has shape \(4,\), not \(3,\)"),
        ({**tensors, "head.linear.bias": torch.zeros(3).half()}, "head.linear.bias is torch.float16"),
    ]
    for changed, match in refuse_with:
        rewrite(written, changed)
        refuse(written, match)
    rewrite(written, tensors)
    read_model(written)


def test_a_file_cut_at_any_place_is_refused(written):
    content = written.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        written.write_bytes(content[:length])
        refuse(written, "damaged, cut short")
        with pytest.raises(ModelFileError):
            read_card(written)
    written.write_bytes(content + b"\0")
    refuse(written, "damaged, cut short")


def test_a_header_that_claims_a_terabyte_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(path, "damaged, cut short")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (None, "no card"),
        ({"other": "1"}, "no card"),
        ({"videogru": "{"}, "no JSON"),
        ({"videogru": "[]"}, "None does not exist"),
    ],
)
def test_foreign_safetensors_are_refused(tmp_path, metadata, match):
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors", metadata=metadata)
    refuse(tmp_path / "foreign.safetensors", match)


class Trap:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    ("name", "match"), [("last.ckpt", "pickles can run code"), ("m.pth", "pickles can"), ("m.safetensors", "damaged")]
)
def test_a_pickle_is_never_opened(tmp_path, name, match):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    refuse(tmp_path / name, match)


def test_folders_and_missing_files_are_named(tmp_path):
    refuse(tmp_path, "a folder")
    refuse(tmp_path / "absent.safetensors", "no such file")


def test_a_file_that_cannot_be_written_leaves_nothing_and_spoils_nothing(written, tmp_path):
    model, card = make()
    with pytest.raises(VideogruError, match="cannot be written") as caught:
        write_model(tmp_path / "absent" / "model.safetensors", model, card)
    assert caught.value.where == str(tmp_path / "absent" / "model.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(VideogruError, match="cannot be written"):
        write_model(tmp_path / "taken", model, card)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "taken"]
    read_model(written)


def test_what_was_read_outlives_its_file(written):
    expected = read_model(written)[0](FRAMES, LENGTHS)
    model, _ = read_model(written)
    written.write_bytes(b"")
    assert torch.equal(model(FRAMES, LENGTHS), expected)


def test_the_newest_readable_model_of_a_kind(tmp_path):
    assert newest_model(tmp_path / "absent") is None
    for age, (run, kind) in enumerate([("c", "video"), ("b", "volume"), ("a", "video"), ("d", "image")]):
        (tmp_path / run).mkdir()
        write_model(tmp_path / run / "model.safetensors", *make(kind=kind))
        os.utime(tmp_path / run / "model.safetensors", (1000 - age, 1000 - age))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no model")
    (tmp_path / "unfinished").mkdir()
    assert newest_model(tmp_path) == tmp_path / "c" / "model.safetensors"
    assert newest_model(tmp_path, "volume") == tmp_path / "b" / "model.safetensors"
    os.utime(tmp_path / "a" / "model.safetensors", (2000, 2000))
    assert newest_model(tmp_path, "video") == tmp_path / "a" / "model.safetensors"


def test_a_model_is_found_by_file_or_by_run(written, tmp_path):
    assert find_model(written) == written
    assert find_model(written.parent) == written
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ModelFileError, match=r"no model\.safetensors"):
        find_model(tmp_path / "unfinished")
    with pytest.raises(ModelFileError, match="no such file"):
        find_model(tmp_path / "absent")

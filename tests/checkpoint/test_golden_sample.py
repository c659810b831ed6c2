"""The golden sample notices what changes an answer, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.command_line import videogru
from tests.support.small_models import GOLDEN_KINDS, rewrite, written
from videogru.checkpoint.describe import describe_model
from videogru.checkpoint.golden_sample import _picture, add_golden_sample, golden_batch, verify_model
from videogru.checkpoint.model_file import FORMAT_VERSION, read_card, read_model, write_model
from videogru.errors import DataError, ModelFileError


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_gaps": True, "cell": "lstm", "seq": "rows"}])
def test_what_was_written_is_said_again(tmp_path: Path, kind: str, settings: dict) -> None:
    path = written(tmp_path / "model.safetensors", kind, **settings)
    replay = verify_model(path)
    assert replay is not None and replay.holds and replay.difference == 0.0
    # By hand: the clip that the readers make, through the classifier.
    classifier, card = read_model(path)
    batch = golden_batch(card)
    assert batch.frames.shape[1:] == ({"image": 1}.get(kind, 6), card.in_channels, 24, 24)
    with torch.no_grad():
        expected = classifier(batch.frames, batch.lengths, batch.gaps)[0]
    np.testing.assert_allclose(card.golden.logits, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("video", {"mean": [0.4, 0.4, 0.42]}),
        ("video", {"std": [0.2, 0.21, 0.2]}),
        ("video", {"data__fit": "pad"}),
        ("video", {"data__num_frames": 5}),
        ("volume", {"data__axis": "coronal"}),
        ("volume", {"data__intensity": "zscore"}),
        ("volume", {"data__percentile_high": 95}),
        ("image", {"data__fit": "crop"}),
        ("image", {"mean": [0.39]}),
    ],
)
def test_changed_preprocessing_is_refused(tmp_path: Path, kind: str, changes: dict) -> None:
    path = written(tmp_path / "model.safetensors", kind)
    rewrite(path, **changes)
    replay = verify_model(path)
    assert replay is not None and not replay.holds and replay.difference > replay.allowed


def test_one_changed_weight_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", "video")
    tensors = load_file(path)
    tensors["head.linear.weight"][2, 3] += 0.1
    rewrite(path, tensors=tensors)
    replay = verify_model(path)
    assert replay is not None and not replay.holds


def test_the_picture_is_the_same_everywhere() -> None:
    """By plain Python integers."""
    for index, c, y, x in [(0, 0, 0, 0), (3, 1, 70, 90), (17, 2, 80, 85), (39, 0, 143, 207), (39, 2, 98, 147)]:
        if abs(x - 30 - 3 * index) < 20 and abs(y - 60 - index) < 25:
            expected = 230 - 60 * c
        else:
            a, b, t = x + 2 * index, y + 16 * c, index
            expected = abs((a + t) % 126 - 63) + abs((b - t) % 90 - 45) + abs((a + b) % 162 - 81)
        assert int(_picture(index)[c, y, x]) == expected


def test_files_without_one_and_of_an_unknown_pattern(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", "video")
    rewrite(path, golden={"pattern": 99, "logits": [0.0] * 4})
    assert verify_model(path) is None
    rewrite(path, golden=None, format_version=1)  # as format 1 was written, but for the key
    assert verify_model(path) is None
    add_golden_sample(path)
    assert read_card(path).format_version == FORMAT_VERSION and verify_model(path).holds
    rewrite(path, golden={"pattern": 1, "logits": [0.0] * 3})
    with pytest.raises(ModelFileError, match="golden sample of 3 logits"):
        verify_model(path)


def test_the_commands(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", "volume")
    shown = videogru("model", "show", path)
    assert shown.code == 0
    facts = describe_model(path)
    for text in ("a, b, c, d", "auto slices", "slab", "24 x 24 pixels", str(facts["parameters"]["total"])):
        assert text in shown.out
    assert facts["parameters"]["total"] == sum(p.numel() for p in read_model(path)[0].parameters())
    sound = videogru("model", "verify", path, "--backend", "torch")
    assert sound.code == 0 and "1 thread): ok" in sound.out
    rewrite(path, mean=[0.4, 0.4, 0.5])
    refused = videogru("model", "verify", path, "--backend", "torch")
    assert refused.code == 4 and "1 thread): FAILED" in refused.out
    missing = videogru("model", "verify", tmp_path / "none.safetensors")
    assert missing.code == 2 and "no such file" in missing.err


def test_one_bad_file_leaves_the_others_verified(tmp_path: Path) -> None:
    good, bad = written(tmp_path / "good.safetensors", "video"), tmp_path / "bad.safetensors"
    bad.write_bytes(b"no model")
    done = videogru("model", "verify", bad, good, tmp_path / "none.safetensors", "--backend", "torch")
    assert done.code == 2 and "1 thread): ok" in done.out
    assert str(bad) in done.err and "none.safetensors" in done.err


def test_a_model_without_finite_scores_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", "video")
    classifier, card = read_model(path)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.fill_(3e38)
    write_model(path, classifier, card)
    with pytest.raises(DataError, match="the training diverged") as caught:
        add_golden_sample(path)
    assert "--lr" in str(caught.value)

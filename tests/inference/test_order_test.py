"""Probes of models whose use of time is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from videogru.checkpoint.model_file import make_card
from videogru.config import DataConfig, ModelConfig
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.errors import ConfigError, DataError
from videogru.inference.metrics import paired_difference
from videogru.inference.order_test import AS_IT_IS, probe
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Classifier


class Rising(nn.Module):
    """Class 1 where the brightness rises from the first valid step to the last, else 0; of equals 2."""

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
        means = frames.float().mean((2, 3, 4))
        last = means.gather(1, lengths[:, None] - 1)[:, 0]
        rise = torch.sign(last - means[:, 0])
        return 5 * torch.stack([(rise == -1), (rise == 1), (rise == 0)], dim=1).float()


class Brightest(nn.Module):
    """Class 1 where the mean of the valid steps is bright, else 0: no order in it."""

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
        valid = torch.arange(frames.shape[1]) < lengths[:, None]
        mean = (frames.float().mean((2, 3, 4)) * valid).sum(1) / lengths
        return torch.stack([0.5 - mean, mean - 0.5, torch.full_like(mean, -9.0)], dim=1)


def corpus(arrays: np.ndarray, labels: list[int]) -> Corpus:
    manifest = build_manifest(Path(), ("a", "b", "c"), [f"x/{row}" for row in range(len(arrays))], labels)
    return Corpus("x", "volume", ("a", "b", "c"), manifest, arrays, None, 0, ())


def predictor(classifier: nn.Module) -> Predictor:
    data = DataConfig(
        frame_size=8, num_frames=12, intensity="window", window_low=0, window_high=255, sampling="uniform"
    ).for_kind("volume")
    model = ModelConfig(encoder_width=4, hidden_size=6)
    real = Classifier(model, in_channels=1, frame_size=8, num_classes=3, mean=(0.5,), std=(0.2,))
    made = Predictor(real, make_card(real, kind="volume", classes=("a", "b", "c"), data=data), device="cpu")
    made._model = classifier  # type: ignore[assignment]
    return made


def ramps(count: int, steps: int = 12) -> tuple[np.ndarray, list[int]]:
    """Volumes whose slices get brighter (label 1) or darker (label 0)."""
    labels = [row % 2 for row in range(count)]
    ramp = np.linspace(20, 230, steps).astype(np.uint8)
    arrays = np.stack([ramp if label else ramp[::-1] for label in labels])
    return np.broadcast_to(arrays[:, :, None, None, None], (count, steps, 1, 8, 8)).copy(), labels


def test_a_model_of_order_is_found_out() -> None:
    arrays, labels = ramps(40)
    found = probe(predictor(Rising()), corpus(arrays, labels), np.arange(40), num_workers=0)
    score = {row.name: row.score.value for row in found.rows}
    assert (found.metric, found.evaluated) == ("top1", 40)
    assert score[AS_IT_IS] == 1.0
    assert score["reversed"] == 0.0
    assert 0.2 < score["shuffled"] < 0.8
    assert score["the middle one alone"] == score["one by one, averaged"] == 0.0  # a single step rises nowhere
    assert found.verdict.startswith("The order of the slices matters")
    again = probe(predictor(Rising()), corpus(arrays, labels), np.arange(40), num_workers=0, batch_size=7)
    assert again.rows == found.rows  # a shuffle depends on the row, not on the batch
    other = probe(predictor(Rising()), corpus(arrays, labels), np.arange(40), num_workers=0, seed=1)
    assert other.rows != found.rows


def test_a_model_without_order_is_found_out(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (30, 12, 1, 8, 8), dtype=np.uint8)
    means = arrays.mean((1, 2, 3, 4))
    labels = (means > 127.5).astype(int).tolist()
    found = probe(predictor(Brightest()), corpus(arrays, labels), np.arange(30), num_workers=0)
    difference = {row.name: row.difference.value for row in found.rows}
    assert difference["shuffled"] == difference["reversed"] == 0
    assert found.verdict.startswith(("Nothing shows", "This model needs several"))
    found.to_json(tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text())["rows"][0]["name"] == AS_IT_IS


def test_padding_stays_where_it_is() -> None:
    """Clips of different lengths: steps are changed among the valid ones only."""
    from videogru.inference.order_test import _picked, _reordered, _shuffle
    from videogru.sequence import SequenceBatch

    frames = torch.arange(1, 11, dtype=torch.uint8).view(2, 5, 1, 1, 1).clone()
    frames[1, 3:] = 0
    batch = SequenceBatch(frames, torch.tensor([5, 3]), torch.tensor([7, 8]), torch.tensor([0, 1]))
    mixed = _reordered(batch, _shuffle(0)).frames[:, :, 0, 0, 0]
    assert sorted(mixed[0].tolist()) == [1, 2, 3, 4, 5]
    assert sorted(mixed[1, :3].tolist()) == [6, 7, 8]
    assert mixed[1, 3:].tolist() == [0, 0]
    turned = _reordered(batch, lambda steps, row: steps.flip(0)).frames[:, :, 0, 0, 0]
    assert turned.tolist() == [[5, 4, 3, 2, 1], [8, 7, 6, 0, 0]]
    single = _picked(batch, lambda length: list(range(length)))
    assert single.frames[:, 0, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert single.indices.tolist() == [7] * 5 + [8] * 3
    assert _picked(batch, lambda length: [length // 2]).frames.flatten().tolist() == [3, 7]


def test_stills_and_unlabeled_rows_cannot_be_probed() -> None:
    arrays, _ = ramps(4)
    with pytest.raises(DataError, match="none of the 4 rows"):
        probe(predictor(Rising()), corpus(arrays, [-1] * 4), np.arange(4), num_workers=0)
    made = predictor(Rising())
    made.card = made.card.model_copy(update={"kind": "image"})
    with pytest.raises(ConfigError, match="one frame"):
        probe(made, corpus(arrays, [0] * 4), np.arange(4), num_workers=0)


def test_paired_differences_against_a_loop() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    plain = rng.random((60, 2))
    plain[:, 1] += labels * 0.5
    plain /= plain.sum(1, keepdims=True)
    changed = plain[:, ::-1].copy()
    changed[:40] = plain[:40]
    metric, score, difference = paired_difference(changed, plain, labels, resamples=50, seed=3)
    assert metric == "auroc"
    assert score.value == pytest.approx(roc_auc_score(labels, changed[:, 1]))
    drawn = np.random.default_rng(3).integers(60, size=(50, 60))
    gaps = [roc_auc_score(labels[d], changed[d, 1]) - roc_auc_score(labels[d], plain[d, 1]) for d in drawn]
    assert difference.value == pytest.approx(score.value - roc_auc_score(labels, plain[:, 1]))
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(gaps, (0.025, 0.975))))
    three = np.concatenate([plain, np.zeros((60, 1))], axis=1)
    other = np.roll(three, 1, axis=1)
    metric, score, difference = paired_difference(other, three, labels, resamples=50, seed=3)
    right = lambda p: (p.argmax(1) == labels).astype(float)  # noqa: E731
    assert metric == "top1"
    gaps = [(right(other) - right(three))[d].mean() for d in drawn]
    assert difference.value == pytest.approx((right(other) - right(three)).mean())
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(gaps, (0.025, 0.975))))

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from videogru.config import ModelConfig, TrainConfig
from videogru.models.classifier import Classifier
from videogru.training.task import SequenceTask, class_weights, mixed_cross_entropy


def make_task(**train: object) -> SequenceTask:
    classifier = Classifier(
        ModelConfig(encoder="pixels", encoder_width=2, hidden_size=3),
        in_channels=1,
        frame_size=4,
        num_classes=3,
        mean=(0.5,),
        std=(0.5,),
    )
    return SequenceTask(
        classifier, TrainConfig(**train), class_counts=[4, 2, 2], total_steps=100, failed=lambda row, reason: None
    )


def test_class_weights_are_scikit_learns() -> None:
    labels = [0] * 10 + [1] * 3 + [2] * 7
    ours = class_weights([10, 3, 7])
    theirs = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=labels)
    assert ours.tolist() == pytest.approx(theirs.tolist())


def test_a_class_without_rows_weighs_nothing() -> None:
    assert class_weights([5, 0, 5]).tolist() == [1.0, 0.0, 1.0]


def test_rate_warms_up_and_follows_half_a_cosine() -> None:
    rate = make_task(warmup=0.1)._rate
    assert [rate(step) for step in range(10)] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.5)
    assert rate(100) == pytest.approx(0.0, abs=1e-9)
    assert rate(250) == pytest.approx(0.0, abs=1e-9)
    assert all(make_task(schedule="constant", warmup=0.0)._rate(step) == 1.0 for step in (0, 50, 99))


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers_hold_every_parameter_once(name: str, kind: type) -> None:
    task = make_task(optimizer=name, weight_decay=0.01)
    optimizer = task.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in task.classifier.parameters())


def test_adamw_leaves_biases_and_norms_undecayed() -> None:
    task = make_task(optimizer="adamw", weight_decay=0.05)
    optimizer = task.configure_optimizers()["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.classifier.named_parameters():
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0), name
    assert math.isclose(sum(decay.values()), 0.05 * sum(p.ndim > 1 for p in task.classifier.parameters()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_cost_as_soft_targets_written_out(weighted, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    labels, others = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 1, 0, 2, 3])
    shares = torch.rand(5, generator=generator)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64) if weighted else None
    scale = torch.ones(4, dtype=torch.float64) if weight is None else weight
    total = norm = 0.0
    for clip in range(5):
        logs = logits[clip] - logits[clip].exp().sum().log()
        for label, share in ((labels[clip], shares[clip]), (others[clip], 1 - shares[clip])):
            target = torch.full((4,), smoothing / 4, dtype=torch.float64)
            target[label] += 1 - smoothing
            total += share * -(target * scale * logs).sum()
            norm += share * scale[label]
    loss = mixed_cross_entropy(logits, labels, others, shares, weight=weight, label_smoothing=smoothing)
    assert float(loss) == pytest.approx(float(total / norm), abs=1e-6)
    whole = mixed_cross_entropy(logits, labels, others, torch.ones(5), weight=weight, label_smoothing=smoothing)
    plain = torch.nn.functional.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(whole, plain)

"""Distillation: the loss by hand, a teacher that fits or is refused, and trainings that go on as if never stopped."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_fit import StopAt, bars, losses, same, settings, train
from videogru.checkpoint.model_file import make_card, read_card, write_model
from videogru.config import Config, TrainConfig
from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, DataError, Interrupted
from videogru.models.digest import weights_digest
from videogru.sequence import SequenceBatch
from videogru.training import teacher as teaching
from videogru.training.fit import build_classifier, fit
from videogru.training.teacher import gives_same_frames, read_teacher, soft_loss, state_loss

PLAIN = {"data__augment__flip": 0.0, "data__augment__noise": 0.0}


def teacher_file(path: Path, *, classes: tuple[str, ...] = ("up", "down"), seed: int = 5, **changes: object) -> Path:
    """An untrained model as a teacher: what it says is as good as anything else."""
    config = settings(model__encoder="conv2", model__hidden_size=12, train__seed=seed, **changes)
    classifier = build_classifier(config, len(classes))
    write_model(path, classifier, make_card(classifier, kind="image", classes=classes, data=config.data))
    return path


def taught(path: Path, **changes: object) -> Config:
    return settings(train__teacher=str(path), **changes)


def test_without_a_teacher_losses_are_those_of_before(tmp_path: Path) -> None:
    """Recorded with `losses` at commit afc2791, before there were teachers, on a processor with AVX-512; on one
    with AVX2 alone, the last digits are others.
    """
    train(tmp_path / "a", settings(train__epochs=2, model__encoder="small", model__encoder_width=8))
    assert losses(tmp_path / "a") == pytest.approx([0.639002, 0.413939, 0.509302, 0.22902], abs=2e-5)
    mixed = {"data__augment__cutmix": 0.5, "train__class_weights": "balanced"}
    train(tmp_path / "b", settings(train__epochs=2, **mixed))
    assert losses(tmp_path / "b") == pytest.approx([0.888463, 0.69922, 0.75402, 0.665116], abs=2e-5)


def test_the_soft_loss_is_the_written_out_divergence() -> None:
    draw = np.random.default_rng(0)
    student, teacher, T = draw.normal(size=(5, 4)), draw.normal(size=(5, 4)), 3.0
    p, q = (np.exp(z / T) / np.exp(z / T).sum(1, keepdims=True) for z in (teacher, student))
    expected = T * T * (p * np.log(p / q)).sum(1).mean()
    assert float(soft_loss(torch.tensor(student), torch.tensor(teacher), T)) == pytest.approx(expected)
    # Hinton et al. 2015, equation 4: hot, and with logits of mean zero, its gradient is that of half the square, / K.
    ours = torch.tensor(student - student.mean(1, keepdims=True), requires_grad=True)
    theirs = torch.tensor(teacher - teacher.mean(1, keepdims=True))
    soft_loss(ours, theirs, 1e4).backward()
    torch.testing.assert_close(ours.grad, (ours.detach() - theirs) / 4 / 5, atol=1e-4, rtol=1e-3)
    assert float(soft_loss(theirs, theirs, 2.0)) == pytest.approx(0.0, abs=1e-12)


def test_states_of_padding_do_not_count() -> None:
    one, other = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    lengths = torch.tensor([4, 2])
    expected = ((one[0] - other[0]).square().mean() + (one[1, :2] - other[1, :2]).square().mean()) / 2 / 2
    one[1, 2:] = 100.0
    torch.testing.assert_close(state_loss(one, other, lengths), expected)


def test_the_loss_of_a_step_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    """One step, so the first epoch's loss is that of the untrained student; by hand from public parts."""
    path = teacher_file(tmp_path / "teacher.safetensors")
    dry = {"model__input_dropout": 0.0, "model__dropout": 0.0, "train__epochs": 1, "train__batch_size": 40, **PLAIN}
    config = taught(path, **dry, train__distill_alpha=0.3, train__distill_temperature=2.0)
    corpus = bars()
    student = build_classifier(config, 2)
    train(tmp_path / "run", config, corpus)
    rows = corpus.training_rows("train")
    batch = SequenceBatch(
        torch.from_numpy(corpus.arrays[rows]), torch.ones(40, dtype=torch.int64), torch.from_numpy(rows)
    )
    labels = torch.from_numpy(corpus.manifest.labels[rows])
    with torch.no_grad():
        said = student(batch.frames, batch.lengths)
        lesson = read_teacher(config, corpus).ask(batch).logits
    hard = torch.nn.functional.cross_entropy(said, labels, label_smoothing=config.train.label_smoothing)
    assert losses(tmp_path / "run")[0] == pytest.approx(
        float(0.7 * hard + 0.3 * soft_loss(said, lesson, 2.0)), abs=1e-5
    )


def test_rows_that_never_change_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = teacher_file(tmp_path / "teacher.safetensors"), []
    real = teaching.Teacher.ask

    def noted(self: teaching.Teacher, batch: SequenceBatch) -> teaching.Lesson:
        asked.extend(batch.indices.tolist())
        return real(self, batch)

    monkeypatch.setattr(teaching.Teacher, "ask", noted)
    config = taught(path, **PLAIN)
    kept = train(tmp_path / "kept", config)
    assert sorted(asked) == bars().training_rows("train").tolist()
    assert (tmp_path / "kept" / teaching.LOGITS_FILE).is_file()
    asked.clear()
    monkeypatch.setattr("videogru.training.fit.gives_same_frames", lambda *_: False)
    each = train(tmp_path / "each", config)
    assert len(asked) == 3 * 40
    for name, tensor in kept.items():
        torch.testing.assert_close(each[name], tensor, atol=1e-5, rtol=0)


def test_what_makes_frames_new_in_each_epoch() -> None:
    data = settings(**PLAIN).data
    clips = data.model_copy(update={"num_frames": 4})
    assert gives_same_frames(data, "image") and not gives_same_frames(clips, "video")
    assert gives_same_frames(clips.model_copy(update={"sampling": "uniform"}), "video")
    for change in ({"flip": 0.5}, {"cutmix": 0.1}, {"drop_steps": 0.1}, {"erase": 0.1}):
        augment = data.augment.model_copy(update=change)
        assert not gives_same_frames(data.model_copy(update={"augment": augment}), "image")


@pytest.mark.parametrize(
    "changes",
    [
        {"data__augment__cutmix": 0.5, "train__distill_features": 0.5, "model__encoder": "conv2"},
        {"train__ema_decay": 0.9, "train__distill_features": 0.5, "train__optimizer": "adamw"},
        PLAIN,
    ],
)
@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_pupil_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, changes: dict
) -> None:
    # Rows as steps: as many for the teacher's maps (2 of 8 pixels) as for the student's.
    path = teacher_file(tmp_path / "teacher.safetensors", model__seq="frames")
    config = taught(path, **{"model__seq": "frames", "train__epochs": 2, **changes})
    whole = train(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        StopAt(patch, step)
        with pytest.raises(Interrupted, match="resume"):
            train(tmp_path / "cut", config)
    assert same(whole, train(tmp_path / "cut", config, resume=True))
    assert not any("projection" in name for name in whole)


def test_checkpointing_teaches_the_same(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "teacher.safetensors", model__seq="frames")
    common = {"model__seq": "frames", "model__encoder": "small", "model__encoder_width": 4, "train__epochs": 1}
    config = {**common, "train__distill_features": 1.0, "train__optimizer": "sgd"}
    plain = train(tmp_path / "plain", taught(path, **config))
    saving = train(tmp_path / "saving", taught(path, **config, train__gradient_checkpointing=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_the_card_says_who_taught(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "teacher.safetensors")
    train(tmp_path / "run", taught(path, train__epochs=1, train__distill_alpha=0.5))
    facts = read_card(tmp_path / "run" / "model.safetensors").teacher
    assert facts is not None and (facts.name, facts.alpha, facts.temperature) == ("teacher", 0.5, 4.0)
    config = settings(model__encoder="conv2", model__hidden_size=12, train__seed=5)
    assert facts.digest == weights_digest(build_classifier(config, 2))


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    corpus = bars()
    batch = SequenceBatch(torch.from_numpy(corpus.arrays[:3]), torch.ones(3, dtype=torch.int64), torch.arange(3))
    straight = read_teacher(taught(teacher_file(tmp_path / "a.safetensors")), corpus).ask(batch).logits
    turned_file = teacher_file(tmp_path / "b.safetensors", classes=("down", "up"))
    turned = read_teacher(taught(turned_file), corpus).ask(batch).logits
    assert torch.equal(turned, straight.flip(1))


@pytest.mark.parametrize(
    ("of_teacher", "changes", "words"),
    [
        ({"classes": ("up", "left")}, {}, "left"),
        ({"data__frame_size": 12}, {}, "data.frame_size=12"),
        ({"data__fit": "stretch"}, {}, "data.fit=stretch"),
        ({"model__seq": "grid"}, {"train__distill_features": 1.0}, "steps per frame"),
    ],
)
def test_teachers_that_do_not_fit(tmp_path: Path, of_teacher: dict, changes: dict, words: str) -> None:
    path = teacher_file(tmp_path / "teacher.safetensors", **of_teacher)
    with pytest.raises(ConfigError, match=words):
        train(tmp_path / "run", taught(path, **changes))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_teacher_of_another_kind(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "teacher.safetensors")
    corpus: Corpus = replace(bars(), kind="video")
    with pytest.raises(ConfigError, match="reads images, the dataset holds videos"):
        read_teacher(taught(path), corpus)


def test_another_teacher_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = teacher_file(tmp_path / "teacher.safetensors")
    StopAt(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", taught(path))
    teacher_file(path, seed=6)
    with pytest.raises(DataError, match="teacher"):
        fit(taught(path), bars(), tmp_path / "run", resume=True, progress=False, say=print)


@pytest.mark.parametrize(
    "changes",
    [
        {"distill_alpha": 0.5},
        {"distill_temperature": 2.0},
        {"distill_features": 1.0},
        {"teacher": "a", "distill_alpha": 0},
    ],
)
def test_settings_without_effect_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="teach"):
        TrainConfig(**changes)

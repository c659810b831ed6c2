from pathlib import Path
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl

from videogru.errors import DataError
from videogru.training import callbacks
from videogru.training.callbacks import BadFiles, rank


def test_auroc_decides_before_accuracy_and_loss_breaks_ties() -> None:
    better = {"val_auroc": 0.9, "val_accuracy": 0.5, "val_loss": 1.0}
    worse = {"val_auroc": 0.8, "val_accuracy": 0.9, "val_loss": 0.1}
    assert rank(better) > rank(worse)
    assert rank({"val_accuracy": 0.5, "val_loss": 0.4}) > rank({"val_accuracy": 0.5, "val_loss": 0.5})


def test_bad_files_are_listed_once_and_too_many_stop_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    bad = BadFiles(tmp_path, lambda row: f"clip-{row}.mp4", limit=2, say=said.append)
    bad.add(3, "cut short")
    bad.add(3, "cut short")
    bad.add(5, "empty, and with a comma")
    with pytest.raises(DataError, match=r"max_bad = 2"):
        bad.add(7, "gone")
    lines = (tmp_path / "bad_files.csv").read_text().splitlines()
    assert lines == [
        "row,source,reason,found_by",
        "3,clip-3.mp4,cut short,training",
        '5,clip-5.mp4,"empty, and with a comma",training',
        "7,clip-7.mp4,gone,training",
    ]
    assert len(said) == 3


def test_a_log_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    news = callbacks.StepNews(said.append, steps=10)
    now = 1000.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    trainer, task = Mock(spec=pl.Trainer, global_step=20, current_epoch=2), Mock(spec=pl.LightningModule)
    news.on_train_epoch_start(trainer, task)
    for _ in range(10):
        now += callbacks.NEWS_SECONDS / 4
        trainer.global_step += 1
        news.on_train_batch_end(trainer, task, None, None, 0)
    assert said == ["epoch 3, step 4 of 10", "epoch 3, step 8 of 10"]

"""Train a 3-D ResNet from scratch on the data of a run: its splits, sampling, size, augmentation and recipe.

    python -m tools.experiments.train_r3d RUN --out runs/r3d-digits [--net r3d_18|monai_resnet18] [--epochs N] \
        [--minutes M]

RUN is a finished `videogru train` folder of videos or volumes, whose config.yaml says what is read and for how many
epochs. Clips of fewer steps than --steps repeat some, longer ones lose some (the nearest), as a 3-D convolution wants
equal lengths; volumes keep data.num_frames. Of videos, gray is repeated to three channels; on volumes the first layer
has as many channels as they have. The best validation epoch is kept and weights are averaged as in RUN. State is saved
after every epoch: run again to go on. For the same time as RUN instead of the same epochs, give the --epochs that
tools/experiments/video_table.py tells.

Leaves what a run has: metrics.csv, predictions-SPLIT.csv and evaluation-SPLIT.json of val and test, and
weights.safetensors.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.video import r3d_18

from tools.measuring import INTERRUPTED, Parser, exit_code
from videogru.checkpoint.model_file import ModelCard, find_model, read_card
from videogru.config import Config
from videogru.data.loading.batching import EpochBatches
from videogru.data.loading.datamodule import CorpusModule
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.errors import DataError
from videogru.inference.evaluation import evaluate
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Normalize
from videogru.training.averaging import weight_average
from videogru.training.callbacks import Scores
from videogru.training.fit import precision, quiet_lightning
from videogru.training.task import SequenceTask
from videogru.workflows.run_folder import run_config

WEIGHTS = "weights.safetensors"


NETS = ("r3d_18", "monai_resnet18")


class R3D(nn.Module):
    """A 3-D ResNet-18 behind the Classifier's interface: (B T C H W), (B,) -> (B K).

    r3d_18: torchvision's (Tran et al. 2018, arXiv:1711.11248); monai_resnet18: MONAI's (Hara et al. 2018,
    arXiv:1711.09577) as it comes. own_channels: the first layer takes the channels as they are.
    frame_size: H = W of what it is measured with; it takes any.
    """

    def __init__(
        self,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        steps: int,
        *,
        net: str = "r3d_18",
        own_channels: bool = False,
        frame_size: int = 64,
    ) -> None:
        super().__init__()
        self.in_channels, self.frame_size = len(mean), frame_size
        self.steps, self.channels = steps, len(mean) if own_channels else 3
        self.normalize = Normalize(mean, std)
        if net == "monai_resnet18":
            from monai.networks.nets import resnet18  # takes seconds to import

            made = resnet18(spatial_dims=3, n_input_channels=self.channels, num_classes=num_classes)
        else:
            made = r3d_18(weights=None, num_classes=num_classes)
            if self.channels != 3:
                first = made.stem[0]
                made.stem[0] = nn.Conv3d(self.channels, 64, first.kernel_size, first.stride, first.padding, bias=False)
                nn.init.kaiming_normal_(made.stem[0].weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        self.net = made.to(memory_format=torch.channels_last_3d)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, gaps: torch.Tensor | None = None) -> torch.Tensor:
        """Logits; each clip's valid steps are stretched to `steps` by the nearest in time, gray is repeated."""
        places = (torch.arange(self.steps, device=frames.device) + 0.5) / self.steps
        chosen = (places * lengths.unsqueeze(1)).long()
        clips = frames[torch.arange(len(frames), device=frames.device).unsqueeze(1), chosen]
        clips = self.normalize(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        clips = (
            clips.expand(-1, -1, self.channels, -1, -1).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        )
        logits: torch.Tensor = self.net(clips)
        return logits.float()

    def features(
        self, frames: torch.Tensor, lengths: torch.Tensor, gaps: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What training reads in place of states: one step a clip (B 1 K), its logits, and how many steps (B,)."""
        return self(frames, lengths, gaps).unsqueeze(1), torch.ones_like(lengths)

    def logits_of(self, outputs: torch.Tensor, step_lengths: torch.Tensor) -> torch.Tensor:
        """The logits (B K) of `features`."""
        return outputs[:, 0]


class Clock(Callback):
    """Stops after the epoch in which this call has used its seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.over = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the clock, unless the training is over anyway."""
        if time.monotonic() >= self.end and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            self.over = trainer.should_stop = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, evaluate, write; the exit code."""
    parser = Parser(prog="train_r3d.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder of a video model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--net", choices=NETS, default="r3d_18", help="default r3d_18")
    parser.add_argument("--epochs", type=int, help="default: as RUN")
    parser.add_argument("--optimizer", choices=("adam", "muon"), default="adam", help="default adam")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of Adam (of AdamW with muon), default 1e-3")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of Muon, default 0.02")
    parser.add_argument("--steps", type=int, default=12, help="frames that the net sees of a video, default 12")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training in this call; default: no limit")
    options = parser.parse_args(arguments)
    return exit_code("train_r3d.py", lambda: work(options), kept="run me again to go on")


def work(options: Any) -> int:
    """Train to the end, or until the call's time is over; then predict and evaluate the test split."""
    config, card = run_config(options.run), read_card(find_model(options.run))
    if card.kind == "image":
        raise DataError("this run reads images, a 3-D net reads videos and volumes", where=options.run)
    epochs = options.epochs or config.train.epochs
    own = {"epochs": epochs, "lr": options.lr, "optimizer": options.optimizer, "muon_lr": options.muon_lr}
    train = config.train.model_copy(update=own | {"muon_recurrent": False})
    config = config.model_copy(update={"train": train, "data": config.data.for_kind(card.kind)})
    corpus = open_corpus(config.data, seed=config.data.split_seed)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(train.seed)
    volumes = card.kind == "volume"
    steps = config.data.num_frames if volumes else options.steps
    net = R3D(len(corpus.classes), card.mean, card.std, steps, net=options.net, own_channels=volumes)
    if not (options.out / "predictions-test.csv").is_file():
        if _train(net, config, corpus, options.out, options.minutes * 60):
            print("stopped; run me again to go on")
            return INTERRUPTED
        _evaluate(net, card, config, corpus, options.out)
    return 0


def _train(net: R3D, config: Config, corpus: Corpus, out: Path, seconds: float) -> bool:
    """True where the call's time is over before the training's end."""
    train = config.train
    rows = corpus.manifest.rows("train")
    steps = len(EpochBatches(rows, batch_size=train.batch_size, seed=0, epoch=lambda: 0))
    counts = np.bincount(corpus.manifest.labels[rows], minlength=len(corpus.classes)).tolist()
    failures: list[tuple[int, str]] = []
    task = SequenceTask(
        net,  # type: ignore[arg-type]
        train,
        class_counts=counts,
        total_steps=steps * train.epochs,
        failed=lambda row, reason: failures.append((row, reason)),
    )

    def save(scores: dict[str, float]) -> None:
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out / WEIGHTS)

    scores = Scores(out, train, say=lambda text: print(text, flush=True), save=save)
    clock = Clock(seconds)
    state = ModelCheckpoint(out, filename="state", save_last=False, every_n_epochs=1, enable_version_counter=False)
    callbacks: list[Callback] = [scores, clock, state]
    if train.ema_decay:  # behind `scores`, which keeps what was validated
        callbacks.insert(1, weight_average(train.ema_decay))
    quiet_lightning()
    trainer = pl.Trainer(
        max_epochs=train.epochs,
        accelerator="auto",
        devices=1,
        precision=precision(train.precision),  # type: ignore[arg-type]
        gradient_clip_val=train.clip_norm or None,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    saved = out / "state.ckpt"
    trainer.fit(task, CorpusModule(corpus, config), ckpt_path=saved if saved.is_file() else None, weights_only=True)
    if train.keep == "last" or not scores.best:
        save({})
    return clock.over


def _evaluate(net: R3D, card: ModelCard, config: Config, corpus: Corpus, out: Path) -> None:
    net.load_state_dict(load_file(out / WEIGHTS))
    predictor = Predictor(net, card, data=config.data)  # type: ignore[arg-type]
    for split in ("val", "test"):  # the test split last: that it is there tells the end
        rows = corpus.manifest.rows(split)
        if not len(rows):
            continue
        predictions = predictor.predict(corpus, rows, batch_size=16)
        evaluation = evaluate(predictions)
        evaluation.to_json(out / f"evaluation-{split}.json")
        predictions.write_csv(out / f"predictions-{split}.csv")
        for row in evaluation.summary_rows():
            print("{:<5} {:<20} {}  {}".format(split, *row))


if __name__ == "__main__":
    sys.exit(main())

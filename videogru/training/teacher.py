"""Distillation: a trained model teaches a smaller one while it trains.

The loss is (1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student), both softened by the temperature T
(Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2; T^2 keeps the gradient's size whatever T is). Beside it the
student's states may be drawn to the teacher's, step by step and through a linear map that is thrown away at the end
(FitNets: Romero et al. 2015, arXiv:1412.6550, section 2.2).

The teacher sees the very frames that the student sees, augmented and mixed, in eval mode and the run's precision. Where
a row gives the same frames in every epoch, its logits are computed once, before the first step, and kept in the run.
"""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from videogru.checkpoint.model_file import TeacherFacts, find_model, read_model
from videogru.config import AugmentConfig, Config, DataConfig
from videogru.data.loading.batching import OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.manifests.corpus import Corpus
from videogru.errors import ConfigError, Interrupted, VideogruError
from videogru.kinds import KINDS, Kind
from videogru.models.classifier import Classifier
from videogru.models.digest import weights_digest
from videogru.models.serialize import valid_steps
from videogru.sequence import SequenceBatch
from videogru.shapes import Lengths, Logits
from videogru.training.processes import Group

LOGITS_FILE = "teacher-logits.safetensors"
# What a teacher must read as the student does: its frames are the student's.
_SAME = ("frame_size", "channels", "slab", "fit", "axis", "volume", "intensity")
_ENDS = {
    "percentile": ("percentile_low", "percentile_high"),
    "window": ("window_low", "window_high"),
    "zscore": ("zscore_range",),
}
# These may differ, as when a student reads fewer frames; but the teacher then sees what it was not trained on.
_TOLD = ("num_frames", "sampling", "stride_seconds", "context_seconds")


class Lesson(NamedTuple):
    """What the teacher makes of a batch: logits (B K) float32 in the student's classes; states (B S F) if wanted."""

    logits: Logits
    states: Float[Tensor, "B S F"] | None


class Teacher:
    """A trained classifier that is asked and never trained.

    No nn.Module, so that neither the saved state, nor the optimizer, nor DDP, nor the model file holds its weights.
    order: (K,) the teacher's class for each of the student's; wants_states: its states are matched, too.
    """

    def __init__(self, classifier: Classifier, *, order: list[int], name: str, wants_states: bool) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.order, self.name, self.wants_states = torch.tensor(order), name, wants_states
        self.digest = weights_digest(classifier)
        self.known: Tensor | None = None  # (rows K), nan where unknown

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        # Averaging weights copies the task; the teacher has no part in that.
        return self

    def __call__(self, batch: SequenceBatch) -> Lesson:
        """The lesson of a batch, from what is known of its rows where all of them are."""
        if self.known is not None:
            if self.known.device != batch.frames.device:
                self.known = self.known.to(batch.frames.device)
            logits = self.known[batch.indices]
            if not bool(logits.isnan().any()):
                return Lesson(logits, None)
        return self.ask(batch)

    @torch.no_grad()
    def ask(self, batch: SequenceBatch) -> Lesson:
        """The lesson of a batch, computed now."""
        device = batch.frames.device
        if self.order.device != device:
            self.classifier.to(device)
            self.order = self.order.to(device)
        states, lengths = self.classifier.features(batch.frames, batch.lengths, batch.gaps)
        logits = self.classifier.logits_of(states, lengths)[:, self.order].float()
        return Lesson(logits, states.float() if self.wants_states else None)


def read_teacher(config: Config, corpus: Corpus, *, say: Callable[[str], None] = lambda text: None) -> Teacher:
    """The teacher that train.teacher names, for a config resolved for the corpus's kind.

    Raises ModelFileError where it is no usable model, ConfigError where it does not fit: it must know the same classes,
    read the same kind of source, and frames of the same size, channels and intensities.
    """
    train, data = config.train, config.data
    assert train.teacher is not None
    path = find_model(train.teacher)
    classifier, card = read_model(path)
    if card.kind != corpus.kind:
        raise ConfigError(
            f"this teacher reads {KINDS[card.kind].plural}, the dataset holds {KINDS[corpus.kind].plural}", where=path
        )
    if set(card.classes) != set(corpus.classes):
        raise ConfigError(
            f"the teacher knows other classes: {_only(card.classes, corpus.classes)}; the data set has "
            f"{_only(corpus.classes, card.classes)}",
            where=path,
            hint="Teach with a model that was trained on the same classes.",
        )
    theirs = card.data.for_kind(card.kind)
    names = (*_SAME, *_ENDS[data.intensity]) if corpus.kind == "volume" else ("frame_size", "channels", "fit")
    for name in names:
        ours, other = getattr(data, name), getattr(theirs, name)
        if ours != other:
            raise ConfigError(
                f"the teacher reads frames with data.{name}={other}, this training makes them with {ours}",
                where=path,
                hint=f"Teacher and student see the same frames: --set data.{name}={other}, or another teacher.",
            )
    for name in _TOLD if KINDS[corpus.kind].is_sequence else ():
        ours, other = getattr(data, name), getattr(theirs, name)
        if ours != other:
            say(f"note: the teacher was trained with data.{name}={other}, and now sees clips of {ours}")
    order = [card.classes.index(name) for name in corpus.classes]
    name = path.parent.name if path.name == "model.safetensors" and path.parent.name else path.stem
    return Teacher(classifier, order=order, name=name, wants_states=train.distill_features > 0)


def _only(some: tuple[str, ...], others: tuple[str, ...]) -> str:
    """Up to three of some that the others lack."""
    found = [name for name in some if name not in others]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "") if found else "no others"


def teacher_facts(teacher: Teacher, config: Config) -> TeacherFacts:
    """What the model card keeps of the teacher."""
    train = config.train
    return TeacherFacts(
        name=teacher.name,
        digest=teacher.digest,
        alpha=train.distill_alpha,
        temperature=train.distill_temperature,
        features=train.distill_features,
    )


def projection_of(teacher: Teacher, student: Classifier, seed: int) -> nn.Linear:
    """The linear map from the student's states to the teacher's, drawn from `seed` alone.

    Raises ConfigError where they have not as many steps per frame.
    """
    mine, theirs = student.steps_per_frame, teacher.classifier.steps_per_frame
    if mine != theirs:
        raise ConfigError(
            f"the student reads {mine} steps per frame and the teacher {theirs}: they cannot be matched step by step",
            where="train.distill_features",
            hint="Use the teacher's model.seq (and maps of its size), or --set train.distill_features=0.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(student.recurrent.out_size, teacher.classifier.recurrent.out_size)


def soft_loss(student: Logits, teacher: Logits, temperature: float) -> Float[Tensor, ""]:
    """T^2 * KL(teacher || student) of the softened classes, the mean over the clips."""
    ours, theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def state_loss(student: Float[Tensor, "B S F"], teacher: Float[Tensor, "B S F"], lengths: Lengths) -> Float[Tensor, ""]:
    """Half the mean square between states of valid steps: over each clip's features and steps, then over the clips."""
    valid = valid_steps(lengths, student.shape[1])
    each = (student - teacher).square().mean(dim=2).masked_fill(~valid, 0.0).sum(dim=1) / lengths
    return each.mean() / 2


def gives_same_frames(data: DataConfig, kind: Kind) -> bool:
    """Whether a row gives the same frames in every epoch: nothing is drawn, neither places nor changes."""
    unused = {"flip_axes": AugmentConfig().flip_axes}
    fixed = kind == "image" or data.sampling in ("uniform", "all")
    return fixed and data.augment.model_copy(update=unused) == AugmentConfig()


class TeachFirst(Callback):
    """Before the first step, where rows give the same frames in every epoch: the teacher's logits of all of them.

    They are kept in the run and read from there when it goes on, unless teacher, rows, settings or precision are
    others; stopped: asked between batches whether to leave, with Interrupted.
    """

    def __init__(
        self,
        teacher: Teacher,
        corpus: Corpus,
        config: Config,
        run: Path,
        *,
        group: Group,
        stopped: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.teacher, self.corpus, self.config, self.path = teacher, corpus, config, run / LOGITS_FILE
        self.group, self.stopped, self.say = group, stopped, say

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read them or have them computed; each process asks for its share of the rows."""
        shape = (len(self.corpus.manifest), len(self.corpus.classes))
        key = self._key(str(trainer.precision))
        known = self.group.by_first(lambda: _read_logits(self.path, key, shape))
        if known is None:
            rows = self.corpus.training_rows("train")
            self.say(f"asking the teacher {self.teacher.name} once for {len(rows)} rows, which no epoch changes")
            mine = self._ask_all(trainer, pl_module)
            known = torch.full(shape, torch.nan)
            for part in self.group.gather(mine):
                for indices, logits in part:
                    known[indices] = logits
            self.group.by_first(lambda: _write_logits(self.path, key, known))
        self.teacher.known = known.to(pl_module.device)

    def _ask_all(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[Tensor, Tensor]]:
        """Rows and logits (n K) of this process's share; rows that cannot be read are left out."""
        rows = self.corpus.training_rows("train")[self.group.rank :: self.group.world]
        train = self.config.train
        workers = default_workers(self.corpus, train.num_workers, sharing=self.group.local_world)
        dataset = ClipDataset(self.corpus, data=self.config.data, seed=train.seed)
        found = []
        for loaded in ClipLoader(dataset, OrderedBatches(rows, batch_size=train.batch_size), num_workers=workers):
            if self.stopped():
                break
            if loaded.batch is not None:
                batch = loaded.batch.to(pl_module.device)
                with trainer.precision_plugin.forward_context():
                    found.append((loaded.batch.indices, self.teacher.ask(batch).logits.cpu()))
        if self.group.total(self.stopped())[0]:
            raise Interrupted("interrupted; the teacher had not seen all rows yet", where=self.path.parent)
        return found

    def _key(self, precision: str) -> str:
        """A name for all that the logits depend on."""
        manifest, found = self.corpus.manifest, hashlib.sha256()
        data = self.config.data.model_dump_json(exclude={"data_dir", "cache_dir", "cache_gib", "max_bad"})
        model = self.teacher.classifier
        parts = (self.teacher.digest, model.config.model_dump_json(), f"{model.mean} {model.std}", data, precision)
        found.update("\n".join([*parts, *self.corpus.classes]).encode())
        for column in (manifest.sources.blob, manifest.sources.offsets, manifest.start_seconds, manifest.end_seconds):
            found.update(column.tobytes())
        found.update(self.corpus.training_rows("train").tobytes())
        return found.hexdigest()


def _read_logits(path: Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    """Logits (rows K) that were kept under this key; None where there are none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            logits: Tensor = file.get_tensor("logits").clone()
    except (SafetensorError, OSError):  # damaged: it is computed anew
        return None
    return logits if logits.shape == shape else None


def _write_logits(path: Path, key: str, logits: Tensor) -> None:
    part = path.with_name(f".{path.name}.partial")
    try:
        part.write_bytes(save({"logits": logits}, metadata={"key": key}))
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        hint = f"Make space or mend the folder, then: videogru train --resume {path.parent}"
        raise VideogruError(f"cannot be written: {error.strerror}", where=path, hint=hint) from error

"""How much each step of a clip spoke for a class, and where in the strongest step it stands.

Two measures, by what the model can see:

- prefixes (causal models with a recurrent part): the logit after steps 0..t minus the logit after steps 0..t-1.
  Baseline and contributions add up to the logit; the baseline is the logit of no step, the head's bias.
- left out (all others): what the logit loses where a few neighboring steps are taken out of the clip, shared among them
  (the occlusion of Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2, with steps removed instead of covered).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64
from numpy.typing import NDArray
from torch import Tensor

from videogru.kinds import Unit
from videogru.models.classifier import Classifier
from videogru.sequence import FrameSequence

Method = Literal["prefixes", "left out"]

WIDTHS = (1, 3)
PATCHES = 8  # along each side of a frame, for the map over the strongest step
MOST_WINDOWS = 256  # of each width: longer clips are left out in blocks
_NUMBERS_AT_ONCE = 2**24  # of maps or states held for a batch of variants: 64 MiB in float32


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """What each of T steps said for class `code`.

    logits: of all K classes; contributions: (T,) parts of the class's logit; baseline: what it is without a step, only
    where baseline and contributions add up to it; where: (P P), 0 or more, what the logit loses where a square of step
    `strongest` is covered.
    """

    code: int
    logits: Float64[np.ndarray, " K"]
    positions: Float64[np.ndarray, " T"]
    unit: Unit
    contributions: Float64[np.ndarray, " T"]
    baseline: float | None
    method: Method
    where: Float32[np.ndarray, "P P"]

    @property
    def strongest(self) -> int:
        """The step with the largest contribution."""
        return int(np.argmax(self.contributions))

    def top(self, count: int) -> list[int]:
        """At most `count` steps whose contributions are above 0, the largest first."""
        order = np.argsort(-self.contributions, kind="stable")[:count]
        return [int(step) for step in order if self.contributions[step] > 0]


class Variants:
    """A clip of which any steps can be left out: frames are encoded once, the rest of the model reads what is kept.

    With model.frame_differences a frame's map depends on its neighbors; where these change, it is encoded again.
    """

    def __init__(self, classifier: Classifier, clip: FrameSequence) -> None:
        self.classifier = classifier
        self._mode = classifier.config.frame_differences
        device = next(classifier.parameters()).device
        self.frames, self._positions = clip.frames.to(device), clip.positions
        with torch.no_grad():
            self.maps = classifier.maps(self.frames[None], torch.tensor([len(clip)], device=device))[0]

    def __len__(self) -> int:
        return len(self.frames)

    @torch.no_grad()
    def logits(self, kept: Sequence[Sequence[int]]) -> Float64[np.ndarray, "V K"]:
        """Logits of the clip with only these steps (increasing), for each of V choices; the bias where it is empty."""
        told = np.tile(empty_logits(self.classifier), (len(kept), 1))
        # Long ones first: a batch is padded to its longest.
        order = [v for v in sorted(range(len(kept)), key=lambda v: -len(kept[v])) if len(kept[v])]
        start = 0
        while start < len(order):
            size = max(1, _NUMBERS_AT_ONCE // (len(kept[order[start]]) * self.maps[0].numel()))
            some = order[start : start + size]
            told[some] = self._batch([kept[v] for v in some])
            start += size
        return told

    def gaps(self, kept: Sequence[int]) -> Tensor:
        """(T,) distances of the kept steps to the one before, as in a batch."""
        gaps = torch.zeros(len(kept))
        gaps[1:] = self._positions[list(kept)].diff()
        return gaps

    def _batch(self, kept: list[Sequence[int]]) -> Float64[np.ndarray, "V K"]:
        longest, device = max(map(len, kept)), self.maps.device
        lengths = torch.tensor([len(steps) for steps in kept], device=device)
        maps = self.maps.new_zeros(len(kept), longest, *self.maps.shape[1:])
        gaps = torch.zeros(len(kept), longest)
        joints: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for variant, steps in enumerate(kept):
            maps[variant, : len(steps)] = self.maps[list(steps)]
            gaps[variant, : len(steps)] = self.gaps(steps)
            if self._mode != "none":
                for place, joint in enumerate(self._neighbors(steps)):
                    if joint is not None:
                        joints.setdefault(joint, []).append((variant, place))
        if joints:
            encoded = self._encode(list(joints))
            for new, places in zip(encoded, joints.values(), strict=True):
                for variant, place in places:
                    maps[variant, place] = new
        logits = self.classifier.from_maps(maps, lengths, gaps.to(device))
        return logits.double().cpu().numpy()

    def _neighbors(self, steps: Sequence[int]) -> list[tuple[int, ...] | None]:
        """For each kept step: None where its neighbors are those of the whole clip, else (place, clip around it)."""
        found: list[tuple[int, ...] | None] = []
        ahead = self._mode == "both"
        for place, step in enumerate(steps):
            before = steps[place - 1] if place else -1
            after = steps[place + 1] if place + 1 < len(steps) else len(self)
            if before == step - 1 and (after == step + 1 or not ahead):
                found.append(None)
                continue
            around = [before] * (before >= 0) + [step] + [after] * (ahead and after < len(self))
            found.append((int(before >= 0), *around))
        return found

    def _encode(self, joints: list[tuple[int, ...]]) -> list[Tensor]:
        """The map of the frame at the named place of each short clip."""
        encoded: list[Tensor] = []
        for start in range(0, len(joints), 32):
            some = joints[start : start + 32]
            frames = self.frames.new_zeros(len(some), 3, *self.frames.shape[1:])
            for row, (_, *around) in enumerate(some):
                frames[row, : len(around)] = self.frames[around]
            lengths = torch.tensor([len(joint) - 1 for joint in some], device=frames.device)
            maps = self.classifier.maps(frames, lengths)
            encoded += [maps[row, joint[0]] for row, joint in enumerate(some)]
        return encoded


def explain(
    classifier: Classifier,
    clip: FrameSequence,
    *,
    code: int | None = None,
    method: Method | None = None,
    widths: Sequence[int] = WIDTHS,
) -> Explanation:
    """What the steps of a prepared clip say for class `code`, by default the one the model names.

    classifier: in eval mode; method: by default what the model allows, see the module; widths: how many neighboring
    steps are left out at a time, the results averaged. Raises ValueError where prefixes are asked of a model that looks
    ahead, FloatingPointError where a logit is not finite.
    """
    if classifier.training:
        raise ValueError("explain wants a classifier in eval mode")
    variants = Variants(classifier, clip)
    whole = variants.logits([range(len(clip))])[0]
    if not np.isfinite(whole).all():
        raise FloatingPointError("the model gives no finite score")
    chosen = int(np.argmax(whole)) if code is None else code
    method = method or ("prefixes" if adds_up(classifier) else "left out")
    baseline: float | None = None
    if method == "prefixes":
        if not adds_up(classifier):
            raise ValueError("only a causal model with a recurrent part has states of prefixes")
        baseline = float(empty_logits(classifier)[chosen])
        contributions = np.diff(prefix_logits(variants)[:, chosen], prepend=baseline)
    else:
        contributions = np.mean([_left_out(variants, whole[chosen], chosen, width) for width in widths], axis=0)
    strongest = int(np.argmax(contributions))
    return Explanation(
        code=chosen,
        logits=whole,
        positions=clip.positions.numpy(),
        unit=clip.unit,
        contributions=contributions,
        baseline=baseline,
        method=method,
        where=covering_map(variants, chosen, strongest),
    )


def adds_up(classifier: Classifier) -> bool:
    """Whether the model reads step after step, so that its states after a prefix are those of the whole clip."""
    return classifier.config.temporal == "causal" and classifier.config.cell != "none"


def empty_logits(classifier: Classifier) -> Float64[np.ndarray, " K"]:
    """What is left of the logits where there is no step: the bias of the linear layer."""
    return classifier.head.linear.bias.detach().double().cpu().numpy()


@torch.no_grad()
def prefix_logits(variants: Variants) -> Float64[np.ndarray, "T K"]:
    """Logits after each step of a causal model: one pass over the clip, then only the head over each prefix."""
    classifier, steps = variants.classifier, len(variants)
    device = variants.maps.device
    gaps = variants.gaps(range(steps)).to(device)[None]
    outputs, _ = classifier.features_of_maps(variants.maps[None], torch.tensor([steps], device=device), gaps)
    size = max(1, _NUMBERS_AT_ONCE // outputs[0].numel())
    told = []
    for start in range(0, steps, size):
        lengths = torch.arange(start + 1, min(start + size, steps) + 1, device=device)
        step_lengths = lengths * classifier.steps_per_frame
        reach = int(step_lengths[-1])
        told.append(classifier.head(outputs[:, :reach].expand(len(lengths), -1, -1), step_lengths))
    return torch.cat(told).double().cpu().numpy()


def windows(steps: int, width: int, *, most: int = MOST_WINDOWS) -> list[tuple[int, int]]:
    """[start, stop) of what is left out at a time: `width` blocks of steps, one block further each time.

    A block is a step, or several where a clip has more than `most` steps. Windows also reach over both ends, so that
    every step is in exactly `width` of them:

    steps     0 1 2 3
    width 2   =  = =        [0, 1), [0, 2), [1, 3), [2, 4), [3, 4)
    """
    block = math.ceil(steps / most)
    blocks = math.ceil(steps / block)
    return [(max(0, first) * block, min(steps, (first + width) * block)) for first in range(1 - width, blocks)]


def covering_map(variants: Variants, code: int, step: int) -> Float32[np.ndarray, "P P"]:
    """What a class's logit loses where a square of one step's frame is covered, at least 0; P = PATCHES.

    Zeiler and Fergus 2014 (arXiv:1311.2901, section 4.2). Squares lie around the centers of P x P cells, two cells
    wide, and are filled with the frame's median, which on a dark ground leaves nothing that could be taken for
    something. Where the model reads differences of frames, its neighbors are encoded again, too.
    """
    classifier, maps, frames = variants.classifier, variants.maps, variants.frames
    steps, (height, width) = len(variants), frames.shape[-2:]
    reach = 0 if classifier.config.frame_differences == "none" else 1
    first, last = max(0, step - reach), min(steps, step + reach + 1)  # whose maps change
    start, stop = max(0, first - reach), min(steps, last + reach)  # what these are made of
    own = frames[step]
    fill = own.flatten(1).median(dim=1).values[:, None, None]
    lengths, gaps = torch.tensor([steps], device=maps.device), variants.gaps(range(steps)).to(maps.device)[None]
    size = max(1, min(32, _NUMBERS_AT_ONCE // maps.numel()))
    lost = np.zeros(PATCHES * PATCHES, np.float32)
    with torch.no_grad():
        whole = classifier.from_maps(maps[None], lengths, gaps)[0, code]
        for begin in range(0, len(lost), size):
            patches = range(begin, min(begin + size, len(lost)))
            covered = frames[start:stop].repeat(len(patches), 1, 1, 1, 1)
            for row, patch in enumerate(patches):
                y, x = divmod(patch, PATCHES)
                rows, columns = _square(y, height), _square(x, width)
                covered[row, step - start, :, rows, columns] = fill
            some = torch.full((len(patches),), stop - start, device=maps.device)
            encoded = classifier.maps(covered, some)
            changed = maps.repeat(len(patches), 1, 1, 1, 1)
            changed[:, first:last] = encoded[:, first - start : last - start]
            logits = classifier.from_maps(changed, lengths.expand(len(patches)), gaps.expand(len(patches), -1))
            lost[begin : begin + len(patches)] = (whole - logits[:, code]).float().cpu().numpy()
    return lost.reshape(PATCHES, PATCHES).clip(min=0)


def _square(cell: int, side: int) -> slice:
    """The pixels of a square two cells wide around the center of a cell."""
    return slice(max(0, round((cell - 0.5) * side / PATCHES)), min(side, max(1, round((cell + 1.5) * side / PATCHES))))


def _left_out(variants: Variants, whole: float, code: int, width: int) -> NDArray[np.float64]:
    """(T,) what the logit loses per step left out, the mean over the windows that hold the step."""
    steps = len(variants)
    spans = windows(steps, width)
    kept = [[*range(start), *range(stop, steps)] for start, stop in spans]
    lost = whole - variants.logits(kept)[:, code]
    sums, counts = np.zeros(steps), np.zeros(steps)
    for (start, stop), loss in zip(spans, lost, strict=True):
        sums[start:stop] += loss / (stop - start)
        counts[start:stop] += 1
    return sums / counts


STRONGEST = 3  # steps that a table names and a picture marks

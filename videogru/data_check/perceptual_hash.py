"""What a source looks like, in 320 bytes: nearly the same after re-encoding, rescaling or a narrow crop.

  16 pictures of 32 x 32 gray pixels, evenly spaced       mean ──DCT──▶ 16 x 16 signs: the scene      256 positions
                                                each minus mean ──DCT──▶  8 x 8 signs: the motion   16 x 64 positions

A perceptual hash by the signs of low DCT coefficients (Zauner 2010, "Implementation and Benchmarking of Perceptual
Image Hash Functions"), with two changes: clips of one scene differ in their motion only, so that is kept apart from the
scene; and a coefficient near zero, whose sign any re-encoding flips, has no sign here. Brightness has no part.
"""

import numpy as np
import torch
from jaxtyping import Float32, Num, UInt8
from numpy.typing import NDArray

PICTURES = 16  # a video or volume is looked at in so many places
SIDE = 32
_SCENE, _MOTION = 16, 8
SCENE_BITS = _SCENE * _SCENE
MOTION_BITS = PICTURES * _MOTION * _MOTION
SIGNATURE_BYTES = 2 * (SCENE_BITS + MOTION_BITS) // 8  # positive and negative signs
# Of an orthonormal DCT over 32 x 32 gray values of 0..255: a wave of 1/4 gray level.
_NO_SIGN = 4.0
_LEAST_SIGNS = 16  # of a scene: what has fewer is of one color


def _cosines(waves: int) -> NDArray[np.float32]:
    """The first `waves` vectors of the orthonormal DCT-II, (32, waves)."""
    angles = np.pi * (2 * np.arange(SIDE)[:, None] + 1) * np.arange(waves) / (2 * SIDE)
    basis = np.sqrt(2 / SIDE) * np.cos(angles)
    basis[:, 0] = np.sqrt(1 / SIDE)
    wanted: NDArray[np.float32] = basis.astype(np.float32)
    return wanted


_BASIS = _cosines(_SCENE)


def small_gray(frames: Num[torch.Tensor, "T C H W"]) -> Float32[np.ndarray, "T 32 32"]:
    """Frames, uint8 in 0..255 or float in 0..1, as small gray pictures in 0..255, averaged over areas."""
    values = frames.float() if frames.dtype == torch.uint8 else frames.float() * 255
    small = torch.nn.functional.adaptive_avg_pool2d(values, SIDE)
    if small.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)  # ITU-R BT.601
        small = small * weights * 3
    gray: NDArray[np.float32] = small.mean(dim=1).numpy()
    return gray


def signatures(pictures: Float32[np.ndarray, "N T 32 32"]) -> UInt8[np.ndarray, "N 320"]:
    """Signatures of N sources of T small gray pictures each, 16 or (stills) 1. What shows nothing gets only zeros."""
    count, steps = pictures.shape[:2]
    if steps not in (1, PICTURES):
        raise ValueError(f"{steps} pictures of each source, expected 1 or {PICTURES}")
    waves = np.einsum("ntyx,yi,xj->ntij", pictures, _BASIS, _BASIS, optimize=True)
    scene = waves.mean(axis=1)
    motion = np.zeros((count, PICTURES, _MOTION, _MOTION), np.float32)
    motion[:, :steps] = (waves - scene[:, None])[:, :, :_MOTION, :_MOTION]
    scene[:, 0, 0] = motion[:, :, 0, 0] = 0
    signs = np.concatenate([scene.reshape(count, -1), motion.reshape(count, -1)], axis=1)
    packed = np.packbits(np.concatenate([signs > _NO_SIGN, signs < -_NO_SIGN], axis=1), axis=1)
    packed[(np.abs(signs[:, :SCENE_BITS]) > _NO_SIGN).sum(axis=1) < _LEAST_SIGNS] = 0
    return packed


def places(positions: NDArray[np.float64], extent: tuple[float, float]) -> NDArray[np.int64]:
    """(16,) the steps shown at the middles of 16 equal parts of `extent`; (1,) of a single step."""
    if len(positions) == 1:
        return np.zeros(1, np.int64)
    times = extent[0] + (np.arange(PICTURES) + 0.5) / PICTURES * (extent[1] - extent[0])
    return np.maximum(np.searchsorted(positions, times, side="right") - 1, 0).astype(np.int64)

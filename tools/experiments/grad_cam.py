"""Grad-CAM over one step of a clip, which `tools/benchmarks/bench_explain.py` holds covered squares against."""

import numpy as np
import torch
from jaxtyping import Float32

from videogru.inference.explain.explain import Variants


def class_map(variants: Variants, code: int, step: int) -> Float32[np.ndarray, "h w"] | None:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2) of a class on the encoder's map of one step.

    Gradients come through all the steps after the encoder; None where the map is a single cell.
    """
    maps = variants.maps
    if maps.shape[-2:] == (1, 1):
        return None
    lengths = torch.tensor([len(maps)], device=maps.device)
    gaps = variants.gaps(range(len(maps))).to(maps.device)[None]
    # cuDNN has no backward pass of recurrent layers in eval mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        one = maps[step].clone().requires_grad_()
        whole = torch.cat((maps[:step], one[None], maps[step + 1 :]))
        logit = variants.classifier.from_maps(whole[None], lengths, gaps)[0, code]
        (gradient,) = torch.autograd.grad(logit, one)
    weights = gradient.mean((-2, -1), keepdim=True)
    return (weights * one.detach()).sum(0).relu().float().cpu().numpy()

"""A name for weights: what else depends on them is known to be stale when it is another."""

import hashlib

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """SHA-256, in hex, of all tensors of a module: names, types, shapes and bytes, wherever they lie in memory."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous()
        found.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

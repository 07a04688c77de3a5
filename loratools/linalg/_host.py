"""The one place where the algorithms wait for a device: results come back to the CPU in a single transfer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def is_remote(tensor: Tensor) -> bool:
    """Whether reading the tensor means to wait for a device."""
    return tensor.device.type != "cpu"


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float64 on the CPU; those of another device arrive together, after one synchronisation.

    Args:
        tensors: any shapes, numbers or booleans, all on one device.

    Returns:
        As many tensors, of the same shapes.
    """
    if not any(is_remote(tensor) for tensor in tensors):
        return tuple(tensor.to(torch.float64) for tensor in tensors)
    flat = torch.cat([tensor.to(torch.float64).reshape(-1) for tensor in tensors]).cpu()
    ends = list(itertools.accumulate(tensor.numel() for tensor in tensors))
    starts = [0, *ends[:-1]]
    return tuple(flat[a:b].view(each.shape) for a, b, each in zip(starts, ends, tensors, strict=True))

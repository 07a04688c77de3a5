"""TIES: trim, elect a sign, average what agrees with it ("TIES-Merging", 2023, https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DENSITY = 0.2
"""The paper keeps the largest 20 % where nothing is tuned."""


def kept_count(density: float, entries: int) -> int:
    """How many of so many entries a density keeps: rounded down, and at least one; as in mergekit."""
    return max(1, int(density * entries))


def trimmed(x: Tensor, density: float) -> Tensor:
    """The entries that are not smaller than the `kept_count`-th largest one, the others 0.

    Args:
        x: any shape, not empty.
        density: in (0, 1].
    """
    if density == 1:
        return x
    sizes = x.abs()
    least = torch.topk(sizes.reshape(-1), kept_count(density, x.numel()))[0][-1]
    return torch.where(sizes >= least, x, 0.0)


def disjoint_mean(parts: Sequence[Tensor]) -> Tensor:
    """Entry by entry, the mean of those parts that have the sign of the sum of all; a sum of 0 counts as positive.

    Zeros have no sign: they do not count.

    Args:
        parts: of one shape; entries that were trimmed are 0.

    Returns:
        float64.
    """
    total = torch.zeros(parts[0].shape, dtype=torch.float64, device=parts[0].device)
    for part in parts:
        total += part
    positive = total >= 0
    count = total.zero_().clone()
    for part in parts:
        agrees = torch.where(positive, part > 0, part < 0)
        total += torch.where(agrees, part, 0.0)
        count += agrees
    return total.div_(count.clamp_min_(1))


def ties(parts: Sequence[Tensor], density: float = DENSITY) -> Tensor:
    """`disjoint_mean` of the `trimmed` parts, float64; for matrices that are held.

    Law: of one part, what is trimmed of it; the order does not matter beyond rounding.
    """
    return disjoint_mean([trimmed(part, density) for part in parts])

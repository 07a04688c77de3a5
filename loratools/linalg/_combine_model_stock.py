"""Model Stock: how far the average of several changes is from where they all come from."""

from __future__ import annotations

import torch
from torch import Tensor

_SINGULAR = 1e-6


def model_stock_ratio(gram: Tensor) -> tuple[float, float]:
    """(t, cos θ): the result is t times the mean of the Xᵢ.

    t = N·cos θ / (1 + (N − 1)·cos θ), cos θ the mean over all pairs ("Model Stock: All we need is just a few fine-tuned
    models", 2024, https://arxiv.org/abs/2403.19522, equation 7 and its generalisation to N). A zero Xᵢ is not one of
    the N. One alone gives t = 1. Where the denominator is below 1e-6 there is no such point, and t = 0, as in mergekit.

    Law: t = 1 for equal directions, t = 0 for orthogonal ones; the sizes of the Xᵢ do not matter.

    Args:
        gram: ⟨Xᵢ, Xⱼ⟩, (N, N) float64; see `product_gram`.
    """
    there = gram.diagonal() > 0
    norms = gram.diagonal()[there].sqrt()
    count = norms.numel()
    if count < 2:  # noqa: PLR2004
        return 1.0, 1.0
    cosines = (gram[there][:, there] / norms[:, None] / norms).clamp(-1, 1)
    pairs = torch.triu_indices(count, count, 1)
    cosine = float(cosines[pairs[0], pairs[1]].mean())
    below = 1 + (count - 1) * cosine
    return (0.0 if abs(below) < _SINGULAR else count * cosine / below), cosine

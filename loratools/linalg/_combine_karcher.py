"""The Karcher mean of directions, as coefficients of a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.errors import UsageError

MAX_ITER = 100
TOL = 1e-7
"""Steps are cheap here: mergekit stops after 10, or at 1e-5, which is where the difference to it comes from."""


def karcher_coefficients(
    gram: Tensor, weights: Sequence[float], *, max_iter: int = MAX_ITER, tol: float = TOL
) -> list[float]:
    """Coefficients cᵢ of the matrix Σ cᵢXᵢ whose direction is the Karcher mean of those of the Xᵢ.

    The mean minimises Σ αᵢ·θᵢ², θᵢ the angle to Xᵢ, α the weights over their sum (Karcher, "Riemannian center of mass
    and mollifier smoothing", 1977; for models, as in mergekit: https://arxiv.org/abs/2603.04972). It is found by steps
    along Σ αᵢ·log(Xᵢ/‖Xᵢ‖) on the unit sphere. Its length is Σ αᵢ‖Xᵢ‖. A zero Xᵢ has no direction: it takes no part
    in the mean, and shortens the result.

    Every step stays in the span of the Xᵢ, so that N coefficients and the N × N inner products are all that it needs.

    Law: of one direction, Σ αᵢXᵢ; the result does not depend on the order; for two with equal weights and norms it is
    slerp at t = 0.5.

    Args:
        gram: ⟨Xᵢ, Xⱼ⟩, (N, N) float64; see `product_gram`.
        weights: N numbers of at least 0, not all 0.
        max_iter: steps at most.
        tol: a length of a step, or an angle, that is taken for 0.

    Raises:
        UsageError: a negative weight, or none above 0.
    """
    if min(weights) < 0 or not sum(weights) > 0:
        raise UsageError("A Karcher mean needs weights of at least 0, not all of them 0.", weights=list(weights))
    norms = gram.diagonal().clamp_min(0).sqrt()
    alphas = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
    there = (norms > 0) & (alphas > 0)
    if not bool(there.any()):
        return [0.0] * len(weights)
    lengths = torch.where(there, norms, 1.0)
    cosines = (gram / lengths[:, None] / lengths)[there][:, there].clamp(-1, 1)
    mean = _mean(cosines, alphas[there] / alphas[there].sum(), max_iter, tol)
    found = torch.zeros_like(alphas)
    found[there] = mean / norms[there] * float(alphas @ norms)
    return [float(each) for each in found]


def _mean(cosines: Tensor, alphas: Tensor, max_iter: int, tol: float) -> Tensor:
    """Coefficients of unit vectors with these inner products."""
    mean = alphas.clone()
    length = _length(mean, cosines)
    if length < tol:  # they cancel: from the first one on
        mean, length = torch.eye(alphas.numel(), dtype=torch.float64)[0], 1.0
    mean = mean / length
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = torch.arccos(dots)
        pull = torch.where(angles < tol, 0.0, alphas * angles / torch.sin(angles.clamp(tol, math.pi - tol)))
        step = pull - float(pull @ dots) * mean
        size = _length(step, cosines)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _length(mean, cosines)
    return mean


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))

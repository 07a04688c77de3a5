"""Truncation of a product of factors of large rank by block Krylov iteration: neither m×n nor R×R is decomposed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from loratools.linalg._basis import HeldBasis
from loratools.linalg._info import Goal, SVDInfo
from loratools.linalg._krylov import Effort, block_krylov
from loratools.linalg._precision import full_float32
from loratools.linalg._prepare import AbstractHeld, exponent_for, square_distance
from loratools.linalg._rounding import power_of_two
from loratools.linalg._truncated_svd import effort_for, finish
from loratools.linalg._workspace import CHUNK, LEAST_BLOCK, block_for, uses_dense

_CANCELS: Final = 100.0
"""Σ|⟨bᵢ,bⱼ⟩⟨aᵢ,aⱼ⟩|/‖B·A‖²: beyond it float32 products lose what is left of terms that cancel."""
_FINE: Final = 5e-3
"""Residuals below this share of the norm are left to the core: noise of float32 products would be in them."""
_LARGE: Final = 512
"""Below it the core, which is exact, takes no more than a second."""
_BLOCKS: Final = 6
"""A core of up to so many blocks is about as fast; measured."""


class ProductMatrix(AbstractHeld):
    """2^-exponent·B·A, from its factors in float32, transposed where that makes it tall."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        """A (R, n) and B (m, R), float64, rows of A and columns of B of one size each."""
        exponents = [exponent_for(float(each.abs().max())) for each in (A, B)]
        self.exponent = sum(exponents)
        A, B = (each * power_of_two(torch.tensor(-by)) for each, by in zip((A, B), exponents, strict=True))
        products = (B.T @ B) * (A @ A.T)
        self.total, self.cancelled = float(products.sum()), float(products.abs().sum())
        self.flipped = B.shape[0] < A.shape[1]
        up, down = (A.T, B.T) if self.flipped else (B, A)
        self._up, self._down = up.to(torch.float32).contiguous(), down.to(torch.float32).contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """See `AbstractMatrix.shape`."""
        return self._up.shape[0], self._down.shape[1]

    @property
    def device(self) -> torch.device:
        """See `AbstractMatrix.device`."""
        return self._up.device

    def left_times(self, rows: Tensor) -> Tensor:
        """See `AbstractMatrix.left_times`."""
        return (rows @ self._up) @ self._down

    def right_times(self, rows: Tensor, out: Tensor) -> None:
        """See `AbstractHeld.right_times`."""
        torch.mm(rows @ self._down.T, self._up.T, out=out)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """See `AbstractMatrix.chunks`."""
        step = max(1, CHUNK // max(self.shape[1], 1))
        for first in range(0, self.shape[0], step):
            yield slice(first, first + step), self._up[first : first + step] @ self._down

    def distance(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
        """See `AbstractMatrix.distance`."""
        total, right = 0.0, right.to(dtype)
        for mine, chunk in self.chunks():
            total += float(square_distance(chunk.to(dtype), left[:, mine].to(dtype), right))
        return math.sqrt(total)


def pays(shape: tuple[int, int], inner: int, goal: Goal) -> bool:
    """Whether the iteration is faster than the core of a product of inner dimension `inner`."""
    rank = LEAST_BLOCK if goal.rank is None else goal.rank
    block, least = block_for(rank), min(shape)
    return not goal.whole and inner >= max(_LARGE, _BLOCKS * block) and not uses_dense(least, block)


def krylov_of_product(A: Tensor, B: Tensor, goal: Goal, *, seed: int) -> tuple[Tensor, Tensor, Tensor, SVDInfo] | None:
    """U (m, r), S (r,), Vh (r, n), float32, of B·A, or None where the core has to do it.

    Block Krylov iteration in float32 with B·(A·z) in place of a matrix. Time O((m + n)·R·r) per product and
    O((m + n)·R²) once, in one multiplication, for ‖B·A‖; `Law` of `truncated_svd`.

    Args:
        A: (R, n) float64, rows of one size with the columns of B.
        B: (m, R) float64.
        goal: a rule that `pays`.
        seed: of the start block.
    """
    with full_float32():
        matrix = ProductMatrix(A, B)
        if not 0 < matrix.total < math.inf or matrix.cancelled > _CANCELS * matrix.total:
            return None
        least, scaled = min(matrix.shape), goal.scaled(matrix.exponent)
        effort = effort_for(scaled, least, "default")
        if goal.rank is None:
            effort = Effort(LEAST_BLOCK, 3 + -(-goal.max_rank // LEAST_BLOCK), effort.tolerance)
        found = block_krylov(HeldBasis(matrix, min(effort.block * effort.blocks, least)), scaled, effort, seed)
        if not found.reached:
            return None
        U, S, Vh, info = finish(matrix, scaled, found)
    return None if info.residual < _FINE * info.norm else (U, S, Vh, info)

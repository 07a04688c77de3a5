"""Randomised block Krylov iteration on AᵀA with Rayleigh-Ritz from a float64 Gram matrix.

Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition" (2015); Tropp and Webber, "Randomized algorithms for low-rank matrix approximation" (2023).
Vectors are kept as rows (block, length), so growing the basis appends memory and copies nothing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from loratools.linalg._certificate import energy_bound, estimated_gap
from loratools.linalg._info import Goal
from loratools.linalg._orth import gram, orthonormal_rows
from loratools.linalg._prepare import Prepared
from loratools.linalg._ritz import Approximation, measured

_CONVERGED = 2e-7  # (T − c)/T at the noise of float32 products: nothing is left to find
_COARSE = 1e-6  # goals and remainders below this fraction need better than T − c
_LEAST_BLOCKS = 2  # one block is a sketch without a power iteration: off by up to a factor
_INSIDE = 0.1  # squared length that a unit vector outside the basis keeps; rounding errors of inside ones lose more
_NOISE = 1e-12  # squared singular values below this fraction of the largest are rounding noise


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """block: vectors per block. blocks: at most so many. tolerance: wanted gap, None to spend every block."""

    block: int
    blocks: int
    tolerance: float | None


class _Basis:
    """Orthonormal rows V, the rows (A·Vᵀ)ᵀ, and H = V·AᵀA·Vᵀ; grows block by block."""

    def __init__(self, A: Tensor, capacity: int) -> None:
        self.A, self.width, self.newest, self.products = A, 0, 0, 0
        self._V = A.new_empty((capacity, A.shape[1]))
        self._Y = A.new_empty((capacity, A.shape[0]))
        self._H = torch.zeros((capacity, capacity), dtype=torch.float64)

    @property
    def V(self) -> Tensor:  # noqa: N802
        return self._V[: self.width]

    @property
    def Y(self) -> Tensor:  # noqa: N802
        return self._Y[: self.width]

    @property
    def H(self) -> Tensor:  # noqa: N802
        return self._H[: self.width, : self.width]

    @property
    def room(self) -> int:
        return self._V.shape[0] - self.width

    @property
    def full(self) -> bool:
        return self.room == 0

    def append(self, Z: Tensor) -> None:
        """Take orthonormal rows Z (b, n), orthogonal to V; one product with A."""
        old, self.newest = self.width, Z.shape[0]
        self.width += self.newest
        self._V[old : self.width] = Z
        torch.mm(Z, self.A.T, out=self._Y[old : self.width])
        self.products += 1
        cross = gram(self.Y, self._Y[old : self.width])
        self._H[: self.width, old : self.width] = cross
        self._H[old : self.width, : self.width] = cross.T

    def outside(self, Z: Tensor) -> Tensor:
        """Z without its part in span(V)."""
        return Z - (Z @ self.V.T) @ self.V

    def next_block(self) -> tuple[Tensor, Tensor]:
        """Orthonormal rows of the new part of AᵀA·V and the newest block's coupling to them; one product."""
        Q, L = orthonormal_rows(self._Y[self.width - self.newest : self.width])
        W = Q @ self.A
        self.products += 1
        Z, below = orthonormal_rows(self.outside(W))
        Z, turn = orthonormal_rows(self.outside(Z), least=_INSIDE)
        return Z, L @ below @ turn


class _Progress:
    """What the growing basis has shown so far, and when that is enough."""

    def __init__(self, prepared: Prepared, goal: Goal, effort: Effort) -> None:
        self.prepared, self.goal, self.effort = prepared, goal, effort
        self.captured: list[float] = []
        self.ranks: list[int] = []
        self.reached = False
        self.best: float | None = None
        self.vectors = torch.empty((0, 0), dtype=torch.float64)
        self.noise_free = 0

    def look(self, basis: _Basis) -> bool:
        """Solve the projected problem; true where no product can improve on it."""
        theta, vectors = torch.linalg.eigh(basis.H)
        theta, self.vectors = theta.flip(0).clamp_min(0), vectors.flip(1)
        rank, self.reached = self.goal.choose(theta, self._total(basis, theta))
        if not self.ranks or rank != self.ranks[-1]:
            self.best = None
        self.ranks.append(rank)
        self.captured.append(float(theta[:rank].sum()))
        self.noise_free = int((theta[:rank] > _NOISE * theta[0]).sum())
        floor = self.prepared.total - self.captured[-1] <= _CONVERGED * self.prepared.total
        blocks = len(self.captured)
        spent = blocks >= self.effort.blocks or basis.full
        return spent or (floor and self.reached and blocks >= _LEAST_BLOCKS)

    def enough(self, basis: _Basis, coupling: Tensor) -> bool:
        """Whether the gap is small enough, or the goal is out of reach, given what the next block couples to."""
        if len(self.captured) < _LEAST_BLOCKS or self.effort.tolerance is None:
            return False
        total, rank = self.prepared.total, self.ranks[-1]
        if not self.reached:
            most = energy_bound(basis.H, coupling, basis.newest, self.goal.max_rank)
            return most < (1 - self.goal.tail - _CONVERGED) * total
        self.best = energy_bound(basis.H, coupling, basis.newest, rank)
        same = [c for r, c in zip(self.ranks, self.captured, strict=True) if r == rank]
        settled = len(self.ranks) > 1 and self.ranks[-2] == rank
        gap = estimated_gap(total, same, len(self.captured), self.best) if settled else float("inf")
        return gap <= self.effort.tolerance

    def _total(self, basis: _Basis, theta: Tensor) -> float:
        """‖A‖², or for goals that it is too coarse for, the energy found plus the measured rest."""
        total, found = self.prepared.total, float(theta.sum())
        if self.goal.rank is not None or self.goal.tail > _COARSE or total - found > _COARSE * total:
            return total
        return found + measured(self.prepared, basis.Y, basis.V, torch.float64) ** 2


def block_krylov(prepared: Prepared, goal: Goal, effort: Effort, seed: int) -> Approximation:
    """Grow a Krylov basis until the goal is met and the gap is small, or the effort is spent.

    Time 2·m·n·block per product and O((m + n)·w²) for a basis of w vectors, memory 4·(m + n)·w bytes.

    Args:
        prepared: a tall matrix that is not zero.
        goal: a rank of at most `effort.block`, an energy or an error.
        effort: how much work at most.
        seed: of the start block; the sketch is drawn on the CPU, so devices agree on it.
    """
    A = prepared.A
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn((effort.block, A.shape[0]), generator=generator).to(A.device)
    basis = _Basis(A, min(effort.block * effort.blocks, A.shape[1]))
    basis.append(orthonormal_rows(sketch @ A)[0])
    basis.products += 1
    progress = _Progress(prepared, goal, effort)
    while not progress.look(basis):
        Z, coupling = basis.next_block()
        if progress.enough(basis, coupling) or Z.shape[0] == 0:
            break
        basis.append(Z[: basis.room])
    chosen = progress.vectors[:, : progress.noise_free].T.to(basis.Y)
    best = progress.best
    if best is not None and prepared.total - best < _CONVERGED * 10 * prepared.total:
        best = None
    reached, products = progress.reached, basis.products
    return Approximation(chosen @ basis.Y, chosen @ basis.V, reached, products, best, False, "block-krylov")

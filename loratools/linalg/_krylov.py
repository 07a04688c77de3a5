"""Randomised block Krylov iteration: grow a basis until its approximation is near enough to the best."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from loratools.linalg._basis import AbstractBasis
from loratools.linalg._certificate import deflated_norm, energy_bound, estimated_gap, gap, likely_norm
from loratools.linalg._half_step import HalfStep, half_step
from loratools.linalg._info import Goal
from loratools.linalg._ritz import Approximation

_CONVERGED = 2e-7  # (T − c)/T at the noise of float32 products: nothing is left to find
_COARSE = 1e-6  # goals and remainders below this fraction need better than T − c
_LEAST_BLOCKS = 2  # one block is a sketch without a power iteration: off by up to a factor
_NOISE = 1e-12  # squared singular values below this fraction of the largest are rounding noise


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How much work at most.

    Attributes:
        block: vectors per block.
        blocks: at most so many.
        tolerance: wanted gap; None spends every block.
        proven: the gap has to be proven, up to a failure probability of 1e-6.
    """

    block: int
    blocks: int
    tolerance: float | None
    proven: bool = False


class _Progress:
    """What the growing basis has shown so far, and when that is enough."""

    def __init__(self, basis: AbstractBasis, goal: Goal, effort: Effort) -> None:
        self.basis, self.goal, self.effort, self.total = basis, goal, effort, basis.matrix.total
        self.captured: list[float] = []
        self.ranks: list[int] = []
        self.reached = False
        self.best: float | None = None
        self.step: HalfStep | None = None
        self.blocks = 0

    def complete(self) -> bool:
        """Whether nothing is left for another product to find."""
        H = self.basis.H
        self.blocks += 1
        if self.blocks < _LEAST_BLOCKS or self.total - float(H.trace()) > _CONVERGED * self.total:
            return False
        theta = torch.linalg.eigvalsh(H)
        self._choose(theta)
        return self.reached and self.total - self.captured[-1] <= _CONVERGED * self.total

    def enough(self, coupling: Tensor) -> bool:
        """Whether the gap is small enough, the goal out of reach, or the effort spent, given the next coupling."""
        H, newest = self.basis.H, self.basis.newest
        self.step = half_step(H, coupling, newest)
        self._choose(torch.linalg.eigvalsh(H if self.step is None else self.step.normal_matrix()))
        spent = self.blocks >= self.effort.blocks or not self.basis.room or not coupling.shape[1]
        if self.blocks < _LEAST_BLOCKS or self.effort.tolerance is None:
            return spent
        mu, rank = likely_norm(H, newest), self.ranks[-1]
        if not self.reached:
            most = energy_bound(H, coupling, self.goal.max_rank, mu)
            return spent or most < (1 - self.goal.tail - _CONVERGED) * self.total
        self.best = energy_bound(H, coupling, rank, mu)
        same = [c for r, c in zip(self.ranks, self.captured, strict=True) if r == rank]
        settled = len(self.ranks) > 1 and self.ranks[-2] == rank
        depth = self.blocks + (self.step is not None) / 2
        return spent or (settled and estimated_gap(self.total, same, depth, self.best) <= self.effort.tolerance)

    def prove(self, coupling: Tensor, seed: int) -> bool:
        """Replace the estimate by a proof; whether it shows what is wanted, or no more effort is left."""
        mu = deflated_norm(self.basis, seed)
        self.best = energy_bound(self.basis.H, coupling, self.ranks[-1], mu)
        proven = gap(self.total, self.captured[-1], self.best)
        return proven <= (self.effort.tolerance or 0.0) or self.blocks >= self.effort.blocks or not self.basis.room

    def _choose(self, values: Tensor) -> None:
        theta = values.flip(0).clamp_min(0)
        rank, self.reached = self.goal.choose(theta, self._total())
        if not self.ranks or rank != self.ranks[-1]:
            self.best = None
        self.ranks.append(min(rank, int((theta > _NOISE * theta[0]).sum())))
        self.captured.append(float(theta[: self.ranks[-1]].sum()))

    def _total(self) -> float:
        """‖A‖², or for goals that it is too coarse for, the energy found plus the measured rest."""
        total, found = self.total, float(self.basis.H.trace())
        if self.goal.rank is not None or self.goal.tail > _COARSE or total - found > _COARSE * total:
            return total
        return found + self.basis.missed()


def block_krylov(basis: AbstractBasis, goal: Goal, effort: Effort, seed: int) -> Approximation:
    """Grow a Krylov basis until the goal is met and the gap is small, or the effort is spent.

    Time 2·m·n·block per product and O((m + n)·w²) for a basis of w vectors. After k blocks 2k + 1 products are spent,
    2k where nothing is left to find.

    Args:
        basis: empty, of a matrix that is not zero.
        goal: a rank of at most `effort.block`, an energy or an error.
        effort: how much work at most.
        seed: of the start block; the sketch is drawn on the CPU, so devices agree on it.
    """
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn((effort.block, basis.matrix.shape[0]), generator=generator)
    basis.start(sketch.to(basis.matrix.device))
    progress = _Progress(basis, goal, effort)
    wait = basis.matrix.device.type != "cpu"  # a product costs less there than to wait for its use
    while wait or not progress.complete():
        Z, coupling = basis.next_block()
        if wait and progress.complete():
            break
        if progress.enough(coupling) and (not effort.proven or not progress.reached or progress.prove(coupling, ~seed)):
            return _from_half_step(basis, progress, Z, proven=effort.proven)
        basis.append(Z[: basis.room], coupling)
    return _from_basis(basis, progress)


def _from_basis(basis: AbstractBasis, progress: _Progress) -> Approximation:
    _, vectors = torch.linalg.eigh(basis.H)
    rank = progress.ranks[-1]
    images, rows = basis.right(vectors[:, vectors.shape[1] - rank :].flip(1).T)
    return Approximation(images, rows, progress.reached, basis.products, None, False, "block-krylov")


def _from_half_step(basis: AbstractBasis, progress: _Progress, Z: Tensor, *, proven: bool) -> Approximation:
    if progress.step is None:
        return dataclasses.replace(_from_basis(basis, progress), best=_useful(progress), proven=proven)
    images, rows = basis.left(*progress.step.chosen(progress.ranks[-1]), Z)
    best = _useful(progress)
    return Approximation(images, rows, progress.reached, basis.products, best, proven, "block-krylov", left=True)


def _useful(progress: _Progress) -> float | None:
    """The bound, unless what it leaves is at the noise of float32."""
    best = progress.best
    if best is None or not math.isfinite(best) or progress.total - best < 10 * _CONVERGED * progress.total:
        return None
    return best

"""Randomised block Krylov iteration: grow a basis until its approximation is near enough to the best."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from loratools.linalg._basis import AbstractBasis
from loratools.linalg._certificate import deflated_norm, energy_bound, estimated_gap, gap, likely_norm
from loratools.linalg._half_step import HalfStep, half_step
from loratools.linalg._host import is_remote
from loratools.linalg._info import Goal
from loratools.linalg._ritz import Approximation

_CONVERGED = 2e-7  # (T − c)/T at the noise of float32 products: nothing is left to find
_COARSE = 1e-6  # goals and remainders below this fraction need better than T − c
_LEAST_BLOCKS = 2  # one block is a sketch without a power iteration: off by up to a factor
_LOOKS = 2
_EIGENVALUES = 0.1  # measured: eigenvalues take as long as a product at about three times this
_NOISE = 1e-12  # squared singular values below this fraction of the largest are rounding noise


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How much work at most.

    Attributes:
        block: vectors per block.
        blocks: at most so many.
        tolerance: wanted gap; None spends every block.
        proven: the gap has to be proven, up to a failure probability of 1e-6.
        eager: stop as soon as the estimate allows, though a product more would make the certificate much better.
    """

    block: int
    blocks: int
    tolerance: float | None
    proven: bool = False
    eager: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """What one look found: at which depth, which rank meets the goal, and the energy that it captures."""

    depth: float
    rank: int
    captured: float


class Progress:
    """What the growing basis has shown so far, and when that is enough."""

    def __init__(self, basis: AbstractBasis, goal: Goal, effort: Effort) -> None:
        self.basis, self.goal, self.effort, self.total = basis, goal, effort, basis.matrix.total
        self.seen: list[_Seen] = []
        self.reached = False
        self.best: float | None = None
        self.step: HalfStep | None = None
        self.blocks = 0

    @property
    def rank(self) -> int:
        """That meets the goal, as far as is known."""
        return self.seen[-1].rank

    def complete(self) -> bool:
        """Whether the basis is good enough as it is, before the next product."""
        self.blocks += 1
        if self.blocks < _LEAST_BLOCKS:
            return False
        found = self.total - float(self.basis.H.trace()) <= _CONVERGED * self.total
        if not found and (self.best is None or self.effort.proven or not self._cheap(self.basis.width)):
            return False
        self.step = None
        self._look(self.blocks, torch.linalg.eigvalsh(self.basis.H))
        if not self.reached:
            return False
        if self.total - self.seen[-1].captured <= _CONVERGED * self.total:
            return True
        return self.best is not None and not self.effort.proven and self._settled(certified=not self.effort.eager)

    def enough(self, coupling: Tensor) -> bool:
        """Whether the half step is good enough, the goal out of reach, or the effort spent."""
        H, newest = self.basis.H, self.basis.newest
        self.step = half_step(H, coupling, newest)
        found = H if self.step is None else self.step.normal_matrix()
        self._look(self.blocks + (self.step is not None) / 2, torch.linalg.eigvalsh(found))
        spent = self.blocks >= self.effort.blocks or not self.basis.room or not coupling.shape[1]
        if self.blocks < _LEAST_BLOCKS or self.effort.tolerance is None:
            return spent
        if not self.reached:
            most = energy_bound(H, coupling, self.goal.max_rank, likely_norm(H, newest))
            return spent or most < (1 - self.goal.tail - _CONVERGED) * self.total
        done = spent or self._settled()
        if done or self._cheap(H.shape[0] + coupling.shape[1]):
            self.best = energy_bound(H, coupling, self.rank, likely_norm(H, newest))
        return done or self._settled()

    def prove(self, coupling: Tensor, seed: int) -> bool:
        """Replace the estimate by a proof; whether it shows what is wanted, or no more effort is left."""
        mu = deflated_norm(self.basis, seed)
        self.best = energy_bound(self.basis.H, coupling, self.rank, mu)
        proven = gap(self.total, self.seen[-1].captured, self.best)
        return proven <= (self.effort.tolerance or 0.0) or self.blocks >= self.effort.blocks or not self.basis.room

    def _cheap(self, width: int) -> bool:
        """Whether eigenvalues of this many dimensions cost little beside a product."""
        m, n = self.basis.matrix.shape
        return width**3 <= _EIGENVALUES * m * n * self.effort.block

    def _settled(self, *, certified: bool = False) -> bool:
        """Whether the gap is small enough, by the bound or, if that is enough, by the estimate.

        The rank has to be the same as before.
        """
        now, tolerance = self.seen[-1], self.effort.tolerance
        if tolerance is None or len(self.seen) < _LOOKS or self.seen[-2].rank != now.rank:
            return False
        if self.best is not None and gap(self.total, now.captured, self.best) <= tolerance:
            return True
        if certified:
            return False
        before = next((each for each in self.seen if each.depth == now.depth - 1), None)
        if before is None or before.rank != now.rank:
            return False
        share = now.depth * self.effort.block / self.basis.matrix.shape[1]
        return estimated_gap(self.total, (before.captured, now.captured), now.depth, share) <= tolerance

    def _look(self, depth: float, values: Tensor) -> None:
        theta = values.flip(0).clamp_min(0)
        chosen, self.reached = self.goal.choose(theta, self._total())
        rank = min(chosen, int((theta > _NOISE * theta[0]).sum()))
        if self.seen and rank != self.rank:
            self.best = None
        self.seen.append(_Seen(depth, rank, float(theta[:rank].sum())))

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
    progress = Progress(basis, goal, effort)
    wait = is_remote(basis.V)  # a product costs less there than to wait for its use
    while wait or not progress.complete():
        Z, coupling = basis.next_block()
        if wait and progress.complete():
            break
        if progress.enough(coupling) and (not effort.proven or not progress.reached or progress.prove(coupling, ~seed)):
            return after_half_step(basis, progress, Z, proven=effort.proven)
        basis.append(Z[: basis.room], coupling)
    return as_it_is(basis, progress)


def as_it_is(basis: AbstractBasis, progress: Progress, *, proven: bool = False) -> Approximation:
    """What the basis says as it is."""
    _, vectors = torch.linalg.eigh(basis.H)
    images, rows = basis.right(vectors[:, vectors.shape[1] - progress.rank :].flip(1).T)
    best = _useful(progress)
    return Approximation(images, rows, progress.reached, basis.products, best, proven, "block-krylov")


def after_half_step(basis: AbstractBasis, progress: Progress, Z: Tensor, *, proven: bool = False) -> Approximation:
    """What it says once the next block, Z (c, n), is taken into account."""
    if progress.step is None:
        return as_it_is(basis, progress, proven=proven)
    images, rows, left = basis.after(progress.step, progress.rank, Z)
    best = _useful(progress)
    return Approximation(images, rows, progress.reached, basis.products, best, proven, "block-krylov", left)


def _useful(progress: Progress) -> float | None:
    """The bound, unless what it leaves is at the noise of float32."""
    best = progress.best
    if best is None or not math.isfinite(best) or progress.total - best < 10 * _CONVERGED * progress.total:
        return None
    return best

"""Several matrices of one shape at a time: on a GPU a product of one small matrix is mostly waiting.

The iteration is that of `_krylov`, for all of them in step, with batched products and Cholesky factors and one wait a
block for all. Each stops by its own estimates. One whose block has dependent rows falls out, and is done by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._basis import INSIDE, HeldBasis
from loratools.linalg._host import is_remote, to_host
from loratools.linalg._info import Goal, SVDInfo, make_goal
from loratools.linalg._krylov import Effort, Progress, after_half_step, as_it_is
from loratools.linalg._orth import hopeful_round
from loratools.linalg._precision import full_float32
from loratools.linalg._prepare import HeldMatrix, prepare
from loratools.linalg._ritz import Approximation
from loratools.linalg._truncated_svd import effort_for, finish, truncated_svd
from loratools.linalg._workspace import BATCH_BYTES, uses_dense

Result = tuple[Tensor, Tensor, Tensor, SVDInfo]


def batch_size(m: int, n: int) -> int:
    """How many m×n matrices `truncated_svd_batch` should get at a time on a GPU: they, and their copies, take 1 GiB."""
    return max(1, BATCH_BYTES // (12 * max(m * n, 1)))


def truncated_svd_batch(
    matrices: Sequence[Tensor], rank: int, *, seed: int = 0, preset: str = "default"
) -> list[Result]:
    """`truncated_svd` of matrices of one shape; together where they are on a GPU and the iteration suits them.

    Law: each result is as near to the optimum as `truncated_svd`'s own, by the same estimates.

    Args:
        matrices: (m, n) each, one shape and device.
        rank: number of triples.
        seed: of the start block, one for all.
        preset: as for `truncated_svd`; `certified` and `exact` are done one by one.

    Raises:
        NonFiniteError, MismatchError, UnsupportedError, UsageError: as `truncated_svd`.
    """
    goal = make_goal(rank, None, None, 256)
    least = min(min(matrix.shape) for matrix in matrices) if matrices else 0
    effort = effort_for(goal, least, preset)
    alone = preset in ("certified", "exact") or uses_dense(least, effort.block, quick=preset == "fast")
    found: dict[int, Result] = {}
    if len(matrices) > 1 and not alone and is_remote(matrices[0]):
        with full_float32():
            prepared = {at: prepare(matrix) for at, matrix in enumerate(matrices)}
            members = {at: each for at, each in prepared.items() if each.total}
            for at, approximation in _Batch(members, effort, seed).run(goal).items():
                found[at] = finish(members[at], goal, approximation)
    return [
        found[at] if at in found else truncated_svd(matrix, rank, seed=seed, preset=preset)
        for at, matrix in enumerate(matrices)
    ]


class _Batch:
    """Bases of all matrices in common storage: V (k, capacity, n) and Y (k, capacity, m)."""

    def __init__(self, members: dict[int, HeldMatrix], effort: Effort, seed: int) -> None:
        first = next(iter(members.values()))
        m, n = first.shape
        capacity = min(effort.block * effort.blocks, n)
        self._effort, self._seed = effort, seed
        self._A = torch.stack([each.A for each in members.values()])
        self._V, self._Y = (
            self._A.new_empty((len(members), capacity, n)),
            self._A.new_empty((len(members), capacity, m)),
        )
        self._bases = {
            at: HeldBasis.within(each, self._V[place], self._Y[place])
            for place, (at, each) in enumerate(members.items())
        }

    def run(self, goal: Goal) -> dict[int, Approximation]:
        """The approximations of those that did not fall out."""
        progress = {at: Progress(basis, goal, self._effort) for at, basis in self._bases.items()}
        done: dict[int, Approximation] = {}
        fallen: set[int] = set()
        Z, coupling = self._start()
        while len(done) + len(fallen) < len(self._bases):
            pending = self._append(Z, coupling)
            Z, step, fine = self._next_block()
            pending, coupling, fine = to_host(pending, step, fine)
            for place, (at, basis) in enumerate(self._bases.items()):
                basis.settle(pending[place])
                basis.products += 1
                if at in done or at in fallen:
                    continue
                if not bool(fine[place]):
                    fallen.add(at)
                elif progress[at].complete():
                    done[at] = as_it_is(basis, progress[at])
                elif progress[at].enough(coupling[place]):
                    done[at] = after_half_step(basis, progress[at], Z[place])
            if next(iter(self._bases.values())).room < Z.shape[1]:
                break  # what is left, if anything, needs part of a block
        return done

    def _start(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        sketch = torch.randn((self._effort.block, self._A.shape[1]), generator=generator).to(self._A.device)
        Z = sketch @ self._A
        for _ in range(2):
            Z, _, _ = hopeful_round(Z)
        for basis in self._bases.values():
            basis.products += 1
        return Z, torch.empty((len(self._bases), 0, Z.shape[1]))

    def _append(self, Z: Tensor, coupling: Tensor) -> Tensor:
        """Take the rows Z (k, b, n) into every basis; their Gram matrices (k, b, b) after the product."""
        old = next(iter(self._bases.values())).width
        for place, basis in enumerate(self._bases.values()):
            basis.grow(Z.shape[1], coupling[place])
            basis.products += 1
        mine = slice(old, old + Z.shape[1])
        self._V[:, mine] = Z
        self._Y[:, mine] = Z @ self._A.mT
        wide = self._Y[:, mine].to(torch.float64)
        return wide @ wide.mT

    def _next_block(self) -> tuple[Tensor, Tensor, Tensor]:
        width = next(iter(self._bases.values())).width
        V, newest = self._V[:, :width], self._Y[:, width - self._effort.block : width]
        W = newest @ self._A
        Z, below, first = hopeful_round(torch.baddbmm(W, W @ V.mT, V, alpha=-1))
        Z, turn, second = hopeful_round(torch.baddbmm(Z, Z @ V.mT, V, alpha=-1), least=INSIDE)
        return Z, below @ turn, first & second

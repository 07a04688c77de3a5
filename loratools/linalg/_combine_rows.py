"""Methods that look at single entries of ΔW: their result, as rows that are computed whenever they are read.

None of it is of low rank, so it is decomposed anew; neither it nor any ΔW is held.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from loratools.linalg._addition import LowRankSum
from loratools.linalg._combine_ties import disjoint_mean, kept_count
from loratools.linalg._counter_random import uniform
from loratools.linalg._magnitude_threshold import magnitude_threshold
from loratools.linalg._streamed import ChunkedRows
from loratools.linalg._workspace import CHUNK

TILE: Final = CHUNK
"""Entries of a tile; a longer row is taken whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deltas:
    """Several ΔW = B·A of one shape, by tiles of rows in float32.

    Law: every entry is the same number in every tile, whatever computes it (`LowRankSum`).

    Attributes:
        sums: one each.
        check: called before each tile; raises where the work is to stop.
    """

    sums: tuple[LowRankSum, ...]
    check: Callable[[], None]

    @classmethod
    def of(cls, products: Sequence[tuple[Tensor, Tensor]], check: Callable[[], None] = lambda: None) -> Deltas:
        """From (A (Rᵢ, n), B (m, Rᵢ)), any float dtype, finite."""
        return cls(tuple(LowRankSum.of([(A, B, 1.0)]) for A, B in products), check)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.sums[0].left.shape[0], self.sums[0].right.shape[1]

    def tiles(self, tile: int) -> Iterator[slice]:
        """The rows of each tile of about so many entries."""
        rows = max(1, tile // max(self.shape[1], 1))
        for first in range(0, self.shape[0], rows):
            self.check()
            yield slice(first, min(first + rows, self.shape[0]))

    def rows(self, index: int, rows: slice) -> Tensor:
        """Those of one ΔW, float32."""
        return self.sums[index].piece(rows, slice(None)).to(torch.float32)


class AbstractPruning(abc.ABC):
    """What is kept of every ΔW before they are put together."""

    @abc.abstractmethod
    def kept(self, index: int, rows: slice, delta: Tensor) -> Tensor:
        """The rows of one ΔW, with zeros for what is dropped, and rescaled; float32 or float64."""


class Largest(AbstractPruning):
    """Of every ΔW the entries that are not smaller than the ⌊density·m·n⌋-th largest one."""

    def __init__(self, deltas: Deltas, density: float, tile: int = TILE) -> None:
        m, n = deltas.shape
        count = kept_count(density, m * n)
        self._least = [0.0 if density == 1 else _threshold(deltas, index, count, tile)
                       for index in range(len(deltas.sums))]  # fmt: skip

    def kept(self, index: int, rows: slice, delta: Tensor) -> Tensor:
        """See `AbstractPruning.kept`."""
        del rows
        return torch.where(delta.abs() >= self._least[index], delta, 0.0)


class Dropped(AbstractPruning):
    """DARE: each entry is kept with probability `density`, and divided by it (https://arxiv.org/abs/2311.03099)."""

    def __init__(self, density: float, keys: Sequence[int]) -> None:
        self._density, self._keys = density, keys

    def kept(self, index: int, rows: slice, delta: Tensor) -> Tensor:
        """See `AbstractPruning.kept`."""
        if self._density == 1:
            return delta
        kept = _drawn(self._keys[index], rows, delta) < self._density
        return torch.where(kept, delta.to(torch.float64) / self._density, 0.0)


class Sampled(AbstractPruning):
    """MAGPRUNE of DELLA: DARE with probabilities that rise with the size (https://arxiv.org/abs/2406.11617).

    The entry of rank i of n in its row, from the smallest on, is kept with probability density + ε·(i/(n − 1) − 1/2),
    and divided by it; equal sizes are ranked by their columns.
    """

    def __init__(self, density: float, epsilon: float, keys: Sequence[int]) -> None:
        self._density, self._epsilon, self._keys = density, epsilon, keys

    def kept(self, index: int, rows: slice, delta: Tensor) -> Tensor:
        """See `AbstractPruning.kept`."""
        columns = delta.shape[1]
        order = delta.abs().argsort(dim=1, stable=True)
        steps = torch.linspace(-0.5, 0.5, columns, dtype=torch.float64) if columns > 1 else torch.zeros(1).double()
        share = self._density + self._epsilon * steps
        chance = torch.empty(delta.shape, dtype=torch.float64).scatter_(1, order, share.expand(delta.shape))
        kept = _drawn(self._keys[index], rows, delta) < chance
        return torch.where(kept, delta.to(torch.float64) / chance, 0.0)


def combined_rows(deltas: Deltas, pruning: AbstractPruning, *, elect: bool, tile: int = TILE) -> ChunkedRows:
    """What is kept of the ΔW: the sum, or with `elect` the `disjoint_mean` of TIES.

    `Largest` and elect is TIES, alone "magnitude"; `Dropped` is DARE; `Sampled` and elect is DELLA.

    Law: the bits of an entry depend on the factors and the keys alone: not on the tiles, threads or passes.

    Returns:
        float32 rows for `truncated_svd`; every pass computes them anew, about 6·m·n·ΣR operations.
    """
    together: Callable[[Sequence[Tensor]], Tensor] = disjoint_mean if elect else _total

    def read() -> Iterator[Tensor]:
        for rows in deltas.tiles(tile):
            parts = [pruning.kept(index, rows, deltas.rows(index, rows)) for index in range(len(deltas.sums))]
            yield together(parts).to(torch.float32)

    return ChunkedRows(deltas.shape, deltas.sums[0].left.device, read)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(parts[0].shape, dtype=torch.float64, device=parts[0].device)
    for part in parts:
        total += part
    return total


def _threshold(deltas: Deltas, index: int, count: int, tile: int) -> float:
    return magnitude_threshold(lambda: (deltas.rows(index, rows) for rows in deltas.tiles(tile)), count)


def _drawn(key: int, rows: slice, delta: Tensor) -> Tensor:
    columns = delta.shape[1]
    return uniform(key, rows.start * columns, delta.numel()).view(delta.shape)

"""Ranks for many matrices out of one pool of bytes: the least residual² over all of them together.

The σ²/cost of a matrix fall, so what is to be solved is a knapsack with concave gains. Its relaxation, in which a part
of a rank may be bought, is solved by taking the densest σ² first, and bounds every choice of whole ranks from above
(G. B. Dantzig, "Discrete-variable extremum problems", 1957, https://doi.org/10.1287/opre.5.2.266).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Spectrum:
    """What a matrix offers and what it asks for.

    Attributes:
        sigma2: squared singular values, descending; all of them or the leading ones.
        cost: bytes of one rank.
        setup: bytes that are paid once, with the first rank.
    """

    sigma2: tuple[float, ...]
    cost: int
    setup: int = 0

    def nbytes(self, rank: int) -> int:
        """Bytes at a rank."""
        return rank * self.cost + self.setup if rank else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Allotment:
    """Ranks for all matrices.

    Attributes:
        ranks: one for each.
        captured: Σ σ² over the ranks.
        bound: no choice of ranks within the capacity captures more, of the values that were given.
        density: σ² per byte of the first value for which the relaxation has no room, or None where it takes all. What
            is less dense has no part in `bound`.
        nbytes: what the ranks take.
    """

    ranks: tuple[int, ...]
    captured: float
    bound: float
    density: float | None
    nbytes: int


def allocate_ranks(spectra: Sequence[Spectrum], capacity: int) -> Allotment:
    """Ranks that capture the most σ² within `capacity` bytes.

    Takes σ² by σ²/cost, the largest first, and passes over what does not fit any more; or starts so from the largest
    rank that all can have, where that captures more.

    Law: never over the capacity; at least what one rank for all captures, and at most `bound`; the optimum where all
    costs are equal and nothing is paid once. Time O(k log k) for k values.
    """
    order = sorted(
        (-value / each.cost, at, index)
        for at, each in enumerate(spectra)
        for index, value in enumerate(each.sigma2)
        if value > 0
    )
    steps = [(at, index) for _, at, index in order]
    level = uniform_rank(spectra, capacity, [len(each.sigma2) for each in spectra])
    starts = ([0] * len(spectra), [min(level, len(each.sigma2)) for each in spectra])
    tried = [_filled(spectra, steps, capacity, start) for start in starts]
    gains = [_captured(spectra, ranks) for ranks in tried]
    best = 1 if gains[1] > gains[0] else 0
    bound, density = _relaxed(spectra, steps, capacity)
    used = sum(each.nbytes(rank) for each, rank in zip(spectra, tried[best], strict=True))
    return Allotment(tuple(tried[best]), gains[best], max(bound, gains[best]), density, used)


def uniform_rank(spectra: Sequence[Spectrum], capacity: int, most: Sequence[int] | None = None) -> int:
    """The largest rank that all matrices can have within `capacity` bytes; 0 where there is none.

    Args:
        spectra: only their costs matter.
        capacity: bytes.
        most: a matrix takes no more than this, however large the rank; None: every one takes all of it.
    """
    if not spectra:
        return 0
    limits = most if most is not None else [capacity] * len(spectra)

    def fits(rank: int) -> bool:
        taken = (each.nbytes(min(rank, limit)) for each, limit in zip(spectra, limits, strict=True))
        return sum(taken) <= capacity

    return _largest(fits, max(limits))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where 0 does, and what lies below a fitting one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _filled(
    spectra: Sequence[Spectrum], steps: Sequence[tuple[int, int]], capacity: int, start: Sequence[int]
) -> list[int]:
    """`start`, and what of the steps fits beside it; a matrix whose next rank does not fit gets no more."""
    ranks, full = list(start), set()
    left = capacity - sum(each.nbytes(rank) for each, rank in zip(spectra, ranks, strict=True))
    for at, index in steps:
        if index < ranks[at] or at in full:
            continue
        price = spectra[at].nbytes(ranks[at] + 1) - spectra[at].nbytes(ranks[at])
        if price > left:
            full.add(at)
            continue
        ranks[at] += 1
        left -= price
    return ranks


def _relaxed(
    spectra: Sequence[Spectrum], steps: Sequence[tuple[int, int]], capacity: int
) -> tuple[float, float | None]:
    """What a part of a rank may be bought for: an upper bound; and the σ²/cost at which the bytes run out."""
    left, gain = capacity, 0.0
    for at, index in steps:
        value, cost = spectra[at].sigma2[index], spectra[at].cost
        if cost > left:
            return gain + value * left / cost, value / cost
        gain, left = gain + value, left - cost
    return gain, None


def _captured(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    kept = (itertools.islice(each.sigma2, rank) for each, rank in zip(spectra, ranks, strict=True))
    return sum(sum(values) for values in kept)

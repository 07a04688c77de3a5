"""Whether one tensor follows from another, entry by entry: rounded to other dtypes, or times a number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.operations.tiles import row_bytes, row_ranges
from loratools.tensors import COMPUTABLE, DTYPES, TensorRef, torch_dtype

if TYPE_CHECKING:
    import torch

_SIXTEEN: Final = ("F16", "BF16")
_LEAST_ENTRIES: Final = 16
_LEAST_MAGNITUDES: Final = 8
_TIES: Final = 1e-15  # a product in the middle of two neighbours leaves an interval of one number
_UNITS: Final = 2
_FEW_BYTES: Final = 2**15


def cast_of(base: TensorRef, tuned: TensorRef, tile_bytes: int) -> dict[str, Any] | None:
    """How one of two tensors comes of rounding the other, if it does; both of dtypes that are computed with.

    Returns:
        `of`, which one was rounded (`a`: the base); `ways`, the dtypes in order, the last one the other's own, of every
        way that gives it, the shortest first; `energy`, what ‖b − a‖² is where rounding errors depend on nothing,
        Σ u²/12 of the steps u of the coarsest dtype of the first way.
    """
    for side, fine, coarse in (("a", base, tuned), ("b", tuned, base)):
        ways = [way for way in _chains(fine.dtype, coarse.dtype) if _gives(way, fine, coarse, tile_bytes)]
        if ways:
            return {"of": side, "ways": [list(way) for way in ways], "energy": _energy(fine, ways[0], tile_bytes)}
    return None


def _gives(way: tuple[str, ...], fine: TensorRef, coarse: TensorRef, tile_bytes: int) -> bool:
    rounding = _rounding(way)
    return all(bool((rounding(one) == other).all()) for one, other in _pairs(fine, coarse, tile_bytes))


def _chains(fine: str, coarse: str) -> Iterator[tuple[str, ...]]:
    """One rounding, where the dtypes differ; or two, by way of a dtype of sixteen bits."""
    if fine != coarse:
        yield (coarse,)
    for between in _SIXTEEN:
        if between not in {fine, coarse}:
            yield between, coarse


def _rounding(through: tuple[str, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    from loratools.linalg import round_to

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        for name in through:
            tensor = round_to(tensor, torch_dtype(name)).double()
        return tensor

    return rounded


def _energy(fine: TensorRef, through: tuple[str, ...], tile_bytes: int) -> float:
    from loratools.linalg import ulp

    coarsest = torch_dtype(min(through, key=lambda name: DTYPES[name].mantissa or 0))
    total = 0.0
    for rows in _ranges(fine, fine, tile_bytes):
        spacing = ulp(fine.rows(*rows).load().to(coarsest))
        total += float(spacing.nan_to_num(0.0).square().sum()) / 12
    return total


def _ranges(one: TensorRef, other: TensorRef, tile_bytes: int) -> Iterator[tuple[int, int]]:
    """A few rows first: mostly they say already that there is nothing to find."""
    longest = max(row_bytes(one), row_bytes(other))
    few = min(one.shape[0], max(1, _FEW_BYTES // max(longest, 1)))
    yield 0, few
    for first, last in row_ranges((one.shape[0] - few, *one.shape[1:]), longest, tile_bytes):
        yield first + few, last + few


def _pairs(one: TensorRef, other: TensorRef, tile_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for rows in _ranges(one, other, tile_bytes):
        yield one.rows(*rows).load().double(), other.rows(*rows).load().double()


@dataclasses.dataclass
class _Factors:
    """The numbers c for which round(c·a) is b in every entry seen, where b is of one dtype: an interval."""

    dtype: torch.dtype
    low: float = -math.inf
    high: float = math.inf

    def see(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Narrow the interval by some entries; whether anything is left of it."""
        import torch

        from loratools.linalg import rounding_edges

        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()) or bool(((a == 0) != (b == 0)).any()):
            return False
        kept = a != 0
        under, over = (edge[kept] / a[kept] for edge in rounding_edges(b, self.dtype))
        if under.numel():
            self.low = max(self.low, float(torch.minimum(under, over).max()))
            self.high = min(self.high, float(torch.maximum(under, over).min()))
        return self.low <= self.high + _TIES * abs(self.high)


def factor_of(base: TensorRef, tuned: TensorRef, tile_bytes: int) -> list[float] | None:
    """The interval of all c for which `tuned` is round(c · base) in every entry; None where there is none.

    A tensor of few entries, or of few magnitudes, is many others' multiple, and one that moved by single units in the
    last place may be one by accident: neither is asked about, so that c is two such units away from one.
    """
    import torch

    if base.spec.numel < _LEAST_ENTRIES or not {base.dtype, tuned.dtype} <= COMPUTABLE:
        return None
    found = _Factors(torch_dtype(tuned.dtype))
    for first, (a, b) in enumerate(_pairs(base, tuned, tile_bytes)):
        if not first and len(torch.unique(a.abs())) < _LEAST_MAGNITUDES:
            return None
        if not found.see(a, b):
            return None
    step = 2.0 ** -(DTYPES[tuned.dtype].mantissa or 0)
    low, high = min(found.low, found.high), max(found.low, found.high)
    far = low >= 1 + _UNITS * step or high <= 1 - _UNITS * step
    return [low, high] if math.isfinite(low) and far else None

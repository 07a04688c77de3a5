"""What one merged matrix can be explained by: counted over its tiles, for `engine.verdicts` to judge.

A matrix is gone through once where our own policy explains every entry, and again where another one does. Otherwise all
policies and faults are counted, and where none of them explains it, a multiple of ΔW.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.context import Context
from loratools.engine.operations.claims import Claim, Tile
from loratools.engine.operations.policies import Policy, interval, policies, unmoved
from loratools.engine.verdicts import HOLDS, MISSING, Findings, Hypothesis
from loratools.errors import NonFiniteError
from loratools.tensors import torch_dtype

if TYPE_CHECKING:
    import torch

_SCALED_STEPS: Final = 1.5
"""How many steps an entry may be off a multiple of ΔW: two roundings, and the multiple itself."""
_APART: Final = 6
"""Up to so many adapters, it is tried which one of them is missing."""
_Asked = tuple[Hypothesis, Policy, tuple[float, ...]]
"""A hypothesis, how it rounds, and what the parts are multiplied by: nothing, where they are as they are."""
_ANY: Final = (-math.inf, math.inf)
_NONE: Final = (math.inf, -math.inf)


@dataclasses.dataclass(slots=True)
class _Counts:
    """Sums over the tiles of a matrix; see `Findings`."""

    off: dict[Hypothesis, int]
    worst: dict[Hypothesis, float]
    moved: int = 0
    concerned: int = 0
    not_finite: int = 0
    rows: dict[Hypothesis, tuple[int, int]] = dataclasses.field(default_factory=dict)
    scales: tuple[float, float] = _ANY
    wide: tuple[float, float] = _ANY
    gram: Any = 0.0
    with_found: Any = 0.0
    with_expected: Any = 0.0
    found_squares: float = 0.0
    expected_squares: float = 0.0


def examined(claim: Claim, context: Context, *, ours: bool = False) -> Findings:
    """Look at a matrix as closely as it takes to judge it; a merge of `ours` can only have our policy.

    Raises:
        NonFiniteError: the base holds NaN or infinity.
    """
    asked = list(_hypotheses(claim, ours=ours))
    held = [each for each in asked if each[0].what == HOLDS]
    faults = [each for each in asked if each[0].what != HOLDS]
    for group in (held[:1], held[1:], faults):
        if (counts := _explaining(claim, context, group)) is not None:
            return _findings(claim, counts)
    counts = _counted(claim, context, asked, ours=ours)
    found = _findings(claim, counts)
    if found.settled or not counts.found_squares:
        return found
    _multiplied(claim, context, counts, found.along)
    return _findings(claim, counts)


def _tiles(claim: Claim, context: Context) -> Iterator[Tile]:
    import torch

    for rows in claim.ranges():
        context.check()
        tile = claim.tile(rows)
        if not bool(torch.isfinite(tile.weight).all()):
            raise NonFiniteError(
                "The base holds NaN or infinity here.",
                fix="The file is damaged.",
                tensor=claim.base.name,
                file=claim.base.source.label,
            )
        yield tile


def _explaining(claim: Claim, context: Context, asked: Sequence[_Asked]) -> _Counts | None:
    """Those of some hypotheses that explain every entry, or None; one that leaves an entry out is not asked again."""
    from loratools.linalg import rounded_from

    dtype, counts, left = torch_dtype(claim.merged.dtype), _Counts({}, {}), list(asked)
    for tile in _tiles(claim, context) if left else ():
        left = [each for each in left if bool(rounded_from(tile.found, *_reals(claim, tile, each), dtype).all())]
        if not left:
            return None
        counts.moved += int((tile.found != unmoved(claim, tile)).sum())
        _correlate(counts, tile, None)
    counts.off |= {key: 0 for key, *_ in left}
    return counts if left else None


def _reals(claim: Claim, tile: Tile, asked: _Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """What a hypothesis leaves for every entry before the last rounding; see `policies.interval`."""
    _, policy, factors = asked
    changed = tile.times(factors) if factors else tile
    if not changed.parts and factors:
        before = unmoved(claim, tile)
        return before, before
    return interval(policy, claim, changed)


def _counted(claim: Claim, context: Context, asked: Sequence[_Asked], *, ours: bool) -> _Counts:
    """Every policy, every fault, and which multiples of ΔW explain all entries."""
    import torch

    from loratools.linalg import to_grid

    counts = _Counts({key: 0 for key, *_ in asked}, {})
    dtype = torch_dtype(claim.merged.dtype)
    for tile in _tiles(claim, context):
        before = unmoved(claim, tile)
        total = tile.weight
        for part in tile.parts:
            total = total + part
        expected = to_grid(total, dtype)
        moved = tile.found != before
        counts.moved += int(moved.sum())
        counts.concerned += int((moved | (expected != before)).sum())
        counts.not_finite += int((~torch.isfinite(tile.found)).sum())
        _correlate(counts, tile, expected)
        delta, first = total - tile.weight, 0.51 * torch.finfo(dtype).eps
        counts.scales = _narrow(counts.scales, tile, delta, dtype, ours=ours, first=0.0)
        counts.wide = _NONE if ours else _narrow(counts.wide, tile, delta, dtype, ours=False, first=first)
        for each in asked:
            _count(counts, each[0], tile, _reals(claim, tile, each), dtype)
    return counts


def _multiplied(claim: Claim, context: Context, counts: _Counts, along: Sequence[float]) -> None:
    """The multiples of ΔW that were measured, to within what two roundings leave."""
    from loratools.linalg import grid_step

    key, dtype = Hypothesis("scale", "any"), torch_dtype(claim.merged.dtype)
    counts.off[key] = 0
    for tile in _tiles(claim, context):
        total = tile.weight
        for factor, part in zip(along, tile.parts, strict=True):
            total = total + factor * part
        slack = _SCALED_STEPS * grid_step(tile.found.abs().maximum(tile.weight.abs()), dtype)
        for factor, far in zip(along, tile.far, strict=True):
            slack = slack + abs(factor) * far
        _count(counts, key, tile, (total - slack, total + slack), dtype)


def _hypotheses(claim: Claim, *, ours: bool) -> Iterator[_Asked]:
    """What is held against a matrix."""
    parts = len(claim.sources)
    for policy in [Policy(ours=True)] if ours else policies(claim):
        yield Hypothesis(HOLDS, policy.name), policy, ()
    yield Hypothesis(MISSING, "none", scale=(0.0,)), Policy(), (0.0,) * parts
    after = torch_dtype(claim.merged.dtype)
    for policy in (Policy(), Policy(delta=(after,))):
        for repeated in (False, True):
            how = dataclasses.replace(policy, one_by_one=repeated)
            times = (1.0,) * 2 * parts if repeated else (2.0,) * parts
            yield Hypothesis("twice", how.name, scale=(2.0,)), how, times
        yield Hypothesis("subtracted", policy.name, scale=(-1.0,)), policy, (-1.0,) * parts
        if 1 < parts <= _APART:
            for index, source in enumerate(claim.sources):
                factors = tuple(float(other != index) for other in range(parts))
                for how in (policy, dataclasses.replace(policy, one_by_one=True)):
                    yield Hypothesis("partly", how.name, (source,), factors), how, factors


def _count(
    counts: _Counts, key: Hypothesis, tile: Tile, reals: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    """Count what an interval of reals does not explain."""
    from loratools.linalg import grid_step, rounded_from

    off = ~rounded_from(tile.found, *reals, dtype)
    number = int(off.sum())
    counts.off[key] += number
    if not number or key.what not in {HOLDS, "scale"}:
        return
    found, low, high = tile.found[off], reals[0][off], reals[1][off]
    apart = (low - found).maximum(found - high).nan_to_num(math.inf, math.inf)
    largest = found.nan_to_num(0.0, 0.0, 0.0).abs().maximum(tile.weight[off].abs())
    counts.worst[key] = max(counts.worst.get(key, 0.0), float((apart / grid_step(largest, dtype)).max()))
    rows = off.any(1).nonzero()
    first, _ = counts.rows.get(key, (tile.first + int(rows[0]), 0))
    counts.rows[key] = (first, tile.first + int(rows[-1]))


def _correlate(counts: _Counts, tile: Tile, expected: torch.Tensor | None) -> None:
    """Inner products of what was added, and of what would have been, with every part."""
    import torch

    if not tile.parts:
        return
    parts = torch.stack([part.reshape(-1) for part in tile.parts])
    counts.gram = counts.gram + parts @ parts.T
    if expected is None:
        return
    found = (tile.found - tile.weight).nan_to_num(0.0, 0.0, 0.0).reshape(-1)
    wanted = (expected - tile.weight).nan_to_num(0.0, 0.0, 0.0).reshape(-1)
    counts.with_found = counts.with_found + parts @ found
    counts.with_expected = counts.with_expected + parts @ wanted
    counts.found_squares += float(found @ found)
    counts.expected_squares += float(wanted @ wanted)


def _narrow(
    scales: tuple[float, float], tile: Tile, delta: torch.Tensor, dtype: torch.dtype, *, ours: bool, first: float
) -> tuple[float, float]:
    """Of some multiples of ΔW those that explain a tile too; `first` is how far, relatively, ΔW was rounded before."""
    import torch

    from loratools.linalg import rounding_edges

    if not scales[0] <= scales[1]:
        return scales
    under, over = rounding_edges(tile.found.nan_to_num(0.0), dtype)
    slack = tile.weight.abs() * (2.0**-51 if ours else 2.0**-24) + first * torch.finfo(dtype).smallest_normal
    for far in [tile.near] if ours else tile.far:
        slack = slack + far
    low, high = under - slack - tile.weight, over + slack - tile.weight
    backwards = delta < 0
    low, high = torch.where(backwards, -high, low), torch.where(backwards, -low, high)
    still = delta == 0
    if bool((still & ((low > 0) | (high < 0))).any()):
        return _NONE
    size = torch.where(still, 1.0, delta.abs())
    low, high = torch.where(still, -math.inf, low / size), torch.where(still, math.inf, high / size)
    low, high = low - first * low.abs(), high + first * high.abs()
    return max(scales[0], float(low.max())), min(scales[1], float(high.min()))


def _known(scales: tuple[float, float]) -> tuple[float, float] | None:
    """Bounds that say something: a multiple explains every entry, and not every multiple does."""
    low, high = scales
    return scales if low <= high and math.isfinite(low) and math.isfinite(high) else None


def _findings(claim: Claim, counts: _Counts) -> Findings:
    import torch

    along: tuple[float, ...] = ()
    alike, size = math.nan, 0.0
    if claim.sources and isinstance(counts.gram, torch.Tensor):
        size = float(counts.gram.sum())
        if isinstance(counts.with_found, torch.Tensor):
            along = _along(counts)
            cosine = _cosine(counts.with_found.sum(), counts.found_squares)
            expected = _cosine(counts.with_expected.sum(), counts.expected_squares)
            alike = cosine / expected if expected else math.nan
    return Findings(
        entries=claim.base.spec.numel,
        moved=counts.moved,
        concerned=counts.concerned,
        not_finite=counts.not_finite,
        size=max(size, 0.0),
        off=counts.off,
        worst=counts.worst,
        rows=counts.rows,
        along=along,
        alike=alike,
        scales=_known(counts.scales),
        wide=_known(counts.wide),
    )


def _cosine(inner: torch.Tensor, squares: float) -> float:
    return float(inner) / math.sqrt(squares) if squares > 0 else 0.0


def _along(counts: _Counts) -> tuple[float, ...]:
    """The multiple of every part that is nearest to what was added, over that of a merge without fault."""
    import torch

    inverse = torch.linalg.pinv(counts.gram, hermitian=True)
    found, expected = inverse @ counts.with_found, inverse @ counts.with_expected
    return tuple(float(one / other) if other else math.nan for one, other in zip(found, expected, strict=True))

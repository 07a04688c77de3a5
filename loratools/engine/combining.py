"""From a method of combination to units: what it needs of the modules, what it takes, what to say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Adapter
from loratools.adapters.algebra import combinable
from loratools.engine import reductions
from loratools.engine.methods import METHODS, Method
from loratools.engine.plan import Unit
from loratools.engine.reductions import Lowered, Reduction
from loratools.engine.svd_options import SvdOptions
from loratools.errors import MismatchError, UnsupportedError

_CORE: Final = 48
"""Working bytes per entry of the concatenated factors: in float64, balanced, their QR and what that works on."""
_SQUARE: Final = 96
"""And per entry of a core: itself, its singular vectors, and what their decomposition works on."""
_PART: Final = 48
"""And per entry of what KnOTS makes of one ΔW, R × in: itself, its sizes and their order."""
_PASSES: Final = 13
"""How often the rows are formed at most: two to find a size, eleven to decompose."""
_LISTED: Final = 5
_UNITS: Final = {"Tflop": 1e12, "Gflop": 1e9, "Mflop": 1e6}
_ALL: Final = Reduction(SvdOptions(rank=None, energy=1.0, error=None, max_rank=2**30, preset="default", seed=0))
"""Every rank that there is: what is made of cores is written as it is."""

RULES: Final[Mapping[str, str]] = {
    "sum": "the weights multiply ΔW; those of linear are divided first by the sum over all adapters, whether they have "
    "the module or not",
    "coefficients": "the coefficients of Σ c ΔW follow from inner products of the ΔW, per module",
    "core": "w ΔW of all adapters go into one pair of bases, and the method works on small matrices between them; "
    "alpha = r, √S on each side",
    "rows": "w ΔW of all adapters are formed by tiles of rows, whenever they are needed; the result is decomposed as "
    "it is read, alpha = r, √S on each side",
}


def require_held(path: str, method: Method | None, held: Sequence[tuple[float, AbstractUpdate]]) -> None:
    """Refuse a module that the method cannot combine.

    Args:
        path: the module.
        method: None: a sum.
        held: the updates of those adapters that have it, and their weights.

    Raises:
        UnsupportedError: parameters given whole, or biases, that the method does not cover; a kind without factors.
        MismatchError: shapes differ; slerp without two ΔW.
    """
    if method is None or method.way == "sum" or not any(update.changes_weight for _, update in held):
        return
    if method.name == "slerp" and len(held) < METHODS[method.name].least:
        raise MismatchError("slerp needs the module in both adapters.", fix="Exclude these modules.", module=path)
    updates = [update for _, update in combinable(path, held)]
    if method.way in {"core", "rows"} and any(update.offsets for update in updates):
        raise UnsupportedError(
            f"{method.name} is for matrices, and these modules add to a bias too.",
            fix="Exclude them, or take sum, linear, slerp, karcher or model-stock.",
            module=path,
        )


def require_common(method: Method | None, adapters: Sequence[Adapter], chosen: Sequence[str]) -> None:
    """Refuse adapters that change different modules throughout: there is nothing to combine.

    Raises:
        MismatchError: says so.
    """
    if method is None or method.way == "sum" or len(adapters) == 1:
        return
    if not any(sum(path in adapter for adapter in adapters) > 1 for path in chosen):
        raise MismatchError(
            f"The adapters have no module in common, so there is nothing for {method.name} to combine.",
            fix="Take --method sum, which keeps all modules as they are.",
        )


def weights_of(method: Method | None, weights: Sequence[float]) -> list[float]:
    """The weights that multiply ΔW: those given, for `linear` over their sum."""
    if method is None or method.name != "linear":
        return list(weights)
    return [weight / sum(weights) for weight in weights]


def planned(
    units: Sequence[Unit],
    rule: Reduction | None,
    sums: Mapping[str, AbstractUpdate],
    method: Method | None,
    weights: Sequence[float],
) -> Lowered:
    """See `reductions.planned`; with the method in the units of the modules that it combines, and what that takes.

    Args:
        units: of all modules.
        rule: for ranks, or None.
        sums: the chosen modules, as they are added up.
        method: or None.
        weights: of all adapters.
    """
    if method is None or method.way == "sum":
        return reductions.planned(units, rule, sums)
    own = _ALL if rule is None and method.way == "core" else rule
    lowered = reductions.planned(units, own, sums, full=method.way == "rows")
    every = [_with_method(unit, method, sums.get(unit.target), weights) for unit in lowered.units]
    return dataclasses.replace(lowered, units=tuple(every), notes=(*lowered.notes, *_notes(every, method, sums)))


def _with_method(unit: Unit, method: Method, update: AbstractUpdate | None, weights: Sequence[float]) -> Unit:
    if update is None or not update.products or update.shape is None:
        return unit
    places = [int(each.source.removeprefix("adapter")) for each in unit.inputs]
    told = {"name": method.name, **method.values, "places": places, "count": len(weights), "total": sum(weights)}
    begun = dataclasses.replace(unit, parameters={**unit.parameters, "method": told})
    return dataclasses.replace(begun, peak_bytes=_peak(begun, method, update, len(places)))


def _peak(unit: Unit, method: Method, update: AbstractUpdate, count: int) -> int:
    """Upper bound on what a module takes: the method's own, and what is done with its result."""
    assert update.shape is not None
    out, into = update.shape
    ranks = [term.rank for term in update.products]
    held = sum(ranks)
    if method.way == "rows":
        return _rows_peak(unit, (out, into), ranks)
    high, wide = min(out, held), min(into, held)
    core = _CORE * held * (out + into) + 8 * high * wide * (count + 2) + _SQUARE * max(high, wide) * min(high, wide)
    parts = _PART * count * min(out, held) * into if method.name == "knots" else 0
    return max(unit.peak_bytes, core + parts)


def _rows_peak(unit: Unit, shape: tuple[int, int], ranks: Sequence[int]) -> int:
    from loratools.linalg import WHOLE_SPECTRUM, combining_bytes, workspace_bytes

    svd: Mapping[str, Any] = unit.parameters["svd"]
    rank = min(svd.get("rank") or svd["max_rank"], *shape)
    preset = "exact" if any(name in svd for name in WHOLE_SPECTRUM) else svd["preset"]
    space: int = workspace_bytes(*shape, rank, preset=preset, streamed=True)
    read: int = combining_bytes(*shape, ranks)
    return int(read + space + 24 * rank * sum(shape))


def _notes(units: Sequence[Unit], method: Method, sums: Mapping[str, AbstractUpdate]) -> Iterator[str]:
    """What it costs, and which modules only some adapters have."""
    mine = [unit for unit in units if "method" in unit.parameters]
    work = sum(_work(sums[unit.target], method) for unit in mine)
    how = f", whose ΔW is formed up to {_PASSES} times," if method.way == "rows" else ""
    yield f"{method.name}: {METHODS[method.name].does}; {len(mine):,} modules{how} in at most {_flop(work)}."
    some = [unit.target for unit in mine if len(unit.inputs) < unit.parameters["method"]["count"]]
    if some:
        first, more = ", ".join(some[:_LISTED]), len(some) - _LISTED
        rest = f" and {more:,} more" if more > 0 else ""
        yield f"Not all adapters have {first}{rest}: where one does not, its ΔW counts as zero."


def _work(update: AbstractUpdate, method: Method) -> float:
    """Operations, at most: of rows 6 per entry and rank in every pass, of cores two QR and what stands between."""
    assert update.shape is not None
    out, into = update.shape
    held = sum(term.rank for term in update.products)
    if method.way == "rows":
        return 6.0 * _PASSES * out * into * held
    return 12.0 * (out + into) * held * held + 30.0 * min(held, max(out, into)) ** 3


def _flop(work: float) -> str:
    unit = next((unit for unit, size in _UNITS.items() if work >= size), "Mflop")
    return f"{work / _UNITS[unit]:,.1f} {unit}"

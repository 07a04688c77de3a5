"""From several adapters to the units of a comparison: which module is compared with which, and how it is measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from loratools.adapters import AbstractUpdate, Adapter, Selection
from loratools.adapters.experts import Stacked
from loratools.adapters.sides import AbstractSided
from loratools.engine import memory
from loratools.engine.binding import reconcile
from loratools.engine.expansion import elements_of
from loratools.engine.plan import Input, Unit

How = Literal["cores", "experts", "dense", "bytes", "whole", "reshaped"]
HOW: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cores": "both are products of factors, of ranks that add up to half of the shorter side where factors are "
        "computed (LoHa, LoKr): measured through these, and ΔW is never formed",
        "experts": "the same for every expert",
        "dense": "ΔW is formed, since it is no product of two factors",
        "whole": "parameters are given whole and compared by their bytes",
        "bytes": "ΔW depends on the base, or does not say how large it is: only told whether it is stored alike",
        "reshaped": "the two are for weights of other shapes",
    }
)
"""How a module is measured; a unit's `how`."""
_DENSE: Final = 60
"""Bytes per entry of forming ΔW: the weight that it does not depend on, float64 forms of both and of its pieces."""


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateComparison:
    """Adapters side by side.

    Attributes:
        units: one for every module, those of the first adapter first.
        notes: what was reconciled.
    """

    units: tuple[Unit, ...]
    notes: tuple[str, ...]


def update_comparison(
    adapters: Mapping[str, Adapter], selection: Selection, *, spectrum: bool, many: bool = False
) -> UpdateComparison:
    """Pair the modules of all adapters by the names of the first; `many`: for a matrix, not for two side by side.

    Raises:
        UsageError: a pattern matches no module of any.
        MismatchError: names that would fit under several prefixes.
    """
    (first, leader), *rest = adapters.items()
    named: dict[str, dict[str, str]] = {path: {first: path} for path in leader}
    notes = []
    for source, adapter in rest:
        renaming = reconcile(list(adapter), list(leader))
        if renaming:
            notes.append(f"Module names of {adapter.name} are read {renaming}: {leader.name} names them so.")
        for path in adapter:
            named.setdefault(renaming.apply(path), {})[source] = path
    chosen = selection.selected(list(named))
    return UpdateComparison(
        tuple(_unit(path, named[path], adapters, spectrum=spectrum, many=many) for path in chosen), tuple(notes)
    )


def _unit(path: str, held: Mapping[str, str], adapters: Mapping[str, Adapter], *, spectrum: bool, many: bool) -> Unit:
    updates = [adapters[source][name] for source, name in held.items()]
    how = _how(updates)
    tensors = sum(ref.nbytes for update in updates for ref in update.tensors)
    return Unit(
        "compare-updates",
        path,
        inputs=tuple(Input(source, name) for source, name in held.items()),
        parameters={"how": how, "spectrum": spectrum, "sources": list(held), "many": many},
        read_bytes=tensors,
        peak_bytes=_peak(how, updates) + 2 * memory.TILE_BYTES,
    )


def _how(updates: Sequence[AbstractUpdate]) -> How:
    stacks = [update for update in updates if isinstance(update, Stacked)]
    if len(stacks) == len(updates):
        alike = len({(stack.experts, stack.matrix) for stack in stacks}) == 1
        return (
            "experts"
            if alike and len({stack.layout for stack in stacks}) == 1
            else "reshaped"
            if not alike
            else "bytes"
        )
    changing = [update for update in updates if update.changes_weight]
    if not changing:
        return "whole"
    if any(update.takes_shape and not update.terms for update in changing) or stacks:
        return "bytes"
    known = [each for each in changing if not (isinstance(each, AbstractSided) and each.vague)]
    if len({(each.shape, each.target) for each in changing}) > 1 or len({(e.layer, e.kernel) for e in known}) > 1:
        return "reshaped"
    if len(changing) < len(updates) or any(update.depends_on_base for update in updates):
        return "bytes"
    return "cores" if all(update.terms for update in updates) or _few(updates) else "dense"


def _few(updates: Sequence[AbstractUpdate]) -> bool:
    """Whether products are so small, also those that are larger than what is stored, that cores take less than ΔW."""
    ranks = [sum(term.rank for term in update.products) for update in updates]
    return all(ranks) and 2 * sum(ranks) <= min(updates[0].shape or (0,))


def _peak(how: How, updates: Sequence[AbstractUpdate]) -> int:
    given = [ref for update in updates for ref in (*update.replaced.values(), *update.added_rows.values())]
    computed = 8 * max((ref.spec.numel for ref in given), default=0)
    if how == "dense":
        entries = math.prod(updates[0].shape or (0,))
        return computed + entries * (_DENSE + 4 * len(updates))
    if how not in {"cores", "experts"}:
        return computed + sum(ref.nbytes for update in updates for ref in update.factors)
    elements = sum(elements_of(update, products=how == "cores") for update in updates)
    rank = sum(sum(term.rank for term in update.products) or update.rank or 0 for update in updates)
    kept = sum(update.kept_bytes for update in updates if isinstance(update, Stacked))
    sizes = [update.matrix if isinstance(update, Stacked) else update.shape or (0, 0) for update in updates]
    core = min(rank, sizes[0][0]) * min(rank, sizes[0][1]) * 8
    experts = updates[0].experts if isinstance(updates[0], Stacked) else 1
    return computed + kept + memory.factor_bytes(elements) + (len(updates) * experts + 6) * core

"""Taking ΔW out of a merged checkpoint of which nothing else is known: what can be subtracted, and with which bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from loratools.adapters import Adapter
from loratools.engine.changes import Changes
from loratools.engine.plan import Unit
from loratools.errors import UnsupportedError


def with_bound(unit: Unit, *, foreign: bool) -> Unit:
    """The unit of a merge with negative weights, told to say how far its result can be from what was there."""
    if unit.operation != "merge":
        return unit
    return dataclasses.replace(unit, parameters={**unit.parameters, "bound": True, "foreign": foreign})


def refuse_replacements(changes: Changes, adapters: Mapping[str, Adapter], *, foreign: bool) -> None:
    """Refuse what cannot be subtracted.

    Args:
        changes: what the adapters do.
        adapters: by the ids of the plan.
        foreign: no report of ours says how they were merged.

    Raises:
        UnsupportedError: W' − W follows from W, or something replaced it.
    """
    computed = [(name, change) for name, change in changes.tensors.items() if change.actions]
    for name, change in computed:
        if any(adapters[term["source"]][term["module"]].depends_on_base for term in change.terms):
            raise UnsupportedError(
                "The change of this tensor depends on what was there before, which cannot be computed from it.",
                fix="Give --base.",
                tensor=name,
            )
    if computed and foreign:
        raise UnsupportedError(
            f"The change of {len(computed)} tensors is no sum of products, and no report of ours says how it was "
            "added: how far the result can be off is not known.",
            fix="Give --base.",
            first=computed[0][0],
        )
    replaced = [name for name, change in changes.tensors.items() if change.wholes or change.rows or change.patches]
    replaced += list(changes.added)
    if replaced or changes.untied:
        raise UnsupportedError(
            f"{len(replaced) or 1} tensors were replaced, lengthened, added or untied by the merge; what was there "
            "before cannot be computed.",
            fix="Give --base.",
            first=replaced[0] if replaced else "",
        )

"""What a matrix of many adapters needs beside the numbers: that all can be compared, and which of them are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from loratools.adapters import Adapter
from loratools.engine.plan import Unit
from loratools.errors import MismatchError, UnsupportedError

_COLLINEAR: Final = 5e-13
"""1 − |cosine| of two ΔW that are a millionth of their size apart."""
_EQUAL: Final = 1e-6
_NAMED: Final = 5


def require_comparable(units: Sequence[Unit], adapters: Mapping[str, Adapter]) -> None:
    """Refuse modules that would be missing from norms and cosines without being zero.

    Raises:
        MismatchError: adapters that are for weights of other shapes.
        UnsupportedError: an adapter whose ΔW depends on the base, or does not say how large it is; names it.
    """
    for unit in units:
        if unit.parameters["how"] == "reshaped":
            shapes = {each.source: adapters[each.source][each.name].shape for each in unit.inputs}
            listed = ", ".join(f"{adapters[source].name} {shape}" for source, shape in shapes.items())
            raise MismatchError(
                f"The adapters are for weights of other shapes: {listed}.",
                fix="Compare adapters of one base, or leave such modules out (--exclude).",
                module=unit.target,
            )
    opaque: dict[str, list[str]] = {}
    for unit in units:
        if unit.parameters["how"] == "bytes":
            for source in _opaque(unit, adapters) or [each.source for each in unit.inputs]:
                opaque.setdefault(source, []).append(unit.target)
    if opaque:
        source, modules = next(iter(opaque.items()))
        kinds = sorted({adapters[each.source][each.name].kind for unit in units if unit.target in modules
                        for each in unit.inputs if each.source == source})  # fmt: skip
        names = ", ".join(f"{adapters[each].name} ({len(paths)} modules)" for each, paths in opaque.items())
        first, more = ", ".join(modules[:_NAMED]), len(modules) - _NAMED
        raise UnsupportedError(
            f"ΔW of kind {', '.join(kinds)} depends on the base, or is not told by its tensors, so that {names} has no "
            "cosine with others.",
            fix="Leave the adapter out, or its modules (--exclude); two adapters alone are compared by their bytes.",
            modules=f"{first} and {more} more" if more > 0 else first,
        )


def _opaque(unit: Unit, adapters: Mapping[str, Adapter]) -> list[str]:
    """The adapters of a module whose ΔW is not told."""
    found = []
    for each in unit.inputs:
        update = adapters[each.source][each.name]
        if update.depends_on_base or (update.takes_shape and not update.terms):
            found.append(each.source)
    return found


def whole_notes(units: Sequence[Unit], adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """Which parameters are given whole, by whom: they are in no norm and no cosine."""
    held: dict[str, list[str]] = {}
    for unit in units:
        for each in unit.inputs:
            if adapters[each.source][each.name].gives_whole:
                held.setdefault(adapters[each.source].name, []).append(unit.target)
    for name, modules in held.items():
        some = modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
        yield f"What {name} gives whole ({some}) is in no norm and no cosine: its change depends on the base."


def alike_notes(
    names: Sequence[str], norms: Sequence[float], cosines: Sequence[Sequence[float | None]]
) -> Iterator[str]:
    """Adapters with the ΔW of an earlier one, or a multiple of it; those that are zero."""
    told: set[int] = set()
    for i, j in itertools.combinations(range(len(names)), 2):
        cosine = cosines[i][j]
        if i in told or j in told or cosine is None or 1 - abs(cosine) > _COLLINEAR:
            continue
        told.add(j)
        ratio = norms[j] / norms[i] * (1 if cosine > 0 else -1)
        same = abs(ratio - 1) <= _EQUAL
        what = "has the same ΔW as" if same else f"is {ratio:.6g} times"
        yield f"{names[j]} ({j + 1}) {what} {names[i]} ({i + 1})."
    for at, norm in enumerate(norms):
        if norm == 0:
            yield f"{names[at]} ({at + 1}) is zero, and has no cosine with any."

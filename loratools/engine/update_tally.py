"""From what units of a comparison of adapters found to the rows of a report."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.engine.compare_tally import kind_of_module, layer_of_module, natural
from loratools.engine.context import Outcome
from loratools.engine.plan import Unit
from loratools.engine.spectrum import ModuleSpectrum, Spectrum
from loratools.engine.update_units import HOW

KINDS: Final = {
    "identical": "the same kind of update, numbers and bytes",
    "equal": "the same ΔW: ‖ΔW_B − ΔW_A‖ is at most 1e-6 of the larger of the two",
    "changed": "another ΔW, or another parameter given whole",
    "reshaped": "an update of a weight of another shape",
    "added": "only the second adapter has it",
    "removed": "only the first adapter has it",
}
"""What may have become of a module's update."""
SAME: Final = frozenset({"identical", "equal"})
EQUAL: Final = 1e-6
_PAIR: Final = 2
_ROUNDING: Final = 1e-13  # of ‖ΔW‖: singular values of a difference that float64 sums make out of nothing


def pair_rows(units: Sequence[Unit], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for every module of two adapters."""
    return [_row(unit, outcome.facts) for unit, outcome in zip(units, outcomes, strict=True)]


def _row(unit: Unit, facts: Mapping[str, Any]) -> dict[str, Any]:
    sources, gram = unit.parameters["sources"], facts["gram"]
    kind = _kind(unit, facts)
    row: dict[str, Any] = {"name": unit.target, "kind": kind, "how": unit.parameters["how"]}
    norms: list[float | None] = [None, None]
    if gram is not None:
        sizes = [math.sqrt(max(gram[at][at], 0.0)) for at in range(len(sources))]
        norms = list(sizes) if len(sizes) == _PAIR else [sizes[0], 0.0] if sources == ["a"] else [0.0, sizes[0]]
    elif len(sources) < _PAIR:
        norms = [None, 0.0] if sources == ["a"] else [0.0, None]
    both = gram is not None and len(sources) == _PAIR
    one, two = norms
    apart = facts["apart"] if both else None if None in norms else math.hypot(*(each or 0.0 for each in norms))
    return {
        **row,
        "norms": norms,
        "apart": apart,
        "cosine": _cosine(gram[0][1], one, two) if both else None,
        "ratio": None if apart is None or not one else facts["ratio"] if both else 0.0,
        "beside": None if apart is None else facts["beside"] if both else two,
        **_spaces(facts.get("spaces")),
        "whole": facts.get("whole") or {},
        "offsets": {name: {"norms": each[:2], "apart": each[2]} for name, each in (facts.get("offsets") or {}).items()},
        "unmeasured": facts.get("unmeasured"),
    }


def _kind(unit: Unit, facts: Mapping[str, Any]) -> str:
    sources, gram = unit.parameters["sources"], facts["gram"]
    if len(sources) < _PAIR:
        return "removed" if sources == ["a"] else "added"
    if facts["identical"]:
        return "identical"
    if unit.parameters["how"] == "reshaped":
        return "reshaped"
    whole = all(kind == "identical" for kind in facts["whole"].values())
    near = all(apart <= EQUAL * max(one, two) for one, two, apart in facts.get("offsets", {}).values())
    if gram is None:
        return "equal" if unit.parameters["how"] == "whole" and whole and near else "changed"
    within = facts["apart"] <= EQUAL * math.sqrt(max(gram[0][0], gram[1][1], 0.0))
    return "equal" if whole and near and within else "changed"


def _cosine(inner: float, one: float | None, two: float | None) -> float | None:
    return max(-1.0, min(1.0, inner / (one * two))) if one and two else None


def _spaces(spaces: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Dimensions and angles in degrees; of experts the dimensions and overlaps over all of them."""
    if not spaces:
        return {"ranks": None, "angles": None, "overlap": None}
    angles = None
    if len(spaces) == 1:
        angles = {
            side: [float(f"{math.degrees(each):.7g}") for each in spaces[0][side]] for side in ("columns", "rows")
        }
    return {
        "ranks": [sum(each["ranks"][side] for each in spaces) for side in (0, 1)],
        "angles": angles,
        "overlap": _overlap(spaces),
    }


def _overlap(spaces: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Σcos² of the principal angles over their number: 1 where one space holds the other, 0 where nothing is shared."""
    found = {}
    for side in ("columns", "rows"):
        angles = [angle for space in spaces for angle in space[side]]
        found[side] = math.fsum(math.cos(angle) ** 2 for angle in angles) / len(angles) if angles else None
    return found


def pair_totals(rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Modules of every kind, and sizes, angle and subspaces over all that were measured."""
    numbers = Counter(row["kind"] for row in rows)
    spaces = [space for outcome in outcomes for space in outcome.facts.get("spaces") or ()]
    return {"modules": {kind: numbers[kind] for kind in KINDS}, **_together(rows), "overlap": _overlap(spaces)}


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several modules as one block-diagonal ΔW: what was not measured on both sides is left out."""
    told = [row for row in rows if row["apart"] is not None]
    one, two = (math.hypot(*(row["norms"][side] for row in told)) for side in (0, 1))
    apart = math.hypot(*(row["apart"] for row in told))
    inner = math.fsum(row["cosine"] * row["norms"][0] * row["norms"][1] for row in told if row["cosine"] is not None)
    ratio = inner / one**2 if one else None
    beside = math.sqrt(math.fsum(_beside(row, ratio) for row in told)) if ratio is not None else None
    return {"norms": [one, two], "apart": apart, "cosine": _cosine(inner, one, two), "ratio": ratio, "beside": beside}


def _beside(row: Mapping[str, Any], ratio: float) -> float:
    """‖B − c·A‖² of one module for any c: B's part beside A is orthogonal to A."""
    own = row["ratio"] if row["ratio"] is not None else ratio
    return float(row["beside"] ** 2 + ((own - ratio) * row["norms"][0]) ** 2)


def pair_groups(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """By what modules are called in every layer, and by layer."""
    kinds, layers = (list(_grouped(rows, key)) for key in (kind_of_module, layer_of_module))
    return kinds, sorted(layers, key=lambda row: natural(row["name"]))


def _grouped(rows: Sequence[Mapping[str, Any]], key: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row["name"]), []).append(row)
    for name, mine in groups.items():
        overlaps = [row["overlap"] for row in mine if row["overlap"] is not None]
        medians = {}
        for side in ("columns", "rows"):
            known = [each[side] for each in overlaps if each[side] is not None]
            medians[side] = statistics.median(known) if known else None
        different = sum(row["kind"] not in SAME for row in mine)
        yield {"name": name, "modules": len(mine), "different": different, **_together(mine), "overlap": medians}


def spectra(
    rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], shapes: Mapping[str, tuple[int, int]]
) -> list[ModuleSpectrum]:
    """The singular values of what differs, exact, of every module that was measured through its factors."""
    found = []
    for row, outcome in zip(rows, outcomes, strict=True):
        if row["kind"] in SAME or not outcome.facts.get("values"):
            continue
        least = _ROUNDING * max(row["norms"])
        kept = [tuple(value for value in each if value > least) for each in outcome.facts["values"]]
        parts = tuple(Spectrum(each, math.hypot(*each), 0.0) for each in kept)
        found.append(ModuleSpectrum(row["name"], shapes[row["name"]], parts))
    return found


def similarity_rows(units: Sequence[Unit], outcomes: Sequence[Outcome], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of every module the norms and cosines of all adapters; null where one does not have it, or was not measured."""
    rows = []
    for unit, outcome in zip(units, outcomes, strict=True):
        gram, held = outcome.facts["gram"], unit.parameters["sources"]
        places = [held.index(name) if name in held and gram is not None else None for name in names]
        own = [math.sqrt(max(gram[at][at], 0.0)) for at in range(len(held))] if gram is not None else []
        norms = [own[at] if at is not None else None for at in places]
        cosines = [
            [_between(gram, own, i, j) if i is not None and j is not None else None for j in places] for i in places
        ]
        how = unit.parameters["how"]
        unmeasured = outcome.facts.get("unmeasured")
        rows.append({"name": unit.target, "how": how, "norms": norms, "cosines": cosines, "unmeasured": unmeasured})
    return rows


def _between(gram: Sequence[Sequence[float]], norms: Sequence[float], i: int, j: int) -> float | None:
    """The cosine of two; that of one with itself is 1."""
    cosine = _cosine(gram[i][j], norms[i], norms[j])
    return 1.0 if cosine is not None and i == j else cosine


def similarity_totals(outcomes: Sequence[Outcome], units: Sequence[Unit], names: Sequence[str]) -> dict[str, Any]:
    """Norms and cosines over all modules that were measured; ΔW is zero where an adapter does not have a module."""
    total = [[0.0] * len(names) for _ in names]
    for unit, outcome in zip(units, outcomes, strict=True):
        gram, held = outcome.facts["gram"], unit.parameters["sources"]
        if gram is not None:
            for i, one in enumerate(held):
                for j, two in enumerate(held):
                    total[names.index(one)][names.index(two)] += gram[i][j]
    norms = [math.sqrt(max(total[at][at], 0.0)) for at in range(len(names))]
    cosines = [[_between(total, norms, i, j) for j in range(len(names))] for i in range(len(names))]
    return {"norms": norms, "cosines": cosines}


def unmeasured(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why modules were left out of what is measured, or had to be formed."""
    for how in ("bytes", "whole", "dense", "reshaped"):
        names = [row["name"] for row in rows if row["how"] == how and row.get("kind") != "identical"]
        if names:
            yield f"{_some(names)}: {HOW[how]}."
    for row in rows:
        if row["unmeasured"] is not None:
            yield f"{row['name']} is only compared by its bytes: {row['unmeasured']}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

"""What was done to make one adapter of the other, said where the evidence leaves nothing else; see `findings`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.engine.compare_tally import kind_of_module, layer_of_module, natural
from loratools.engine.findings import Finding, finding, listed, whole_groups

_SAME: Final = frozenset({"identical", "equal"})
_EXACT: Final = 1e-6
_BEST: Final = 1e-4
"""By how much of ‖ΔW_B‖² a truncation may miss the best one of its rank: what float32 and bfloat16 factors cost."""


def update_findings(
    rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any], optima: Sequence[float | None]
) -> tuple[Finding, ...]:
    """Everything that is certain enough to be said of two adapters.

    Args:
        rows: of every module.
        totals: over all of them.
        optima: of every module ‖ΔW_A − its best approximation of B's rank‖, where B has a smaller rank.
    """
    different = [row for row in rows if row["kind"] not in _SAME]
    if not different:
        equal = sum(row["kind"] == "equal" for row in rows)
        if not equal:
            return (finding("identical", "B holds the updates of A, byte for byte.", modules=len(rows)),)
        return (finding("refactored", f"B has the ΔW of A from other factors in {equal} modules.", modules=equal),)
    return (*_multiple(rows, different, totals), *_truncated(rows, different, optima), *_only(rows, different))


def _is_plain(row: Mapping[str, Any]) -> bool:
    """Whether ΔW is all that a module's update is, and was measured on both sides."""
    return row["ratio"] is not None and row["kind"] == "changed" and not row["whole"] and not row["offsets"]


def _multiple(
    rows: Sequence[Mapping[str, Any]], different: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]
) -> Iterator[Finding]:
    """The same adapter at another weight."""
    if len(different) != len(rows) or not all(_is_plain(row) for row in rows):
        return
    if totals["ratio"] and totals["beside"] <= _EXACT * totals["norms"][1]:
        text = f"B is A at {totals['ratio']:.6g} times its weight."
        yield finding("scaled", text, factor=totals["ratio"], beside=totals["beside"] / totals["norms"][1])


def _truncated(
    rows: Sequence[Mapping[str, Any]], different: Sequence[Mapping[str, Any]], optima: Sequence[float | None]
) -> Iterator[Finding]:
    """The best approximation of A of B's rank, in every module that differs."""
    best = {row["name"]: optimum for row, optimum in zip(rows, optima, strict=True)}
    for row in different:
        optimum = best[row["name"]]
        if not _is_plain(row) or optimum is None or not row["norms"][1]:
            return
        if row["apart"] ** 2 - optimum**2 > _BEST * row["norms"][1] ** 2:
            return
    ranks = sorted({row["ranks"][1] for row in different})
    left = math.hypot(*(row["apart"] for row in different)) / math.hypot(*(row["norms"][0] for row in different))
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    text = f"B is A truncated to {said} in {len(different)} modules, as well as that can be: residual {left:.3g}."
    yield finding("truncated", text, ranks=ranks, residual=left, modules=len(different))


def _only(rows: Sequence[Mapping[str, Any]], different: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Nothing but all modules of some names, or all of some layers, differ."""
    if any(row["kind"] != "changed" for row in different):
        return
    modules, changed = [row["name"] for row in rows], {row["name"] for row in different}
    for what, key in (("modules", kind_of_module), ("layers", layer_of_module)):
        names = whole_groups(modules, changed, key)
        if names is not None and "" not in names:
            shown = listed(sorted(names, key=natural))
            which = f"modules called {shown}" if what == "modules" else f"the layers {shown}"
            text = f"Only {which} differ, and all of them."
            yield finding(f"only {what}", text, names=sorted(names), modules=len(changed))

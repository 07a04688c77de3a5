"""What adapters differ in, as reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from loratools.adapters import Adapter
from loratools.adapters.experts import Stacked
from loratools.engine.context import Outcome
from loratools.engine.plan import Plan
from loratools.engine.reports import AbstractReport
from loratools.engine.similarity import alike_notes, whole_notes
from loratools.engine.spectrum import table
from loratools.engine.update_findings import update_findings
from loratools.engine.update_tally import (
    SAME,
    pair_groups,
    pair_rows,
    pair_totals,
    similarity_rows,
    similarity_totals,
    spectra,
    unmeasured,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterDiffReport(AbstractReport):
    """What the difference of two adapters is.

    Attributes:
        compared: `adapters`.
        findings: what was done to A, as far as it is certain: `name`, `text` and `evidence` of each.
        same: every module is identical or equal.
        inputs: role (`a`, `b`), kind, base name, format, modules and bytes of both.
        parameters: the options.
        totals: `modules` per kind of difference; over all that were measured, the `norms` of both, `apart`
            ‖ΔW_B − ΔW_A‖, `cosine`, the `ratio` c for which `beside`, ‖ΔW_B − c·ΔW_A‖, is least, and the `overlap` of
            column and row spaces.
        by_kind: the same for all modules of one name; of the overlaps the median.
        by_layer: the same for every layer.
        table: with a spectrum, what an adapter of the difference would weigh and lose at every rank.
        notes: what a user should know.
        modules: every module: see `docs/guide/diff.md`.
    """

    compared: Literal["adapters"]
    findings: tuple[Mapping[str, Any], ...]
    same: bool
    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    totals: Mapping[str, Any]
    by_kind: tuple[Mapping[str, Any], ...]
    by_layer: tuple[Mapping[str, Any], ...]
    table: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    modules: tuple[Mapping[str, Any], ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "diff"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarityReport(AbstractReport):
    """How alike more than two adapters are.

    Attributes:
        compared: `similarities`.
        inputs: role, kind, base name, format, modules and bytes of each.
        parameters: the options.
        norms: ‖ΔW‖ of each over all modules that were measured.
        cosines: ⟨ΔWᵢ, ΔWⱼ⟩/(‖ΔWᵢ‖·‖ΔWⱼ‖) of each pair; None where one of them is zero.
        notes: what a user should know.
        modules: every module with its own norms and cosines, None where an adapter does not have it.
    """

    compared: Literal["similarities"]
    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    notes: tuple[str, ...]
    modules: tuple[Mapping[str, Any], ...]

    @property
    def same(self) -> bool:
        """A matrix is an answer whatever it says."""
        return True

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "diff"


def adapters_report(
    plan: Plan, inputs: Sequence[Mapping[str, Any]], adapters: Mapping[str, Adapter], outcomes: Sequence[Outcome]
) -> AdapterDiffReport | SimilarityReport:
    """The report on two adapters, or on more, from what the plan's units found."""
    names = list(adapters)
    if len(names) > len(("a", "b")):
        rows = similarity_rows(plan.units, outcomes, names)
        found = similarity_totals(outcomes, plan.units, names)
        return SimilarityReport(
            compared="similarities",
            inputs=tuple(inputs),
            parameters=plan.options,
            norms=tuple(found["norms"]),
            cosines=tuple(tuple(row) for row in found["cosines"]),
            notes=(
                *plan.notes,
                *unmeasured([row for row in rows if row["how"] != "whole"]),
                *whole_notes(plan.units, adapters),
                *alike_notes([each.name for each in adapters.values()], found["norms"], found["cosines"]),
            ),
            modules=tuple(rows),
        )
    rows = pair_rows(plan.units, outcomes)
    kinds, layers = pair_groups(rows)
    sizes = pair_totals(rows, outcomes)
    found_spectra = spectra(rows, outcomes, _shapes(plan, adapters))
    return AdapterDiffReport(
        compared="adapters",
        findings=update_findings(rows, sizes, [outcome.facts.get("optimum") for outcome in outcomes]),
        same=all(row["kind"] in SAME for row in rows),
        inputs=tuple(inputs),
        parameters=plan.options,
        totals=sizes,
        by_kind=tuple(kinds),
        by_layer=tuple(layers),
        table=tuple(table(found_spectra, 0, plan.options["max_rank"])),
        notes=(*plan.notes, *unmeasured(rows)),
        modules=tuple(rows),
    )


def _shapes(plan: Plan, adapters: Mapping[str, Adapter]) -> dict[str, tuple[int, int]]:
    """Rows and columns of every module's matrix, where its update says them."""
    found = {}
    for unit in plan.units:
        update = adapters[unit.inputs[0].source][unit.inputs[0].name]
        shape = update.matrix if isinstance(update, Stacked) else update.shape
        if shape is not None:
            found[unit.target] = shape
    return found

"""What two checkpoints differ in, as a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from loratools.engine.compare_tally import SAME, kind_rows, layer_rows, module_rows, tensor_rows, totals
from loratools.engine.compare_units import Comparison
from loratools.engine.context import Outcome
from loratools.engine.findings import findings
from loratools.engine.plan import Plan
from loratools.engine.reports import AbstractReport
from loratools.engine.spectrum import ModuleSpectrum, Spectrum, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffReport(AbstractReport):
    """What the difference of two checkpoints is.

    Attributes:
        compared: `checkpoints`.
        findings: what was done to A, as far as it is certain: `name`, `text` and `evidence` of each.
        same: every tensor is identical or equal in value.
        inputs: role (`a`, `b`), kind, base name, tensors and bytes of both.
        parameters: the options.
        totals: tensors and bytes per kind of difference, all kinds named; ‖ΔW‖ over all tensors of one shape, and
            relative to ‖W‖ of those that changed; the largest |ΔW|, the share of entries that moved, and the share of
            ‖ΔW‖² that is the noise of rounding.
        by_kind: the same for all modules of one name (`q_proj`), with the median of their matrices' effective ranks.
        by_layer: the same for every layer; the name is empty for what stands outside of layers.
        table: with a spectrum, for ranks 1, 2, 4, …: `rank`, `bytes` of an adapter's tensors, `captured` and `residual`
            over all low-rank modules, `worst`, the module with the largest residual, and its `residual`.
        whole: with a spectrum, bytes of what an adapter stores as it is, part of every row; else None.
        modules: every module with a tensor that is not the same, with `kinds`, what is measured of its tensors that
            changed, and `spectrum`, or None: see `docs/guide/diff.md`.
        tensors: every tensor: `name`, `module`, `kind`, `dtype` and `shape` on either side, and what was measured.
        notes: what a user should know.
    """

    compared: Literal["checkpoints"]
    findings: tuple[Mapping[str, Any], ...]
    same: bool
    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    totals: Mapping[str, Any]
    by_kind: tuple[Mapping[str, Any], ...]
    by_layer: tuple[Mapping[str, Any], ...]
    table: tuple[Mapping[str, Any], ...]
    whole: int | None
    notes: tuple[str, ...]
    modules: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "diff"


def checkpoints_report(
    plan: Plan, inputs: Sequence[Mapping[str, Any]], found: Comparison, outcomes: Sequence[Outcome]
) -> DiffReport:
    """The report on two checkpoints, from what the plan's units found."""
    compared = {
        names: {**facts, "module": outcome.target}
        for outcome in outcomes
        for names, facts in outcome.facts["tensors"].items()
    }
    tensors = tensor_rows(found, compared)
    spectra = [
        ModuleSpectrum(outcome.target, tuple(spectrum["shape"]), tuple(Spectrum.of(each) for each in spectrum["parts"]))
        for outcome in outcomes
        if (spectrum := outcome.facts["spectrum"]) is not None
    ]
    asked, cap = plan.options["spectrum"], plan.options["max_rank"]
    whole = sum(outcome.facts["whole"] for outcome in outcomes) if asked else None
    modules = tuple(module_rows(tensors, {each.name: each for each in spectra}, cap))
    return DiffReport(
        compared="checkpoints",
        findings=findings(tensors, spectra, cap),
        same=all(row["kind"] in SAME for row in tensors),
        inputs=tuple(inputs),
        parameters=plan.options,
        totals=totals(tensors),
        by_kind=tuple(kind_rows(tensors, modules)),
        by_layer=tuple(layer_rows(tensors, modules)),
        table=tuple(table(spectra, whole or 0, cap)),
        whole=whole,
        notes=(*plan.notes, *_unmeasured(tensors), *(_left_out(found, tensors) if asked else ())),
        modules=modules,
        tensors=tuple(tensors),
    )


def _unmeasured(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Which tensors are not all numbers."""
    for row in tensors:
        if row["non_finite"] is not None:
            one, two = row["non_finite"]
            entries = math.prod(row["shape"][0])
            what = f"{one} of {entries} entries of the first and {two} of the second are NaN or infinite"
            why = what if one or two else "the squares of its entries overflow"
            yield f"{row['name']} was compared by its bytes and not measured: {why}."


def _left_out(found: Comparison, tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What keeps `extract` from writing what the table says, or makes it write more than one would think."""
    refused = {
        address.name
        for unit in found.units
        for rule in unit.parameters.get("rules", {}).values()
        if rule["rule"].startswith("refused:")
        for address in (unit.inputs[rule["tuned"]],)
    }
    new = [pair.tuned_name for _, pair in found.pairs if pair.relation == "new-parameter"]
    damaged = {row["name"] for row in tensors if row["non_finite"] is not None}
    odd = [*new, *(each["name"] for each in tensors if each["name"] in refused | damaged and each["kind"] not in SAME)]
    if odd:
        yield f"The table leaves out what extract refuses: {_some(odd)}."
    recast = [row["name"] for row in tensors if row["kind"] == "recast"]
    if recast:
        yield f"The table counts what rounding to another dtype did as a change, as extract does: {_some(recast)}."


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

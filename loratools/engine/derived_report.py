"""The report that the verbs share which make adapters of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from loratools.adapters import Adapter
from loratools.engine import reductions
from loratools.engine.context import Outcome
from loratools.engine.execute import Execution
from loratools.engine.operations.deriving import LEFT_OUT
from loratools.engine.plan import Plan
from loratools.engine.reductions import Reduction
from loratools.engine.repeats import repeated
from loratools.engine.reports import AbstractWrittenReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class DerivedReport(AbstractWrittenReport):
    """What came out.

    Attributes:
        modules: `name, rank, alpha, scaling` of every module; where its rank was lowered, `captured, residual,
            certificate, certificate_kind` and the size of ΔW too.
        left_out: modules of the inputs that are not in the output, with the reason.
        totals: counts and bytes; captured and residual over all modules whose rank was lowered.
    """

    modules: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, str]
    totals: Mapping[str, Any]


Report = TypeVar("Report", bound=DerivedReport)


def report_of(
    report: type[Report],
    plan: Plan,
    adapters: Sequence[Adapter],
    rule: Reduction | None,
    provenance: Mapping[str, Any],
    execution: Execution,
) -> Report:
    """What was made of the adapters."""
    outcomes = reductions.allotted(execution.of("derive"), execution)
    left = dict(_left(outcomes))
    rows = tuple(
        {"name": each.target, "kind": each.what, **reductions.row(each)} for each in outcomes if each.target not in left
    )
    kept = {outcome.target for outcome in outcomes}
    left |= {path: "excluded by the patterns" for adapter in adapters for path in adapter if path not in kept}
    inputs = execution.inputs(plan)
    totals = {
        "modules": len(rows),
        "rank": sum(row["rank"] for row in rows),
        "bytes": sum(file["bytes"] for file in execution.files if file["name"].endswith(".safetensors")),
        **reductions.totals(outcomes, execution),
    }
    return report(
        inputs=inputs,
        parameters=plan.options,
        files=execution.files,
        base=provenance,
        notes=(*plan.notes, *reductions.notes(rows, totals, rule), *repeated(inputs)),
        modules=rows,
        left_out=MappingProxyType(left),
        totals=totals,
    )


def _left(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    """Modules without a rank, and why."""
    for each in outcomes:
        if each.what == LEFT_OUT or ("residual" in each.facts and not each.facts["rank"]):
            yield each.target, reductions.why_left(each)

"""Adapters made of adapters: the plan and the report that stack and rescale share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

from loratools.adapters import Adapter, LowRank, Selection
from loratools.adapters.adapter import hub_name, merged_config, merged_provenance
from loratools.adapters.algebra import as_products, of_one_kind, summed
from loratools.engine import expansion, planning
from loratools.engine.changes import source_id
from loratools.engine.execute import Execution, execute
from loratools.engine.operations.deriving import LEFT_OUT, require_alpha
from loratools.engine.plan import Input, Plan, Unit
from loratools.engine.planning import Run
from loratools.engine.repeats import repeated
from loratools.engine.reports import AbstractWrittenReport
from loratools.engine.sinks import Assembly
from loratools.engine.strength import NORM_RULE, Strength
from loratools.errors import UnsupportedError
from loratools.files.locate import Source, require_directory_name
from loratools.formats import codec_named

RULES: Final = {
    "keep": "one adapter times a weight keeps its factors' bytes, alpha is multiplied; several are concatenated, "
    "with alpha = r and the scaling in lora_B where scalings differ",
    "products": "sums of other kinds become plain LoRA where they are products, LoHa and LoKr through Khatri–Rao and "
    "Kronecker products of their factors; those of one tensor stay what they are",
    "bake": "the scaling goes into lora_B and alpha = r",
    "restate": "alpha becomes the given number and lora_B takes the quotient",
    "dtype": "a factor keeps its dtype where the multiplication is exact in it (a power of two), else float32",
}
_NAMED: Final = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DerivedReport(AbstractWrittenReport):
    """What came out.

    Attributes:
        modules: `name, rank, alpha, scaling` of every module.
        left_out: modules of the inputs that are not in the output, with the reason.
        totals: counts and bytes.
    """

    modules: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, str]
    totals: Mapping[str, Any]


Report = TypeVar("Report", bound=DerivedReport)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        verb: `stack` or `rescale`.
        adapters: the inputs.
        output: where to.
        weights: one per input.
        alpha: `keep`, `bake`, or the number to restate it as.
        patterns: (include, exclude).
        format: the dialect, or None.
        options: what the report repeats.
        strengths: what is done to single modules of the one input instead of its weight.
        notes: what deciding that had to say.
    """

    verb: str
    adapters: Sequence[Adapter]
    output: Source
    weights: Sequence[float]
    alpha: str | float
    patterns: tuple[Sequence[str], Sequence[str]]
    format: str | None
    options: Mapping[str, Any]
    strengths: Mapping[str, Strength] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def weight(self, index: int, path: str) -> float:
        """The weight of a module of one input."""
        return self.strengths[path].weight if path in self.strengths else self.weights[index]

    def asked(self, index: int, path: str) -> float:
        """The weight to ask with whether the module has such a multiple."""
        return self.strengths[path].least if path in self.strengths else self.weights[index]


def plan_of(request: Request, run: Run) -> Plan:
    """Decide, from headers, what every module of the output is made of.

    Raises:
        UsageError: the output is no directory; a pattern matches nothing.
    """
    codec_named(_format(request))
    path = Path(request.output)
    require_directory_name(path)
    sources = {source_id(index): adapter for index, adapter in enumerate(request.adapters)}
    paths = list(dict.fromkeys(path for adapter in request.adapters for path in adapter))
    selection = Selection(tuple(request.patterns[0]), tuple(request.patterns[1]))
    chosen = set(selection.selected(paths))
    products = _products(request, chosen)
    _refuse(request, [path for path in paths if path in chosen], products=products)
    units = [
        unit
        for path in paths
        if path in chosen or request.verb == "rescale"
        for unit in [_unit(path, request, changed=path in chosen, products=products)]
    ]
    written = sum(unit.write_bytes for unit in units)
    work = planning.hash_units(dict(sources)) + units
    planning.check_output(path, run, sources.values(), 2 * written)
    return Plan(
        verb=request.verb,
        kind="adapter",
        output=str(path),
        overwrite=run.overwrite,
        sources=planning.infos(dict(sources)),
        units=tuple(work),
        bounds=planning.bounds(work, sources.values(), run, write=written, scratch=written),
        options={
            **request.options,
            "weights": list(request.weights),
            "include": list(selection.include),
            "exclude": list(selection.exclude),
            "format": _format(request),
        },
        rules={**RULES, **({"norm": NORM_RULE} if request.options.get("norm") is not None else {})},
        notes=(
            *(note for adapter in request.adapters for note in adapter.notes),
            *_notes(request, products=products),
            *request.notes,
        ),
    )


def _format(request: Request) -> str:
    formats = {adapter.format for adapter in request.adapters}
    return request.format or (formats.pop() if len(formats) == 1 else "peft")


def _notes(request: Request, *, products: bool) -> Iterator[str]:
    formats = {adapter.format for adapter in request.adapters}
    if request.format is None and len(formats) > 1:
        yield f"The inputs are {', '.join(sorted(formats))}; the output is peft."
    if len({adapter.base_model for adapter in request.adapters if adapter.base_model}) > 1:
        yield "The adapters name different bases; the output names the first one's."
    for adapter in request.adapters:
        if adapter.base_model and not hub_name(adapter.base_model):
            yield f"{adapter.name} names its base by a path, which means nothing elsewhere: it is left out."
    if products:
        paths = dict.fromkeys(path for adapter in request.adapters for path in adapter)
        held = [[adapter[path] for adapter in request.adapters if path in adapter] for path in paths]
        yield from expansion.notes(held)


def _refuse(request: Request, paths: Sequence[str], *, products: bool) -> None:
    """Refuse what cannot be done, with all modules that the same reason holds for.

    Raises:
        UnsupportedError: a sum, a multiple or another alpha that a kind of update does not have.
    """
    refused: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        held = [
            (request.asked(index, path), adapter[path])
            for index, adapter in enumerate(request.adapters)
            if path in adapter
        ]
        try:
            if path in request.strengths:
                request.strengths[path].require(path, held[0][1])
            update = as_products(summed(path, held)) if products else summed(path, held)
            if request.alpha != "keep":
                require_alpha(path, update, None if request.alpha == "bake" else float(request.alpha))
        except UnsupportedError as error:
            refused.setdefault((error.what, error.fix), []).append(path)
    for (what, fix), modules in refused.items():
        first, more = ", ".join(modules[:_NAMED]), len(modules) - _NAMED
        where = {"modules": f"{first} and {more} more"} if more > 0 else {"modules": first}
        raise UnsupportedError(what, fix=fix, **({"module": first} if len(modules) == 1 else where))


def _products(request: Request, chosen: Collection[str]) -> bool:
    """Whether the output is plain LoRA whatever the inputs: where modules of other kinds are added or meet others."""
    if len(request.adapters) == 1:
        return False
    held = [[adapter[path] for adapter in request.adapters if path in adapter] for path in chosen]
    changing = [updates for each in held if (updates := [update for update in each if update.changes_weight])]
    if {type(update) for updates in changing for update in updates} <= {LowRank}:
        return False
    added = [updates for updates in changing if len(updates) > 1]
    alike = len({type(update) for updates in changing for update in updates}) == 1
    return not alike or any(of_one_kind("", [(1.0, update) for update in updates]) is None for updates in added)


def _unit(path: str, request: Request, *, changed: bool, products: bool) -> Unit:
    held = [(index, adapter[path]) for index, adapter in enumerate(request.adapters) if path in adapter]
    strength = request.strengths.get(path, Strength()) if changed else Strength()
    size = sum(ref.nbytes for _, update in held for ref in update.tensors)
    elements = sum(expansion.elements_of(update, products=products) for _, update in held)
    return Unit(
        "derive",
        path,
        inputs=tuple(Input(source_id(index), path) for index, _ in held),
        parameters={
            "weights": [request.weight(index, path) if changed else 1.0 for index, _ in held],
            "alpha": request.alpha if changed else "keep",
            "products": products,
            **strength.parameters(),
        },
        read_bytes=size,
        write_bytes=4 * elements + size,
        peak_bytes=max([24 * elements, *(strength.peak_bytes(update) for _, update in held)]),
    )


def run_of(request: Request, run: Run, report: type[Report]) -> Report:
    """Plan and execute."""
    plan = plan_of(request, run)
    sources = {source_id(index): adapter for index, adapter in enumerate(request.adapters)}
    template = _template(request)
    return execute(
        plan,
        sources,
        describe=lambda execution: _report(report, plan, request, template, execution),
        run=run,
        computes=False,
        assembly=Assembly(template),
    )


def _template(request: Request) -> Adapter:
    first = request.adapters[0]
    return dataclasses.replace(
        first,
        updates={},
        format=_format(request),
        base_model=next((name for each in request.adapters if (name := hub_name(each.base_model))), None),
        config=merged_config(request.adapters),
        provenance=merged_provenance(list(request.adapters)),
    )


def _report(report: type[Report], plan: Plan, request: Request, template: Adapter, execution: Execution) -> Report:
    outcomes = execution.of("derive")
    kept = {outcome.target for outcome in outcomes}
    left = {each.target: "its rank is 0" for each in outcomes if each.what == LEFT_OUT}
    outcomes = [outcome for outcome in outcomes if outcome.target not in left]
    left |= {path: "excluded by the patterns" for adapter in request.adapters for path in adapter if path not in kept}
    inputs = execution.inputs(plan)
    return report(
        inputs=inputs,
        parameters=plan.options,
        files=execution.files,
        base=template.provenance,
        notes=(*plan.notes, *repeated(inputs)),
        modules=tuple({"name": outcome.target, "kind": outcome.what, **outcome.facts} for outcome in outcomes),
        left_out=MappingProxyType(left),
        totals={
            "modules": len(outcomes),
            "rank": sum(outcome.facts["rank"] for outcome in outcomes),
            "bytes": sum(file["bytes"] for file in execution.files if file["name"].endswith(".safetensors")),
        },
    )

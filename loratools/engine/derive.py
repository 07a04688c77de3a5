"""Adapters made of adapters: the plan that stack, rescale and resize share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Adapter, LowRank, Selection
from loratools.adapters.adapter import hub_name, merged_config, merged_provenance
from loratools.adapters.algebra import as_products, of_one_kind, summed
from loratools.checkpoints import Checkpoint
from loratools.engine import combining, expansion, planning, reductions
from loratools.engine.changes import source_id
from loratools.engine.derived_report import Report, report_of
from loratools.engine.execute import execute
from loratools.engine.methods import Method
from loratools.engine.operations.deriving import require_alpha
from loratools.engine.plan import Input, Plan, Unit
from loratools.engine.planning import Run
from loratools.engine.reductions import Reduction
from loratools.engine.sinks import Assembly
from loratools.engine.strength import NORM_RULE, Strength
from loratools.errors import InputDataError, MismatchError, UnsupportedError
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


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        verb: `stack`, `resize` or `rescale`.
        adapters: the inputs.
        output: where to.
        weights: one per input.
        alpha: `keep`, `bake`, or the number to restate it as.
        patterns: (include, exclude).
        format: the dialect, or None.
        options: what the report repeats.
        strengths: what is done to single modules of the one input instead of its weight.
        notes: what deciding that had to say.
        rule: what is done to the ranks of the modules that the patterns choose; None: nothing.
        method: how the inputs are combined; None: summed.
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
    rule: Reduction | None = None
    method: Method | None = None

    @property
    def keeps(self) -> bool:
        """Whether modules that the patterns leave out are in the output as they are."""
        return self.verb != "stack"

    def weight(self, index: int, path: str) -> float:
        """The weight of a module of one input."""
        return self.strengths[path].weight if path in self.strengths else self._multiplier(index, path)

    def asked(self, index: int, path: str) -> float:
        """The weight to ask with whether the module has such a multiple."""
        return self.strengths[path].least if path in self.strengths else self._multiplier(index, path)

    def _multiplier(self, index: int, path: str) -> float:
        """Of a module: what is given whole has no share in a method."""
        changing = any(adapter[path].changes_weight for adapter in self.adapters if path in adapter)
        return (combining.weights_of(self.method, self.weights) if changing else self.weights)[index]


def plan_of(request: Request, run: Run) -> Plan:
    """Decide, from headers, what every module of the output is made of.

    Raises:
        UsageError: the output is no directory; a pattern matches nothing.
    """
    codec_named(_format(request))
    path = Path(request.output)
    require_directory_name(path)
    sources = _sources(request)
    paths = list(dict.fromkeys(path for adapter in request.adapters for path in adapter))
    selection = Selection(tuple(request.patterns[0]), tuple(request.patterns[1]))
    chosen = set(selection.selected(paths))
    products = request.rule is not None or _products(request, chosen)
    sums = _sums(request, [path for path in paths if path in chosen], products=products)
    units = [
        unit
        for path in paths
        if path in chosen or request.keeps
        for unit in [_unit(path, request, changed=path in chosen, products=products)]
    ]
    lowered = combining.planned(units, request.rule, sums, request.method, request.weights)
    work = planning.hash_units(sources) + list(lowered.units)
    planning.check_output(path, run, sources.values(), lowered.written + lowered.scratch)
    return Plan(
        verb=request.verb,
        kind="adapter",
        output=str(path),
        overwrite=run.overwrite,
        sources=planning.infos(sources),
        units=tuple(work),
        closing=lowered.closing,
        bounds=planning.bounds(work, sources.values(), run, write=lowered.written, scratch=lowered.scratch),
        options={
            **request.options,
            **reductions.told(request.rule),
            "weights": list(request.weights),
            "include": list(selection.include),
            "exclude": list(selection.exclude),
            "format": _format(request),
        },
        rules=_rules(request),
        notes=(*_notes(request, products=products), *lowered.notes, *request.notes),
    )


def _sources(request: Request) -> dict[str, Checkpoint | Adapter]:
    """The inputs by the ids that units use."""
    given = reductions.sources(request.rule)
    return {**{source_id(index): adapter for index, adapter in enumerate(request.adapters)}, **given}


def _rules(request: Request) -> dict[str, str]:
    norm = {"norm": NORM_RULE} if request.options.get("norm") is not None else {}
    method = {"method": combining.RULES[request.method.way]} if request.method is not None else {}
    return {**RULES, **norm, **method, **(reductions.DECIDED if request.rule is not None else {})}


def _format(request: Request) -> str:
    formats = {adapter.format for adapter in request.adapters}
    return request.format or (formats.pop() if len(formats) == 1 else "peft")


def _notes(request: Request, *, products: bool) -> Iterator[str]:
    yield from (note for adapter in request.adapters for note in adapter.notes)
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


def _sums(request: Request, paths: Sequence[str], *, products: bool) -> dict[str, AbstractUpdate]:
    """`Σ w ΔW` of every module, unread; refuse what cannot be done, with all modules that the same reason holds for.

    Raises:
        UnsupportedError: a sum, a multiple, another alpha or a method that a kind of update does not have.
        MismatchError: shapes differ, or a method finds nothing in common.
    """
    combining.require_common(request.method, request.adapters, paths)
    refused: dict[tuple[type[InputDataError], str, str], list[str]] = {}
    sums = {}
    for path in paths:
        held = [
            (request.asked(index, path), adapter[path])
            for index, adapter in enumerate(request.adapters)
            if path in adapter
        ]
        try:
            sums[path] = _sum(request, path, held, products=products)
        except (UnsupportedError, MismatchError) as error:
            refused.setdefault((type(error), error.what, error.fix), []).append(path)
    for (kind, what, fix), modules in refused.items():
        first, more = ", ".join(modules[:_NAMED]), len(modules) - _NAMED
        where = {"modules": f"{first} and {more} more"} if more > 0 else {"modules": first}
        raise kind(what, fix=fix, **({"module": first} if len(modules) == 1 else where))
    return sums


def _sum(
    request: Request, path: str, held: Sequence[tuple[float, AbstractUpdate]], *, products: bool
) -> AbstractUpdate:
    """See `_sums`; of one module."""
    if path in request.strengths:
        request.strengths[path].require(path, held[0][1])
    update = as_products(summed(path, held)) if products else summed(path, held)
    combining.require_held(path, request.method, held)
    if request.rule is not None:
        reductions.require_products(path, update)
    if request.alpha != "keep":
        require_alpha(path, update, None if request.alpha == "bake" else float(request.alpha))
    return update


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
    sources = _sources(request)
    template = _template(request)
    return execute(
        plan,
        sources,
        describe=lambda execution: report_of(
            report, plan, request.adapters, request.rule, template.provenance, execution
        ),
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

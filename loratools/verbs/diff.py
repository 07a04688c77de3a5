"""diff: two checkpoints: which tensors differ, by how much, and what an adapter of that would cost at every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter, Selection
from loratools.checkpoints import Checkpoint
from loratools.engine import memory, planning
from loratools.engine.compare_tally import (
    KINDS,
    SAME,
    kind_rows,
    layer_rows,
    module_rows,
    tensor_rows,
    totals,
)
from loratools.engine.compare_units import Comparison, comparison
from loratools.engine.context import Outcome
from loratools.engine.execute import observe
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions
from loratools.engine.reports import AbstractReport
from loratools.engine.spectrum import ModuleSpectrum, Spectrum, table
from loratools.engine.svd_options import SvdOptions
from loratools.errors import UnsupportedError, UsageError
from loratools.files import open_checkpoint
from loratools.files.locate import Source, kind_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ROLES: Final = ("a", "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffReport(AbstractReport):
    """What the difference of two checkpoints is.

    Attributes:
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    plan: Plan
    sides: Mapping[str, Checkpoint]
    found: Comparison
    run: Run


def plan_diff(
    a: Source | Checkpoint,
    b: Source | Checkpoint,
    *others: Source | Checkpoint,
    spectrum: bool = False,
    max_rank: int = 128,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **run: Unpack[RunOptions],
) -> Plan:
    """What `diff` would read and compute with the same arguments, and the memory that it would take.

    Raises:
        LoratoolsError: as `diff`, for everything that headers tell.
    """
    return _prepare((a, b, *others), spectrum, max_rank, Selection(tuple(include), tuple(exclude)), Run(**run)).plan


def diff(
    a: Source | Checkpoint,
    b: Source | Checkpoint,
    *others: Source | Checkpoint,
    spectrum: bool = False,
    max_rank: int = 128,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **run: Unpack[RunOptions],
) -> DiffReport:
    """Compare two checkpoints tensor by tensor; nothing is written.

    Args:
        a: the first checkpoint, such as the base.
        b: the second, such as the fine-tuned one; a prefix that differs from the first one's is reconciled and said.
        others: none; more than two are not compared.
        spectrum: decompose ΔW = b − a of every matrix that `extract` makes low-rank, once, at `max_rank`, and read
            every smaller rank off that.
        max_rank: singular values per matrix that the spectrum looks at.
        include: patterns of modules to look at; default all.
        exclude: patterns of modules not to look at.
        run: `max_memory`, `threads`, `device`, `listener`.

    Raises:
        UnsupportedError: an adapter, or more than two inputs.
        MismatchError: the two are not checkpoints of one architecture.
        MemoryLimitError: it would take more than `max_memory`.
        UsageError: a pattern matches no module, a rank below 1, a device that is not there.

    Law: every tensor of both sides has one kind. A row of the table is what `extract` with that `rank` writes: its
    bytes without the file's header, its residual to within what a certificate promises.
    """
    selection = Selection(tuple(include), tuple(exclude))
    prepared = _prepare((a, b, *others), spectrum, max_rank, selection, Run(**run))
    memory.require(prepared.plan, prepared.run.max_memory)
    sources: dict[str, Checkpoint | Adapter] = {"base": prepared.sides["a"], "tuned": prepared.sides["b"]}
    return _report(prepared, observe(prepared.plan, sources, prepared.run))


def _prepare(
    inputs: Sequence[Source | Checkpoint], spectrum: bool, max_rank: int, selection: Selection, run: Run
) -> _Prepared:
    _require_two_checkpoints(inputs)
    if max_rank < 1:
        raise UsageError("A rank is at least 1.", max_rank=max_rank)
    before, after = (open_checkpoint(each) for each in inputs)
    svd = SvdOptions(rank=max_rank, energy=None, error=None, max_rank=max_rank, preset="default", seed=0)
    found = comparison(before, after, selection, svd if spectrum else None, run.max_memory)
    sources: dict[str, Checkpoint | Adapter] = {"base": before, "tuned": after}
    plan = Plan(
        verb="diff",
        kind="report",
        output="",
        overwrite=False,
        sources=planning.infos(sources),
        units=found.units,
        bounds=planning.bounds(found.units, sources.values(), run, write=0),
        options={
            "spectrum": spectrum,
            "max_rank": max_rank,
            "include": list(selection.include),
            "exclude": list(selection.exclude),
        },
        rules=KINDS,
        notes=(*before.notes, *after.notes, *found.pairing.notes),
    )
    return _Prepared(plan, dict(zip(_ROLES, (before, after), strict=True)), found, run)


def _require_two_checkpoints(sources: Sequence[Source | Checkpoint | Adapter]) -> None:
    for source in sources:
        if isinstance(source, Adapter) or (not isinstance(source, Checkpoint) and kind_of(source) == "adapter"):
            raise UnsupportedError(
                "diff compares checkpoints, and this is an adapter.",
                fix="Merge it into its base, and compare that; `loratools inspect` says what the adapter is.",
                source=source.name if isinstance(source, Adapter) else source,
            )
    if len(sources) != len(_ROLES):
        raise UnsupportedError(
            "diff compares two checkpoints at a time.", fix="Compare each with the first.", inputs=len(sources)
        )


def _report(prepared: _Prepared, outcomes: Sequence[Outcome]) -> DiffReport:
    plan, found = prepared.plan, prepared.found
    compared = {
        names: {**facts, "module": outcome.target}
        for outcome in outcomes
        for names, facts in outcome.facts["tensors"].items()
    }
    tensors = tensor_rows(found, compared)
    spectra = [
        ModuleSpectrum(outcome.target, spectrum["sides"], tuple(Spectrum.of(each) for each in spectrum["parts"]))
        for outcome in outcomes
        if (spectrum := outcome.facts["spectrum"]) is not None
    ]
    asked, cap = plan.options["spectrum"], plan.options["max_rank"]
    whole = sum(outcome.facts["whole"] for outcome in outcomes) if asked else None
    modules = tuple(module_rows(tensors, {each.name: each for each in spectra}, cap))
    return DiffReport(
        same=all(row["kind"] in SAME for row in tensors),
        inputs=tuple(_input(role, side) for role, side in prepared.sides.items()),
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


def _input(role: str, side: Checkpoint) -> dict[str, Any]:
    nbytes = sum(ref.nbytes for ref in side.values())
    return {"role": role, "kind": "checkpoint", "name": side.name, "tensors": len(side), "bytes": nbytes}


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

"""unmerge: merged checkpoint → the base again, or the merge without some of its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import layout, planning
from loratools.engine.changes import Changes, collect, source_id
from loratools.engine.execute import Execution, execute
from loratools.engine.history import Recorded, written_hashes
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import Plan, SourceInfo, Unit
from loratools.engine.planning import Run, RunOptions
from loratools.engine.reports import AbstractWrittenReport
from loratools.engine.restore_units import RestorePlanner
from loratools.engine.vocabulary import lengthened
from loratools.errors import UndecidedError, UnsupportedError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack

RULES: Final = {
    "restore": "the base's bytes, after checking that the merged tensor is what base and adapters make",
    "subtract": "Ŵ = round(W' − Σ w ΔW); within the reported bound of what was there, not bit for bit",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmergeReport(AbstractWrittenReport):
    """What an unmerge did.

    Attributes:
        method: `base` (bit for bit) or `subtraction` (within `totals.bound` per entry).
        modules: each restored or subtracted tensor, with its bound where it was subtracted.
        totals: counts, and the largest bound.
    """

    method: str
    modules: tuple[Mapping[str, Any], ...]
    totals: Mapping[str, Any]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "unmerge"


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    plan: Plan
    sources: dict[str, Checkpoint | Adapter]
    run: Run


def plan_unmerge(
    merged: Source | Checkpoint,
    output: Source,
    *,
    adapters: Sequence[Source | Adapter] = (),
    weights: Sequence[float] | float | None = None,
    base: Source | Checkpoint | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `unmerge` with the same arguments; reads headers and configurations, hashes adapters."""
    return _prepare(merged, output, adapters, weights, base, Run(**run)).plan


def unmerge(
    merged: Source | Checkpoint,
    output: Source,
    *,
    adapters: Sequence[Source | Adapter] = (),
    weights: Sequence[float] | float | None = None,
    base: Source | Checkpoint | None = None,
    **run: Unpack[RunOptions],
) -> UnmergeReport:
    """Take adapters out of a merged checkpoint.

    Args:
        merged: the checkpoint.
        output: a directory, or a `.safetensors` file for a checkpoint of one file.
        adapters: those to take out; none takes out all, which the merge's own report and `base` allow.
        weights: as they were merged; default what the merge's report says, else 1 each.
        base: what they were merged into: then the result is exact, bit for bit. Without it, ΔW is subtracted.
        run: see `loratools.engine.planning.Run`.

    Raises:
        MismatchError: the merged checkpoint is not this base plus these adapters.
        UndecidedError: neither adapters nor base tell what to take out.
        UnsupportedError: parameters that were replaced whole cannot be subtracted.

    Law: with `base`, every tensor has the base's sha256; without, every entry is within the reported bound.
    """
    prepared = _prepare(merged, output, adapters, weights, base, Run(**run))
    return execute(
        prepared.plan,
        prepared.sources,
        describe=lambda execution: _report(prepared, execution),
        run=prepared.run,
        computes=any(unit.operation == "merge" for unit in prepared.plan.units),
    )


def _prepare(
    merged: Source | Checkpoint,
    output: Source,
    adapters: Sequence[Source | Adapter],
    weights: Sequence[float] | float | None,
    base: Source | Checkpoint | None,
    run: Run,
) -> _Prepared:
    checkpoint = open_checkpoint(merged)
    loaded = [load_adapter(adapter, base=checkpoint) for adapter in planning.as_list(adapters)]
    recorded = Recorded.of(checkpoint)
    if base is None:
        if not loaded:
            names = ", ".join(part.name for part in recorded.adapters)
            raise UndecidedError(
                "Neither adapters nor a base are given: nothing says what to take out, or what was there before.",
                fix=f"Name --base for an exact result, or adapters to subtract{f' ({names})' if names else ''}.",
                merged=checkpoint.name,
            )
        factors = recorded.weights_for(loaded, weights)
        return _subtract(checkpoint, output, loaded, factors, run, foreign=not recorded.known)
    original = open_checkpoint(base)
    return _restore(checkpoint, original, output, loaded, recorded, weights, run)


def _subtract(
    merged: Checkpoint, output: Source, loaded: list[Adapter], factors: Sequence[float], run: Run, *, foreign: bool
) -> _Prepared:
    changes = collect(merged, loaded, [-factor for factor in factors], merged=True)
    sources: dict[str, Checkpoint | Adapter] = {"base": merged}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    _refuse_replacements(changes, {key: each for key, each in sources.items() if isinstance(each, Adapter)}, foreign)
    planner = MergePlanner(merged, changes, sources, None)
    path = Path(output)
    single = path.suffix == ".safetensors"
    files = planner.files(None, single=single, name=path.name)
    work = [_with_bound(unit, foreign=foreign) for unit in planner.units(files)]
    notes = (
        *changes.notes,
        "ΔW was subtracted: every entry is within the bound of what was there, not bit for bit; --base gives the bits.",
    )
    return _prepared(path, run, sources, planner, files, work, "subtraction", factors, notes)


def _with_bound(unit: Unit, *, foreign: bool) -> Unit:
    if unit.operation != "merge":
        return unit
    return dataclasses.replace(unit, parameters={**unit.parameters, "bound": True, "foreign": foreign})


def _refuse_replacements(changes: Changes, adapters: Mapping[str, Adapter], foreign: bool) -> None:
    """Refuse what cannot be subtracted: W' − W that follows from W, or that replaced it."""
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


def _restore(  # noqa: PLR0917
    merged: Checkpoint,
    base: Checkpoint,
    output: Source,
    loaded: list[Adapter],
    recorded: Recorded,
    weights: Sequence[float] | float | None,
    run: Run,
) -> _Prepared:
    loaded = [lengthened(adapter, base) for adapter in loaded]
    factors = recorded.weights_for(loaded, weights)
    recorded.require_base(base)
    recorded.require_all(loaded)
    changes = collect(base, loaded, factors)
    sources: dict[str, Checkpoint | Adapter] = {"merged": merged, "base": base}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    planner = RestorePlanner.of(merged, base, changes if loaded else None, recorded)
    path = Path(output)
    files = planner.files(single=path.suffix == ".safetensors", name=path.name)
    return _prepared(path, run, sources, planner, files, planner.units(files), "base", factors, planner.notes)


def _prepared(  # noqa: PLR0917
    path: Path,
    run: Run,
    sources: dict[str, Checkpoint | Adapter],
    planner: MergePlanner | RestorePlanner,
    files: Sequence[tuple[str, list[layout.Planned]]],
    work: list[Unit],
    method: str,
    factors: Sequence[float],
    notes: Sequence[str],
) -> _Prepared:
    base = planner.base
    headers = layout.output_files(files, base)
    written = sum(spec.nbytes for file in headers for spec in file.tensors)
    single = path.suffix == ".safetensors"
    beside = 0 if single else sum(map(planning.size_of, base.companions))
    planning.check_output(path, run, sources.values(), written + beside)
    merged = sources.get("merged")
    expected = written_hashes(merged) if isinstance(merged, Checkpoint) else {}
    units = planning.hash_units(sources, {"merged": expected}) + work
    plan = Plan(
        verb="unmerge",
        kind="checkpoint",
        output=str(path),
        overwrite=run.overwrite,
        sources=tuple(_info(key, each, method) for key, each in sources.items()),
        units=tuple(units),
        bounds=planning.bounds(units, sources.values(), run, write=written + beside),
        files=headers,
        copies=() if single else planner.copies(edited=False),
        texts={} if single else planner.texts(headers, {}),
        options={"method": method, "weights": list(factors)},
        rules=RULES,
        notes=tuple(notes),
    )
    return _Prepared(plan, sources, run)


def _info(key: str, source: Checkpoint | Adapter, method: str) -> SourceInfo:
    """A source as the plan describes it; what ΔW is subtracted from is the merged checkpoint: units call it base."""
    role = "merged" if key == "base" and method == "subtraction" else key.rstrip("0123456789")
    return planning.info(key, role, source)


def _report(prepared: _Prepared, execution: Execution) -> UnmergeReport:
    plan = prepared.plan
    modules = [
        {"name": outcome.target, "what": outcome.what, **outcome.facts}
        for outcome in execution.outcomes
        if outcome.operation in {"merge", "restore"}
    ]
    exact = plan.options["method"] == "base"
    replaced = [address.name for unit in plan.units if unit.operation == "copy" for address in unit.inputs if exact]
    modules += [{"name": name, "what": "restored"} for name in replaced]
    bounds = [module["bound"] for module in modules if "bound" in module]
    if not plan.files:
        raise UsageError("Nothing came out.")
    return UnmergeReport(
        inputs=execution.inputs(plan),
        parameters=plan.options,
        files=execution.files,
        base={},
        notes=plan.notes,
        method=str(plan.options["method"]),
        modules=tuple(modules),
        totals={
            "tensors": sum(len(file.tensors) for file in plan.files),
            "changed": len(modules),
            "checked": sum(outcome.operation == "restore" for outcome in execution.outcomes),
            "unchanged": sum(outcome.facts["count"] for outcome in execution.of("same")),
            "bound": max(bounds) if bounds else 0.0 if exact else None,
        },
    )

"""unmerge: merged checkpoint → the base again, or the merge without some of its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import layout, planning
from loratools.engine.changes import collect, source_id
from loratools.engine.execute import Execution, execute
from loratools.engine.history import Recorded, written_hashes
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import Plan, SourceInfo, Unit
from loratools.engine.planning import Run, RunOptions
from loratools.engine.receipts.opened import Receipt
from loratools.engine.receipts.taking_out import TakingOut
from loratools.engine.reports import AbstractWrittenReport
from loratools.engine.restore_units import RestorePlanner
from loratools.engine.subtracting import refuse_replacements, with_bound
from loratools.engine.vocabulary import lengthened
from loratools.errors import UndecidedError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack

RULES: Final = {
    "receipt": "W from W', the adapters and the receipt's corrections, held against the base's SHA-256",
    "restore": "the base's bytes, after checking that the merged tensor is what base and adapters make",
    "subtract": "Ŵ = round(W' − Σ w ΔW); within the reported bound of what was there, not bit for bit",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmergeReport(AbstractWrittenReport):
    """What an unmerge did.

    Attributes:
        method: `base` or `receipt` (bit for bit), or `subtraction` (within `totals.bound` per entry).
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
    taking_out: TakingOut | None = None


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
        adapters: those to take out; none takes out all, which a receipt, or the merge's own report and `base` allow.
        weights: as they were merged; default what the receipt or the merge's report says, else 1 each.
        base: what they were merged into: then the result is exact, bit for bit. Without it the checkpoint's receipt
            gives the base back, and what is not taken out is merged into that again. Without both, ΔW is subtracted.
        run: see `loratools.engine.planning.Run`.

    Raises:
        MismatchError: the merged checkpoint is not this base plus these adapters, or not the one of its receipt.
        MalformedError: the receipt is damaged.
        UndecidedError: neither adapters nor base tell what to take out.
        UnsupportedError: parameters that were replaced whole cannot be subtracted.

    Law: with `base` or a receipt, every tensor has the base's sha256; without, every entry is within the bound.
    """
    prepared = _prepare(merged, output, adapters, weights, base, Run(**run))
    return execute(
        prepared.plan,
        prepared.sources,
        describe=lambda execution: _report(prepared, execution),
        run=prepared.run,
        computes=any(unit.operation in {"merge", "revert"} for unit in prepared.plan.units),
        receipt=prepared.taking_out.draft if prepared.taking_out is not None else None,
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
    receipt = Receipt.beside(checkpoint) if base is None else None
    if receipt is not None:
        return _take_out(receipt, checkpoint, output, loaded, weights, run)
    recorded = Recorded.of(checkpoint)
    if base is None:
        if not loaded:
            names = ", ".join(part.name for part in recorded.adapters)
            raise UndecidedError(
                "There is no receipt, and neither adapters nor a base are given: nothing says what was there before.",
                fix=f"Name --base for an exact result, or adapters to subtract{f' ({names})' if names else ''}.",
                merged=checkpoint.name,
            )
        factors = recorded.weights_for(loaded, weights)
        return _subtract(checkpoint, output, loaded, factors, run, foreign=not recorded.known)
    original = open_checkpoint(base)
    return _restore(checkpoint, original, output, loaded, recorded, weights, run)


def _take_out(
    receipt: Receipt,
    merged: Checkpoint,
    output: Source,
    loaded: list[Adapter],
    weights: Sequence[float] | float | None,
    run: Run,
) -> _Prepared:
    taking_out = TakingOut.of(receipt, merged, loaded, weights)
    base = taking_out.restoration.base
    rest, factors = taking_out.rest, taking_out.weights
    changes = collect(base, rest, factors, known=True)
    sources: dict[str, Checkpoint | Adapter] = {"base": base}
    sources["merged"] = dataclasses.replace(merged, files=(*merged.files, receipt.file.path))
    sources |= {source_id(index): adapter for index, adapter in enumerate(rest)}
    planner = MergePlanner(base, changes, sources, None, receipt=taking_out.draft is not None)
    path = Path(output)
    planning.check_output(path, run, loaded, 0)  # the named ones are read, though no unit does it
    files = planner.files(None, single=path.suffix == ".safetensors", name=path.name)
    work = taking_out.reverting(planner.units(files))
    notes = (*changes.notes, *taking_out.notes)
    prepared = _prepared(path, run, sources, planner, files, work, "receipt", factors, notes, taking_out)
    texts = {} if path.suffix == ".safetensors" else taking_out.texts(planner, prepared.plan.files)
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, texts=texts), taking_out=taking_out)


def _subtract(
    merged: Checkpoint, output: Source, loaded: list[Adapter], factors: Sequence[float], run: Run, *, foreign: bool
) -> _Prepared:
    changes = collect(merged, loaded, [-factor for factor in factors], merged=True)
    sources: dict[str, Checkpoint | Adapter] = {"base": merged}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    named = {key: each for key, each in sources.items() if isinstance(each, Adapter)}
    refuse_replacements(changes, named, foreign=foreign)
    planner = MergePlanner(merged, changes, sources, None)
    path = Path(output)
    single = path.suffix == ".safetensors"
    files = planner.files(None, single=single, name=path.name)
    work = [with_bound(unit, foreign=foreign) for unit in planner.units(files)]
    notes = (
        *changes.notes,
        "ΔW was subtracted: every entry is within the bound of what was there, not bit for bit; --base gives the bits.",
    )
    return _prepared(path, run, sources, planner, files, work, "subtraction", factors, notes)


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
    taking_out: TakingOut | None = None,
) -> _Prepared:
    base = planner.base
    headers = layout.output_files(files, base)
    written = sum(spec.nbytes for file in headers for spec in file.tensors)
    single = path.suffix == ".safetensors"
    beside = 0 if single else sum(map(planning.size_of, base.companions))
    receipt = taking_out.draft.estimate(work) if taking_out is not None and taking_out.draft is not None else 0
    planning.check_output(path, run, sources.values(), written + beside + receipt)
    merged = sources.get("merged")
    expected = written_hashes(merged) if isinstance(merged, Checkpoint) and taking_out is None else {}
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
    plan, method = prepared.plan, str(prepared.plan.options["method"])
    modules = [
        {"name": outcome.target, "what": outcome.what, **outcome.facts}
        for outcome in execution.outcomes
        if outcome.operation in {"merge", "restore", "revert"}
    ]
    copied = [address.name for unit in plan.units if unit.operation == "copy" for address in unit.inputs]
    replaced = copied if method == "base" else []
    out = prepared.taking_out
    if out is not None:
        out.restoration.require_proven()
        replaced = [name for name in copied if out.restoration.keeps(name)]
    modules += [{"name": name, "what": "restored"} for name in replaced]
    bounds = [module["bound"] for module in modules if "bound" in module]
    if not plan.files:
        raise UsageError("Nothing came out.")
    return UnmergeReport(
        inputs=execution.inputs(plan) if out is None else out.inputs(execution.inputs(plan)),
        parameters=plan.options,
        files=execution.files,
        base={},
        notes=plan.notes,
        method=method,
        modules=tuple(modules),
        totals={
            "tensors": sum(len(file.tensors) for file in plan.files),
            "changed": len(modules),
            "checked": sum(outcome.operation == "restore" for outcome in execution.outcomes),
            "unchanged": len(copied) - len(replaced) + sum(each.facts["count"] for each in execution.of("same")),
            "bound": max(bounds) if bounds else None if method == "subtraction" else 0.0,
        },
    )

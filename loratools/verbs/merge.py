"""merge: base + adapters → checkpoint. Without an adapter: recast or reshard."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint, layout, planning
from loratools.engine.changes import collect, source_id
from loratools.engine.execute import Execution, execute
from loratools.engine.identity import identity
from loratools.engine.merge_plans import plan_of
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import Plan, Unit
from loratools.engine.planning import Run, RunOptions
from loratools.engine.receipts.afterwards import plan_afterwards
from loratools.engine.receipts.choice import drafted
from loratools.engine.receipts.draft import Draft
from loratools.engine.repeats import repeated
from loratools.engine.reports import AbstractWrittenReport
from loratools.engine.resuming import Resumption
from loratools.engine.vocabulary import lengthened
from loratools.errors import UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source, kind_of
from loratools.tensors import COMPUTABLE

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport(AbstractWrittenReport):
    """What a merge did.

    Attributes:
        modules: each changed tensor with the adapters that changed it and how many entries became others.
        tensors: how many were copied, merged (replacements among them), recast, added; of a receipt alone recorded,
            unchanged.
        totals: bytes and counts.
    """

    modules: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, int]
    totals: Mapping[str, Any]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "merge"


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    plan: Plan
    sources: dict[str, Checkpoint | Adapter]
    base: Checkpoint
    run: Run
    draft: Draft | None
    resumption: Resumption | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """The request, as it was made."""

    weights: Sequence[float] | float | None
    dtype: str | None
    max_shard_size: int | None
    receipt: str | None
    receipt_for: Source | Checkpoint | None
    resume: str | os.PathLike[str] | None


def plan_merge(
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    output: Source,
    *,
    weights: Sequence[float] | float | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    receipt: str | None = None,
    receipt_for: Source | Checkpoint | None = None,
    resume: str | os.PathLike[str] | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `merge` with the same arguments; reads headers and configurations only."""
    asked = _Asked(weights, dtype, max_shard_size, receipt, receipt_for, resume)
    return _prepare(base, adapters, output, asked, Run(**run)).plan


def merge(
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    output: Source,
    *,
    weights: Sequence[float] | float | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    receipt: str | None = None,
    receipt_for: Source | Checkpoint | None = None,
    resume: str | os.PathLike[str] | None = None,
    **run: Unpack[RunOptions],
) -> MergeReport:
    """Write `round(W + Σ w_i ΔW_i)` for every weight that the adapters change; copy the rest byte for byte.

    Args:
        base: the checkpoint.
        adapters: any number; none recasts or reshards.
        output: a directory, or a `.safetensors` file for a checkpoint of one file.
        weights: none is 1 each, one is for all, or one each; they multiply ΔW and may be negative.
        dtype: `bf16`, `fp16`, `fp32` for all floating-point tensors; default each tensor's own.
        max_shard_size: bytes per file; default the base's own files.
        receipt: `full`, from which alone `unmerge` gives the base back; `lean`, for which it needs the adapters, too;
            `none`. Default `full` where it can be, which the notes say otherwise.
        receipt_for: a checkpoint that something else merged from these: only a receipt is written, to a file `output`
            whose name ends in `.receipt`.
        resume: a work directory, made if it does not exist: what is done is kept in it if the run ends early, and a run
            with the same arguments goes on from there. Its own files are removed once the output is there.
        run: see `loratools.engine.planning.Run`.

    Raises:
        MismatchError: an adapter does not belong to this base.
        NonFiniteError: an input holds NaN or infinity, or the result overflows.
        LoratoolsError: see `loratools.errors`; in every case nothing is left behind but the work directory.

    Law: untouched tensors are byte-identical; the result does not depend on threads, tiles or device, nor on whether
    and where earlier runs in the same work directory ended.
    """
    asked = _Asked(weights, dtype, max_shard_size, receipt, receipt_for, resume)
    prepared = _prepare(base, adapters, output, asked, Run(**run))
    return execute(
        prepared.plan,
        prepared.sources,
        describe=lambda execution: _report(prepared, execution),
        run=prepared.run,
        computes=any(unit.operation in {"merge", "record"} for unit in prepared.plan.units),
        receipt=prepared.draft,
        resumption=prepared.resumption,
    )


def _require_order(base: Source | Checkpoint, adapters: Sequence[Source | Adapter]) -> None:
    """Refuse an adapter where the base belongs if the base stands where adapters do."""
    named = [adapter for adapter in adapters if not isinstance(adapter, Adapter)]
    if isinstance(base, Checkpoint) or not _is_kind(base, "adapter"):
        return
    swapped = next((each for each in named if _is_kind(each, "checkpoint")), None)
    if swapped is not None:
        order = f"`loratools merge {Path(swapped).name} {Path(base).name}`"
        raise UsageError("The base comes first, then the adapters.", fix=f"Turn them round: {order}.", adapter=base)


def _is_kind(source: Source, kind: str) -> bool:
    """Whether a directory holds this; what cannot be looked at is for the reader to refuse."""
    try:
        return Path(source).is_dir() and kind_of(source) == kind
    except OSError:
        return False


def _load(base: Source | Checkpoint, adapters: Sequence[Source | Adapter]) -> tuple[Checkpoint, list[Adapter]]:
    _require_order(base, adapters)
    checkpoint = open_checkpoint(base)
    return checkpoint, [lengthened(load_adapter(each, base=checkpoint), checkpoint) for each in adapters]


def _prepare(
    base: Source | Checkpoint, adapters: Sequence[Source | Adapter], output: Source, asked: _Asked, run: Run
) -> _Prepared:
    checkpoint, loaded = _load(base, planning.as_list(adapters))
    wanted = planning.dtype_named(asked.dtype)
    factors = planning.weights_for(len(loaded), asked.weights)
    if asked.receipt_for is not None:
        return _prepare_receipt(checkpoint, loaded, factors, output, asked, run)
    if not loaded and wanted is None and asked.max_shard_size is None:
        raise UsageError("Without an adapter, merge recasts or reshards.", fix="Give --dtype or --max-shard-size.")
    draft, no_receipt = drafted(asked.receipt, checkpoint, loaded, factors, wanted)
    changes = collect(checkpoint, loaded, factors)
    sources: dict[str, Checkpoint | Adapter] = {"base": checkpoint}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    planner = MergePlanner(checkpoint, changes, sources, wanted, draft is not None)
    options = {"weights": factors, "dtype": wanted, "max_shard_size": asked.max_shard_size}
    options["receipt"] = draft.kind if draft is not None else "none"
    notes = (*checkpoint.notes, *changes.notes, *layout.recast_notes(checkpoint, wanted), *no_receipt)
    plan = plan_of(planner, Path(output), draft, options, notes, run, resume=asked.resume)
    return _Prepared(plan, sources, checkpoint, run, draft, _resumption(plan, loaded, asked.resume, run))


def _prepare_receipt(
    base: Checkpoint, loaded: Sequence[Adapter], factors: Sequence[float], output: Source, asked: _Asked, run: Run
) -> _Prepared:
    assert asked.receipt_for is not None
    merged = open_checkpoint(asked.receipt_for)
    idle = {"--dtype": asked.dtype, "--max-shard-size": asked.max_shard_size, "--resume": asked.resume}
    idle["--receipt none"] = asked.receipt == "none" or None
    named = [name for name, value in idle.items() if value is not None]
    if named:
        raise UsageError(f"--receipt-for writes a receipt alone; {named[0]} says nothing there.", fix="Leave it out.")
    draft, _ = drafted(asked.receipt or "full", base, loaded, factors, None)
    assert draft is not None
    draft = dataclasses.replace(draft, merged=tuple(merged))
    options = {"weights": list(factors), "receipt": draft.kind}
    plan, sources = plan_afterwards(merged, draft, Path(output), options, run)
    return _Prepared(plan, sources, base, run, draft)


def _resumption(
    plan: Plan, adapters: Sequence[Adapter], resume: str | os.PathLike[str] | None, run: Run
) -> Resumption | None:
    """The work directory, where one is named; refused if it holds other work."""
    if resume is None:
        return None
    exact = all(update.everywhere for adapter in adapters for update in adapter.values())
    resumption = Resumption(plan, identity(plan, run, exact=exact), Path(resume))
    resumption.require_same()
    return resumption


def _report(prepared: _Prepared, execution: Execution) -> MergeReport:
    plan = prepared.plan
    alone = plan.kind == "receipt"
    counts = dict.fromkeys(("recorded", "unchanged") if alone else ("copied", "merged", "recast", "added"), 0)
    modules = []
    for unit, outcome in zip(plan.units, execution.outcomes, strict=True):
        if unit.operation == "copy":
            counts["copied"] += len(unit.inputs)
        elif unit.operation == "cast":
            counts["recast"] += 1
        elif unit.operation == "add":
            counts["added"] += 1
        elif unit.operation == "record-same":
            counts["unchanged"] += len(unit.inputs) // 2
        elif unit.operation == "record":
            counts["recorded"] += 1
        elif unit.operation == "merge":
            counts["merged"] += 1
            modules.append(_module(unit, outcome.facts, plan))
    touched = [unit.inputs[-1].name for unit in plan.units if unit.operation in {"merge", "record"}]
    inputs = execution.inputs(plan)
    return MergeReport(
        inputs=inputs,
        parameters=plan.options,
        files=execution.files,
        base={"name": prepared.base.name, "fingerprint": _fingerprints(prepared.base, touched)},
        notes=(*plan.notes, *repeated(inputs)),
        modules=tuple(modules),
        tensors=counts,
        totals={
            "tensors": sum(len(file.tensors) for file in plan.files),
            "bytes": sum(spec.nbytes for file in plan.files for spec in file.tensors),
            "changed": sum(module["changed"] for module in modules),
        },
    )


def _module(unit: Unit, facts: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    names = {source.id: source.name for source in plan.sources}
    applied = [
        {"adapter": names[each["source"]], "id": each["source"], "module": each["module"], "weight": each["weight"]}
        for each in (*unit.parameters["terms"], *unit.parameters["wholes"])
    ]
    return {"name": unit.target, "base": unit.inputs[0].name, "applied": applied, **facts}


def _fingerprints(base: Checkpoint, tensors: Sequence[str]) -> dict[str, str]:
    return {name: fingerprint.of(base[name]) for name in tensors if base[name].dtype in COMPUTABLE}

"""merge: base + adapters → checkpoint. Without an adapter: recast or reshard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint, layout, planning
from loratools.engine.changes import collect, source_id
from loratools.engine.execute import Execution, execute
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import Plan, Unit
from loratools.engine.planning import Run, RunOptions
from loratools.engine.receipts.afterwards import plan_afterwards
from loratools.engine.receipts.choice import drafted
from loratools.engine.receipts.draft import Draft
from loratools.engine.repeats import repeated
from loratools.engine.reports import AbstractWrittenReport
from loratools.engine.vocabulary import lengthened
from loratools.errors import UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source, kind_of
from loratools.tensors import COMPUTABLE

if TYPE_CHECKING:
    from typing_extensions import Unpack

RULES: Final = {"one-rounding": "W' = round(W + Σ w ΔW), ΔW to 2e-7 of its size, rounded once to the output dtype"}


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
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `merge` with the same arguments; reads headers and configurations only."""
    return _prepare(base, adapters, output, weights, dtype, max_shard_size, receipt, receipt_for, Run(**run)).plan


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
        run: see `loratools.engine.planning.Run`.

    Raises:
        MismatchError: an adapter does not belong to this base.
        NonFiniteError: an input holds NaN or infinity, or the result overflows.
        LoratoolsError: see `loratools.errors`; in every case nothing is left behind.

    Law: untouched tensors are byte-identical; the result does not depend on threads, tiles or device.
    """
    prepared = _prepare(base, adapters, output, weights, dtype, max_shard_size, receipt, receipt_for, Run(**run))
    return execute(
        prepared.plan,
        prepared.sources,
        describe=lambda execution: _report(prepared, execution),
        run=prepared.run,
        computes=any(unit.operation in {"merge", "record"} for unit in prepared.plan.units),
        receipt=prepared.draft,
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


def _prepare(  # noqa: PLR0917
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    output: Source,
    weights: Sequence[float] | float | None,
    dtype: str | None,
    max_shard_size: int | None,
    receipt: str | None,
    receipt_for: Source | Checkpoint | None,
    run: Run,
) -> _Prepared:
    checkpoint, loaded = _load(base, planning.as_list(adapters))
    wanted = planning.dtype_named(dtype)
    factors = planning.weights_for(len(loaded), weights)
    if receipt_for is not None:
        return _prepare_receipt(
            checkpoint, loaded, factors, output, wanted or max_shard_size, receipt, receipt_for, run
        )
    if not loaded and wanted is None and max_shard_size is None:
        raise UsageError("Without an adapter, merge recasts or reshards.", fix="Give --dtype or --max-shard-size.")
    draft, notes = drafted(receipt, checkpoint, loaded, factors, wanted)
    changes = collect(checkpoint, loaded, factors)
    sources: dict[str, Checkpoint | Adapter] = {"base": checkpoint}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    planner = MergePlanner(checkpoint, changes, sources, wanted, draft is not None)
    options = {"weights": factors, "dtype": wanted, "max_shard_size": max_shard_size}
    options["receipt"] = draft.kind if draft is not None else "none"
    notes = (*checkpoint.notes, *changes.notes, *layout.recast_notes(checkpoint, wanted), *notes)
    return _Prepared(_plan(planner, Path(output), draft, options, notes, run), sources, checkpoint, run, draft)


def _prepare_receipt(  # noqa: PLR0917
    base: Checkpoint,
    loaded: Sequence[Adapter],
    factors: Sequence[float],
    output: Source,
    other: object,
    receipt: str | None,
    receipt_for: Source | Checkpoint,
    run: Run,
) -> _Prepared:
    merged, options = open_checkpoint(receipt_for), {"weights": list(factors), "receipt": receipt or "full"}
    if other or receipt == "none":
        what = "--receipt none" if receipt == "none" else "--dtype and --max-shard-size"
        raise UsageError(f"--receipt-for writes a receipt alone; {what} say nothing there.", fix="Leave that out.")
    draft, _ = drafted(receipt or "full", base, loaded, factors, None)
    assert draft is not None
    draft = dataclasses.replace(draft, merged=tuple(merged))
    plan, sources = plan_afterwards(merged, draft, Path(output), options, run)
    return _Prepared(plan, sources, base, run, draft)


def _plan(
    planner: MergePlanner, path: Path, draft: Draft | None, options: Mapping[str, Any], notes: tuple[str, ...], run: Run
) -> Plan:
    base, sources, single = planner.base, planner.sources, path.suffix == ".safetensors"
    files = planner.files(options["max_shard_size"], single=single, name=path.name)
    units = planning.hash_units(sources) + planner.units(files)
    headers = layout.output_files(files, base)
    written = sum(spec.nbytes for file in headers for spec in file.tensors)
    written += 0 if single else sum(map(planning.size_of, base.companions))
    receipt = draft.estimate(units) if draft is not None else 0
    planning.check_output(path, run, sources.values(), written + receipt)
    untied, rows = planner.changes.untied is not None, planner.vocabulary()
    edits, edit_notes = layout.config_edits(
        base.config, dtype=planner.dtype, untied=untied, rows=rows, written=not single
    )
    return Plan(
        verb="merge",
        kind="checkpoint",
        output=str(path),
        overwrite=run.overwrite,
        sources=planning.infos(sources),
        units=tuple(units),
        bounds=planning.bounds(units, sources.values(), run, write=written),
        files=headers,
        copies=() if single else planner.copies(edited=bool(edits)),
        texts={} if single else planner.texts(headers, edits),
        options=options,
        rules=RULES,
        notes=(*notes, *edit_notes),
    )


def _report(prepared: _Prepared, execution: Execution) -> MergeReport:
    plan = prepared.plan
    counts: dict[str, int] = {"copied": 0, "merged": 0, "recast": 0, "added": 0, "recorded": 0, "unchanged": 0}
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

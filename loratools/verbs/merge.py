"""merge: base + adapters → checkpoint. Without an adapter: recast or reshard."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint, layout, planning, resuming
from loratools.engine.changes import Changes, collect, source_id
from loratools.engine.execute import Execution, execute
from loratools.engine.identity import identity
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import Plan, Unit
from loratools.engine.planning import Run, RunOptions
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

RULES: Final = {"one-rounding": "W' = round(W + Σ w ΔW), ΔW to 2e-7 of its size, rounded once to the output dtype"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport(AbstractWrittenReport):
    """What a merge did.

    Attributes:
        modules: each changed tensor with the adapters that changed it and how many entries became others.
        tensors: how many tensors were copied, merged (replacements among them), recast, added.
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
    resumption: Resumption | None


def plan_merge(
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    output: Source,
    *,
    weights: Sequence[float] | float | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `merge` with the same arguments; reads headers and configurations only."""
    return _prepare(base, adapters, output, weights, dtype, max_shard_size, resume, Run(**run)).plan


def merge(
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    output: Source,
    *,
    weights: Sequence[float] | float | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
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
    prepared = _prepare(base, adapters, output, weights, dtype, max_shard_size, resume, Run(**run))
    return execute(
        prepared.plan,
        prepared.sources,
        describe=lambda execution: _report(prepared, execution),
        run=prepared.run,
        computes=any(unit.operation == "merge" for unit in prepared.plan.units),
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


def _prepare(  # noqa: PLR0917
    base: Source | Checkpoint,
    adapters: Sequence[Source | Adapter],
    output: Source,
    weights: Sequence[float] | float | None,
    dtype: str | None,
    max_shard_size: int | None,
    resume: str | os.PathLike[str] | None,
    run: Run,
) -> _Prepared:
    checkpoint, loaded = _load(base, planning.as_list(adapters))
    wanted = planning.dtype_named(dtype)
    factors = planning.weights_for(len(loaded), weights)
    if not loaded and wanted is None and max_shard_size is None:
        raise UsageError("Without an adapter, merge recasts or reshards.", fix="Give --dtype or --max-shard-size.")
    changes = collect(checkpoint, loaded, factors)
    sources: dict[str, Checkpoint | Adapter] = {"base": checkpoint}
    sources |= {source_id(index): adapter for index, adapter in enumerate(loaded)}
    planner = MergePlanner(checkpoint, changes, sources, wanted)
    path = Path(output)
    single = path.suffix == ".safetensors"
    files = planner.files(max_shard_size, single=single, name=path.name)
    units = planning.hash_units(sources) + planner.units(files)
    headers = layout.output_files(files, checkpoint)
    written = sum(spec.nbytes for file in headers for spec in file.tensors)
    beside = 0 if single else sum(map(planning.size_of, checkpoint.companions))
    there = 0 if resume is None else resuming.check(resume, path, sources, headers)
    planning.check_output(path, run, sources.values(), max(written - there, 0) + beside)
    untied, rows = changes.untied is not None, planner.vocabulary()
    edits, edit_notes = layout.config_edits(
        checkpoint.config, dtype=wanted, untied=untied, rows=rows, written=not single
    )
    plan = Plan(
        verb="merge",
        kind="checkpoint",
        output=str(path),
        overwrite=run.overwrite,
        sources=tuple(
            planning.info(key, "base" if key == "base" else "adapter", each) for key, each in sources.items()
        ),
        units=tuple(units),
        bounds=planning.bounds(units, sources.values(), run, write=written + beside),
        files=headers,
        copies=() if single else planner.copies(edited=bool(edits)),
        texts={} if single else planner.texts(headers, edits),
        options={"weights": factors, "dtype": wanted, "max_shard_size": max_shard_size},
        rules=RULES,
        notes=(*checkpoint.notes, *changes.notes, *edit_notes, *layout.recast_notes(checkpoint, wanted)),
    )
    return _Prepared(plan, sources, checkpoint, run, _resumption(plan, changes, resume, run))


def _resumption(plan: Plan, changes: Changes, resume: str | os.PathLike[str] | None, run: Run) -> Resumption | None:
    """The work directory, where one is named; refused if it holds other work."""
    if resume is None:
        return None
    exact = not any(change.actions for change in changes.tensors.values())
    resumption = Resumption(plan, identity(plan, run, exact=exact), Path(resume))
    resumption.require_same()
    return resumption


def _report(prepared: _Prepared, execution: Execution) -> MergeReport:
    plan = prepared.plan
    counts: dict[str, int] = {"copied": 0, "merged": 0, "recast": 0, "added": 0}
    modules = []
    for unit, outcome in zip(plan.units, execution.outcomes, strict=True):
        if unit.operation == "copy":
            counts["copied"] += len(unit.inputs)
        elif unit.operation == "cast":
            counts["recast"] += 1
        elif unit.operation == "add":
            counts["added"] += 1
        elif unit.operation == "merge":
            counts["merged"] += 1
            modules.append(_module(unit, outcome.facts, plan))
    touched = [unit.inputs[0].name for unit in plan.units if unit.operation == "merge"]
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

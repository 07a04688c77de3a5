"""The plan of a receipt for a checkpoint that something else merged, where its base is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory, planning
from loratools.engine.binding import Renaming, reconcile
from loratools.engine.changes import Changes, collect, source_id
from loratools.engine.merge_units import peak_bytes, recorded
from loratools.engine.plan import Input, Plan, Unit
from loratools.engine.planning import Run
from loratools.engine.receipts.draft import Draft
from loratools.engine.receipts.manifest import SUFFIX
from loratools.engine.tensor_change import TensorChange
from loratools.errors import MismatchError, UsageError

RULES: Final = {
    "recorded": "the merged tensor is W + Σ w ΔW as far as another tool's arithmetic may be off; else it is refused"
}
_TOGETHER: Final = 256 * memory.MIB


def plan_afterwards(
    merged: Checkpoint, draft: Draft, output: Path, options: Mapping[str, Any], run: Run
) -> tuple[Plan, dict[str, Checkpoint | Adapter]]:
    """What is done, and with which sources; reads headers only.

    Args:
        merged: what somebody merged.
        draft: base, adapters, weights.
        output: a file that ends in `.receipt`.
        options: for the report.
        run: threads, limits.

    Raises:
        UsageError: another name of the output.
        MismatchError: the base's tensors are not there in their dtypes and shapes.
    """
    if output.suffix != SUFFIX:
        where = f"{Path(merged.location or 'merged').name}/loratools.receipt, or x.receipt beside x.safetensors"
        raise UsageError("A receipt's name ends in .receipt.", fix=f"Give -o {where}.", output=output.name)
    base = draft.base
    changes = collect(base, draft.adapters, draft.weights)
    renaming = reconcile(list(base), list(merged))
    _require_header(base, merged, changes, renaming)
    sources: dict[str, Checkpoint | Adapter] = {"base": base, "merged": merged}
    sources |= {source_id(index): adapter for index, adapter in enumerate(draft.adapters)}
    units = planning.hash_units(sources) + _units(base, merged, changes, renaming)
    planning.check_output(output, run, sources.values(), draft.estimate(units))
    extra = sorted(set(merged) - {renaming.apply(name) for name in base})
    notes = (f"Not in the base, and forgotten by an unmerge: {', '.join(extra[:5])}.",) if extra else ()
    plan = Plan(
        verb="merge",
        kind="receipt",
        output=str(output),
        overwrite=run.overwrite,
        sources=planning.infos(sources),
        units=tuple(units),
        bounds=planning.bounds(units, sources.values(), run, write=draft.estimate(units)),
        options=options,
        rules=RULES,
        notes=(*changes.notes, *notes),
    )
    return plan, sources


def _require_header(base: Checkpoint, merged: Checkpoint, changes: Changes, renaming: Renaming) -> None:
    for name, ref in base.items():
        there = merged.get(renaming.apply(name))
        change = changes.tensors.get(name)
        rows = int(change.rows["count"]) if change is not None and change.rows is not None else 0
        shape = (ref.shape[0] + rows, *ref.shape[1:]) if rows else ref.shape
        if there is None or (there.dtype, there.shape) != (ref.dtype, shape):
            found = "nothing" if there is None else f"{there.dtype} {there.shape}"
            raise MismatchError(
                f"The merged checkpoint has {found} where {ref.dtype} {shape} is due.",
                fix="Is this the base that was merged into? A merge into another dtype can have no receipt.",
                tensor=name,
                merged=merged.name,
            )


def _units(base: Checkpoint, merged: Checkpoint, changes: Changes, renaming: Renaming) -> list[Unit]:
    units: list[Unit] = []
    run: list[str] = []
    for name, ref in base.items():
        change = changes.tensors.get(name)
        if change is not None and not change.nothing:
            units.append(_record(base, merged, name, renaming.apply(name), change))
            continue
        run.append(name)
        if sum(base[each].nbytes for each in run) >= _TOGETHER or ref.nbytes >= _TOGETHER:
            units.append(_record_same(base, run, renaming))
            run = []
    return [*units, _record_same(base, run, renaming)] if run else units


def _record(base: Checkpoint, merged: Checkpoint, name: str, there: str, change: TensorChange) -> Unit:
    ref = base[name]
    unit = Unit(
        "record",
        there,
        inputs=(Input("merged", there), Input("base", name)),
        parameters={**change.parameters(), "acts": bool(change.actions)},
        read_bytes=2 * ref.nbytes,
        write_bytes=0,
        peak_bytes=peak_bytes(merged[there].spec, change, tiles=3),
    )
    return recorded(unit, ref.spec, change)


def _record_same(base: Checkpoint, names: Sequence[str], renaming: Renaming) -> Unit:
    there = [renaming.apply(name) for name in names]
    pairs = zip(names, there, strict=True)
    return Unit(
        "record-same",
        there[0] if len(there) == 1 else f"{there[0]} … {there[-1]}",
        inputs=tuple(each for one, two in pairs for each in (Input("base", one), Input("merged", two))),
        parameters={"names": there},
        read_bytes=2 * sum(base[name].nbytes for name in names),
        peak_bytes=2 * memory.TILE_BYTES,
    )

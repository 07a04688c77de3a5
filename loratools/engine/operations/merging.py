"""W' = round(W + Σ w ΔW): one rounding, row tile by row tile; and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loratools.adapters.algebra import finite
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.bounds import Bound
from loratools.engine.operations.copying import write_cast
from loratools.engine.operations.differences import Difference, differing_entries
from loratools.engine.operations.recomputing import recomputed
from loratools.engine.operations.recording import Recorder, kept
from loratools.engine.operations.tiles import differing_bytes, row_bytes, row_ranges
from loratools.engine.plan import Input, Unit
from loratools.errors import MismatchError, NonFiniteError
from loratools.tensors import COMPUTABLE, TensorRef, TensorSpec, torch_dtype

if TYPE_CHECKING:
    import torch


def merge(unit: Unit, context: Context) -> Outcome:
    """Write `round(W + Σ w ΔW)` for one stored tensor, then rows that the adapter appends.

    Raises:
        NonFiniteError: an input holds NaN or infinity, or the sum overflows the output's dtype.
    """
    ref = context.tensor(unit.inputs[0])
    if ref.dtype not in COMPUTABLE:
        return _merge_given(unit, ref, context)
    dtype = torch_dtype(str(unit.parameters["dtype"]))
    written = changed = 0
    bound = Bound.of(unit, context) if unit.parameters.get("bound") else None
    receipt = unit.parameters.get("receipt")
    recorder = Recorder(unit.target, ref, context, keeps=receipt == "kept") if receipt else None
    for tile in recomputed(unit, ref, dtype, context, back=receipt == "corrected"):
        tile.require_finite(context)
        changed += differing_entries(tile.after, tile.before)
        if bound is not None:
            bound.see(tile.before, tile.after)
        context.sink.write(unit.file, unit.target, tile.after.cpu(), written)
        written += tile.after.numel() * tile.after.element_size()
        if recorder is not None:
            recorder.see(tile)
        context.advance(tile.stored.numel() * tile.stored.element_size(), unit.target)
    for result in _appended(unit, context, dtype):
        context.sink.write(unit.file, unit.target, result, written)
        written += result.numel() * result.element_size()
    facts: dict[str, Any] = {"changed": changed, "entries": ref.spec.numel}
    facts |= {"bound": bound.value} if bound else {}
    return Outcome(unit.target, "merge", "merged", facts, receipt=recorder.facts() if recorder else None)


def _merge_given(unit: Unit, ref: TensorRef, context: Context) -> Outcome:
    """A tensor of integers (a counter, a table) that an adapter gives whole: its bytes."""
    given = given_whole(unit, context)
    context.sink.copy(unit.file, [unit.target], [given])
    context.advance(unit.read_bytes, unit.target)
    facts = {"changed": differing_bytes(ref, given), "entries": ref.spec.numel}
    receipt = kept(ref, context) if unit.parameters.get("receipt") else None
    return Outcome(unit.target, "merge", "merged", facts, receipt=receipt)


def given_whole(unit: Unit, context: Context) -> TensorRef:
    """The one replacement that a unit names."""
    (whole,) = unit.parameters["wholes"]
    return context.update(Input(whole["source"], whole["module"])).replaced[whole["parameter"]]


def stretch(ref: TensorRef, start: int, nbytes: int) -> TensorRef:
    """A run of a tensor's bytes as a flat tensor."""
    count = nbytes * ref.spec.numel // max(ref.nbytes, 1)
    return TensorRef(TensorSpec(ref.name, ref.dtype, (count,)), ref.source, ref.offset + start)


def _appended(unit: Unit, context: Context, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows that an adapter appends, tile by tile, rounded once."""
    from loratools.linalg import non_finite_count, round_to

    rows: Mapping[str, Any] | None = unit.parameters.get("rows")
    if not rows:
        return
    ref = context.update(Input(rows["source"], rows["module"])).added_rows[rows["parameter"]]
    for first, last in row_ranges(ref.shape, row_bytes(ref), context.settings.tile_bytes):
        context.check()
        result = round_to(finite(ref.rows(first, last)).double(), dtype)
        if non_finite_count(result):
            raise NonFiniteError(f"The appended rows overflow {dtype}.", fix="Choose --dtype bf16.", tensor=ref.name)
        yield result


def add(unit: Unit, context: Context) -> Outcome:
    """A tensor that an adapter brings along: byte for byte, or rounded to the dtype that was asked for."""
    ref = context.update(unit.inputs[0]).replaced[str(unit.parameters["parameter"])]
    if ref.dtype == unit.parameters["dtype"]:
        context.sink.copy(unit.file, [unit.target], [ref])
        context.advance(unit.read_bytes, unit.target)
    else:
        write_cast(ref, unit, context)
    return Outcome(unit.target, "add", "added", {"entries": ref.spec.numel})


def restore(unit: Unit, context: Context) -> Outcome:
    """Put the base's bytes back, after checking that the merged tensor is what the adapters make of it.

    Inputs: the merged tensor, the base's. The check recomputes the merge; what an entry may be off, see `Difference`.

    Raises:
        MismatchError: merged is not base + adapters.
    """
    merged, base = context.tensor(unit.inputs[0]), context.tensor(unit.inputs[1])
    foreign, acts = bool(unit.parameters.get("foreign")), bool(unit.parameters.get("acts"))
    difference = Difference(foreign, acts, len(unit.parameters["terms"]))
    if base.dtype not in COMPUTABLE:
        difference.entries = differing_bytes(merged, given_whole(unit, context))
        return _restored(unit, base, difference, context)
    dtype = torch_dtype(merged.dtype)
    read = 0
    for tile in recomputed(unit, base, dtype, context):
        nbytes = tile.before.numel() * dtype.itemsize
        found = context.on_device(stretch(merged, read, nbytes).load().view(tile.before.shape))
        read += nbytes
        if differing_entries(found, tile.after):
            difference.see(tile.before, tile.after, found)
        context.advance(2 * found.numel() * found.element_size(), unit.target)
    return _restored(unit, base, difference, context)


def _restored(unit: Unit, base: TensorRef, difference: Difference, context: Context) -> Outcome:
    require_as_merged(unit, base, difference)
    context.sink.copy(unit.file, [unit.target], [base])
    return Outcome(unit.target, "restore", "restored", {"entries": base.spec.numel})


def require_as_merged(unit: Unit, base: TensorRef, difference: Difference) -> None:
    """Refuse a merged tensor that is not what was recomputed.

    Raises:
        MismatchError: says in how many entries.
    """
    if difference.entries:
        raise MismatchError(
            "The merged tensor is not this base plus these adapters: "
            f"{difference.entries} of {base.spec.numel} entries differ{difference}.",
            fix="Are these the base, the adapters and the weights that it was merged from?",
            tensor=unit.target,
        )

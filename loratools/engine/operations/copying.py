"""Bytes that stay bytes: copies, hashes, and changes of dtype."""

from __future__ import annotations

from loratools.engine.context import Context, Outcome
from loratools.engine.operations.recording import hash_of
from loratools.engine.operations.tiles import row_bytes, row_ranges, same_bytes
from loratools.engine.plan import Unit
from loratools.errors import MismatchError, NonFiniteError
from loratools.storage.files import sha256_of
from loratools.tensors import TensorRef, torch_dtype


def hash_file(unit: Unit, context: Context) -> Outcome:
    """The SHA-256 of one input file, for the report."""
    digest = sha256_of(context.input_file(str(unit.parameters["source"]), unit.target), context.check)
    expected = unit.parameters.get("expected")
    if expected is not None and digest != expected:
        raise MismatchError(
            "This file is not the one that its loratools.json speaks of: it was changed after it was written.",
            fix="Get it again; or name the adapters and let them be subtracted, without --base.",
            file=unit.target,
        )
    context.advance(unit.read_bytes, unit.target)
    return Outcome(unit.target, "hash", "hashed", {"source": unit.parameters["source"], "sha256": digest})


def copy(unit: Unit, context: Context) -> Outcome:
    """Tensors byte for byte, in the kernel; neighbours go together."""
    refs = [context.tensor(address) for address in unit.inputs]
    context.sink.copy(unit.file, list(unit.parameters["names"]), refs)
    receipt = {"same": [hash_of(ref, context) for ref in refs]} if unit.parameters.get("receipt") else None
    context.advance(unit.read_bytes, unit.target)
    return Outcome(unit.target, "copy", "copied", {"count": len(refs)}, receipt=receipt)


def revert(unit: Unit, context: Context) -> Outcome:
    """The base's tensor as a receipt gives it back: computed, and held against its hash, as it is copied."""
    (ref,) = (context.tensor(address) for address in unit.inputs)
    done = copy(unit, context)
    return Outcome(unit.target, "revert", "restored", {"entries": ref.spec.numel}, receipt=done.receipt)


def same(unit: Unit, context: Context) -> Outcome:
    """The base's tensors byte for byte, after checking that the merged ones, which no adapter touched, are the same.

    Inputs: base and merged tensor in turn.

    Raises:
        MismatchError: one differs.
    """
    pairs = [(context.tensor(one), context.tensor(two)) for one, two in zip(*[iter(unit.inputs)] * 2, strict=True)]
    for base, merged in pairs:
        context.check()
        if not same_bytes(base, merged, context.settings.tile_bytes, context.check):
            raise MismatchError(
                "This tensor is not the base's, although none of the adapters touches it.",
                fix="Name every adapter that was merged, or leave --base out to subtract only the named ones.",
                tensor=base.name,
            )
    context.sink.copy(unit.file, list(unit.parameters["names"]), [base for base, _ in pairs])
    context.advance(unit.read_bytes, unit.target)
    return Outcome(unit.target, "same", "unchanged", {"count": len(pairs)})


def cast(unit: Unit, context: Context) -> Outcome:
    """A tensor in another dtype: each entry rounded once, to nearest even; NaN and infinity stay what they are.

    Raises:
        NonFiniteError: a finite entry overflows.
    """
    ref = context.tensor(unit.inputs[0])
    write_cast(ref, unit, context)
    return Outcome(unit.target, "cast", "cast", {"from": ref.dtype, "to": unit.parameters["dtype"]})


def write_cast(ref: TensorRef, unit: Unit, context: Context) -> None:
    """Write `ref` as the unit's target, in the dtype that its parameters name; raises as `cast`."""
    from loratools.linalg import non_finite_count, round_to

    dtype = torch_dtype(str(unit.parameters["dtype"]))
    written = 0
    for start, stop in row_ranges(ref.shape, row_bytes(ref), context.settings.tile_bytes):
        context.check()
        tile = (ref.rows(start, stop) if ref.shape else ref).load()
        result = round_to(tile, dtype)
        lost = non_finite_count(result) - non_finite_count(tile)
        if lost:
            raise NonFiniteError(
                f"{lost} entries overflow {result.dtype}.",
                fix="Choose a dtype with a larger range: bf16 or fp32.",
                tensor=ref.name,
                file=ref.source.label,
            )
        context.sink.write(unit.file, unit.target, result, written)
        written += result.numel() * result.element_size()
        context.advance(tile.numel() * tile.element_size(), unit.target)

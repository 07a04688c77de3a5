"""What a receipt needs of a tensor that somebody else merged."""

from __future__ import annotations

import dataclasses

from loratools.engine.context import Context, Outcome
from loratools.engine.operations.differences import Difference, differing_entries
from loratools.engine.operations.merging import given_whole, require_as_merged, stretch
from loratools.engine.operations.recomputing import recomputed
from loratools.engine.operations.recording import Recorder, hash_of, kept
from loratools.engine.operations.tiles import differing_bytes, same_bytes
from loratools.engine.plan import Unit
from loratools.errors import MismatchError
from loratools.tensors import COMPUTABLE, torch_dtype


def record(unit: Unit, context: Context) -> Outcome:
    """Hold a merged tensor against the merge, and say how it leads back to the base's.

    Inputs: the merged tensor, the base's. What an entry may be off, see `Difference`.

    Raises:
        MismatchError: merged is not base + adapters.
    """
    merged, base = context.tensor(unit.inputs[0]), context.tensor(unit.inputs[1])
    acts = bool(unit.parameters.get("acts"))
    difference = Difference(foreign=True, acts=acts, added=len(unit.parameters["terms"]))
    if base.dtype not in COMPUTABLE:
        difference.entries = differing_bytes(merged, given_whole(unit, context))
        require_as_merged(unit, base, difference)
        return Outcome(unit.target, "record", "recorded", {"entries": base.spec.numel}, receipt=kept(base, context))
    recorder = Recorder(unit.target, base, context, keeps=unit.parameters["receipt"] == "kept")
    read = 0
    for tile in recomputed(unit, base, torch_dtype(base.dtype), context, back=True):
        nbytes = tile.stored.numel() * tile.stored.element_size()
        found = context.on_device(stretch(merged, read, nbytes).load().view(tile.before.shape))
        read += nbytes
        if differing_entries(found, tile.after):
            difference.see(tile.before, tile.after, found)
            tile = dataclasses.replace(tile, after=found, back=None)  # noqa: PLW2901
        recorder.see(tile)
        context.advance(2 * nbytes, unit.target)
    require_as_merged(unit, base, difference)
    return Outcome(unit.target, "record", "recorded", {"entries": base.spec.numel}, receipt=recorder.facts())


def record_same(unit: Unit, context: Context) -> Outcome:
    """Tensors that no adapter touches: the same bytes on both sides, or this is another base.

    Inputs: the base's and the merged tensor in turn.

    Raises:
        MismatchError: one differs.
    """
    pairs = [(context.tensor(one), context.tensor(two)) for one, two in zip(*[iter(unit.inputs)] * 2, strict=True)]
    for base, merged in pairs:
        context.check()
        if not same_bytes(base, merged, context.settings.tile_bytes, context.check):
            raise MismatchError(
                "This tensor is not the base's, although none of the adapters touches it.",
                fix="Name the base and every adapter that was merged.",
                tensor=base.name,
            )
    context.advance(unit.read_bytes, unit.target)
    receipt = {"same": [hash_of(base, context) for base, _ in pairs]}
    return Outcome(unit.target, "record-same", "unchanged", {"count": len(pairs)}, receipt=receipt)

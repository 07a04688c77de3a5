"""Whether a merged tensor is what base and adapters make of it, along a path that no merge takes."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from loratools.engine.context import Context, Outcome
from loratools.engine.operations.change import matrices
from loratools.engine.operations.claims import Claim
from loratools.engine.operations.examining import examined
from loratools.engine.operations.tiles import row_bytes, row_ranges, same_bytes
from loratools.engine.plan import Input, Unit
from loratools.engine.verdicts import GOOD, Verdict, judge, together
from loratools.storage.files import blocks
from loratools.tensors import COMPUTABLE, TensorRef

if TYPE_CHECKING:
    import torch


def verify(unit: Unit, context: Context) -> Outcome:
    """The verdict on one merged tensor. Inputs: the base's tensor, the merged one.

    Raises:
        NonFiniteError: the base or a factor holds NaN or infinity.
    """
    base, merged = context.tensor(unit.inputs[0]), context.tensor(unit.inputs[1])
    rows = unit.parameters.get("rows")
    tail = merged.rows(base.shape[0], merged.shape[0]) if rows else None
    pairs = zip(matrices(base, unit), matrices(merged.rows(0, base.shape[0]) if tail else merged, unit), strict=True)
    verdicts = []
    for (before, expert), (after, _) in pairs:
        claim = Claim.of(unit, context, before, after, expert)
        verdicts.append(judge(examined(claim, context, ours=bool(unit.parameters.get("ours")))))
        context.advance(before.nbytes + after.nbytes, unit.target)
    verdict = together(verdicts)
    if rows and tail is not None and verdict.verdict == GOOD:
        given = context.update(Input(rows["source"], rows["module"])).added_rows[rows["parameter"]]
        if off := differing(given, tail, context):
            verdict = Verdict("other", None, deviating=off, detail="in the appended rows")
    facts: dict[str, Any] = dataclasses.asdict(verdict) | {"entries": base.spec.numel}
    return Outcome(unit.target, "verify", verdict.verdict, facts)


def verify_same(unit: Unit, context: Context) -> Outcome:
    """Tensors that no adapter touches. Inputs: the base's and the merged one in turn."""
    pairs = list(zip(*[iter(unit.inputs)] * 2, strict=True))
    deviating: list[dict[str, Any]] = []
    for one, other in pairs:
        before, after = context.tensor(one), context.tensor(other)
        off = differing(before, after, context, exact=bool(unit.parameters.get("exact")))
        if off:
            deviating.append({"name": after.name, "entries": after.spec.numel, "deviating": off})
        context.advance(before.nbytes + after.nbytes, unit.target)
    return Outcome(unit.target, "verify-same", "compared", {"count": len(pairs), "deviating": deviating})


def verify_added(unit: Unit, context: Context) -> Outcome:
    """A tensor that an adapter gives whole. Inputs: it, the adapter's module, the base's tensor if any."""
    after = context.tensor(unit.inputs[0])
    given = context.update(unit.inputs[1]).replaced[str(unit.parameters["parameter"])]
    off = differing(given.reshaped(after.shape), after, context)
    verdict = Verdict(GOOD, "whole") if not off else Verdict("other", None, deviating=off)
    if off and len(unit.inputs) > 2 and not differing(context.tensor(unit.inputs[2]), after, context):  # noqa: PLR2004
        verdict = Verdict("missing", "none", deviating=off)
    context.advance(unit.read_bytes, unit.target)
    facts = dataclasses.asdict(verdict) | {"entries": after.spec.numel}
    return Outcome(unit.target, "verify-added", verdict.verdict, facts)


def verify_digest(unit: Unit, context: Context) -> Outcome:
    """Whether a tensor's bytes have the SHA-256 that a receipt gives. Inputs: the tensor.

    One of the base says something of the receipt, and is not counted: what the merge made of it is.
    """
    ref = context.tensor(unit.inputs[0])
    digest = hashlib.sha256()
    for view in blocks(ref.source, ref.offset, ref.offset + ref.nbytes, check=context.check):
        digest.update(view)
    same = digest.hexdigest() == unit.parameters["sha256"]
    context.advance(ref.nbytes, unit.target)
    count = int(unit.inputs[0].source == "merged")
    deviating = [] if same else [{"name": ref.name, "entries": ref.spec.numel, "deviating": 0}]
    return Outcome(unit.target, "verify-digest", "hashed", {"count": count, "deviating": deviating})


def differing(expected: TensorRef, found: TensorRef, context: Context, *, exact: bool = False) -> int:
    """How many entries are not the expected ones: rounded to another dtype where that is asked of a checkpoint.

    Zeros of either sign are the same unless `exact`, and so are NaNs.
    """
    if expected.dtype == found.dtype and same_bytes(expected, found, context.settings.tile_bytes, context.check):
        return 0
    if not {expected.dtype, found.dtype} <= COMPUTABLE:
        return max(found.spec.numel, 1)
    wanted, is_ = (ref if ref.shape else ref.reshaped((1,)) for ref in (expected, found))
    off = 0
    for rows in row_ranges(is_.shape, max(row_bytes(is_), row_bytes(wanted)), context.settings.tile_bytes):
        context.check()
        off += _off(wanted.rows(*rows).load(), is_.rows(*rows).load(), exact=exact)
    return off


def _off(expected: torch.Tensor, found: torch.Tensor, *, exact: bool) -> int:
    import torch

    from loratools.linalg import to_grid

    if exact and expected.dtype == found.dtype:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
        return int((expected.view(bits) != found.view(bits)).sum())
    wide = expected.double()
    finite = torch.isfinite(wide)
    wanted = torch.where(finite, to_grid(wide.nan_to_num(0.0, 0.0, 0.0), found.dtype), wide)
    there = found.double()
    return int((~((wanted == there) | (wanted.isnan() & there.isnan()))).sum())

"""ΔW of stacked experts: a truncated SVD for every expert, at one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters.experts import Stacked
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.tiles import require_all_finite, same_bytes
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import SVDInfo


def extract_experts(unit: Unit, context: Context) -> Outcome:
    """Write one update for all experts: the largest rank that any of them needs, zeros where one needs less.

    Raises:
        NonFiniteError: NaN or infinity in a difference.
    """
    half = len(unit.inputs) // 2
    tuned, base = ([context.tensor(each) for each in side] for side in (unit.inputs[:half], unit.inputs[half:]))
    facts: dict[str, Any] = {"fates": {}, "experts": unit.parameters["experts"]}
    if all(same_bytes(one, other, context.settings.tile_bytes) for one, other in zip(base, tuned, strict=True)):
        facts["tensors"] = dict.fromkeys((ref.name for ref in tuned), "identical")
        context.advance(unit.read_bytes, unit.target)
        return Outcome(unit.target, "extract", "identical", facts)
    experts = int(unit.parameters["experts"])
    found = [
        _factors(parts_of(tuned, experts, at), parts_of(base, experts, at), unit, context) for at in range(experts)
    ]
    rank = max(lora_A.shape[0] for lora_A, _, _, _ in found)
    facts |= _measured([(info, norm) for _, _, info, norm in found], rank)
    what = "low-rank" if rank else "equal in value"
    facts["tensors"] = dict.fromkeys((ref.name for ref in tuned), what)
    if rank:
        lora_A, lora_B = _stacked([(lora_A, lora_B) for lora_A, lora_B, _, _ in found], rank)
        update = Stacked(
            lora_A=context.sink.keep(f"{unit.target}.lora_A", lora_A),
            lora_B=context.sink.keep(f"{unit.target}.lora_B", lora_B),
            experts=experts,
            alpha=float(rank),
        )
        context.sink.update(unit.target, update)
    return Outcome(unit.target, "extract", what, facts)


def parts_of(refs: Sequence[TensorRef], experts: int, expert: int) -> list[TensorRef]:
    """The tensors of one expert: a slice of the stacked one, or its own."""
    if len(refs) == 1:
        return [refs[0].rows(expert, expert + 1).reshaped(refs[0].shape[1:])]
    count = len(refs) // experts
    return list(refs[expert * count : (expert + 1) * count])


def _factors(
    tuned: Sequence[TensorRef], base: Sequence[TensorRef], unit: Unit, context: Context
) -> tuple[torch.Tensor, torch.Tensor, SVDInfo, float]:
    """lora_A (r, in), lora_B (out, r) of one expert, what is known of them, and ‖W‖."""
    from loratools.linalg import balanced_factors, truncated_svd

    difference, norm = difference_of(tuned, base, unit, context)
    try:
        U, S, Vh, info = truncated_svd(difference, **unit.parameters["svd"], overwrite=True)
    except NonFiniteError:
        for ref in (*base, *tuned):
            require_all_finite(ref, context.settings.tile_bytes)
        raise
    lora_A, lora_B = balanced_factors(U, S, Vh)
    context.advance(sum(ref.nbytes for ref in (*base, *tuned)), unit.target)
    return lora_A.cpu(), lora_B.cpu(), info, norm


def difference_of(
    tuned: Sequence[TensorRef], base: Sequence[TensorRef], unit: Unit, context: Context
) -> tuple[torch.Tensor, float]:
    """ΔW of one expert, (out, in) in float32, and ‖W‖."""
    import torch

    context.check()
    before = torch.cat([context.on_device(ref.load()).double() for ref in base])
    after = torch.cat([context.on_device(ref.load()).double() for ref in tuned])
    norm = float(torch.linalg.vector_norm(before))
    difference = after.sub_(before).float()
    del before
    if unit.parameters["transposed"]:
        difference = difference.T.contiguous()
    return difference, norm


def _stacked(factors: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts in the layout of `Stacked`; a smaller rank is filled up with zeros."""
    import torch

    (first_A, first_B), experts = factors[0], len(factors)
    lora_A = torch.zeros((experts, rank, first_A.shape[1]))
    lora_B = torch.zeros((first_B.shape[0], rank, experts))
    for expert, (down, up) in enumerate(factors):
        lora_A[expert, : down.shape[0]] = down
        lora_B[:, : up.shape[1], expert] = up
    return lora_A.reshape(experts * rank, -1), lora_B.reshape(-1, rank * experts)


def _measured(found: Sequence[tuple[SVDInfo, float]], rank: int) -> dict[str, Any]:
    """Over all experts together; the certificate is the worst one's."""
    infos = [info for info, _ in found]
    squares = sum(info.norm**2 for info in infos)
    left = sum(info.residual**2 for info in infos)
    weight = math.sqrt(sum(norm**2 for _, norm in found))
    bounds = [info.certificate for info in infos if info.norm]
    proven = all(info.certificate_kind == "proven" for info in infos if info.norm)
    known = [bound for bound in bounds if bound is not None]
    certificate = max(known) if known and len(known) == len(bounds) else None
    return {
        "rank": rank,
        "captured": 1 - left / squares if squares else 1.0,
        "residual": math.sqrt(left / squares) if squares else 0.0,
        "certificate": certificate,
        "certificate_kind": None if certificate is None else "proven" if proven else "heuristic",
        "norm": math.sqrt(squares),
        "relative": math.sqrt(squares) / weight if weight else None,
        "method": infos[0].method,
        "products": sum(info.products for info in infos),
        "clipped": any(info.clipped for info in infos),
        "reached": all(info.reached for info in infos),
    }

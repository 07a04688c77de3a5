"""ΔW of stacked experts: a truncated SVD for every expert, at one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters.experts import Stacked
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.tiles import require_all_finite, same_bytes
from loratools.engine.operations.weighting import share, truncated, weights_of
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
    half = len(unit.inputs) // 2  # a vector of activations, if there is one, comes after both
    tuned, base = (
        [context.tensor(each) for each in side] for side in (unit.inputs[:half], unit.inputs[half : 2 * half])
    )
    facts: dict[str, Any] = {"fates": {}, "experts": unit.parameters["experts"]}
    if all(same_bytes(one, other, context.settings.tile_bytes) for one, other in zip(base, tuned, strict=True)):
        facts["tensors"] = dict.fromkeys((ref.name for ref in tuned), "identical")
        context.advance(unit.read_bytes, unit.target)
        return Outcome(unit.target, "extract", "identical", facts)
    experts = int(unit.parameters["experts"])
    weights = weights_of(unit, context)
    found = [
        _factors(_parts(tuned, experts, at), _parts(base, experts, at), weights[at], unit, context)
        for at in range(experts)
    ]
    rank = max(lora_A.shape[0] for (lora_A, _), _, _, _ in found)
    facts |= _measured([(info, norm) for _, info, _, norm in found], rank)
    facts["sigma2"] = _energies([lora_A for (lora_A, _), _, _, _ in found], rank)
    if any(weighted for _, _, weighted, _ in found):
        facts |= share([weighted or info for _, info, weighted, _ in found])
    what = "low-rank" if rank else "equal in value"
    facts["tensors"] = dict.fromkeys((ref.name for ref in tuned), what)
    if rank:
        lora_A, lora_B = _stacked([factors for factors, _, _, _ in found], rank)
        update = Stacked(
            lora_A=context.sink.keep(f"{unit.target}.lora_A", lora_A),
            lora_B=context.sink.keep(f"{unit.target}.lora_B", lora_B),
            experts=experts,
            alpha=float(rank),
        )
        context.sink.update(unit.target, update)
    return Outcome(unit.target, "extract", what, facts)


def _parts(refs: Sequence[TensorRef], experts: int, expert: int) -> list[TensorRef]:
    """The tensors of one expert: a slice of the stacked one, or its own."""
    if len(refs) == 1:
        return [refs[0].rows(expert, expert + 1).reshaped(refs[0].shape[1:])]
    count = len(refs) // experts
    return list(refs[expert * count : (expert + 1) * count])


def _factors(
    tuned: Sequence[TensorRef],
    base: Sequence[TensorRef],
    weights: torch.Tensor | None,
    unit: Unit,
    context: Context,
) -> tuple[tuple[torch.Tensor, torch.Tensor], SVDInfo, SVDInfo | None, float]:
    """lora_A (r, in) and lora_B (out, r) of one expert, what is known of them, also as weighted, and ‖W‖."""
    import torch

    from loratools.linalg import balanced_factors

    context.check()
    before = torch.cat([context.on_device(ref.load()).double() for ref in base])
    after = torch.cat([context.on_device(ref.load()).double() for ref in tuned])
    norm = float(torch.linalg.vector_norm(before))
    difference = after.sub_(before).float()
    del before
    if unit.parameters["transposed"]:
        difference = difference.T.contiguous()
    try:
        (U, S, Vh), info, weighted = truncated(difference, weights, unit.parameters["svd"], transposed=False)
    except NonFiniteError:
        for ref in (*base, *tuned):
            require_all_finite(ref, context.settings.tile_bytes)
        raise
    lora_A, lora_B = balanced_factors(U, S, Vh)
    context.advance(sum(ref.nbytes for ref in (*base, *tuned)), unit.target)
    return (lora_A.cpu(), lora_B.cpu()), info, weighted, norm


def _energies(downs: Sequence[torch.Tensor], rank: int) -> list[float]:
    """σ² of every rank, over all experts: balanced factors have rows of length √σ."""
    import torch

    total = torch.zeros(rank, dtype=torch.float64)
    for lora_A in downs:
        total[: lora_A.shape[0]] += lora_A.double().square().sum(1).square()
    return total.tolist()


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

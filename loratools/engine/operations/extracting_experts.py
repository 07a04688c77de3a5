"""ΔW of stacked experts: a truncated SVD for every expert, at one rank."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters.experts import Stacked
from loratools.engine.context import Context, Outcome
from loratools.engine.operations import auto_rank
from loratools.engine.operations.tiles import require_all_finite, same_bytes
from loratools.engine.operations.truncating import Truncated, truncate
from loratools.engine.operations.weighting import share, weights_of
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import RoundingNoise, SVDInfo


def extract_experts(unit: Unit, context: Context) -> Outcome:
    """Write one update for all experts: the largest rank that any of them needs, zeros where one needs less.

    Raises:
        NonFiniteError: NaN or infinity in a difference.
    """
    from loratools.linalg import balanced_factors

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
    pairs = [(parts_of(tuned, experts, at), parts_of(base, experts, at)) for at in range(experts)]
    if is_batched(unit, context, weights):
        found = _in_batches(pairs, unit, context)
    else:
        found = [_factors(*pair, weights[at], unit, context) for at, pair in enumerate(pairs)]
    rank = max(one.info.rank for one, _ in found)
    facts |= _measured([(one.info, norm) for one, norm in found], rank)
    facts |= auto_rank.together([one.decided for one, _ in found]) | unit.parameters.get("carried", {})
    facts["sigma2"] = _energies([one.S for one, _ in found], rank)
    if any(one.weighted for one, _ in found):
        facts |= share([one.weighted or one.info for one, _ in found])
    what = "low-rank" if rank else "equal in value"
    facts["tensors"] = dict.fromkeys((ref.name for ref in tuned), what)
    if rank:
        lora_A, lora_B = _stacked([balanced_factors(one.U, one.S, one.Vh) for one, _ in found], rank)
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
    tuned: Sequence[TensorRef],
    base: Sequence[TensorRef],
    weights: torch.Tensor | None,
    unit: Unit,
    context: Context,
) -> tuple[Truncated, float]:
    """The truncated SVD of one expert, (out, in), and ‖W‖."""
    shape = (sum(ref.shape[0] for ref in tuned), tuned[0].shape[1])
    noise = auto_rank.wanted_noise(unit.parameters["svd"], *shape)
    difference, norm = difference_of(tuned, base, unit, context, noise)
    try:
        found = truncate(difference, unit.parameters["svd"], weights=weights, noise=noise, transposed=False)
    except NonFiniteError:
        for ref in (*base, *tuned):
            require_all_finite(ref, context.settings.tile_bytes)
        raise
    context.advance(sum(ref.nbytes for ref in (*base, *tuned)), unit.target)
    return dataclasses.replace(found, U=found.U.cpu(), S=found.S.cpu(), Vh=found.Vh.cpu()), norm


def is_batched(unit: Unit, context: Context, weights: Sequence[torch.Tensor | None]) -> bool:
    """Whether experts are decomposed together: on a device, at one rank, unweighted."""
    plain = isinstance(unit.parameters["svd"].get("rank"), int) and all(each is None for each in weights)
    return plain and context.settings.device != "cpu"


def _in_batches(
    pairs: Sequence[tuple[Sequence[TensorRef], Sequence[TensorRef]]], unit: Unit, context: Context
) -> list[tuple[Truncated, float]]:
    from loratools.linalg import batch_size, truncated_svd_batch

    svd = {key: value for key, value in unit.parameters["svd"].items() if key != "max_rank"}
    first = pairs[0][0]
    step = batch_size(sum(ref.shape[0] for ref in first), first[0].shape[1])
    found: list[tuple[Truncated, float]] = []
    for start in range(0, len(pairs), step):
        batch = pairs[start : start + step]
        differences = [difference_of(tuned, base, unit, context) for tuned, base in batch]
        try:
            results = truncated_svd_batch([each for each, _ in differences], **svd)
        except NonFiniteError:
            for ref in (ref for tuned, base in batch for ref in (*base, *tuned)):
                require_all_finite(ref, context.settings.tile_bytes)
            raise
        for (U, S, Vh, info), (_, norm) in zip(results, differences, strict=True):
            found.append((Truncated(U.cpu(), S.cpu(), Vh.cpu(), info, None, {}), norm))
        context.advance(sum(ref.nbytes for tuned, base in batch for ref in (*base, *tuned)), unit.target)
    return found


def _energies(values: Sequence[torch.Tensor], rank: int) -> list[float]:
    """σ² of every rank, over all experts."""
    import torch

    total = torch.zeros(rank, dtype=torch.float64)
    for S in values:
        total[: S.numel()] += S.double().square()
    return total.tolist()


def difference_of(
    tuned: Sequence[TensorRef],
    base: Sequence[TensorRef],
    unit: Unit,
    context: Context,
    noise: RoundingNoise | None = None,
) -> tuple[torch.Tensor, float]:
    """ΔW of one expert, (out, in) in float32, and ‖W‖; the rounding noise's profile, as stored, is filled in."""
    import torch

    context.check()
    before, after = ([context.on_device(ref.load()) for ref in side] for side in (base, tuned))
    norm = math.hypot(*(float(torch.linalg.vector_norm(each.double())) for each in before))
    difference = torch.cat([(new.double() - old.double()).float() for old, new in zip(before, after, strict=True)])
    if noise is not None:
        firsts = itertools.accumulate((len(each) for each in after), initial=0)
        for first, old, new in zip(firsts, before, after, strict=False):
            noise.see(first, difference[first : first + len(new)], old, new)
    del before, after
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

"""One module's ΔW at a lower rank, through its factors."""

from __future__ import annotations

from typing import Any

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.algebra import concatenated, summed_bias, without_products
from loratools.engine.context import Context
from loratools.engine.operations.weighting import share, weights_of
from loratools.engine.plan import Unit
from loratools.tensors import TensorRef


def reduced(unit: Unit, update: AbstractUpdate, context: Context) -> tuple[AbstractUpdate | None, dict[str, Any]]:
    """The update truncated by the unit's `svd` (None: nothing is left of it), and what a report says of it.

    captured, residual and certificate are those of the float32 factors.
    """
    from loratools.linalg import reduce_low_rank

    options: dict[str, Any] = {
        key: value for key, value in unit.parameters["svd"].items() if key not in {"preset", "seed"}
    }
    (weights,) = weights_of(unit, context, update.kernel)
    down, up = concatenated(update)
    context.check()
    found = reduce_low_rank(down, up, weights=weights, **options)
    info, bound = found.info, found.weighted or found.info
    error = options.get("error")
    facts = {
        "captured": info.captured,
        "residual": info.residual / info.norm if info.norm else 0.0,
        "certificate": info.certificate if found.weighted is None else found.weighted.certificate,
        "certificate_kind": info.certificate_kind if found.weighted is None else found.weighted.certificate_kind,
        "norm": info.norm,
        "method": info.method,
        "clipped": info.clipped,
        "reached": info.reached and (error is None or bound.residual <= error * bound.norm * 1.000001),
        "sigma2": found.sigma2.tolist(),
        **(share([bound]) if bound is not info else {}),
    }
    if not info.rank:
        return without_products(unit.target, update), facts
    bias = summed_bias(unit.target, [(1.0, update)])
    return LowRank(
        lora_A=context.sink.keep(f"{unit.target}.lora_A", found.lora_A),
        lora_B=context.sink.keep(f"{unit.target}.lora_B", found.lora_B),
        alpha=float(info.rank),
        of=update.layer,
        parameter=update.target,
        kernel=update.kernel,
        bias=None if bias is None else _kept(f"{unit.target}.bias", bias, context),
        replaced=update.replaced,
        added_rows=update.added_rows,
        patches=update.patches,
    ), facts


def _kept(name: str, bias: TensorRef, context: Context) -> TensorRef:
    return context.sink.keep(name, bias.load().float())

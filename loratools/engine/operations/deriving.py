"""Updates made of updates: sums, scalings, restated alphas."""

from __future__ import annotations

import dataclasses

from loratools.adapters import LowRank, Sum
from loratools.adapters.algebra import finite, summed
from loratools.engine.context import Context, Outcome
from loratools.engine.plan import Unit
from loratools.errors import UnsupportedError
from loratools.files import concatenated, scaled_exactly


def derive(unit: Unit, context: Context) -> Outcome:
    """`Σ w ΔW` of the unit's inputs, then `parameters["alpha"]`: keep, bake, or a number to restate it as."""
    weights = [float(weight) for weight in unit.parameters["weights"]]
    held = [(weight, context.update(address)) for weight, address in zip(weights, unit.inputs, strict=True)]
    for _, update in held:
        for ref in update.factors:
            finite(ref)
    update = summed(unit.target, held)
    alpha = unit.parameters["alpha"]
    if isinstance(update, Sum):
        update = concatenated(unit.target, update, context.sink.keep)
    if alpha != "keep" and update.changes_weight and not isinstance(update, LowRank):
        raise UnsupportedError(f"The alpha of a {update.kind} update is not restated yet.", module=unit.target)
    if alpha != "keep" and isinstance(update, LowRank):
        update = _restated(unit.target, update, None if alpha == "bake" else float(alpha), context)
    context.sink.update(unit.target, update)
    context.advance(unit.read_bytes, unit.target)
    facts = {"rank": update.rank or 0, "alpha": getattr(update, "alpha", None), "scaling": update.scaling}
    return Outcome(unit.target, "derive", update.kind, facts)


def _restated(target: str, update: LowRank, alpha: float | None, context: Context) -> LowRank:
    """The same ΔW with `alpha` (None: alpha = r, no rsLoRA, so that the scaling is 1); B takes the quotient."""
    if alpha == 0:
        raise UnsupportedError("alpha 0 would make every update zero.", module=target)
    rslora = update.use_rslora and alpha is not None
    number = float(update.lora_A.shape[0] if alpha is None else alpha)
    fresh = dataclasses.replace(update, alpha=number, use_rslora=rslora)
    quotient = update.scaling / fresh.scaling
    lora_B, bias = update.lora_B, update.bias
    if quotient != 1:
        lora_B = context.sink.keep(f"{target}.lora_B", scaled_exactly(update.lora_B, quotient))
        if bias is not None:
            bias = context.sink.keep(f"{target}.bias", scaled_exactly(bias, quotient))
    return dataclasses.replace(fresh, lora_B=lora_B, bias=bias)

"""Updates made of updates: sums, scalings, restated alphas."""

from __future__ import annotations

import dataclasses

from loratools.adapters import AbstractUpdate, LowRank, Sum, Term
from loratools.adapters.algebra import finite, summed
from loratools.engine.context import Context, Outcome
from loratools.engine.plan import Unit
from loratools.errors import UnsupportedError
from loratools.files import concatenated_factors, scaled_exactly
from loratools.tensors import TensorRef


def derive(unit: Unit, context: Context) -> Outcome:
    """`Σ w ΔW` of the unit's inputs, then `parameters["alpha"]`: keep, bake, or a number to restate it as."""
    weights = [float(weight) for weight in unit.parameters["weights"]]
    held = [(weight, context.update(address)) for weight, address in zip(weights, unit.inputs, strict=True)]
    for _, update in held:
        for term in update.terms:
            _require_finite(term)
    update = _scaled_alpha(held) or summed(unit.target, held)
    alpha = unit.parameters["alpha"]
    if isinstance(update, Sum):
        update = _settled(unit.target, update, context)
    if alpha != "keep" and isinstance(update, LowRank):
        update = _restated(unit.target, update, None if alpha == "bake" else float(alpha), context)
    context.sink.update(unit.target, update)
    context.advance(unit.read_bytes, unit.target)
    facts = {"rank": update.rank, "alpha": getattr(update, "alpha", None), "scaling": getattr(update, "scaling", None)}
    return Outcome(unit.target, "derive", update.kind, facts)


def _scaled_alpha(held: list[tuple[float, AbstractUpdate]]) -> LowRank | None:
    """One low-rank update times a weight is the same factors with another alpha: no byte changes."""
    weight, update = held[0]
    if len(held) != 1 or not isinstance(update, LowRank) or update.replaced or update.added_rows:
        return None
    return dataclasses.replace(update, alpha=update.alpha * weight)


def _require_finite(term: Term) -> None:
    for ref in (term.lora_A, term.lora_B):
        finite(ref)


def _settled(target: str, update: Sum, context: Context) -> LowRank:
    lora_A, lora_B, alpha = concatenated_factors(update)
    return LowRank(
        lora_A=context.sink.keep(f"{target}.lora_A", lora_A),
        lora_B=context.sink.keep(f"{target}.lora_B", lora_B),
        alpha=alpha,
        of=update.layer,
        replaced=update.replaced,
        added_rows=update.added_rows,
    )


def _restated(target: str, update: LowRank, alpha: float | None, context: Context) -> LowRank:
    """The same ΔW with `alpha` (None: alpha = r, no rsLoRA, so that the scaling is 1); B takes the quotient."""
    if alpha == 0:
        raise UnsupportedError("alpha 0 would make every update zero.", module=target)
    rslora = update.use_rslora and alpha is not None
    fresh = dataclasses.replace(update, alpha=float(update.rank if alpha is None else alpha), use_rslora=rslora)
    quotient = update.scaling / fresh.scaling
    lora_B: TensorRef = update.lora_B
    if quotient != 1:
        lora_B = context.sink.keep(f"{target}.lora_B", scaled_exactly(update.lora_B, quotient))
    return dataclasses.replace(fresh, lora_B=lora_B)

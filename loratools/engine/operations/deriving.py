"""Updates made of updates: sums, scalings, restated alphas."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank, Sum
from loratools.adapters.algebra import as_products, finite, summed, without_products
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.capping import capped
from loratools.engine.operations.combining import combined
from loratools.engine.operations.one_factor import in_factors
from loratools.engine.operations.reducing import reduced
from loratools.engine.plan import Unit
from loratools.errors import UnsupportedError
from loratools.files import scaled_exactly, settled

LEFT_OUT: Final = "left out"
"""What became of a module whose products have rank 0."""


def derive(unit: Unit, context: Context) -> Outcome:
    """`Σ w ΔW` of the unit's inputs, then `parameters["alpha"]`: keep, bake, or a number to restate it as.

    With a `cap` the one input's weight is what brings its norm down to that; with a `factor` that takes it, not alpha.
    With a `method` that says what stands in place of the sum. With an `svd` the outcome is truncated so.
    """
    weights = [float(weight) for weight in unit.parameters["weights"]]
    held = [(weight, context.update(address)) for weight, address in zip(weights, unit.inputs, strict=True)]
    for _, update in held:
        for ref in update.factors:
            finite(ref)
    said = dict(unit.parameters.get("said", {}))
    if "cap" in unit.parameters:
        weight, found = capped(unit, held[0][1], context)
        held, said = [(weight, held[0][1])], {**said, **found}
    make = combined if "method" in unit.parameters else _summed
    rest, found = make(unit, held, context)
    said |= found
    if rest is not None and "svd" in unit.parameters and "residual" not in found:
        rest, found = reduced(unit, rest, context)
        said |= found
    if rest is None:
        context.advance(unit.read_bytes, unit.target)
        return Outcome(unit.target, "derive", LEFT_OUT, {"rank": 0, "alpha": None, "scaling": None, **said})
    update = settled(unit.target, rest, context.sink.keep)
    alpha = unit.parameters["alpha"]
    if alpha != "keep":
        update = _with_alpha(unit.target, update, None if alpha == "bake" else float(alpha), context)
    context.sink.update(unit.target, update)
    context.advance(unit.read_bytes, unit.target)
    facts = {"rank": update.rank or 0, "alpha": getattr(update, "alpha", None), "scaling": update.scaling}
    return Outcome(unit.target, "derive", update.kind, {**facts, **said})


def _summed(
    unit: Unit, held: Sequence[tuple[float, AbstractUpdate]], context: Context
) -> tuple[AbstractUpdate | None, dict[str, Any]]:
    """`Σ w ΔW`, with what a report says of how it came about; None where nothing is left of it."""
    factor, said = unit.parameters.get("factor"), dict[str, Any]()
    if factor is not None:
        (weight, one), *_ = held
        update, said = in_factors(unit.target, one, weight, str(factor), context)
    else:
        update = summed(unit.target, held)
    if unit.parameters.get("products"):
        update = as_products(update)
    return without_products(unit.target, update) if isinstance(update, Sum) and not update.rank else update, said


def _with_alpha(target: str, update: AbstractUpdate, alpha: float | None, context: Context) -> AbstractUpdate:
    """The same ΔW with another alpha; a tensor that ΔW is linear in takes the quotient.

    Raises:
        UnsupportedError: the kind has no alpha, or no such tensor.
    """
    if isinstance(update, LowRank):
        return _restated(target, update, alpha, context)
    if not update.changes_weight or (alpha is None and update.divisor is None and update.scaling == 1):
        return update
    require_alpha(target, update, alpha)
    field, divisor, scaling = update.linear_in, update.divisor, update.scaling
    assert field is not None
    assert divisor is not None
    assert scaling is not None
    number = divisor if alpha is None else alpha
    quotient = scaling * divisor / number
    fresh: dict[str, Any] = {"alpha": number}
    if quotient != 1:
        fresh[field] = context.sink.keep(f"{target}.{field}", scaled_exactly(getattr(update, field), quotient))
    return dataclasses.replace(update, **fresh)


def require_alpha(target: str, update: AbstractUpdate, alpha: float | None) -> None:
    """Refuse another alpha (None: the one that makes the scaling 1) where no tensor could take the quotient.

    Raises:
        UnsupportedError: names the kind.
    """
    if isinstance(update, (LowRank, Sum)) or not update.changes_weight:
        return
    if alpha is None and update.divisor is None and update.scaling == 1:
        return
    if None in {update.linear_in, update.divisor, update.scaling} or alpha == 0:
        raise UnsupportedError(
            f"The alpha of an update of kind {update.kind} cannot be restated.",
            fix="`loratools merge` takes it as it is; --exclude leaves such modules of an adapter alone.",
            module=target,
        )


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

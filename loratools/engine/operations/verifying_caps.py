"""What a cap on the norm makes of a module's weight, found along a path of its own: ΔW row tile by row tile."""

from __future__ import annotations

import math

from loratools.adapters import AbstractUpdate
from loratools.adapters.experts import Stacked
from loratools.engine import memory
from loratools.engine.context import Context


def weight_under(cap: float, update: AbstractUpdate, context: Context) -> float:
    """`min(1, cap / ‖ΔW‖_F)`, from the entries of ΔW in float64; 1 for what has none of its own."""
    parts = [update.part(expert) for expert in range(update.experts)] if isinstance(update, Stacked) else [update]
    norm = math.sqrt(math.fsum(_squares(part, context) for part in parts))
    return min(1.0, cap / norm) if norm else 1.0


def _squares(update: AbstractUpdate, context: Context) -> float:
    """‖ΔW‖²."""
    if not update.terms:
        return float(update.delta_weight().double().square().sum()) if update.products else 0.0
    out, into = update.terms[0].lora_B.shape[0], update.terms[0].lora_A.shape[1]
    step = max(1, memory.WIDE_ENTRIES // max(into, 1))
    factors = [(term.lora_B.load().double() * term.scale, term.lora_A.load().double()) for term in update.terms]
    total = 0.0
    for start in range(0, out, step):
        context.check()
        tile = sum((ups[start : start + step] @ downs for ups, downs in factors[1:]),
                   start=factors[0][0][start : start + step] @ factors[0][1])  # fmt: skip
        total += float(tile.square().sum())
    return total

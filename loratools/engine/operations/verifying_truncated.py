"""Whether a module whose rank was lowered leaves as much of `Σ w ΔW` as its report says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from loratools.adapters import AbstractUpdate
from loratools.engine.context import Context
from loratools.engine.operations.claims import Product
from loratools.engine.verdicts import GOOD, Verdict

_TOLERANCE: Final = (1e-4, 1e-6)
"""Relative and absolute."""
_ENTRIES: Final = 2**18


def residual_as_told(
    own: AbstractUpdate, held: Sequence[tuple[float, AbstractUpdate]], told: float, context: Context
) -> Verdict:
    """‖Σ w ΔW − Δ̂‖/‖Σ w ΔW‖ by row tiles in float64, a way of its own, against the residual that the report gives."""
    terms = [(1.0, own), *((-weight, update) for weight, update in held)]
    made = [
        Product.of("", [(each.lora_A, each.lora_B, weight * each.scale) for each in update.products], transposed=False)
        for weight, update in terms
        if update.products
    ]
    rows, columns = made[0].left.shape[0], made[0].right.shape[1]
    if any((each.left.shape[0], each.right.shape[1]) != (rows, columns) for each in made):
        return Verdict("reshaped")
    rest = squares = 0.0
    for start in range(0, rows, step := max(1, _ENTRIES // max(columns, 1))):
        context.check()
        mine = slice(start, min(start + step, rows))
        kept = made[0].left[mine] @ made[0].right
        wanted = -sum((each.left[mine] @ each.right for each in made[1:]), start=kept.new_zeros(()))
        rest, squares = rest + float((wanted - kept).square().sum()), squares + float(wanted.square().sum())
    found = math.sqrt(rest / squares) if squares else math.inf
    relative, absolute = _TOLERANCE
    if abs(found - told) <= relative * told + absolute:
        return Verdict(GOOD, "residual", detail=f"{found:.6g}")
    return Verdict("other", None, detail=f"its residual is {found:.6g}, the report says {told:.6g}")

"""The norm of an update through its factors, and what brings it down to a cap."""

from __future__ import annotations

import math
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.algebra import concatenated
from loratools.adapters.experts import Stacked
from loratools.engine.context import Context
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError

SLACK: Final = 1e-9
"""By so much a norm may exceed the cap: alpha was rounded, and a second time is to change nothing."""


def capped(unit: Unit, update: AbstractUpdate, context: Context) -> tuple[float, dict[str, Any]]:
    """The factor that brings ‖ΔW‖_F down to `parameters["cap"]` (1 where it is not above), and what to report.

    Raises:
        NonFiniteError: the norm is beyond float64.
    """
    cap = float(unit.parameters["cap"])
    if not update.changes_weight:
        return 1.0, {}
    norm = norm_of(unit.target, update, context)
    factor = cap / norm if norm > cap * (1 + SLACK) else 1.0
    return factor, {"norm_before": norm, "factor": factor, "norm_after": norm * factor}


def norm_of(path: str, update: AbstractUpdate, context: Context) -> float:
    """‖ΔW‖_F of products; of stacked experts, over all of them.

    Raises:
        NonFiniteError: it is beyond float64.
    """
    from loratools.linalg import product_norm

    if isinstance(update, Stacked):
        norms = []
        for expert in range(update.experts):
            context.check()
            norms.append(product_norm(*concatenated(update.part(expert))))
        norm = math.hypot(*norms)
    else:
        norm = product_norm(*concatenated(update)) if update.products else 0.0
    if not math.isfinite(norm):
        raise NonFiniteError("‖ΔW‖ is larger than float64 can say.", fix="Scale it down first (--by).", module=path)
    return norm

"""A multiple of ΔW that factors say instead of alpha: all of it in one, or its root in both."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.experts import Stacked
from loratools.engine.context import Context
from loratools.errors import InternalError
from loratools.files import scaled_exactly


def in_factors(
    target: str, update: AbstractUpdate, weight: float, factor: str, context: Context
) -> tuple[AbstractUpdate, dict[str, Any]]:
    """`weight · ΔW` with the same alpha, and what to report: the factors that had to become float32.

    ΔW is multiplied once whichever factor takes it: by `weight` in `lora_A` or `lora_B`, by √|weight| in `both`, where
    `lora_B` has the sign. A bias takes the weight itself.
    """
    if not isinstance(update, (LowRank, Stacked)):
        raise InternalError("This kind has no lora_A and lora_B.", module=target, kind=update.kind)
    if weight == 1:
        return update, {}
    root = math.sqrt(abs(weight))
    shares = {"lora_A": {"lora_A": weight}, "lora_B": {"lora_B": weight}}.get(
        factor, {"lora_A": root, "lora_B": math.copysign(root, weight)}
    )
    if isinstance(update, LowRank) and update.bias is not None:
        shares["bias"] = weight
    fresh: dict[str, Any] = {}
    for name, share in shares.items():
        tensor = scaled_exactly(getattr(update, name), share)
        fresh[name] = context.sink.keep(f"{target}.{name}", tensor)
        del tensor
    widened = [name for name, ref in fresh.items() if ref.dtype != getattr(update, name).dtype]
    return dataclasses.replace(update, **fresh), {"widened": widened}

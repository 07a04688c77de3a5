"""A module at fewer ranks than it was decomposed at: its figures, and its update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

_CERTAIN: Final = 1e-6  # relative rounding error of a residual
_HIDDEN: Final = 0.5  # share of a residual² that may be doubtful where something is still said about it


def numbers(facts: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The report's figures at a rank, from those of the unit that decomposed it at a higher one.

    ‖ΔW − ΔW_r‖² is the residual² that was measured there, and the σ² that are cut off: the remainder ΔW − U S Vᵀ is
    orthogonal to V. No difference is taken, so nothing cancels.
    """
    sigma2 = facts["sigma2"]
    norm2 = facts["norm"] ** 2
    at_cap = (facts["residual"] * facts["norm"]) ** 2
    left = at_cap + math.fsum(sigma2[rank:])
    certificate, kind = _certificate(facts, at_cap, left) if rank else (None, None)
    return {
        "rank": rank,
        "captured": min(math.fsum(sigma2[:rank]) / norm2, 1.0) if rank else 0.0,
        "residual": math.sqrt(left / norm2) if rank else 1.0,
        "certificate": certificate,
        "certificate_kind": kind,
        "clipped": False,
        "reached": True,
    }


def _certificate(facts: Mapping[str, Any], at_cap: float, left: float) -> tuple[float | None, str | None]:
    """The certificate at a lower rank, from that at the cap.

    Singular values of a projection are not above those of ΔW, one by one; what the first of them lack is therefore not
    more than what all lack, and this is at most residual² − optimum² at the cap, or residual² where no more is known.
    """
    known = facts["certificate"]
    lacking = at_cap if known is None else at_cap - at_cap / (1 + known) ** 2
    if lacking > _HIDDEN * left or left <= 0:
        return None, None
    return 1 / math.sqrt(1 - lacking / left) - 1 + _CERTAIN, facts["certificate_kind"] or "proven"

"""Pure tensor functions: truncated SVD, QR core, rank rules, exact addition, rounding. One algorithm per file.

Nothing here opens a file, prints, or starts a thread; every function runs on the device of its arguments. Names are
imported when they are first asked for: a planner wants to know sizes long before torch has to be there.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from loratools.linalg._addition import LowRankSum, add_low_rank, low_rank_delta, subtract_low_rank
    from loratools.linalg._core import truncate_low_rank
    from loratools.linalg._info import SVDInfo
    from loratools.linalg._rank import rank_for_energy, rank_for_error
    from loratools.linalg._rounding import non_finite_count, round_to, ulp
    from loratools.linalg._streamed import AbstractRows
    from loratools.linalg._truncated_svd import balanced_factors, truncated_svd
    from loratools.linalg._workspace import PRESETS, workspace_bytes

__all__ = [
    "PRESETS",
    "AbstractRows",
    "LowRankSum",
    "SVDInfo",
    "add_low_rank",
    "balanced_factors",
    "low_rank_delta",
    "non_finite_count",
    "rank_for_energy",
    "rank_for_error",
    "round_to",
    "subtract_low_rank",
    "truncate_low_rank",
    "truncated_svd",
    "ulp",
    "workspace_bytes",
]

_HOMES: Final = MappingProxyType(
    {
        "PRESETS": "_workspace",
        "AbstractRows": "_streamed",
        "LowRankSum": "_addition",
        "SVDInfo": "_info",
        "add_low_rank": "_addition",
        "balanced_factors": "_truncated_svd",
        "low_rank_delta": "_addition",
        "non_finite_count": "_rounding",
        "rank_for_energy": "_rank",
        "rank_for_error": "_rank",
        "round_to": "_rounding",
        "subtract_low_rank": "_addition",
        "truncate_low_rank": "_core",
        "truncated_svd": "_truncated_svd",
        "ulp": "_rounding",
        "workspace_bytes": "_workspace",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"loratools.linalg.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

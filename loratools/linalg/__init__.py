"""Pure tensor functions: truncated SVD, QR core, rank rules, exact addition, rounding. One algorithm per file.

Nothing here opens a file, prints, or starts a thread; every function runs on the device of its arguments.
"""

from loratools.linalg._addition import LowRankSum, add_low_rank, low_rank_delta, subtract_low_rank
from loratools.linalg._core import truncate_low_rank
from loratools.linalg._info import SVDInfo
from loratools.linalg._rank import rank_for_energy, rank_for_error
from loratools.linalg._rounding import non_finite_count, round_to, ulp
from loratools.linalg._truncated_svd import PRESETS, balanced_factors, truncated_svd
from loratools.linalg._workspace import workspace_bytes

__all__ = [
    "PRESETS",
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

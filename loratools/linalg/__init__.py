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
    from loratools.linalg._batch import batch_size, truncated_svd_batch
    from loratools.linalg._budget import Allotment, Spectrum, allocate_ranks, uniform_rank
    from loratools.linalg._combine_core_space import core_space
    from loratools.linalg._combine_iso_c import iso_c
    from loratools.linalg._combine_karcher import karcher_coefficients
    from loratools.linalg._combine_knots import knots
    from loratools.linalg._combine_model_stock import model_stock_ratio
    from loratools.linalg._combine_rows import Deltas, Dropped, Largest, Sampled, combined_rows
    from loratools.linalg._combine_slerp import slerp_coefficients
    from loratools.linalg._combine_ties import ties
    from loratools.linalg._combine_tsv import tsv
    from loratools.linalg._core import truncate_low_rank
    from loratools.linalg._counter_random import random_key, uniform
    from loratools.linalg._directions import DirectionProbe
    from loratools.linalg._exact_product import ExactFactor, exact_product, inverse_of_positive
    from loratools.linalg._exact_sums import SquareSums, square_sums
    from loratools.linalg._gram import product_gram
    from loratools.linalg._grid import grid_step, rounded_from, rounding_edges, to_grid
    from loratools.linalg._info import SVDInfo
    from loratools.linalg._joint import core_bases, joint_cores, principal_angles
    from loratools.linalg._kronecker import truncate_kronecker
    from loratools.linalg._magnitude_threshold import magnitude_threshold
    from loratools.linalg._noise import RoundingNoise, noise_edge, noise_margin
    from loratools.linalg._product_norm import product_norm
    from loratools.linalg._rank import (
        rank_above,
        rank_at_knee,
        rank_for_cumulative,
        rank_for_energy,
        rank_for_error,
        rank_for_fro,
        rank_for_ratio,
    )
    from loratools.linalg._reduction import Reduced, reduce_low_rank
    from loratools.linalg._reversal import Corrections, corrected, corrections, risky_count
    from loratools.linalg._rounding import non_finite_count, round_to, ulp
    from loratools.linalg._rules import WHOLE_SPECTRUM, RankRules, given_rule, require_in_range
    from loratools.linalg._streamed import ChunkedRows
    from loratools.linalg._truncated_svd import balanced_factors, truncated_svd
    from loratools.linalg._underflow import flushes, gradual_underflow
    from loratools.linalg._weighted import input_weights, truncated_svd_weighted
    from loratools.linalg._workspace import PRESETS, combining_bytes, noise_bytes, workspace_bytes

__all__ = [
    "PRESETS",
    "WHOLE_SPECTRUM",
    "AbstractPruning",
    "Allotment",
    "ChunkedRows",
    "Corrections",
    "Deltas",
    "DirectionProbe",
    "Dropped",
    "ExactFactor",
    "Largest",
    "LowRankSum",
    "RankRules",
    "Reduced",
    "RoundingNoise",
    "SVDInfo",
    "Sampled",
    "Spectrum",
    "SquareSums",
    "add_low_rank",
    "allocate_ranks",
    "balanced_factors",
    "batch_size",
    "combined_rows",
    "combining_bytes",
    "core_bases",
    "core_space",
    "corrected",
    "corrections",
    "exact_product",
    "flushes",
    "given_rule",
    "gradual_underflow",
    "grid_step",
    "input_weights",
    "inverse_of_positive",
    "iso_c",
    "joint_cores",
    "karcher_coefficients",
    "knots",
    "low_rank_delta",
    "magnitude_threshold",
    "model_stock_ratio",
    "noise_bytes",
    "noise_edge",
    "noise_margin",
    "non_finite_count",
    "principal_angles",
    "product_gram",
    "product_norm",
    "random_key",
    "rank_above",
    "rank_at_knee",
    "rank_for_cumulative",
    "rank_for_energy",
    "rank_for_error",
    "rank_for_fro",
    "rank_for_ratio",
    "reduce_low_rank",
    "require_in_range",
    "risky_count",
    "round_to",
    "rounded_from",
    "rounding_edges",
    "slerp_coefficients",
    "square_sums",
    "subtract_low_rank",
    "ties",
    "to_grid",
    "truncate_kronecker",
    "truncate_low_rank",
    "truncated_svd",
    "truncated_svd_batch",
    "truncated_svd_weighted",
    "tsv",
    "ulp",
    "uniform",
    "uniform_rank",
    "workspace_bytes",
]

_HOMES: Final = MappingProxyType(
    {
        "PRESETS": "_workspace",
        "Allotment": "_budget",
        "noise_bytes": "_workspace",
        "WHOLE_SPECTRUM": "_rules",
        "RankRules": "_rules",
        "RoundingNoise": "_noise",
        "noise_edge": "_noise",
        "noise_margin": "_noise",
        "given_rule": "_rules",
        "Reduced": "_reduction",
        "reduce_low_rank": "_reduction",
        "grid_step": "_grid",
        "rounded_from": "_grid",
        "rounding_edges": "_grid",
        "to_grid": "_grid",
        "ChunkedRows": "_streamed",
        "Corrections": "_reversal",
        "corrected": "_reversal",
        "corrections": "_reversal",
        "risky_count": "_reversal",
        "DirectionProbe": "_directions",
        "LowRankSum": "_addition",
        "SVDInfo": "_info",
        "Spectrum": "_budget",
        "ExactFactor": "_exact_product",
        "exact_product": "_exact_product",
        "inverse_of_positive": "_exact_product",
        "SquareSums": "_exact_sums",
        "square_sums": "_exact_sums",
        "flushes": "_underflow",
        "gradual_underflow": "_underflow",
        "add_low_rank": "_addition",
        "allocate_ranks": "_budget",
        "balanced_factors": "_truncated_svd",
        "core_bases": "_joint",
        "joint_cores": "_joint",
        "principal_angles": "_joint",
        "product_norm": "_product_norm",
        "input_weights": "_weighted",
        "low_rank_delta": "_addition",
        "non_finite_count": "_rounding",
        "rank_above": "_rank",
        "rank_at_knee": "_rank",
        "rank_for_cumulative": "_rank",
        "rank_for_energy": "_rank",
        "rank_for_error": "_rank",
        "rank_for_fro": "_rank",
        "rank_for_ratio": "_rank",
        "require_in_range": "_rules",
        "round_to": "_rounding",
        "subtract_low_rank": "_addition",
        "truncate_kronecker": "_kronecker",
        "truncate_low_rank": "_core",
        "truncated_svd": "_truncated_svd",
        "truncated_svd_batch": "_batch",
        "batch_size": "_batch",
        "truncated_svd_weighted": "_weighted",
        "core_space": "_combine_core_space",
        "iso_c": "_combine_iso_c",
        "karcher_coefficients": "_combine_karcher",
        "knots": "_combine_knots",
        "model_stock_ratio": "_combine_model_stock",
        "Deltas": "_combine_rows",
        "AbstractPruning": "_combine_rows",
        "Dropped": "_combine_rows",
        "Largest": "_combine_rows",
        "Sampled": "_combine_rows",
        "combined_rows": "_combine_rows",
        "combining_bytes": "_workspace",
        "slerp_coefficients": "_combine_slerp",
        "ties": "_combine_ties",
        "tsv": "_combine_tsv",
        "random_key": "_counter_random",
        "uniform": "_counter_random",
        "product_gram": "_gram",
        "magnitude_threshold": "_magnitude_threshold",
        "ulp": "_rounding",
        "uniform_rank": "_budget",
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

"""The rules that say how much of a matrix to keep: their names, their ranges. Known before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypedDict

from loratools.errors import UsageError


class RankRules(TypedDict, total=False):
    """Rules beside a rank, an energy and an error; see `truncated_svd`.

    Attributes:
        sv_ratio: keep σ_i ≥ σ_1/sv_ratio.
        sv_cumulative: keep the least r with Σ_{i≤r} σ_i ≥ sv_cumulative·Σσ.
        sv_fro: keep the least r with ‖M_r‖ ≥ sv_fro·‖M‖.
        knee: keep what comes before the knee of the singular values.
        floor: keep σ_i > floor.
    """

    sv_ratio: float | None
    sv_cumulative: float | None
    sv_fro: float | None
    knee: bool
    floor: float | None


WHOLE_SPECTRUM: Final = frozenset({"sv_cumulative", "knee"})
"""Rules that need every singular value, and so the dense path."""

_RANGES: Final[Mapping[str, tuple[str, Callable[[float], bool]]]] = MappingProxyType(
    {
        "rank": ("be at least 1", lambda value: value >= 1),
        "energy": ("lie in (0, 1]", lambda value: 0 < value <= 1),
        "error": ("lie in [0, 1)", lambda value: 0 <= value < 1),
        "sv_ratio": ("be at least 1", lambda value: 1 <= value < math.inf),
        "sv_cumulative": ("lie in (0, 1]", lambda value: 0 < value <= 1),
        "sv_fro": ("lie in (0, 1]", lambda value: 0 < value <= 1),
        "floor": ("be a number of at least 0", lambda value: 0 <= value < math.inf),
    }
)


def given_rule(rules: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The one rule that is given, checked; None where none is. A value of None or False gives none.

    Args:
        rules: name → value, among `rank`, `energy`, `error` and those of `RankRules`.

    Raises:
        UsageError: more than one, or one out of its range.
    """
    given = [(name, value) for name, value in rules.items() if value is not None and value is not False]
    if len(given) > 1:
        names = " and ".join(name for name, _ in given)
        raise UsageError(f"{names} are different rules for the rank.", fix="Give one of them.")
    for name, value in given:
        require_in_range(name, value)
    return given[0] if given else None


def require_in_range(name: str, value: Any) -> None:
    """Refuse a value that the rule has no meaning for.

    Raises:
        UsageError: names the rule, the value and the range.
    """
    if name in _RANGES:
        words, holds = _RANGES[name]
        if not holds(value):
            raise UsageError(f"{name} must {words}.", **{name: value})

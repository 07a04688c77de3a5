"""How much of a module's ΔW an extraction keeps: one rule for all, and ranks for some."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.adapters import Selection
from loratools.adapters.selection import matches_any
from loratools.engine import budgets
from loratools.errors import UsageError

AUTO: Final = "auto"
FALLBACK: Final = 0.9
"""The energy that `auto` keeps where a difference is not of low rank and noise."""
RULES: Final = ("rank", "energy", "error", "sv_ratio", "sv_cumulative", "sv_fro", "knee")


@dataclasses.dataclass(frozen=True, slots=True)
class SvdOptions:
    """How a module's ΔW is truncated; exactly one of `RULES` once checked.

    Attributes:
        rank: a number, or `auto`: what stands out of the rounding noise of the tuned checkpoint.
        energy: see `loratools.linalg.truncated_svd`, as for the other rules.
        error: the same.
        max_rank: cap on what a rule chooses.
        preset: effort of the SVD.
        seed: of its sketch.
        sv_ratio: a rule.
        sv_cumulative: a rule.
        sv_fro: a rule.
        knee: a rule.
        budget: a rule over all modules: bytes of the weights file.
        uniform_rank: with a budget, one rank for all.
        rank_pattern: (pattern, rank) pairs that stand above the rule; the first that matches a module decides.
    """

    rank: int | str | None
    energy: float | None
    error: float | None
    max_rank: int
    preset: str
    seed: int
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    knee: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    budget: int | None = None
    uniform_rank: bool = False

    def checked(self, default_rank: int) -> SvdOptions:
        """With the default rank where no rule was given.

        Raises:
            UsageError: several rules, a value outside its range, an unknown preset.
        """
        from loratools.linalg import PRESETS, given_rule, require_in_range

        budgets.require_sensible(self.budget, uniform=self.uniform_rank)
        rules = {name: getattr(self, name) for name in RULES}
        if self.budget is not None:
            self._require_alone(rules)
        elif isinstance(self.rank, str):
            if self.rank != AUTO:
                raise UsageError("A rank is a number, or the word auto.", rank=self.rank)
            given_rule({**rules, "rank": 1})
        elif given_rule(rules) is None:
            return dataclasses.replace(self, rank=default_rank).checked(default_rank)
        require_in_range("rank", self.max_rank)
        for pattern, rank in self.rank_pattern:
            if rank < 1:
                raise UsageError("A rank is at least 1.", pattern=pattern, rank=rank)
        if self.preset not in PRESETS:
            raise UsageError("There is no such preset.", fix=f"Choose one of {', '.join(PRESETS)}.", preset=self.preset)
        return self

    def _require_alone(self, rules: Mapping[str, Any]) -> None:
        given = [name for name, value in rules.items() if value is not None and value is not False]
        if given:
            raise UsageError(f"{given[0]} and budget are different rules for the rank.", fix="Give one of them.")
        if self.rank_pattern:
            raise UsageError("A budget decides about every module's rank.", fix="Leave out --rank-pattern.")

    def require_weighable(self) -> None:
        """Refuse rules that are meant in the plain norm, where activations weigh.

        Raises:
            UsageError: `auto` or a budget.
        """
        if self.rank == AUTO or self.budget is not None:
            rule = "--budget" if self.budget is not None else "--rank auto"
            raise UsageError(f"{rule} decides by ΔW as it is, not as activations weigh it.", fix="Give another rule.")

    def require_matches(self, paths: Sequence[str]) -> None:
        """Refuse a pattern for ranks that no module matches.

        Raises:
            UsageError: names it.
        """
        for pattern, _ in self.rank_pattern:
            Selection((pattern,)).selected(paths)

    def of_module(self, *paths: str) -> SvdOptions:
        """The options of one module, by any of the paths that it goes by."""
        for pattern, rank in self.rank_pattern:
            if any(matches_any((pattern,), path) for path in paths):
                none = dict.fromkeys(RULES[1:-1])
                return dataclasses.replace(self, **none, rank=rank, knee=False, rank_pattern=())  # type: ignore[arg-type]
        return dataclasses.replace(self, rank_pattern=())

    @property
    def cap(self) -> int:
        """The largest rank that can come out."""
        return self.rank if isinstance(self.rank, int) else self.max_rank

    def limit(self, rows: int, columns: int, count: int = 1) -> int:
        """The same for matrices of a shape, of which `count` share a rank."""
        matrix = budgets.Matrix(rows, columns, count)
        return min(self.cap, rows, columns) if self.budget is None else matrix.ceiling(self.cap, self.budget)

    @property
    def effort(self) -> str:
        """The preset whose memory is needed: some rules are dense whatever the preset."""
        from loratools.linalg import WHOLE_SPECTRUM

        return "exact" if any(getattr(self, name) for name in WHOLE_SPECTRUM) else self.preset

    def noise_bytes(self, rows: int, columns: int) -> int:
        """What looking at the rounding noise of a matrix takes."""
        if self.rank != AUTO:
            return 0
        from loratools.linalg import noise_bytes

        return noise_bytes(rows, columns)

    def arguments(self) -> dict[str, Any]:
        """What a unit says of it: the rule that is given, and the rest."""
        rules = {name: getattr(self, name) for name in RULES}
        given = {name: value for name, value in rules.items() if value is not None and value is not False}
        return {**given, "max_rank": max(self.max_rank, self.cap), "preset": self.preset, "seed": self.seed}

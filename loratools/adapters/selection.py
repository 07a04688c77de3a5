"""Which modules a command is about: `--include` and `--exclude`.

A pattern is a glob that must match a module path from a dot boundary to its end: `q_proj` and
`layers.0.*` do what they look like. `*` crosses dots, `?` is one character, `{10-20}` an integer in
that range, `{a,b}` one of the two. `re:` introduces a regular expression, searched anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Final

from loratools.adapters import _globs
from loratools.errors import UsageError
from loratools.patterns import MAX_EXPRESSION, Allowance, CostlyExpressionError, InvalidExpressionError

_REGULAR: Final = "re:"


def _matches(pattern: str, path: str, allowance: Allowance) -> bool:
    """Whether one pattern matches `path`.

    Raises:
        UsageError: it is empty, too long, no valid expression, or takes too long to match.
    """
    if not pattern.startswith(_REGULAR):
        return _globs.fits(_parts(pattern), path)
    _require_length(pattern)
    try:
        return allowance.finds(pattern.removeprefix(_REGULAR), path)
    except InvalidExpressionError as error:
        raise UsageError(f"This is not a valid pattern: {error}.", pattern=pattern) from error
    except CostlyExpressionError as error:
        raise UsageError(
            f"This pattern is not matched: {error}.",
            fix="Avoid repetitions inside of repetitions, or write a glob.",
            pattern=pattern,
            module=path,
        ) from error


@functools.lru_cache(maxsize=256)
def _parts(pattern: str) -> tuple[_globs.Token, ...]:
    _require_length(pattern)
    return _globs.tokens(pattern)


def _require_length(pattern: str) -> None:
    if not 0 < len(pattern) <= MAX_EXPRESSION:
        raise UsageError(f"A pattern must have between 1 and {MAX_EXPRESSION} characters.", pattern=pattern)


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """`include` (empty: everything) minus `exclude`.

    Law: `selected(paths)` keeps order, and every pattern matches at least one path or is an error.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def selected(self, paths: Iterable[str]) -> list[str]:
        """The paths that are chosen.

        Raises:
            UsageError: a pattern is none, matches nothing or takes too long, or nothing is left.
        """
        known = list(paths)
        if not self.include and not self.exclude:
            return known
        allowance = Allowance()
        included = _union(self.include, known, allowance) if self.include else set(known)
        excluded = _union(self.exclude, known, allowance)
        chosen = [path for path in known if path in included and path not in excluded]
        if known and not chosen:
            raise UsageError("The patterns leave no module.", fix="`loratools inspect --modules` lists them.")
        return chosen


def _union(patterns: Iterable[str], paths: Iterable[str], allowance: Allowance) -> set[str]:
    """The paths that one of the patterns matches; each must match one."""
    union: set[str] = set()
    for pattern in patterns:
        found = {path for path in paths if _matches(pattern, path, allowance)}
        if not found:
            raise UsageError(
                "The pattern matches no module.", fix="`loratools inspect --modules` lists them.", pattern=pattern
            )
        union |= found
    return union


def matches_any(patterns: Iterable[str], path: str) -> bool:
    """Whether one of `patterns` matches `path`.

    Raises:
        UsageError: a pattern is none, or takes too long.
    """
    allowance = Allowance()
    return any(_matches(pattern, path, allowance) for pattern in patterns)

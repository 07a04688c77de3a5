"""Which modules a command is about: `--include` and `--exclude`.

A pattern is a glob that must match a module path from a dot boundary to its end: `q_proj` and
`layers.0.*` do what they look like. `*` crosses dots, `?` is one character, `{10-20}` an integer in
that range, `{a,b}` one of the two. `re:` introduces a regular expression, searched anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

from loratools.errors import UsageError

_MAX_PATTERN = 2000


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression for one pattern, to be used with `search`.

    Raises:
        UsageError: it is empty, too long, or not a valid expression.
    """
    if not pattern or len(pattern) > _MAX_PATTERN:
        raise UsageError("A pattern must have between 1 and 2000 characters.", pattern=pattern)
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        return re.compile(rf"(?:^|\.){_glob(pattern)}$")
    except re.error as error:
        raise UsageError(f"This is not a valid pattern: {error}.", pattern=pattern) from error


def _glob(pattern: str) -> str:
    pieces = re.split(r"(\*+|\?|\{[^{}]*\})", pattern)
    return "".join(_piece(piece) for piece in pieces)


def _piece(piece: str) -> str:
    if piece.startswith("*"):
        return ".*"
    if piece == "?":
        return "."
    if piece.startswith("{") and piece.endswith("}"):
        bounds = re.fullmatch(r"\{(\d+)-(\d+)\}", piece)
        if bounds is None:
            return f"(?:{'|'.join(re.escape(choice) for choice in piece[1:-1].split(','))})"
        low, high = int(bounds[1]), int(bounds[2])
        if high < low or high - low > 100_000:  # noqa: PLR2004
            raise UsageError("A range must run upwards, and over at most 100000 integers.", pattern=piece)
        return f"(?:{'|'.join(str(value) for value in range(low, high + 1))})"
    return re.escape(piece)


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
            UsageError: a pattern matches nothing, or nothing is left.
        """
        known = list(paths)
        if not self.include and not self.exclude:
            return known
        for pattern in (*self.include, *self.exclude):
            if not any(compiled(pattern).search(path) for path in known):
                raise UsageError(
                    "The pattern matches no module.",
                    fix="`loratools inspect --modules` lists them.",
                    pattern=pattern,
                )
        chosen = [path for path in known if self.wants(path)]
        if known and not chosen:
            raise UsageError("The patterns leave no module.", fix="`loratools inspect --modules` lists them.")
        return chosen

    def wants(self, path: str) -> bool:
        """Whether `path` is chosen."""
        included = not self.include or any(compiled(pattern).search(path) for pattern in self.include)
        return included and not any(compiled(pattern).search(path) for pattern in self.exclude)


def matches_any(patterns: Iterable[str], path: str) -> bool:
    """Whether one of `patterns` matches `path`."""
    return any(compiled(pattern).search(path) for pattern in patterns)

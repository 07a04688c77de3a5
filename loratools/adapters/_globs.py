"""Globs over module paths, in time that grows with the length of pattern and path, and no faster."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from loratools.errors import UsageError

Token = str | range | tuple[str, ...] | None
"""Literal text; an integer of a range; one of several texts; any characters (None). `?` is `_ANY`."""

_ANY: Final = ""
_SPECIAL: Final = re.compile(r"(\*+|\?|\{[^{}]*\})")
_RANGE: Final = re.compile(r"\{(\d+)-(\d+)\}", re.ASCII)
_LONGEST_RANGE: Final = 100_000


def tokens(pattern: str) -> tuple[Token, ...]:
    """The parts of a glob.

    Raises:
        UsageError: a range runs downwards, or is too long.
    """
    return tuple(_token(piece) for piece in _SPECIAL.split(pattern) if piece)


def _token(piece: str) -> Token:
    if piece.startswith("*"):
        return None
    if piece == "?":
        return _ANY
    if not (piece.startswith("{") and piece.endswith("}")):
        return piece
    bounds = _RANGE.fullmatch(piece)
    if bounds is None:
        return tuple(piece[1:-1].split(","))
    low, high = int(bounds[1]), int(bounds[2])
    if high < low or high - low > _LONGEST_RANGE:
        raise UsageError("A range must run upwards, and over at most 100000 integers.", pattern=piece)
    return range(low, high + 1)


def fits(parts: Iterable[Token], path: str) -> bool:
    """Whether the glob matches `path` from a dot boundary to its end.

    All ways to match are followed side by side, as the set of places that they have reached.
    """
    reached = {0, *(at + 1 for at, character in enumerate(path) if character == ".")}
    for part in parts:
        reached = _after(part, path, reached)
        if not reached:
            return False
    return len(path) in reached


def _after(part: Token, path: str, reached: set[int]) -> set[int]:
    """Where `part` can end when it begins at one of `reached`."""
    if part is None:
        return set(range(min(reached), len(path) + 1))
    if part == _ANY:
        return {at + 1 for at in reached if at < len(path)}
    if isinstance(part, str):
        return {at + len(part) for at in reached if path.startswith(part, at)}
    if isinstance(part, tuple):
        return {at + len(text) for at in reached for text in part if path.startswith(text, at)}
    digits = range(len(str(part[0])), len(str(part[-1])) + 1)
    return {at + count for at in reached for count in digits if _is_in(part, path[at : at + count], count)}


def _is_in(numbers: range, text: str, count: int) -> bool:
    """Whether `text` is one of `numbers`, as Python writes it: all of its digits, and no leading zero."""
    plain = len(text) == count and text.isascii() and text.isdigit() and (count == 1 or text[0] != "0")
    return plain and int(text) in numbers

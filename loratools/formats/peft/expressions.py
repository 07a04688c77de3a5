"""The keys of `rank_pattern` and `alpha_pattern`: regular expressions, written by strangers.

Python's `re` backtracks, so an expression of twenty characters can run for hours on a name of thirty. What could do
that is refused before it runs; no pattern that PEFT writes, or that its documentation shows, is among it.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from loratools.errors import MalformedError, UnsupportedError

_MAX_KEY: Final = 2000
_MAX_MODULE: Final = 1000
_MAX_REPETITIONS: Final = 4
_PIECE: Final = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[*+?]|\{\d*,?\d*\}|[()|]|.", re.DOTALL)
_LOOSE: Final = re.compile(r"[*+]|\{\d*,?\d*\}")
"""A quantifier that can repeat: all but `?`."""


def matches(key: str, module: str, *, file: str, field: str) -> bool:
    r"""Whether `re.match(rf"(.*\.)?({key})$", module)` holds, as in `peft.utils.other.get_pattern_key`.

    Raises:
        MalformedError: `key` is no expression.
        UnsupportedError: it could run for hours.
    """
    if len(key) > _MAX_KEY:
        raise _too_long(key, file, field)
    return _matches(rf"(.*\.)?({key})$", key, module, file, field)


def matches_whole(key: str, module: str, *, file: str, field: str) -> bool:
    """Whether `re.fullmatch(key, module)` holds, as in `feedforward_modules` of IA3; a list of plain names may be long.

    Raises:
        MalformedError, UnsupportedError: see `matches`.
    """
    if len(key) > _MAX_KEY and _LOOSE.search(key):
        raise _too_long(key, file, field)
    return _matches(rf"({key})\Z", key, module, file, field)


def _matches(expression: str, key: str, module: str, file: str, field: str) -> bool:
    if not _is_tame(key) or (len(module) > _MAX_MODULE and _LOOSE.search(key)):
        raise _too_long(key, file, field)
    try:
        return _compiled(expression).match(module) is not None
    except re.error as error:
        raise MalformedError(f"{error}.", file=file, field=field, key=key) from error


def _too_long(key: str, file: str, field: str) -> UnsupportedError:
    return UnsupportedError(
        "This pattern could take hours to match, and is not tried.",
        fix="Name the modules plainly.",
        file=file,
        field=field,
        key=key,
    )


@functools.lru_cache(maxsize=65536)
def _compiled(expression: str) -> re.Pattern[str]:
    """The cache of `re` holds 512, and a large model has more modules."""
    return re.compile(expression)


@functools.lru_cache(maxsize=65536)
def _is_tame(key: str) -> bool:
    """No repeated group that itself repeats or branches, and few repetitions: at worst a low power of the length."""
    groups = [False]  # for every open group: does it repeat or branch inside?
    closed = False
    repetitions = 0
    for piece in _PIECE.findall(key):
        if _LOOSE.fullmatch(piece):
            if closed:
                return False
            repetitions += 1
        groups[-1] |= piece == "|" or _LOOSE.fullmatch(piece) is not None
        closed = False
        if piece == "(":
            groups.append(False)
        elif piece == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
    return repetitions <= _MAX_REPETITIONS

"""Regular expressions that somebody else wrote, matched in bounded time.

Python's `re` backtracks without a limit: `(a+)+$` on forty letters runs for hours. The expressions here come from
files of strangers and from command lines, so they are matched by the `regex` package, which takes a time limit. It
reads the language of `re` as `re` does (its version 0), except for the few constructs that are refused below.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from typing import Any, Final, final

MAX_EXPRESSION: Final = 2000
MAX_TEXT: Final = 1000
"""Longer texts are not matched: between two looks at the clock the engine may go through the text 65,536 times."""

_TOO_LONG: Final = "it takes too long"
_SECONDS: Final = 5.0
_SECONDS_EACH: Final = 0.25  # an honest expression takes microseconds
_PIECE: Final = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[0-9]*,?[0-9]*\}|.", re.DOTALL)
_QUANTIFIER: Final = re.compile(r"\{(?:(\d+)(?:,\d*)?|,\d*)\}", re.ASCII)
_MOST_UNROLLED: Final = 10_000


class InvalidExpressionError(ValueError):
    """The text is no regular expression, or one that is not read here; the message says why."""


class CostlyExpressionError(Exception):
    """Matching was not tried, or was given up; the message says why."""


@final
class Allowance:
    """The time that the expressions of one file, or of one command, may take in all.

    Time is what this thread computes, compiling included, so that a busy machine refuses nothing.

    Args:
        total: seconds for all calls together.
        each: seconds for one call.
    """

    def __init__(self, total: float = _SECONDS, each: float = _SECONDS_EACH) -> None:
        self._left = total
        self._each = each

    def matches(self, expression: str, text: str) -> bool:
        """Whether `re.match(expression, text)` finds something.

        Raises:
            InvalidExpressionError: it is no expression.
            CostlyExpressionError: it or `text` is too long, or the time is up.
        """
        return self._tried(expression, text, "match")

    def finds(self, expression: str, text: str) -> bool:
        """Whether `re.search(expression, text)` finds something.

        Raises:
            InvalidExpressionError, CostlyExpressionError: as in `matches`.
        """
        return self._tried(expression, text, "search")

    def spend(self, seconds: float) -> None:
        """Take off time that the caller spent on the same expressions in another way.

        Raises:
            CostlyExpressionError: nothing is left.
        """
        self._left -= seconds
        if self._left <= 0:
            raise CostlyExpressionError(_TOO_LONG)

    def _tried(self, expression: str, text: str, method: str) -> bool:
        if len(expression) > MAX_EXPRESSION:
            raise CostlyExpressionError(f"it has more than {MAX_EXPRESSION} characters")
        if len(text) > MAX_TEXT:
            raise CostlyExpressionError(f"the name has more than {MAX_TEXT} characters")
        if self._left <= 0:
            raise CostlyExpressionError(_TOO_LONG)
        start = time.thread_time()
        try:
            found = getattr(_compiled(expression), method)(text, timeout=min(self._left, self._each))
        except TimeoutError:
            raise CostlyExpressionError(_TOO_LONG) from None
        finally:
            self._left -= time.thread_time() - start
        return found is not None


@functools.lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    """The expression for `regex`, once `re` has accepted it: what only `regex` knows is refused, not obeyed."""
    import regex  # takes a while to import, and is needed only where somebody wrote an expression

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
            _require_common(expression)
            return regex.compile(expression, regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise InvalidExpressionError(str(error) or "it is nested too deeply") from None


def _require_common(expression: str) -> None:
    """Refuse what is literal text to `re` and something else to `regex`, and what it would unroll into gigabytes."""
    unrolled = 1
    for piece in _PIECE.findall(expression):
        quantifier = _QUANTIFIER.fullmatch(piece)
        if quantifier:
            unrolled *= int(quantifier[1] or 1) or 1
        elif piece.startswith("{"):  # `a{e}` is a fuzzy match
            raise InvalidExpressionError("a brace that is no quantifier must be escaped")
        elif piece.startswith("[") and "[:" in piece:  # `[[:alpha:]]` is a class of POSIX
            raise InvalidExpressionError("a character class must not hold `[:`")
        if unrolled > _MOST_UNROLLED:
            raise InvalidExpressionError(f"its repetitions multiply to more than {_MOST_UNROLLED}")

r"""`rank_pattern` and `alpha_pattern`: which key is a module's.

PEFT takes the first key in stored order for which `re.match(rf"(.*\.)?({key})$", module)` holds, and otherwise the
module's own name (`peft.utils.other.get_pattern_key`). Nearly all keys are plain names, of which a configuration can
have a hundred thousand: those are looked up. The others are matched one by one, in bounded time.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, final

from loratools.errors import MalformedError, UnsupportedError
from loratools.patterns import Allowance, CostlyExpressionError, InvalidExpressionError

_SPECIAL: Final = re.compile(r"[\\^$|?*+()\[{]")
_ESCAPED: Final = re.compile(r"(\^?)((?:[^\\^$.|?*+()\[{]|\\[^0-9A-Za-z])+)")
"""A name as `re.escape` writes it, with or without an anchor."""

_Pieces = tuple[int, ...]


@final
class ModuleKeys:
    """The keys of one pattern.

    Args:
        keys: in stored order.
        where: what an error names, such as `file` and `field`.
    """

    def __init__(self, keys: Iterable[str], **where: str) -> None:
        self._keys = list(keys)
        self._where = where
        self._allowance = Allowance()
        self._whole: dict[str, int] = {}
        self._suffixes: dict[str, int] = {}
        self._expressions: list[int] = []
        self._of_length: defaultdict[int, list[int]] = defaultdict(list)
        self._plain: dict[int, dict[_Pieces, dict[str, int]]] = {}
        for position, key in enumerate(self._keys):
            if not _SPECIAL.search(key):
                self._of_length[len(key)].append(position)
            elif escaped := _ESCAPED.fullmatch(key):
                known = self._whole if escaped[1] else self._suffixes
                known.setdefault(re.sub(r"\\(.)", r"\1", escaped[2], flags=re.DOTALL), position)
            else:
                self._expressions.append(position)

    def first(self, module: str) -> str | None:
        """The first key that matches, if one does.

        Raises:
            MalformedError: a key is no expression.
            UnsupportedError: a key takes too long to match.
        """
        named = min(self._named(module), default=len(self._keys))
        for position in self._to_try(module):
            if position > named:
                break
            if self._matches(self._keys[position], module):
                return self._keys[position]
        return self._keys[named] if named < len(self._keys) else None

    def idle(self, modules: Iterable[str]) -> list[str]:
        """The keys that match none of `modules`.

        Raises:
            MalformedError, UnsupportedError: as in `first`.
        """
        listed = list(modules)
        used = {position for module in listed for position in self._named(module)}
        for position in sorted({position for module in listed for position in self._to_try(module)} - used):
            if any(self._matches(self._keys[position], module) for module in listed):
                used.add(position)
        return [key for position, key in enumerate(self._keys) if position not in used]

    def _to_try(self, module: str) -> Iterable[int]:
        """Positions of the keys that a look-up does not settle. A dot, and `$`, are odd about line breaks."""
        return range(len(self._keys)) if "\n" in module else self._expressions

    def _named(self, module: str) -> list[int]:
        """Positions of the keys that are names and match."""
        start = time.thread_time()
        found = list(self._names_of(module))
        try:
            self._allowance.spend(time.thread_time() - start)  # keys can be made so that there is much to look up
        except CostlyExpressionError as error:
            raise self._costly(error, module=module) from error
        return found

    def _names_of(self, module: str) -> Iterator[int]:
        if "\n" in module:
            return
        if module in self._whole:
            yield self._whole[module]
        for suffix in suffixes(module):
            if suffix in self._suffixes:
                yield self._suffixes[suffix]
            for pieces, names in self._plain_of(len(suffix)).items():
                position = names.get(_with_dots(suffix, pieces))
                if position is not None:
                    yield position

    def _plain_of(self, length: int) -> dict[_Pieces, dict[str, int]]:
        """Plain keys of one length, by the lengths of the pieces between their dots, each of which fits any character.

        Sorted out when a module first has a suffix of that length: few lengths occur.
        """
        if length not in self._plain:
            groups: defaultdict[_Pieces, dict[str, int]] = defaultdict(dict)
            for position in self._of_length.pop(length, ()):
                key = self._keys[position]
                groups[tuple(map(len, key.split(".")))][key] = position
            self._plain[length] = dict(groups)
        return self._plain[length]

    def _matches(self, key: str, module: str) -> bool:
        try:
            return self._allowance.matches(rf"(.*\.)?({key})$", module)
        except InvalidExpressionError as error:
            raise MalformedError(f"A key is no regular expression: {error}.", **self._where, key=key) from error
        except CostlyExpressionError as error:
            raise self._costly(error, key=key, module=module) from error

    def _costly(self, error: CostlyExpressionError, **place: str) -> UnsupportedError:
        return UnsupportedError(
            f"The keys here are not matched: {error}.", fix="Name the modules plainly.", **self._where, **place
        )


def matches_whole(expression: str, module: str, **where: str) -> bool:
    """Whether an expression matches a module's whole path, as PEFT reads a text in `target_modules`.

    Raises:
        MalformedError, UnsupportedError: as of `ModuleKeys.first`.
    """
    return ModuleKeys([f"^(?:{expression})$"], **where).first(module) is not None


def suffixes(module: str) -> Iterator[str]:
    """The path itself, and what follows each of its dots."""
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.find(".", at + 1)


def _with_dots(text: str, pieces: _Pieces) -> str:
    """`text` with a dot wherever a key of such pieces has one."""
    if len(pieces) == 1:
        return text
    parts, at = [], 0
    for length in pieces:
        parts.append(text[at : at + length])
        at += length + 1
    return ".".join(parts)

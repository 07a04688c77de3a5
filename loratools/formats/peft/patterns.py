r"""`rank_pattern` and `alpha_pattern`: which key is a module's.

PEFT takes the first key in stored order for which `re.match(rf"(.*\.)?({key})$", module)` holds, and otherwise the
module's own name (`peft.utils.other.get_pattern_key`). Nearly all keys are plain names, of which a configuration can
have a hundred thousand: those are looked up. The others are matched one by one, in bounded time.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, final

from loratools.errors import MalformedError, UnsupportedError
from loratools.patterns import Allowance, CostlyExpressionError, InvalidExpressionError

_SPECIAL: Final = re.compile(r"[\\^$|?*+()\[{]")
_ESCAPED: Final = re.compile(r"(\^?)([^\\^$.|?*+()\[{]*(?:\\[^0-9A-Za-z][^\\^$.|?*+()\[{]*)*)")
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
                known.setdefault(_unescaped(escaped[2]), position)
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

    def ending(self, module: str) -> Iterator[str]:
        r"""The keys for which `re.match(rf".*\.{key}$", module)` holds: the rule of FourierFT and C3A.

        Raises:
            MalformedError, UnsupportedError: as in `first`.
        """
        if "\n" not in module:
            yield from (self._keys[position] for end in list(suffixes(module))[1:] for position in self._ends(end))
        for position in self._to_try(module):
            if self._matches(self._keys[position], module, r".*\.{}$"):
                yield self._keys[position]

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
            yield from self._ends(suffix)

    def _ends(self, suffix: str) -> Iterator[int]:
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

    def _matches(self, key: str, module: str, rule: str = r"(.*\.)?({})$") -> bool:
        try:
            return self._allowance.matches(rule.format(key), module)
        except InvalidExpressionError as error:
            raise MalformedError(f"A key is no regular expression: {error}.", **self._where, key=key) from error
        except CostlyExpressionError as error:
            raise self._costly(error, key=key, module=module) from error

    def _costly(self, error: CostlyExpressionError, **place: str) -> UnsupportedError:
        return UnsupportedError(
            f"The keys here are not matched: {error}.", fix="Name the modules plainly.", **self._where, **place
        )


@final
class ModulePattern(Mapping[str, Any]):
    """A `rank_pattern` or `alpha_pattern`, ready for many modules.

    Args:
        pattern: the field's value.
        where: as in `ModuleKeys`.

    Raises:
        MalformedError: it is no object.
    """

    def __init__(self, pattern: Any, **where: str) -> None:
        if not isinstance(pattern, Mapping):
            raise MalformedError("A pattern must be an object.", **where)
        self._values = pattern
        self._keys = ModuleKeys(pattern, **where)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def key(self, module: str) -> str:
        """The key that PEFT takes for `module`, which may be in vain: `a+b` does not match itself.

        Raises:
            MalformedError, UnsupportedError: see `ModuleKeys.first`.
        """
        found = self._keys.first(module)
        return module if found is None else found


@final
class WholeExpression:
    """An expression that a module's whole path must match, as `feedforward_modules` of IA3.

    Args:
        expression: alternatives that are escaped names may be many.
        where: as in `ModuleKeys`.
    """

    def __init__(self, expression: str, **where: str) -> None:
        self._expression, self._where = expression, where
        self._allowance = Allowance()
        escaped = [_ESCAPED.fullmatch(name) for name in expression.split("|")]
        plain = [each[2] for each in escaped if each and not each[1]]
        self._names = {_unescaped(name) for name in plain} if len(plain) == len(escaped) else None

    def matches(self, module: str) -> bool:
        """Whether `re.fullmatch(expression, module)` holds.

        Raises:
            MalformedError: it is no expression.
            UnsupportedError: it takes too long to match.
        """
        if self._names is not None:
            return module in self._names
        try:
            return self._allowance.matches(rf"(?:{self._expression})\Z", module)
        except InvalidExpressionError as error:
            raise MalformedError(f"This is no regular expression: {error}.", **self._where) from error
        except CostlyExpressionError as error:
            raise UnsupportedError(
                f"The expression is not matched: {error}.",
                fix="Name the modules plainly.",
                **self._where,
                module=module,
            ) from error


def prepared(config: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """`config` with what many modules will be matched with sorted out once: patterns, and an expression of IA3."""
    made: dict[str, Any] = dict(config)
    for field in ("alpha_pattern", "rank_pattern"):
        if isinstance(made.get(field), Mapping):
            made[field] = ModulePattern(made[field], file=file, field=field)
    if isinstance(made.get("feedforward_modules"), str):
        made["feedforward_modules"] = WholeExpression(
            made["feedforward_modules"], file=file, field="feedforward_modules"
        )
    return made


def _unescaped(name: str) -> str:
    if "\\\\" in name:
        return re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL)
    return name.replace("\\", "")  # ten times as fast, and there can be a hundred thousand


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

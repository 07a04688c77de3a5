"""Lists of names that PEFT matches with a module's path as plain text, ready for many paths."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, final

from loratools.errors import MalformedError

_FEW: Final = 16
_LONG: Final = 512


def listed(config: Mapping[str, Any], field: str, *, file: str) -> list[str]:
    """The names in a field; none where it is not set.

    Raises:
        MalformedError: it is no list of names.
    """
    value = config.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedError("This field must be a list of names.", file=file, field=field, value=value)
    return value


@final
class Endings:
    """Names that end a path, at a dot or not: `path.endswith(tuple(names))`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._turned = _shortest(name[::-1] for name in names)

    def end(self, path: str) -> bool:
        """Whether one of the names ends `path`."""
        return _start(self._turned, path[::-1]) is not None


@final
class Anywhere:
    """Names that stand anywhere in a path: `any(name in path for name in names)`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = _shortest(names)
        self._known = frozenset(self._names)
        self._longest = max(map(len, self._names), default=0)

    def find(self, path: str) -> str | None:
        """A name that is in `path`, if one is."""
        if path in self._known:
            return path
        if len(self._names) <= _FEW or len(path) > _LONG:  # looking at every place of a long path would be quadratic
            return next((name for name in self._names if name in path), None)
        starts = (_start(self._names, path[at : at + self._longest]) for at in range(len(path) + 1))
        return next((name for name in starts if name is not None), None)


def begins_another(start: str, names: Sequence[str]) -> bool:
    """Whether `start` begins one of the sorted names other than itself."""
    following = bisect.bisect_right(names, start)
    return following < len(names) and names[following].startswith(start)


def _shortest(names: Iterable[str]) -> list[str]:
    """The names that begin with no other one, sorted: of those, one that begins a text stands right before it."""
    found: list[str] = []
    for name in sorted(set(names)):
        if not found or not name.startswith(found[-1]):
            found.append(name)
    return found


def _start(names: list[str], text: str) -> str | None:
    at = bisect.bisect_right(names, text)
    return names[at - 1] if at and text.startswith(names[at - 1]) else None

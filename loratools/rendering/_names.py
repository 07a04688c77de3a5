"""Names from strangers' files, and numbers, as people read them."""

from __future__ import annotations

import re
from typing import Final

from loratools.errors import printable

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_PIECE: Final = 200  # `printable` shortens what is longer
_LINE_ENDS: Final = {0x2028: "\\u2028", 0x2029: "\\u2029"}
_THOUSAND: Final = 1000
_KIBI: Final = 1024


def shown(name: str) -> str:
    """A name on one line, safe for a terminal; a long one is shortened."""
    return printable(name).translate(_LINE_ENDS)


def sentence(text: str) -> str:
    """A note, safe for a terminal, whole."""
    return "".join(shown(text[start : start + _PIECE]) for start in range(0, len(text), _PIECE))


def number_of(label: str, *, default: int) -> int:
    """The integer that a name component is, written the one way that a list's index is written."""
    return int(label) if _NUMBER.fullmatch(label) else default


def dimensions(shape: tuple[int, ...] | list[int] | None) -> str:
    """`4096 × 1024`; `scalar` for no axes; nothing for no shape."""
    if shape is None:
        return ""
    return " × ".join(str(extent) for extent in shape) or "scalar"


def count(number: int) -> str:
    """Three significant digits: `1.10 B`, `124 M`, `38.6 K`; exact below a thousand."""
    if number < _THOUSAND:
        return str(number)
    value = float(number)
    for unit in ("K", "M", "B"):
        value /= _THOUSAND
        digits = f"{value:#.3g}"
        if "e" not in digits:  # a thousand of them, once rounded
            return f"{digits.rstrip('.')} {unit}"
    return f"{value / _THOUSAND:.2f} T"


def size(number: int) -> str:
    """`2.2 GiB`; exact below a KiB."""
    if number < _KIBI:
        return f"{number} B"
    value = float(number)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= _KIBI
        if round(value, 1) < _KIBI:
            return f"{value:.1f} {unit}"
    return f"{value / _KIBI:.1f} PiB"

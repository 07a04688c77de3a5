"""Lines of text for people: a headline, labelled rows, notes; tables; sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loratools.errors import printable

_STEP: Final = 1024
_SHOWN: Final = 3
_ONE_LINE: Final = {ord("\n"): "\\n", ord("\t"): "\\t"}
"""A name in a note may hold a line break; it must not look like a line of ours."""


def size(nbytes: float) -> str:
    """Bytes for people: `4.2 MiB`."""
    if nbytes < _STEP:
        return f"{nbytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= _STEP
        if nbytes < _STEP:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / _STEP:.2f} TiB"


def count(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    known = list(names)
    rest = f", … ({len(known)} in all)" if len(known) > _SHOWN else ""
    return ", ".join(printable(name) for name in known[:_SHOWN]) + rest


def counted(numbers: Mapping[str, int]) -> str:
    """`24 merged, 12 copied`: what there is none of goes unsaid."""
    return ", ".join(f"{number:,} {what}" for what, number in numbers.items() if number) or "none"


def page(headline: str, rows: Iterable[tuple[str, str]], notes: Sequence[str] = ()) -> list[str]:
    """A headline, labelled rows without the empty ones, and notes."""
    filled = [(label, text) for label, text in rows if text]
    width = max((len(label) for label, _ in filled), default=0)
    lines = [headline, *(f"  {label:<{width}}  {text}" for label, text in filled)]
    return [*lines, *(f"  note: {note.translate(_ONE_LINE)}" for note in notes)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their contents, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

"""Columns of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(rows: Sequence[Sequence[str]], *, right: int) -> Iterator[str]:
    """Lines with columns two spaces apart; the last `right` columns, of numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = len(widths) - right
    for row in rows:
        cells = [
            cell.rjust(width) if index >= numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()

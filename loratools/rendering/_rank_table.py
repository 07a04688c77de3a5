"""The table to choose a rank from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratools.rendering._names import shown, size
from loratools.rendering._table import table


def choices(document: Mapping[str, Any]) -> Iterator[str]:
    """Rank, size and error of an adapter."""
    if not document["table"]:
        return
    whole = f", {size(document['whole'])} of it stored whole" if document.get("whole") else ""
    yield ""
    yield f"An adapter of the difference{whole}:"
    head = ("rank", "size", "captured", "residual", "worst", "of module")
    rows = [
        (
            str(row["rank"]),
            size(row["bytes"]),
            f"{row['captured']:.4%}",
            f"{row['residual']:.3g}",
            f"{row['worst']['residual']:.3g}",
            shown(row["worst"]["name"]),
        )
        for row in document["table"]
    ]
    yield from table([head, *rows], right=len(head) - 1)

"""The module tree as text: name, kind, shape, parameters, in columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratools.rendering._names import dimensions, sentence, shown
from loratools.rendering._outline import Entry, Graph, outline
from loratools.rendering._table import table

_TITLES: Final = ("module", "kind", "shape", "dtype", "parameters")
_DTYPE: Final = 3
_FOLDED: Final = "×N: N modules of equal names, kinds, shapes and dtypes, shown once; equal layout, not equal weights."
_CUT: Final = "…: there are modules below this one."


def tree(report: Graph, depth: int | None = None) -> str:
    """The tree; equal numbered layers are folded, and a note says so."""
    root = outline(report, depth)
    rows = [_TITLES, *_rows(root, "", "")]
    if len({node.dtype for node in report.nodes if node.dtype is not None}) < 2:  # noqa: PLR2004  it would say nothing
        rows = [row[:_DTYPE] + row[_DTYPE + 1 :] for row in rows]
    entries = list(_entries(root))
    notes = [note for note, wanted in ((_FOLDED, _any_folded(entries)), (_CUT, _any_cut(entries))) if wanted]
    return "\n".join([*table(rows, right=1), *(f"note: {sentence(note)}" for note in (*notes, *report.notes))])


def _rows(entry: Entry, lead: str, below: str) -> Iterator[tuple[str, ...]]:
    node = entry.node
    times = f" ×{entry.times}" if entry.times > 1 else ""
    kind = "" if node.kind == "container" else node.kind
    name = f"{lead}{entry.label}{times}{' …' if entry.cut else ''}"
    yield name, kind, dimensions(node.shape), node.dtype or "", _size(entry)
    last = len(entry.children) - 1
    for index, child in enumerate(entry.children):
        branch, rest = ("└─ ", "   ") if index == last else ("├─ ", "│  ")
        yield from _rows(child, below + branch, below + rest)


def _size(entry: Entry) -> str:
    """The parameters; of one of a fold, with how many there are of it, so that the column can be added up."""
    if entry.node.tied_to is not None:
        return f"= {shown(entry.node.tied_to)}"
    return f"{entry.times} × {entry.node.parameters:,}" if entry.times > 1 else f"{entry.node.parameters:,}"


def _entries(entry: Entry) -> Iterator[Entry]:
    yield entry
    for child in entry.children:
        yield from _entries(child)


def _any_folded(entries: list[Entry]) -> bool:
    return any(entry.times > 1 for entry in entries)


def _any_cut(entries: list[Entry]) -> bool:
    return any(entry.cut for entry in entries)

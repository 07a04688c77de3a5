"""The module tree for Mermaid (https://mermaid.js.org/syntax/flowchart.html), folded, as GitHub renders it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import Final

from loratools.rendering._names import dimensions, shown
from loratools.rendering._outline import Entry, Graph, outline

MAX_LINKS: Final = 500
"""How many links Mermaid draws unless its site allows more (`maxEdges`)."""

_UNSAFE: Final = re.compile(r"[^\w .,:=×–-]|_(?=_)")


def mermaid(report: Graph, depth: int | None = None) -> str:
    """The tree as a flowchart; equal numbered layers are folded."""
    root = outline(report, depth)
    numbers = count()
    lines = list(_lines(root, next(numbers), numbers))
    links = sum(" --> " in line for line in lines)
    if links > MAX_LINKS:
        lines.insert(0, f"  %% {links} links: Mermaid draws {MAX_LINKS} by default. Show fewer levels.")
    return "\n".join(["flowchart LR", *lines]) + "\n"


def _lines(entry: Entry, number: int, numbers: count[int]) -> Iterator[str]:
    yield f'  n{number}["{_label(entry)}"]'
    for child in entry.children:
        below = next(numbers)
        yield from _lines(child, below, numbers)
        yield f"  n{number} --> n{below}"


def _label(entry: Entry) -> str:
    node = entry.node
    times = f" ×{entry.times}" if entry.times > 1 else ""
    kind = "" if node.kind == "container" else node.kind
    tied = f"= {shown(node.tied_to)}" if node.tied_to is not None else ""
    facts = " ".join(each for each in (kind, dimensions(node.shape), tied) if each)
    return _escaped(f"{entry.label}{times}{': ' if facts else ''}{facts}")


def _escaped(text: str) -> str:
    """Every character that Mermaid, Markdown or HTML could take for more than itself, as `#code;`."""
    return _UNSAFE.sub(lambda found: f"#{ord(found[0])};", text)

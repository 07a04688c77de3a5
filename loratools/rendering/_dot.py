"""The module tree for Graphviz (https://graphviz.org/doc/info/lang.html): every module is a node, nothing is folded."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.rendering._names import dimensions, shown
from loratools.rendering._outline import Graph, Node, last


def dot(report: Graph, depth: int | None = None) -> str:
    """The tree as a digraph; identifiers are our own, names stand in labels only."""
    return "\n".join(_lines(report, depth)) + "\n"


def _lines(report: Graph, depth: int | None) -> Iterator[str]:
    above = {below: above for above, below in report.edges}
    levels: dict[str, int] = {}
    numbers: dict[str, int] = {}
    yield f"digraph {_quoted(shown(report.model))} {{"
    yield '  rankdir="LR";'
    yield '  node [shape="box"];'
    for node in report.nodes:
        parent = above.get(node.name)
        levels[node.name] = levels[parent] + 1 if parent is not None else 0
        if depth is not None and levels[node.name] > depth:
            continue
        numbers[node.name] = len(numbers)
        yield f"  n{numbers[node.name]} [label={_quoted(_label(report, node, parent))}];"
        if parent is not None:
            yield f"  n{numbers[parent]} -> n{numbers[node.name]};"
    yield "}"


def _label(report: Graph, node: Node, parent: str | None) -> str:
    name = shown(report.model if parent is None else last(parent, node.name))
    tied = f"= {shown(node.tied_to)}" if node.tied_to is not None else f"{node.parameters:,}"
    return "\n".join(line for line in (name, f"{node.kind} {dimensions(node.shape)}".strip(), tied) if line)


def _quoted(text: str) -> str:
    r"""A string of the DOT language whose label reads `text`.

    Inside quotes only `\"` is special to the language; labels read `\n`, `\N`, … and HTML entities too.
    """
    escaped = text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

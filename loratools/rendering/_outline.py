"""A module tree with its repetitions folded: numbered siblings of equal content become one entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from loratools.rendering._names import number_of, shown


class Node(Protocol):
    """What is asked of a node: values that do not change."""

    @property
    def name(self) -> str:
        """The module path; empty for the model itself."""

    @property
    def kind(self) -> str:
        """What the module is."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of its weight, if it has one."""

    @property
    def dtype(self) -> str | None:
        """The dtype of its weight, if it has one."""

    @property
    def parameters(self) -> int:
        """The number of its parameters and of all below it."""

    @property
    def tied_to(self) -> str | None:
        """The module whose matrix this one's weight is."""


class Graph(Protocol):
    """What is asked of a report on a module tree."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def nodes(self) -> Sequence[Node]:
        """Each before those that it contains; the model first."""

    @property
    def edges(self) -> Sequence[tuple[str, str]]:
        """Container and contained."""

    @property
    def notes(self) -> Sequence[str]:
        """What cannot be seen from the nodes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One line of an outline.

    Attributes:
        label: the last component of the name, or the first and last number of a fold; printable.
        node: the node, the first one of a fold.
        times: how many siblings it stands for.
        children: what is below; of the first one of a fold.
        cut: whether something below is not shown.
    """

    label: str
    node: Node
    times: int
    children: tuple[Entry, ...]
    cut: bool


def outline(report: Graph, depth: int | None = None) -> Entry:
    """The tree, folded, `depth` levels deep.

    Law: siblings fold only if they are numbered without a gap and all that is below them agrees, shown
    or not: names, kinds, shapes, dtypes, parameters, ties.
    """
    nodes = {node.name: node for node in report.nodes}
    children: dict[str, list[str]] = {name: [] for name in nodes}
    for above, below in report.edges:
        children[above].append(below)
    contents = _contents(report.nodes, children)
    root = report.nodes[0]

    def entry(label: str, name: str, times: int, left: int | None) -> Entry:
        if left == 0:
            return Entry(label, nodes[name], times, (), cut=bool(children[name]))
        rest = None if left is None else left - 1
        runs = _runs(name, children[name], contents)
        below = tuple(entry(_label(name, run), run[0], len(run), rest) for run in runs)
        return Entry(label, nodes[name], times, below, cut=False)

    return entry(shown(report.model), root.name, 1, depth)


def _contents(nodes: Sequence[Node], children: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Name → a number that two nodes share if and only if they are equal but for their own names."""
    numbers: dict[object, int] = {}
    found: dict[str, int] = {}
    for node in reversed(nodes):
        below = tuple(sorted((last(node.name, name), found[name]) for name in children[node.name]))
        key = (node.kind, node.shape, node.dtype, node.parameters, node.tied_to, below)
        found[node.name] = numbers.setdefault(key, len(numbers))
    return found


def _runs(above: str, names: Sequence[str], contents: Mapping[str, int]) -> list[list[str]]:
    """Siblings in runs of consecutive numbers and equal content; everything else alone."""
    runs: list[list[str]] = []
    due = -1
    for name in names:
        number = number_of(last(above, name), default=-1)
        if runs and number == due and contents[runs[-1][0]] == contents[name]:
            runs[-1].append(name)
        else:
            runs.append([name])
        due = number + 1 if number >= 0 else -2
    return runs


def _label(above: str, run: Sequence[str]) -> str:
    first = shown(last(above, run[0]))
    return first if len(run) == 1 else f"{first}–{shown(last(above, run[-1]))}"


def last(above: str, name: str) -> str:
    """What a name adds to that of its container."""
    return name[len(above) + 1 :] if above else name

"""graph: the module tree of a checkpoint, from tensor names and shapes alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from loratools import rendering
from loratools.adapters import Selection
from loratools.checkpoints import Checkpoint, Module, facts, owner
from loratools.engine.reports import AbstractReport, version
from loratools.errors import MalformedError, UsageError
from loratools.files import open_checkpoint
from loratools.files.locate import Source

VIEWS: Final[Mapping[str, Callable[[GraphReport], str]]] = MappingProxyType(
    {
        "tree": lambda report: rendering.tree(report, report.depth),
        "json": lambda report: json.dumps(report.to_json(), indent=2),
        "dot": lambda report: rendering.dot(report, report.depth),
        "mermaid": lambda report: rendering.mermaid(report, report.depth),
    }
)
"""What a report can be rendered as."""

MAX_DEPTH: Final = 200  # real models have about ten; every level of a hostile name would cost its whole length again


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A module: one that owns tensors, or one that only contains others.

    Attributes:
        name: the module path; empty for the model itself.
        kind: `model`, `container`, or the kind of a module that owns tensors.
        shape: of its weight as stored, or of its only tensor; None where neither is.
        dtype: of the same; all of its dtypes, joined, where it has several tensors and no weight.
        parameters: its own and all below it, a tied matrix once, at the embedding.
        tied_to: the module whose matrix this one's weight is.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    dtype: str | None
    parameters: int
    tied_to: str | None = None

    @property
    def depth(self) -> int:
        """The number of components of the name."""
        return self.name.count(".") + 1 if self.name else 0

    def to_json(self) -> dict[str, Any]:
        """The node as JSON; `tied_to` only where there is something to say."""
        shape = list(self.shape) if self.shape is not None else None
        node = {"name": self.name, "kind": self.kind, "shape": shape, "parameters": self.parameters}
        return {**node, "dtype": self.dtype, **({"tied_to": self.tied_to} if self.tied_to is not None else {})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphReport(AbstractReport):
    """A module tree.

    Attributes:
        model: a base name; never a path.
        nodes: each before those that it contains; numbered siblings in the order of their numbers.
        edges: container and contained, by name.
        notes: what cannot be seen from the nodes.
        view: how `text` shows it if not told.
        depth: how many name components are shown; None is all.
    """

    model: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    view: str = "tree"
    depth: int | None = None

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "graph"

    def text(self, view: str | None = None) -> str:
        """The tree in one of `VIEWS`.

        Raises:
            UsageError: there is no such view.
        """
        return _view_named(view or self.view)(self)

    def to_json(self) -> dict[str, Any]:
        """See `AbstractReport.to_json`; nothing is folded, and what lies below `depth` is left out."""
        shown = [node for node in self.nodes if self.depth is None or node.depth <= self.depth]
        names = {node.name for node in shown}
        return {
            "schema": "loratools/graph/1",
            "loratools": version(),
            "model": self.model,
            "depth": self.depth,
            "notes": list(self.notes),
            "nodes": [node.to_json() for node in shown],
            "edges": [{"from": above, "to": below} for above, below in self.edges if below in names],
        }


def graph(
    model: Source | Checkpoint,
    *,
    view: str = "tree",
    depth: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> GraphReport:
    """The module tree of `model`; reads headers and configurations only.

    Args:
        model: a checkpoint.
        view: `tree`, `json`, `dot` or `mermaid`: what the report's `text` gives.
        depth: show so many name components; parameters are counted below it all the same.
        include: patterns of modules to show, with what contains them; default all.
        exclude: patterns of modules not to show.

    Raises:
        UsageError: a pattern matches no module, or there is no such view or depth.
        InputDataError: a file breaks its rules, or is of a kind that is not read.
    """
    _view_named(view)
    if depth is not None and depth < 1:
        raise UsageError("The depth is the number of levels to show.", fix="Give 1 or more.", depth=depth)
    checkpoint = open_checkpoint(model)
    chosen = Selection(tuple(include), tuple(exclude)).selected(checkpoint.modules)
    tie = facts.tie_of(checkpoint, set(chosen))
    children = _children(chosen, checkpoint.name)
    order = _preorder(children)
    return GraphReport(
        model=checkpoint.name,
        nodes=_nodes(checkpoint, order, set(chosen), tie),
        edges=tuple((above, below) for above in order for below in children[above]),
        notes=_notes(checkpoint, chosen, tie),
        view=view,
        depth=depth,
    )


def _view_named(view: str) -> Callable[[GraphReport], str]:
    if view not in VIEWS:
        raise UsageError("There is no such view.", fix=f"Take one of {', '.join(VIEWS)}.", view=view)
    return VIEWS[view]


def _children(paths: Iterable[str], model: str) -> dict[str, list[str]]:
    """Module path → the paths right below it; containers that own nothing are there too."""
    found: dict[str, list[str]] = {"": []}
    for path in paths:
        if path.count(".") >= MAX_DEPTH:
            raise MalformedError(f"A module lies more than {MAX_DEPTH} levels deep.", module=path, model=model)
        new = []
        while path not in found:  # what contains it, up to what is known
            found[path] = []
            new.append(path)
            path = owner(path)[0]  # noqa: PLW2901  the way up
        for below in reversed(new):
            found[owner(below)[0]].append(below)
    for siblings in found.values():
        siblings.sort(key=_number)  # stable: what has no number keeps the file's order
    return found


def _number(path: str) -> int:
    return rendering.number_of(path.rpartition(".")[2], default=-1)


def _preorder(children: Mapping[str, Sequence[str]]) -> list[str]:
    order, waiting = [], [""]
    while waiting:
        path = waiting.pop()
        order.append(path)
        waiting.extend(reversed(children[path]))
    return order


def _nodes(
    checkpoint: Checkpoint, order: Sequence[str], chosen: Collection[str], tie: facts.Tie | None
) -> tuple[Node, ...]:
    modules = checkpoint.modules
    totals = {path: facts.counted(modules[path], tie) if path in chosen else 0 for path in order}
    for path in reversed(order):
        if path:
            totals[owner(path)[0]] += totals[path]
    heads = {owner(tie.tensor)[0]: owner(tie.same_as)[0]} if tie is not None else {}
    return tuple(
        _node(path, modules[path] if path in chosen else None, totals[path], heads.get(path)) for path in order
    )


def _node(path: str, module: Module | None, parameters: int, tied_to: str | None) -> Node:
    if module is None:
        return Node(path, "container" if path else "model", None, None, parameters, tied_to)
    shape, dtype = facts.face(module)
    return Node(path, module.kind if path else "model", shape, dtype, parameters, tied_to)


def _notes(checkpoint: Checkpoint, chosen: Sequence[str], tie: facts.Tie | None) -> tuple[str, ...]:
    notes = list(checkpoint.notes)
    if len(chosen) < len(checkpoint.modules):
        notes.append(f"{len(chosen)} of {len(checkpoint.modules)} modules were selected.")
    if tie is not None:
        stored = "is stored as well" if tie.stored else "is not stored"
        notes.append(f"{tie.tensor} is tied to {tie.same_as} ({tie.evidence}) and {stored}.")
    return tuple(notes)

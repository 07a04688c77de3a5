"""Module trees as rendering takes them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Node:
    name: str
    kind: str = "linear"
    shape: tuple = (2, 2)
    dtype: str = "F32"
    parameters: int = 4
    tied_to: str = None


@dataclasses.dataclass(frozen=True)
class Graph:
    model: str
    nodes: tuple
    edges: tuple
    notes: tuple = ()


def graph(*leaves, model="tiny", notes=()):
    """A report on these leaves, and the containers that their names imply."""
    given = {leaf.name: leaf for leaf in (Node(leaf) if isinstance(leaf, str) else leaf for leaf in leaves)}
    nodes, edges = {"": Node("", "model", None, None, sum(leaf.parameters for leaf in given.values()))}, []
    for name, leaf in given.items():
        pieces = name.split(".")
        for end in range(1, len(pieces) + 1):
            path = ".".join(pieces[:end])
            if path not in nodes:
                inside = sum(each.parameters for other, each in given.items() if other.startswith(f"{path}."))
                nodes[path] = leaf if end == len(pieces) else Node(path, "container", None, None, inside)
                edges.append((".".join(pieces[: end - 1]), path))
    return Graph(model, tuple(nodes.values()), tuple(edges), notes)


def layers(count, *names, **facts):
    """`layers.0` to `layers.<count - 1>` with these modules in each."""
    return [Node(f"layers.{number}.{name}", **facts) for number in range(count) for name in names]


HOSTILE = (
    'q"uote', "new\nline", "\x1b[31mred", "[x](y){z}", "<script>alert(1)</script>", "back\\slash\\", "&lt;", "%% c",
    "#35;", "`code`", "a --> b", "\u202eevil", "end", "subgraph", "_x_ **y**", "|pipe|", "semi;colon", "\\N\\G", "'",
)  # fmt: skip

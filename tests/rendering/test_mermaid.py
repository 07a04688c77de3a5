import re

import pytest

from loratools import rendering
from loratools.rendering import _mermaid, _names
from tests.rendering.trees import HOSTILE, Node, graph, layers

NODE = re.compile(r'  (n\d+)\["((?:[\w .,:=×–-]|#\d+;)+)"\]')
LINK = re.compile(r"  (n\d+) --> (n\d+)")


def parsed(text):
    """Labels by identifier, and links; every line must be one of the three that we mean to write."""
    assert text.endswith("\n")
    head, *rest = text.splitlines()
    assert head == "flowchart LR"
    nodes, links = {}, []
    for line in rest:
        if line.startswith("  %% "):
            continue
        if found := NODE.fullmatch(line):
            assert found[1] not in nodes
            nodes[found[1]] = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), found[2])
        else:
            links.append(LINK.fullmatch(line).groups())
    assert all(end in nodes for link in links for end in link)
    assert len(links) == len(nodes) - 1
    return nodes, links


def test_layers_fold():
    nodes, _ = parsed(rendering.mermaid(graph(*layers(32, "q", "k"), Node("head", parameters=0, tied_to="embed"))))
    assert list(nodes.values()) == [
        "tiny: model",
        "layers",
        "0–31 ×32",
        "q: linear 2 × 2",
        "k: linear 2 × 2",
        "head: linear 2 × 2 = embed",
    ]


def test_depth_cuts():
    nodes, _ = parsed(rendering.mermaid(graph(*layers(2, "q"), "norm"), 1))
    assert list(nodes.values()) == ["tiny: model", "layers", "norm: linear 2 × 2"]


def test_hostile_names_are_text():
    nodes, _ = parsed(rendering.mermaid(graph(*HOSTILE, model='"]; click n0 "javascript:x"')))
    assert {label.removesuffix(": linear 2 × 2") for label in nodes.values()} >= {
        _names.shown(name) for name in HOSTILE
    }


@pytest.mark.parametrize(("count", "said"), [(499, False), (501, True)])
def test_a_graph_that_mermaid_would_not_draw_says_so(count, said):
    text = rendering.mermaid(graph(*[f"m{n}" for n in range(count)]))
    assert (f"%% {count} links" in text) is said
    assert said is (text.count("-->") > _mermaid.MAX_LINKS)
    parsed(text)

import html
import json
import re
import shutil
import subprocess

import pytest

from loratools import rendering
from tests.rendering.trees import HOSTILE, Node, graph, layers

DOT = shutil.which("dot")
graphviz = pytest.mark.skipif(DOT is None, reason="Graphviz is not installed")


def drawn(text):
    """What Graphviz read: labels of nodes, number of edges."""
    done = subprocess.run([DOT, "-Tjson"], input=text, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    document = json.loads(done.stdout)
    return [each["label"] for each in document["objects"]], len(document["edges"])


def test_nothing_is_folded():
    text = rendering.dot(graph(*layers(3, "a", "b")))
    assert text.count("[label=") == 1 + 1 + 3 + 6
    assert text.count(" -> ") == 10


def test_depth_cuts():
    text = rendering.dot(graph(*layers(3, "a"), "norm"), 2)
    assert re.findall(r'label="(\w+)', text) == ["tiny", "layers", "0", "1", "2", "norm"]
    assert text.count(" -> ") == 5


@graphviz
def test_graphviz_reads_every_node_and_edge():
    labels, edges = drawn(rendering.dot(graph(*layers(3, "a", "b"), Node("head", parameters=0, tied_to="embed"))))
    assert len(labels) == 12
    assert edges == 11
    assert r"head\nlinear 2 × 2\n= embed" in labels


@graphviz
def test_graphviz_reads_hostile_names_as_they_are():
    """Each label, unescaped the way Graphviz draws it, is the name as a terminal would show it."""
    labels, _ = drawn(rendering.dot(graph(*HOSTILE, model='"}; evil ["')))
    shown = {html.unescape(label.split(r"\nlinear")[0]).replace("\\\\", "\\") for label in labels[1:]}
    assert shown == {rendering._names.shown(name) for name in HOSTILE}


@graphviz
def test_graphviz_draws_it():
    done = subprocess.run(
        [DOT, "-Tsvg"], input=rendering.dot(graph(*HOSTILE)), capture_output=True, text=True, check=True
    )
    assert "<script" not in done.stdout

import dataclasses

from loratools import rendering
from tests.rendering.trees import HOSTILE, Node, graph, layers


def lines(report, depth=None):
    return rendering.tree(report, depth).splitlines()


def test_columns_and_folds():
    report = graph(Node("embed", "embedding", (64, 32), "F32", 2048), *layers(3, "attn.q", "mlp"), "head")
    assert lines(report) == [
        "module         kind       shape    parameters",
        "tiny           model                    2,076",
        "├─ embed       embedding  64 × 32       2,048",
        "├─ layers                                  24",
        "│  └─ 0–2 ×3                            3 × 8",
        "│     ├─ attn                               4",
        "│     │  └─ q  linear     2 × 2             4",
        "│     └─ mlp   linear     2 × 2             4",
        "└─ head        linear     2 × 2             4",
        "note: ×N: N modules of equal names, kinds, shapes and dtypes, shown once; equal layout, not equal weights.",
    ]


def test_what_differs_below_is_not_folded():
    """Kind, shape, dtype, parameters, ties and names each keep two layers apart, however deep."""
    for change in ({"kind": "norm"}, {"shape": (4, 1)}, {"dtype": "BF16"}, {"parameters": 5}, {"tied_to": "x"}):
        odd = [dataclasses.replace(each, **change) if ".1." in each.name else each for each in layers(4, "a.b.c")]
        text = rendering.tree(graph(*odd))
        assert "2–3 ×2" in text, change
        assert "0–" not in text
        assert "0–" not in rendering.tree(graph(*odd), 2), "what is not shown counts as well"
    renamed = [Node(each.name.replace("1.a", "1.z")) for each in layers(3, "a")]
    assert "×" not in rendering.tree(graph(*renamed)).replace(" × ", "")


def test_only_numbers_without_a_gap_fold():
    assert "0–2 ×3" not in rendering.tree(graph("s.0.w", "s.2.w", "s.4.w"))
    assert "×" not in rendering.tree(graph("s.00.w", "s.01.w", "s.a.w")).replace(" × ", "")
    text = rendering.tree(graph(*[f"m.layers.{n}.{'dense' if n < 3 else 'moe'}" for n in range(61)]))
    assert "0–2 ×3" in text
    assert "3–60 ×58" in text


def test_experts_fold_inside_of_layers():
    report = graph(*layers(2, *[f"experts.{n}.{name}" for n in range(8) for name in ("up", "down")]))
    text = rendering.tree(report)
    assert "0–1 ×2" in text
    assert "0–7 ×8" in text
    assert len(text.splitlines()) == 9


def test_order_below_does_not_matter():
    swapped = [*layers(1, "a", "b"), Node("layers.1.b"), Node("layers.1.a")]
    assert "0–1 ×2" in rendering.tree(graph(*swapped))


def test_depth_says_that_it_cut():
    report = graph(*layers(2, "a"), "norm")
    assert lines(report, 1)[1:] == [
        "tiny         model                  12",
        "├─ layers …                          8",
        "└─ norm      linear  2 × 2           4",
        "note: …: there are modules below this one.",
    ]
    assert lines(report, 3) == lines(report)


def test_dtypes_are_a_column_where_they_differ():
    assert "F32" not in rendering.tree(graph("a", "b"))
    mixed = lines(graph("a", Node("b", dtype="BF16")))
    assert mixed[0].split() == ["module", "kind", "shape", "dtype", "parameters"]
    assert mixed[3].split()[-2:] == ["BF16", "4"]


def test_ties_and_notes():
    text = rendering.tree(graph("embed", Node("head", parameters=0, tied_to="embed"), notes=["a\x1b" + "b" * 300]))
    assert "= embed" in text
    assert text.endswith("note: a\\x1b" + "b" * 300)


def test_hostile_names_stay_in_their_line():
    report = graph(*HOSTILE, model="m\x1b\n")
    text = rendering.tree(report)
    assert len(text.splitlines()) == len(HOSTILE) + 2
    assert all(line.isprintable() for line in text.splitlines())

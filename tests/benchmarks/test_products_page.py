"""The page on the cost of the same bits is what its stored result gives, and what it says of them holds here too."""

import json

import pytest

from tests.benchmarks import products, products_page
from tests.benchmarks.product_ways import SAMPLED, WAYS


def stored():
    return json.loads(products_page.RESULT.read_text(encoding="utf-8"))


def test_the_page_is_what_the_result_gives():
    """Nobody types a number."""
    assert products_page.PAGE.read_text(encoding="utf-8") == products_page.page()


def test_the_result_covers_all_ways_and_shapes():
    document = stored()
    assert [tuple(cell["shape"]) for cell in document["ways"]] == list(products.SHAPES)
    assert all(set(cell["seconds"]) == set(WAYS) for cell in document["ways"])
    assert {(tuple(cell["shape"]), cell["dtype"]) for cell in document["merges"]} == {
        (shape, dtype) for shape in products.SHAPES for dtype in ("bfloat16", "float16", "float32")
    }


def test_what_merges_use_is_the_cheapest_that_reaches_its_error_at_every_rank():
    """Of the ways with the same bits, among those that keep to 2e-7 on all shapes; the total of their times."""
    document = stored()
    enough = [
        name for name in WAYS
        if name not in SAMPLED and document["reproducible"][name]
        and all(cell["errors"][name] <= 2e-7 for cell in document["ways"])
    ]  # fmt: skip
    totals = {name: sum(cell["seconds"][name] for cell in document["ways"]) for name in enough}
    assert min(totals, key=totals.__getitem__) == "one piece"
    assert "split float32" in totals


@pytest.mark.parametrize("name", [name for name in WAYS if name not in SAMPLED])
def test_ways_are_as_near_and_as_reproducible_as_the_page_says(name):
    document, way = stored(), WAYS[name]
    assert products.reproducible(way) == document["reproducible"][name]
    A, B = products.factors(256, 300, 16)
    assert products.error(way, A, B) <= 1.5 * document["ways"][0]["errors"][name] + 1e-15

"""The page on activations is what its stored result gives."""

import json

from tests.benchmarks import activations


def test_the_page_is_what_the_result_gives():
    """Nobody types a number."""
    result = json.loads(activations.RESULT.read_text(encoding="utf-8"))
    assert activations.PAGE.read_text(encoding="utf-8") == activations.page(result)
    assert all(row["better"] > row["layers"] / 2 for rows in result["tunes"].values() for row in rows)

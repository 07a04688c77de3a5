"""The page on `--rank auto` is what its stored result gives, and the result holds what other pages say of it."""

import json

from tests.benchmarks import auto_rank, auto_rank_page
from tests.benchmarks.auto_rank_page import added, alone, outcome


def stored():
    return json.loads(auto_rank.RESULT.read_text(encoding="utf-8"))


def test_the_page_is_what_the_result_gives():
    """Nobody types a number, and every adapter, dtype, size and fine-tune is there."""
    result = stored()
    assert auto_rank_page.PAGE.read_text(encoding="utf-8") == auto_rank_page.page(result)
    cells = {(row["adapter"], row["dtype"], row["size"]) for row in result["merges"]}
    names = {**auto_rank.ADAPTERS, **auto_rank.SYNTHETIC}
    assert cells == {(name, dtype, size) for name in names for dtype in auto_rank.DTYPES for size in auto_rank.SIZES}
    tunes = {(row["tune"], row["dtype"]) for row in result["tunes"]}
    assert tunes == {(name, dtype) for name in auto_rank.FULL for dtype in auto_rank.DTYPES}


def test_what_is_claimed_of_it():
    """No merge is taken for a full fine-tune or the reverse; together the layers know more than each by itself."""
    result = stored()
    assert not any(row["what"] == "full fine-tune" for row in result["merges"])
    assert not any(row["what"] == "merge" for row in result["tunes"])
    together = added([outcome(row) for row in result["merges"]])
    single = added([alone(row) for row in result["merges"]])
    assert together[0] > single[0]
    assert together[2] < single[2]

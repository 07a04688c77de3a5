"""The page on stacking is what its stored result gives, and the result has what it speaks of."""

import json
import statistics

from tests.benchmarks import stacking, stacking_page


def stored():
    return json.loads(stacking.RESULT.read_text(encoding="utf-8"))


def test_the_page_is_what_the_result_gives():
    """Nobody types a number."""
    assert stacking_page.PAGE.read_text(encoding="utf-8") == stacking_page.page()


def test_every_shape_and_rank_is_there_and_near_the_best():
    """Law 4: at most 1.001 of the best."""
    rows = {(tuple(row["shape"]), row["rank"]): row for row in stored()["rows"]}
    assert set(rows) == {(shape, rank) for shape in stacking.SHAPES for rank in stacking.RANKS if rank <= min(shape)}
    assert all(each["gap"] <= 1e-3 for row in rows.values() for each in row["cores"])


def test_the_operation_is_a_hundred_times_faster_than_pefts():
    """By pairs, in the median."""
    found = stored()["operation"]
    assert statistics.median(b / a for a, b in zip(found["loratools"], found["peft"], strict=True)) >= 100


def test_the_gap_is_measured_and_not_assumed(monkeypatch):
    """A truncation that is worse than it could be is seen."""
    monkeypatch.setattr(stacking, "KEPT", 4)
    assert abs(stacking.cores((24, 40), 8)["gap"]) <= 1e-5
    honest = stacking.cores
    from loratools.adapters import Adapter

    truncate = Adapter.truncate
    monkeypatch.setattr(Adapter, "truncate", lambda self, rank: truncate(self, rank=rank - 1))
    assert honest((24, 40), 8)["gap"] > 0.01

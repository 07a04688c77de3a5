"""From counts to verdicts: each guard, at its edge."""

import dataclasses

import pytest

from loratools.engine.verdicts import VERDICTS, Findings, Hypothesis, Verdict, judge, together

HOLDS, LATER = Hypothesis("holds", "one-rounding"), Hypothesis("holds", "float32")
MISSING, TWICE = Hypothesis("missing", "none"), Hypothesis("twice", "float32", scale=(2.0,))
PARTLY, SCALE = Hypothesis("partly", "float32", ("adapter1",), (1.0, 0.0)), Hypothesis("scale", "any")
ALL_OFF = {HOLDS: 100, LATER: 100, MISSING: 100, TWICE: 100}
FOUND = Findings(entries=200, moved=100, concerned=100, not_finite=0, size=1.0, off=ALL_OFF, along=(0.3,), alike=0.1)


def found(**changes):
    off = ALL_OFF | changes.pop("off", {})
    return dataclasses.replace(FOUND, off=off, **changes)


def verdict(**changes):
    return judge(found(**changes)).verdict


def test_what_explains_every_entry_comes_first_and_there_what_holds():
    """The first policy that does; a fault does not take precedence over it."""
    told = judge(found(off={HOLDS: 0, LATER: 0, TWICE: 0}))
    assert (told.verdict, told.policy) == ("holds", "one-rounding")
    told = judge(found(off={LATER: 0, MISSING: 0}))
    assert (told.verdict, told.policy) == ("holds", "float32")
    assert verdict(off={MISSING: 0}) == "missing"
    assert judge(found(off={TWICE: 0})).scale == (2.0,)


def test_cannot_tell_where_nothing_moved_though_something_was_added():
    """No update at all is no question; an entry that moved is an answer."""
    assert verdict(off={HOLDS: 0, MISSING: 0}, moved=0) == "cannot tell"
    assert verdict(off={HOLDS: 0, MISSING: 0}, moved=1) == "holds"
    assert verdict(off={HOLDS: 0, MISSING: 0}, moved=0, size=0.0) == "holds"
    assert verdict(off={MISSING: 0}, moved=0) == "missing"


def test_nan_is_said_before_anything_else():
    assert verdict(off={HOLDS: 0}, not_finite=1) == "not finite"


def test_a_few_entries_off_is_damage():
    """A tenth of those that are concerned, and no more; the closest hypothesis is named."""
    told = judge(found(off={LATER: 10, HOLDS: 11}, worst={LATER: 7.0}))
    assert (told.verdict, told.policy, told.deviating, told.worst) == ("damaged", "float32", 10, 7.0)
    assert verdict(off={LATER: 11}) == "other"
    assert verdict(off={MISSING: 10, HOLDS: 12}) == "missing"
    assert judge(found(off={PARTLY: 5})) == Verdict("partly", "float32", (1.0, 0.0), 5, 0.0, "without adapter1")


def test_few_entries_concerned_allow_no_damage():
    """Where hardly an entry should move, one that did not is all the evidence there is."""
    assert verdict(off={HOLDS: 1, MISSING: 1}, concerned=9) == "other"
    assert verdict(off={HOLDS: 1, MISSING: 1}, concerned=10) == "damaged"


def test_a_multiple_that_explains_all_entries_precedes_damage():
    told = judge(found(off={HOLDS: 1}, scales=(0.4, 0.6), along=(0.5,)))
    assert (told.verdict, told.scale) == ("scale", (0.5,))
    assert judge(found(scales=(0.4, 0.6), along=(0.7,))).scale == (0.5,)  # what was measured explains less
    assert judge(found(scales=(0.4, 0.8), along=(0.5, 0.6))).scale == (pytest.approx(0.6),)
    assert verdict(off={HOLDS: 1}, scales=(0.9, 1.1)) == "damaged"  # it may be the multiple that was asked for
    assert verdict(scales=(0.9, 1.0)) == "other"


def test_a_multiple_of_an_update_that_was_rounded_before_comes_after_damage():
    """Those bounds are wide enough to explain a single entry that is off."""
    assert verdict(off={HOLDS: 1}, wide=(0.4, 0.6)) == "damaged"
    assert judge(found(wide=(0.4, 0.6), along=(0.5,))).scale == (0.5,)
    assert verdict(wide=(0.9, 1.1)) == "other"


def test_a_multiple_has_to_run_along_the_update():
    """A small difference lies within two steps of any small multiple of anything."""
    assert verdict(off={SCALE: 0}, alike=0.7) == "scale"
    assert verdict(off={SCALE: 0}, alike=0.69) == "other"
    assert verdict(off={SCALE: 0}, alike=float("nan")) == "other"
    assert verdict(off={SCALE: 10}, alike=0.7) == "scale"
    assert verdict(off={SCALE: 11}, alike=0.7) == "other"
    assert judge(found(off={SCALE: 0}, alike=1.0, along=(0.5, 1.0))).scale == (0.5, 1.0)


def test_other_says_where_and_how_far():
    told = judge(found(rows={HOLDS: (3, 8)}, worst={HOLDS: 12.0}))
    assert (told.deviating, told.worst, told.scale) == (100, 12.0, (0.3,))
    assert "rows 3 to 8" in told.detail
    assert "0.10" in told.detail


def test_when_a_multiple_has_to_be_tried():
    """Not where the counts decide already."""
    assert not found().settled
    assert not found(off={HOLDS: 11}).settled
    assert found(off={HOLDS: 10}).settled
    assert found(scales=(1.1, 2.0)).settled
    assert found(wide=(1.1, 2.0)).settled
    assert not found(scales=(1.0, 2.0)).settled
    assert found(not_finite=1).settled


GOOD, OPEN = Verdict("holds", "one-rounding"), Verdict("cannot tell", "one-rounding")
BAD = Verdict("missing", "none", (0.0,), 3, 2.0)


def test_of_several_matrices_the_worst_decides():
    """Experts: one that is missing makes the tensor so; one that cannot be told leaves it open."""
    assert together([GOOD, GOOD]) == GOOD
    assert together([BAD]) == BAD
    assert together([GOOD, OPEN, GOOD]).verdict == "cannot tell"
    told = together([GOOD, BAD, GOOD, BAD])
    assert (told.verdict, told.deviating, told.scale) == ("missing", 6, (0.0,))
    assert told.detail == "2 of 4 matrices, the first is 1"
    assert together([OPEN, BAD, Verdict("scale", None, (0.5,))]).verdict == "other"
    mixed = together([GOOD, Verdict("holds", "float32")])
    assert (mixed.verdict, mixed.policy) == ("holds", None)


def test_every_verdict_is_explained():
    assert {"holds", "cannot tell", "missing", "twice", "subtracted", "partly", "scale", "damaged", "other"} <= set(
        VERDICTS
    )

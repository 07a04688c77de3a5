"""The page of kinds says what the tests show."""

from tests.interop import matrix
from tests.laws.kinds import EVERY_KIND


def test_every_named_test_exists():
    """No row rests on a test that is gone."""
    assert [test for test in sorted(matrix.tests_named()) if matrix.missing(test)] == []


def test_the_page_is_current():
    """`python -m tests.interop.matrix` changes nothing."""
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page()


def test_every_kind_of_the_laws_has_a_row():
    """What the laws are held against is on the page, once; an entry that a row names is there."""
    named = [name for kind in matrix.KINDS for name in kind.laws]
    assert sorted(named) == sorted(EVERY_KIND)


def test_every_cell_says_something():
    """A test, or the reason why there is none."""
    assert all(cell for kind in matrix.KINDS for cell in matrix.cells_of(kind))

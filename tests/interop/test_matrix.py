"""The page of kinds says what the tests show."""

from tests.interop import matrix


def test_every_named_test_exists():
    """No row rests on a test that is gone."""
    assert [test for test in sorted(matrix.tests_named()) if matrix.missing(test)] == []


def test_the_page_is_current():
    """`python -m tests.interop.matrix` changes nothing."""
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page()

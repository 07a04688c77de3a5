import pytest

from loratools.rendering import _names


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 K"), (38_600, "38.6 K"), (124_439_808, "124 M"), (999_499, "999 K"),
     (999_500, "1.00 M"), (1_100_048_384, "1.10 B"), (572_263_001_600, "572 B"), (10**12, "1.00 T"),
     (10**15, "1000.00 T")],
)  # fmt: skip
def test_counts_have_three_digits(number, text):
    assert _names.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"), (2_362_232_012, "2.2 GiB"),
     (1_144_526_003_200, "1.0 TiB"), (2**60, "1024.0 PiB")],
)  # fmt: skip
def test_sizes_are_binary(number, text):
    assert _names.size(number) == text


@pytest.mark.parametrize("label", ["00", "01", "-1", "+1", " 1", "1_0", "٣", "²", "", "x", "1.0", "9" * 5000])
def test_only_an_index_is_a_number(label):
    assert _names.number_of(label, default=-7) == -7


def test_names_stay_on_one_line():
    hostile = "a\x1b[31m\n\r\x85\u2028\u2029\u202e\udc80b\ud800"
    assert len(_names.shown(hostile).splitlines()) == 1
    assert _names.shown(hostile).isprintable()
    assert _names.shown("x" * 1000) == "x" * 200 + "…"


def test_sentences_are_whole():
    assert _names.sentence("é" * 1000 + "\x1b") == "é" * 1000 + "\\x1b"


def test_dimensions():
    assert [_names.dimensions(shape) for shape in ((3, 4), (), None, [5])] == ["3 × 4", "scalar", "", "5"]

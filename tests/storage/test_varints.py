"""LEB128 for arrays, held against the definition, number by number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import MalformedError
from loratools.storage import varints

WORDS = st.integers(0, 2**64 - 1) | st.integers(0, 300)
SIGNED = st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300)


def by_definition(value):
    """Seven bits at a time, the lowest first; the highest bit says that there are more."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


@given(st.lists(WORDS), st.binary())
def test_numbers_come_back(values, rest):
    data = varints.encode(np.array(values, np.uint64))
    assert data == b"".join(map(by_definition, values))
    found, end = varints.decode(data + rest, len(values), what="a test")
    assert (found.tolist(), end) == (values, len(data))


@given(st.lists(SIGNED))
def test_folding_is_a_bijection_that_keeps_small_numbers_small(values):
    folded = varints.folded(np.array(values, np.int64))
    assert folded.tolist() == [2 * value if value >= 0 else -2 * value - 1 for value in values]
    assert varints.unfolded(folded).tolist() == values


@given(st.lists(WORDS, min_size=1))
def test_fewer_numbers_than_promised_are_refused(values):
    data = varints.encode(np.array(values, np.uint64))
    with pytest.raises(MalformedError, match="are due"):
        varints.decode(data[:-1], len(values), what="a test")


@pytest.mark.parametrize("data", [b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\x01", b"\xff" * 12 + b"\x00"])
def test_more_than_64_bits_are_refused(data):
    with pytest.raises(MalformedError, match="64 bits"):
        varints.decode(data, 1, what="a test")


@given(st.binary(max_size=40), st.integers(0, 8))
def test_any_bytes_are_numbers_or_refused(data, count):
    try:
        found, end = varints.decode(data, count, what="a test")
    except MalformedError:
        return
    assert len(found) == count
    assert end <= len(data)

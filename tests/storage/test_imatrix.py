"""The older importance matrices: what llama.cpp's layout says is read, and bounded by the file."""

import struct

import numpy as np
import pytest

from loratools.errors import LoratoolsError, MalformedError
from loratools.storage.imatrix import open_imatrix
from tests.imatrix_files import SAMPLE, legacy, line


def opened(tmp_path, data):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    return open_imatrix(path)


@pytest.mark.parametrize(
    "tail", [b"", struct.pack("<i", 2), struct.pack("<ii", 2, 0), struct.pack("<ii", 2, 4) + b"wiki"]
)
def test_entries_and_every_age_of_the_trailer(tmp_path, tail):
    """Means times calls; the number of chunks and the data set came later than the format."""
    found = opened(tmp_path, legacy(tail=tail))
    assert list(found) == list(SAMPLE)
    sums, counts = SAMPLE["blk.0.attn_q.weight"]
    assert np.allclose(found["blk.0.attn_q.weight"].load().numpy(), sums[0] / counts[0] * 2)
    experts = found["blk.1.ffn_down_exps.weight"].load().numpy().reshape(3, 4)
    assert np.allclose(experts[0], 2)  # an expert that was never chosen has ones
    assert np.allclose(experts[1], SAMPLE["blk.1.ffn_down_exps.weight"][0][1] / 5 * 2)


ONE = line("blk.0.attn_q.weight", [1, 2])
HOSTILE = {
    "empty": b"",
    "three bytes": b"\1\0\0",
    "no entry": legacy(lines=[]),
    "a negative number of entries": legacy(lines=[ONE], count=-1),
    "more entries than room": legacy(lines=[ONE], count=2**31 - 1),
    "one entry more than there are": legacy(lines=[ONE], count=2),
    "one entry fewer than there are": legacy(lines=[ONE, line("b", [1])], count=1, tail=b""),
    "a name twice": legacy(lines=[ONE, ONE]),
    "a name of no bytes": legacy(lines=[line("", [1])]),
    "a negative name": legacy(lines=[struct.pack("<i", -4) + ONE[4:]]),
    "a name longer than the file": legacy(lines=[struct.pack("<i", 2**30) + ONE[4:]]),
    "a name of 300 bytes": legacy(lines=[line("a" * 300, [1] * 300)]),
    "a name that is not UTF-8": legacy(lines=[line(b"\xff\xfe", [1])]),
    "a negative number of calls": legacy(lines=[line("a", [1], calls=-1)]),
    "no values": legacy(lines=[line("a", [])]),
    "more values than room": legacy(lines=[struct.pack("<i", 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(8)]),
    "values beyond the end by one": legacy(lines=[struct.pack("<i", 1) + b"a" + struct.pack("<ii", 1, 3) + bytes(8)],
                                           tail=b""),
    "half a trailer": legacy(lines=[ONE], tail=b"\1\0\0"),
    "a data set longer than the file": legacy(lines=[ONE], tail=struct.pack("<ii", 1, 2**30)),
    "a negative data set": legacy(lines=[ONE], tail=struct.pack("<ii", 1, -1)),
    "bytes behind the data set": legacy(lines=[ONE], tail=struct.pack("<ii", 1, 0) + b"x"),
    "JSON": b'{"blk.0.attn_q.weight": [1, 2]}',
    "a pickle": b"\x80\x04\x95\x0c\0\0\0\0\0\0\0}\x94\x8c\x01a\x94K\x01s.",
    "a zip file": b"PK\3\4" + bytes(60),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_none(tmp_path, name):
    """A typed error that names the file and says what may be given."""
    with pytest.raises(MalformedError, match=r"no importance matrix.*imatrix\.dat.*llama-imatrix"):
        opened(tmp_path, HOSTILE[name])


def test_every_truncation_and_every_flipped_byte_is_survived(tmp_path):
    """Cut anywhere inside the entries it is refused; changed anywhere it is read within bounds, or refused."""
    data = legacy(tail=b"")
    for length in range(len(data)):
        with pytest.raises(MalformedError):
            opened(tmp_path, data[:length])
    for at in range(len(data)):
        for value in (0, 0x7F, 0xFF):
            try:
                found = opened(tmp_path, data[:at] + bytes([value]) + data[at + 1 :])
            except LoratoolsError:
                continue
            assert all(ref.offset + ref.nbytes <= len(data) for ref in found.values())

"""The GGUF reader: what the real writer writes is read; what breaks the specification is refused, by name."""

import struct
from pathlib import Path

import numpy as np
import pytest

from loratools.errors import LoratoolsError, MalformedError, UnsupportedError
from loratools.storage import gguf as reader
from loratools.storage.gguf import open_gguf
from tests.imatrix_files import ARRAY, PAIRS, SAMPLE, STRING, U32, gguf, info, pair, strings, tensors_of, text

REAL = Path(__file__).parent / "data" / "imatrix.gguf"


def opened(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return open_gguf(path)


def refused(tmp_path, data):
    try:
        opened(tmp_path, data)
    except LoratoolsError:
        return True
    return False


def test_a_file_of_the_real_writer():
    """Names, shapes (outermost first), values and metadata of a file of gguf-py; our builder writes the same."""
    assert REAL.read_bytes() == gguf()
    found = open_gguf(REAL)
    assert list(found.tensors) == list(tensors_of(SAMPLE))
    for name, array in tensors_of(SAMPLE).items():
        ref = found.tensors[name]
        assert ref.shape == array.shape
        assert np.array_equal(ref.load().numpy(), array)
    assert found.metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ("wiki.train.raw",),
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }


def test_values_of_every_type_and_other_alignments(tmp_path):
    """Every scalar type, arrays of numbers and bools, versions 2 and 3, an alignment that is not the default."""
    forms = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
    pairs = [pair(f"n.{kind}", kind, struct.pack(form, 3)) for kind, form in forms.items()]
    pairs += [pair("n.7", 7, b"\1"), pair("a", ARRAY, struct.pack("<IQ3h", 3, 3, -1, 0, 7))]
    pairs += [pair("b", ARRAY, struct.pack("<IQ2B", 7, 2, 1, 0)), pair("general.alignment", U32, struct.pack("<I", 64))]
    found = opened(tmp_path, gguf(pairs=pairs, alignment=64, version=2))
    assert {key: found.metadata[key] for key in ("n.7", "a", "b", "n.1", "n.12")} == {
        "n.7": True, "a": (-1, 0, 7), "b": (True, False), "n.1": 3, "n.12": 3.0,
    }  # fmt: skip
    assert all(found.metadata[f"n.{kind}"] == 3 for kind in forms)
    name = "blk.0.ffn_down.weight"
    assert np.array_equal(found.tensors[f"{name}.in_sum2"].load().numpy(), SAMPLE[name][0])


def test_the_last_padding_may_be_missing(tmp_path):
    """Writers differ there; a byte of a tensor may not be missing."""
    data = gguf(tensors={"a": np.ones((1, 3), "<f4")})
    assert opened(tmp_path, data[: len(data) - 20]).tensors["a"].load().tolist() == [[1, 1, 1]]
    with pytest.raises(MalformedError, match="cut short"):
        opened(tmp_path, data[: len(data) - 21])


ONE = {"a": np.ones((2, 3), "<f4")}
HUGE = 2**62
HOSTILE = {
    "empty": b"",
    "magic alone": b"GGUF",
    "another magic": b"GGML" + gguf()[4:],
    "version 7": gguf(version=7),
    "more tensors than room": gguf(counts=(2**63, 4)),
    "more pairs than room": gguf(counts=(6, 2**63)),
    "one tensor more than there are": gguf(counts=(7, 4)),
    "one tensor fewer than there are": gguf(counts=(5, 4)),
    "one pair more than there are": gguf(counts=(6, 5)),
    "a key twice": gguf(pairs=[*PAIRS, PAIRS[0]]),
    "a key of no bytes that are UTF-8": gguf(pairs=[pair(b"\xff\xfe", U32, struct.pack("<I", 1))]),
    "a key longer than the file": gguf(pairs=[struct.pack("<Q", HUGE) + b"k"]),
    "an unknown value type": gguf(pairs=[pair("k", 13, bytes(8))]),
    "an array of unknown type": gguf(pairs=[pair("k", ARRAY, struct.pack("<IQ", 77, 1) + bytes(8))]),
    "arrays in an array": gguf(pairs=[pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + strings(["x"]))]),
    "an array longer than the file": gguf(pairs=[pair("k", ARRAY, struct.pack("<IQ", U32, HUGE))]),
    "strings longer than the file": gguf(pairs=[pair("k", ARRAY, struct.pack("<IQ", STRING, 2**40))]),
    "a string longer than the file": gguf(pairs=[pair("k", STRING, struct.pack("<Q", 2**27))]),
    "a bool of 2": gguf(pairs=[pair("k", 7, b"\2")]),
    "an alignment of 0": gguf(pairs=[pair("general.alignment", U32, struct.pack("<I", 0))]),
    "an alignment of 24": gguf(pairs=[pair("general.alignment", U32, struct.pack("<I", 24))], alignment=24),
    "an alignment of 2^31": gguf(pairs=[pair("general.alignment", U32, struct.pack("<I", 2**31))]),
    "an alignment that is text": gguf(pairs=[pair("general.alignment", STRING, text("32"))]),
    "a tensor twice": gguf(tensors={"a": np.ones((1, 8), "<f4"), "b": np.ones((1, 8), "<f4")},
                           infos=[info("a", (1, 8), 0), info("a", (1, 8), 32)]),
    "five dimensions": gguf(tensors=ONE, infos=[info("a", (1, 1, 1, 2, 3), 0)]),
    "dimensions that overflow": gguf(tensors=ONE, infos=[info("a", (2**33, 2**33), 0)]),
    "a zero that hides an overflow": gguf(tensors={}, infos=[info("a", (0, 2**33, 2**33), 0)]),
    "a shape larger than the file": gguf(tensors=ONE, infos=[info("a", (2, 4000), 0)]),
    "an offset past the file": gguf(tensors=ONE, infos=[info("a", (2, 3), HUGE)]),
    "an offset that is not aligned": gguf(tensors=ONE, infos=[info("a", (2, 3), 4)]),
    "a hole": gguf(tensors=ONE, infos=[info("a", (2, 3), 32)], tail=bytes(64)),
    "an overlap": gguf(tensors=ONE, infos=[info("a", (1, 3), 0), info("b", (1, 3), 0)]),
    "bytes behind the last tensor": gguf(tensors=ONE, tail=bytes(32)),
    "a name of no byte that is UTF-8": gguf(tensors=ONE, infos=[info(b"\xc3", (2, 3), 0)]),
    "a name of 300 bytes": gguf(tensors=ONE, infos=[info("a" * 300, (2, 3), 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_breaks_the_specification(tmp_path, name):
    """A typed error of one paragraph that names the file."""
    with pytest.raises(MalformedError, match=r"x\.gguf"):
        opened(tmp_path, HOSTILE[name])


def test_what_is_understood_and_not_read(tmp_path):
    """Version 1, big-endian files and quantised tensors are refused by name."""
    for data, words in (
        (gguf(version=1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (gguf(tensors=ONE, infos=[info("a", (2, 32), 0, kind=8)]), "Quantised"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            opened(tmp_path, data)


def test_a_header_cannot_fill_the_memory(tmp_path, monkeypatch):
    """Entries are counted before they are made: a header of very many is refused."""
    monkeypatch.setattr(reader, "MAX_ITEMS", 100)
    many = gguf(pairs=[pair("k", ARRAY, struct.pack("<IQ", 0, 200) + bytes(200))])
    with pytest.raises(UnsupportedError, match="more than 100 entries"):
        opened(tmp_path, many)
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", 150)
    monkeypatch.setattr(reader, "READ_BYTES", 64)
    with pytest.raises(MalformedError):
        opened(tmp_path, gguf())


def test_every_truncation_and_every_flipped_byte_of_the_header_is_survived(tmp_path):
    """Cut at every byte it is refused; with any one byte changed it is read or refused, and nothing else happens."""
    data = gguf()
    first = data.index(b"\0\0\x80?")  # the first value of the first tensor
    for length in range(len(data) - 31):
        with pytest.raises(MalformedError):
            opened(tmp_path, data[:length])
    mutants = [data[:at] + bytes([value]) + data[at + 1 :] for at in range(first) for value in (0, 0x7F, 0xFF)]
    assert sum(refused(tmp_path, mutant) for mutant in mutants) > first

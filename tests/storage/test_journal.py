"""Records that are whole, and journals that were torn, spoilt or forged."""

import os
import random

import pytest

from loratools.errors import StorageError
from loratools.storage import syscalls
from loratools.storage.journal import Journal

RECORDS = [
    ({"unit": 0}, b""),
    ({"unit": 1, "text": "Δ\n" * 5000}, b""),
    ({"unit": 2}, b"\n1 2 {}\n" * 9),
    ({"a": {}}, b""),
]


class Opened:
    def __init__(self, path, seed=b"seed"):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.journal = Journal(self.descriptor, path, seed)

    def __enter__(self):
        return self.journal

    def __exit__(self, *exception):
        os.close(self.descriptor)


def written(path, records=RECORDS):
    with Opened(path) as journal:
        assert journal.read() == []
        journal.append(records[:1])
        journal.append(records[1:])
    return path


def read(path, seed=b"seed"):
    with Opened(path, seed) as journal:
        return [(dict(record.document), journal.section(record)) for record in journal.read()]


def test_what_was_written_is_read(tmp_path):
    """Documents longer than a block, and sections with anything in them; more is appended after them."""
    path = written(tmp_path / "journal")
    assert read(path) == RECORDS
    with Opened(path) as journal:
        journal.read()
        journal.append(RECORDS[:2])
    assert read(path) == [*RECORDS, *RECORDS[:2]]


def test_any_cut_leaves_whole_records(tmp_path):
    """The beginning of what was written, at every byte of the last two records; then writing goes on."""
    data = written(tmp_path / "journal").read_bytes()
    ends = []
    for number in range(len(RECORDS) + 1):
        ends.append(len(written(tmp_path / f"first-{number}", RECORDS[:number]).read_bytes()) if number else 0)
    assert ends[-1] == len(data)
    path = tmp_path / "cut"
    for size in [*range(0, 300, 7), *range(ends[1] - 2, len(data), 113), *range(ends[2] - 3, len(data) + 1)]:
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends) - 1
        assert read(path) == RECORDS[:whole], size
        assert path.stat().st_size == ends[whole]
        with Opened(path) as journal:
            journal.read()
            journal.append(RECORDS[2:3])
        assert read(path) == [*RECORDS[:whole], RECORDS[2]]


def test_any_changed_byte_ends_the_reading(tmp_path):
    """Whatever it is changed to: no record is read that was not written."""
    data = written(tmp_path / "journal").read_bytes()
    path, generator = tmp_path / "spoilt", random.Random(1)
    for _ in range(400):
        at = generator.choice(
            [generator.randrange(300), generator.randrange(len(data)), len(data) - 1 - generator.randrange(400)]
        )
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        found = read(path)
        assert len(found) < len(RECORDS)
        assert found == RECORDS[: len(found)]


def test_a_record_of_another_journal_is_none_of_this(tmp_path):
    assert read(written(tmp_path / "journal"), seed=b"other") == []


@pytest.mark.parametrize(
    "data",
    [
        b"\n" * 100, b"0" * 64, b"0" * 10_000_000, b"0" * 64 + b" 0 {}\n", b"0" * 64 + b" " + b"9" * 18 + b" {}\n",
        b"0" * 64 + b" -1 {}\n", b"0" * 64 + b" 0 " + b"[" * 100_000 + b"\n", b"\xff" * 5000, bytes(5000),
    ],
)  # fmt: skip
def test_nonsense_is_no_record(tmp_path, data):
    """And takes neither time nor memory."""
    (tmp_path / "journal").write_bytes(data)
    assert read(tmp_path / "journal") == []
    assert (tmp_path / "journal").stat().st_size == 0


@pytest.mark.parametrize("text", ["[]", "7", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 200 + "]" * 200, "{}"])
def test_what_is_no_document_ends_the_reading(tmp_path, text):
    """Even with a checksum that is right: whoever can write one is not trusted for it."""
    import hashlib

    line = f"0 {text}\n".encode()
    (tmp_path / "journal").write_bytes(hashlib.sha256(b"seed" + line).hexdigest().encode() + b" " + line)
    assert read(tmp_path / "journal") == []


def test_records_are_flushed_when_append_returns(tmp_path, monkeypatch):
    """Written, then flushed; a failure of either is an error."""
    calls = []
    for name in ("write_at", "sync_data"):
        real = getattr(syscalls, name)
        monkeypatch.setattr(syscalls, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    written(tmp_path / "journal")
    assert calls == ["write_at", "sync_data", *["write_at"] * 3, "sync_data"]

    def failing(*args):
        raise StorageError("failed")

    monkeypatch.setattr(syscalls, "sync_data", failing)
    with Opened(tmp_path / "journal") as journal, pytest.raises(StorageError):
        journal.append(RECORDS)


def test_records_are_written_as_they_come(tmp_path):
    """One is in memory at a time: what they hold for a receipt may be as large as their tensors."""
    with Opened(tmp_path / "journal") as journal:
        journal.read()
        sizes = []

        def made():
            for number in range(3):
                sizes.append((tmp_path / "journal").stat().st_size)
                yield {"unit": number}, bytes(1000)

        journal.append(made())
    assert [size // 1000 for size in sizes] == [0, 1, 2]
    assert len(read(tmp_path / "journal")) == 3

import gc
import hashlib
import os
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from loratools.errors import AccessError, InputMissingError, MalformedError, StorageError
from loratools.storage.files import ReadOnlyFile, sha256_of
from loratools.storage.strict_json import parse_json, read_json


@contextmanager
def without_privilege():
    """As a user whom permissions bind; root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A directory that an unprivileged user may enter (pytest's own is closed to others)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_reads_any_part_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with ReadOnlyFile(tmp_path / "f") as file:
        buffer = bytearray(10)
        file.read_into(memoryview(buffer), 42)
        assert (bytes(buffer), file.size, file.label) == (bytes(range(42, 52)), 100, "f")
        assert os.get_inheritable(file.fileno()) is False
    with pytest.raises(StorageError, match="closed"):
        file.read_into(memoryview(buffer), 0)


def test_the_file_cannot_be_written_through_its_descriptor(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    with ReadOnlyFile(tmp_path / "f") as file, pytest.raises(OSError, match="Bad file descriptor"):
        os.write(file.fileno(), b"y")


def test_many_threads_read_at_once(tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "f").write_bytes(data)
    wrong = []
    with ReadOnlyFile(tmp_path / "f") as file:

        def read(at):
            buffer = bytearray(1000)
            for offset in range(at, len(data) - 1000, 50_000):
                file.read_into(memoryview(buffer), offset)
                if buffer != data[offset : offset + 1000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_file_truncated_while_it_is_read_is_an_error_and_not_a_crash(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    with ReadOnlyFile(path) as file:
        os.truncate(path, 60)
        with pytest.raises(StorageError, match=r"changed or was truncated.*40 bytes.*file f, offset 60"):
            file.read_into(memoryview(bytearray(100)), 0)


def test_the_descriptor_goes_back_when_the_object_does(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    descriptor = ReadOnlyFile(tmp_path / "f").fileno()
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("name", ["missing", "file/below", "n" * 300, "nul\0byte"])
def test_a_file_that_is_not_there(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputMissingError, match="no such file"):
        ReadOnlyFile(tmp_path / name)


def test_things_that_are_not_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket"))
    cases = {"pipe": "named pipe", "directory": "a directory", "socket": "socket", "loop": "circle"}
    start = time.monotonic()
    for name, word in cases.items():
        with pytest.raises(MalformedError, match=word):
            ReadOnlyFile(tmp_path / name)
    with pytest.raises(MalformedError, match="character device"):
        ReadOnlyFile("/dev/zero")
    server.close()
    assert time.monotonic() - start < 2


def test_an_unreadable_file(public):
    path = public / "f"
    path.write_bytes(b"x")
    path.chmod(0)
    with without_privilege(), pytest.raises(AccessError, match="not permitted"):
        ReadOnlyFile(path)


def test_too_many_open_files_says_what_to_raise(tmp_path, monkeypatch):
    (tmp_path / "f").touch()

    def full(*args):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StorageError, match="ulimit"):
        ReadOnlyFile(tmp_path / "f")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 7, 3 << 20])
def test_sha256(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with ReadOnlyFile(tmp_path / "f") as file:
        assert sha256_of(file) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": [1, 2.5, null, true]}', {"a": [1, 2.5, None, True]}),
        (b' "\\ud83d\\ude00" \n', "😀"),
        (b"[" * 128 + b"]" * 128, None),
        (b"9" * 4000, int("9" * 4000)),
    ],
)
def test_json_that_is_json(data, value):
    read = parse_json(data, file="x.json")
    assert value is None or read == value


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "Expecting value"),
        (b"{", "character 1"),
        (b'{"a": 1, "a": 2}', "key a"),
        (b'{"x": {"k": 1, "k": 1}}', "key k"),
        (b"[NaN]", "finite"),
        (b"[-Infinity]", "finite"),
        (b"[1e400]", "finite"),
        (b"9" * 5000, "too long"),
        (b"[" * 100_000 + b"]" * 100_000, "deeply"),
        (b"[" * 130 + b"]" * 130, "deeply"),
        (b'{"a":' * 130 + b"1" + b"}" * 130, "deeply"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"{}\0", "Extra data"),
        (b'{"a": 1,}', "character"),
        (b'"a\nb"', "control"),
    ],
)
def test_json_that_is_not(data, word):
    with pytest.raises(MalformedError, match=word) as caught:
        parse_json(data, file="x.json")
    assert "x.json" in str(caught.value)


def test_a_json_file_larger_than_asked_for_is_not_read(tmp_path):
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MalformedError, match="more than"):
        read_json(tmp_path / "big.json")
    (tmp_path / "ok.json").write_bytes(b"[1]")
    assert read_json(tmp_path / "ok.json", max_bytes=3) == [1]
    with pytest.raises(MalformedError, match="3 bytes of JSON are more than the 2"):
        read_json(tmp_path / "ok.json", max_bytes=2)

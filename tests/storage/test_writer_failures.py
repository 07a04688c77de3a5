import errno
import os
import resource
import subprocess

import pytest

from loratools.errors import AccessError, OutputExistsError, StorageError
from loratools.storage.safetensors import open_safetensors
from loratools.storage.writer import SafetensorsWriter, ScratchFile, write_bytes_durably
from loratools.tensors import TensorSpec
from tests.storage.storage_samples import DATA, SPECS, written


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        written(tmp_path / "x")
        write_bytes_durably(tmp_path / "y", b"1")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "xy"} == {0o666 & ~umask}


def test_a_file_that_exists_is_not_touched(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(OutputExistsError):
        written(tmp_path / "x")
    with pytest.raises(OutputExistsError):
        write_bytes_durably(tmp_path / "x", b"new")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError):
        write_bytes_durably(tmp_path / "link", b"new")
    assert (tmp_path / "x").read_text() == "old"
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_known_before_anything_is_computed(small_disk):
    with pytest.raises(StorageError, match=r"disk is full.*\d+ bytes are free"):
        SafetensorsWriter(small_disk / "x", [TensorSpec("a", "U8", (2 << 20,))], {})
    with pytest.raises(StorageError, match="disk is full"):
        write_bytes_durably(small_disk / "y", bytes(2 << 20))
    with ScratchFile(small_disk) as scratch, pytest.raises(StorageError, match="disk is full"):
        scratch.append("a", bytes(2 << 20), TensorSpec("a", "U8", (2 << 20,)))
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_where_nothing_can_be_reserved(small_disk, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    with (
        SafetensorsWriter(small_disk / "x", [TensorSpec("a", "U8", (2 << 20,))], {}) as writer,
        pytest.raises(StorageError, match="Writing failed: the disk is full"),
    ):
        writer.write("a", bytes(2 << 20))
    assert list(small_disk.iterdir()) == []


def test_a_limit_on_the_file_size(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="ulimit -f"):
            SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (2 << 20,))], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EIO, StorageError), (errno.EDQUOT, StorageError), (errno.EROFS, AccessError), (errno.EACCES, AccessError)],
)
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fdatasync", "open", "copy_file_range", "preadv"])
def test_every_failing_call_is_a_typed_error_and_leaves_nothing(tmp_path, monkeypatch, call, number, error):
    written(tmp_path / "source")
    refs = open_safetensors(tmp_path / "source").tensors

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    def work():
        with SafetensorsWriter(tmp_path / "x", SPECS, {}) as writer:
            writer.write("a", DATA["a"])
            writer.copy_run("bc", [refs["b"], refs["c"]])
            writer.finish()

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((error, StorageError)) as caught:
            work()
    assert isinstance(caught.value, error) or call == "preadv"
    assert os.strerror(number) in str(caught.value) or number == errno.EDQUOT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_interrupt_in_the_proof_is_answered_and_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "_require_header", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []

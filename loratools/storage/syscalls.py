"""Every system call of the writing side, in one place, with typed errors.

One seam, so that a test can fail or kill the K-th call of each kind and know that it saw them all.
Nothing is retried except what the kernel asks to be retried (short counts, EINTR).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from loratools.errors import AccessError, LoratoolsError, OutputError, OutputExistsError, StorageError
from loratools.storage.files import Check, ReadOnlyFile, blocks

COPY_BYTES: Final = 4 << 20
WRITE_BYTES: Final = 16 << 20  # a signal is seen between two calls, so that Ctrl-C is answered at once
KERNEL_COPY_BYTES: Final = 64 << 20
BLOCK: Final = 4096  # file systems share blocks between files only where offsets agree modulo this

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_PERMITTED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_UNABLE: Final = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_HERE: Final = -100  # AT_FDCWD
_NO_REPLACE: Final = 1
_EXCHANGE: Final = 2
_WRITE_OUT: Final = 2  # SYNC_FILE_RANGE_WRITE
WRITEBACK_BYTES: Final = 64 << 20
"""How much is written before the kernel is asked to begin with it."""


def failure(error: OSError, doing: str, path: Path) -> LoratoolsError:
    """The typed error for a failed call; `doing` completes "… failed"."""
    if error.errno in _NO_SPACE:
        return StorageError(
            f"{doing} failed: the disk is full or the quota is used up; {_free(path)} bytes are free.",
            fix="Make room, or write to another disk.",
            file=path,
        )
    if error.errno == errno.EFBIG:
        return StorageError(
            f"{doing} failed: the file would be larger than this system or user may make.",
            fix="Ask for smaller shards, or raise the limit (`ulimit -f`).",
            file=path,
        )
    if error.errno in _NOT_PERMITTED:
        return AccessError(
            f"{doing} failed: {os.strerror(error.errno)}.",
            fix="Choose another place, or change its permissions.",
            file=path,
        )
    if error.errno in {errno.EEXIST, errno.ENOTEMPTY}:
        return OutputExistsError("The output exists.", fix="Choose another path, or pass --overwrite.", path=path)
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}:
        return OutputError(f"{doing} failed: {error.strerror}.", fix="Choose another output path.", path=path)
    return StorageError(f"{doing} failed: {error.strerror or error}.", fix="Check the disk and the mount.", file=path)


@contextmanager
def reported(doing: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into `failure`; errors that are typed already pass."""
    try:
        yield
    except LoratoolsError:
        raise
    except OSError as error:
        raise failure(error, doing, path) from error


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _free(path: Path) -> str:
    try:
        return str(free_bytes(path.parent))
    except OSError:
        return "an unknown number of"


def create(path: Path) -> int:
    """Create a file that does not exist yet, for reading and writing; its mode follows the umask."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with reported("Creating the file", path):
        return os.open(path, flags, 0o666)


def allocate(descriptor: int, size: int, path: Path) -> None:
    """Give the file its size, and its disk blocks where the file system can: a full disk shows now."""
    with reported(f"Reserving {size} bytes", path):
        preallocate = getattr(os, "posix_fallocate", None)
        if preallocate is not None:
            try:
                preallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
            else:
                return
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of `data` (bytes) from `offset` on."""
    done = 0
    with reported("Writing", path):
        while done < len(data):
            done += os.pwrite(descriptor, data[done : done + WRITE_BYTES], offset + done)


def copy_at(  # noqa: PLR0913, PLR0917  (the system's own call takes as many)
    source: ReadOnlyFile,
    start: int,
    descriptor: int,
    offset: int,
    count: int,
    path: Path,
    check: Check = None,
) -> None:
    """Copy `count` bytes of `source` from `start` on; in the kernel where it can, sharing blocks if they align.

    Raises:
        StorageError: the source is shorter than `start + count`, or a call failed; or whatever `check` raises.
    """
    head = min(-start % BLOCK, count) if (start - offset) % BLOCK == 0 else 0  # blocks are shared from a boundary on
    done = _copy_in_kernel(source.fileno(), start, descriptor, offset, head, path, check)
    if done == head:
        done += _copy_in_kernel(source.fileno(), start + head, descriptor, offset + head, count - head, path, check)
    for view in blocks(source, start + done, start + count, COPY_BYTES, check):
        write_at(descriptor, view, offset + done, path)
        done += len(view)


def _copy_in_kernel(  # noqa: PLR0913, PLR0917
    source: int, start: int, descriptor: int, offset: int, count: int, path: Path, check: Check
) -> int:
    """Bytes copied before the kernel declined or the source ended; the caller's loop does the rest."""
    done = 0
    call = getattr(os, "copy_file_range", None)
    with reported("Copying", path):
        while call is not None and done < count:
            if check is not None:
                check()
            try:
                copied = call(source, descriptor, min(count - done, KERNEL_COPY_BYTES), start + done, offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                break
            if copied == 0:
                break
            done += copied
    return done


def start_writeback(descriptor: int) -> None:
    """Ask the kernel to begin writing dirty pages out, without waiting: the final sync then finds little left.

    A hint: where the call does not exist or fails, nothing is lost, since `sync_data` follows in any case.
    """
    call = _native("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE_OUT)


def sync_data(descriptor: int, path: Path) -> None:
    """Wait until the file's bytes and size are on the disk."""
    with reported("Flushing to the disk", path):
        getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_path(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    with reported("Flushing to the disk", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot flush a directory; they order its changes themselves.
            if error.errno not in _UNABLE:
                raise
        finally:
            os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory that does not exist yet; its mode follows the umask."""
    with reported("Creating the directory", path):
        path.mkdir()


def remove_directory(path: Path) -> None:
    """Remove an empty directory."""
    with reported("Removing the directory", path):
        path.rmdir()


def link(source: Path, target: Path) -> None:
    """Give a file a second name, where the file system has such a thing; elsewhere do nothing."""
    with reported("Linking", target):
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _UNABLE | {errno.EPERM, errno.EMLINK}:
                raise


def move_new(source: Path, target: Path) -> None:
    """Give `source` the name `target`, which nothing may have: of two runs, one wins.

    Raises:
        OutputExistsError: `target` exists.
    """
    with reported("Moving the output into place", target):
        try:
            _renameat2(source, target, _NO_REPLACE)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            _move_new_portably(source, target)


def _move_new_portably(source: Path, target: Path) -> None:
    if source.is_dir():
        source.rename(target)  # refuses a directory that is not empty, and anything else that is there
    else:
        os.link(source, target)  # refuses whatever is there
        source.unlink()


def exchange(first: Path, second: Path) -> None:
    """Swap two names in one step.

    Raises:
        OutputError: this system, or the file system, cannot.
    """
    with reported("Exchanging the old output for the new", second):
        try:
            _renameat2(first, second, _EXCHANGE)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            raise OutputError(
                "Replacing a directory in one step is not possible here, and anything else could lose both.",
                fix="Write to a new path, then move the old directory away yourself.",
                path=second,
            ) from error


def replace(source: Path, target: Path) -> None:
    """Give the file `source` the name `target`, taking it from what had it."""
    with reported("Moving the output into place", target):
        source.replace(target)


def remove(path: Path) -> None:
    """Remove a file; one that is gone already is fine."""
    with reported("Removing", path):
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it; what cannot be removed stays, without an error.

    Threads that were interrupted may still add a file or two, hence the second try.
    """
    for _ in range(3):
        with suppress(FileNotFoundError):
            shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return


@cache
def _native(name: str) -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """`rename` with flags (Linux; elsewhere it fails with ENOSYS)."""
    native = _native("renameat2")
    if native is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while native(_HERE, os.fsencode(source), _HERE, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))

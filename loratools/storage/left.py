"""Files that an earlier run left and this one goes on with: opened through no link, read and cut by descriptor."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from loratools.errors import OutputError
from loratools.storage import syscalls
from loratools.storage.files import ReadOnlyFile

COPY = ".copy"
"""What a copy's name ends in, before it takes the place of what it is a copy of."""

_READ_WRITE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def require_regular(path: Path) -> os.stat_result | None:
    """What a file of ours looks like, or None where nothing has its name.

    Raises:
        OutputError: a link, a directory, a pipe or a device has it; it is left alone.
        StorageError: it cannot be looked at.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise syscalls.failure(error, "Looking at the file", path) from error
    if not stat.S_ISREG(status.st_mode):
        raise OutputError(
            "Something that is not a regular file has the name of a file of the work directory.",
            fix="Name a new directory, or move this away.",
            path=path,
        )
    return status


def open_left(path: Path) -> int:
    """A descriptor for reading and writing of a regular file that is there.

    One that has a second name is copied first: what is written to it must not reach whatever that name belongs to.

    Raises:
        OutputError: it is not a regular file.
        StorageError, AccessError: it cannot be opened or copied.
    """
    status = require_regular(path)
    if status is not None and status.st_nlink > 1:
        _detach(path)
    with syscalls.reported("Opening the file", path):
        descriptor = os.open(path, _READ_WRITE)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OutputError("The file was replaced by something else.", fix="Name a new directory.", path=path)


def remove_left(path: Path) -> None:
    """Remove a regular file, if it is there.

    Raises:
        OutputError: something else has its name.
        StorageError, AccessError: it cannot be removed.
    """
    if require_regular(path) is not None:
        syscalls.remove(path)


def _detach(path: Path) -> None:
    """Have `path` be a file of its own."""
    copy = path.with_name(path.name + COPY)
    remove_left(copy)
    with ReadOnlyFile(path) as source:
        descriptor = syscalls.create(copy)
        try:
            syscalls.copy_at(source, 0, descriptor, 0, source.size, copy)
        except BaseException:
            syscalls.remove(copy)
            raise
        finally:
            os.close(descriptor)
    syscalls.replace(copy, path)


def read_at(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    """At most `count` bytes from `offset` on; fewer only where the file ends."""
    found = bytearray()
    with syscalls.reported("Reading", path):
        while len(found) < count:
            data = os.pread(descriptor, count - len(found), offset + len(found))
            if not data:
                break
            found += data
    return bytes(found)


def cut(descriptor: int, size: int, path: Path) -> None:
    """Give the file this size."""
    with syscalls.reported("Cutting the file", path):
        os.ftruncate(descriptor, size)

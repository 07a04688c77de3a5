"""Input files: opened read-only, read by `pread`.

Nothing here maps memory: a file truncated under a mapping kills the process with SIGBUS, whereas
a short `pread` is an error that names the file and the offset.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, final

from loratools.errors import AccessError, InputMissingError, LoratoolsError, MalformedError, StorageError
from loratools.tensors import AbstractBytes

Check = Callable[[], None] | None  # called between two blocks of whatever takes long; raises to end it
READ_BYTES: Final = 1 << 20  # stays in the second-level cache between the read and whatever looks at it

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"),
)  # fmt: skip


@final
class ReadOnlyFile(AbstractBytes):
    """A regular file, opened read-only; every method may be called from several threads.

    Args:
        path: the file; a symbolic link is followed.

    Raises:
        InputMissingError: there is no such file.
        MalformedError: it is a directory, pipe, socket or device, or a loop of symbolic links.
        AccessError: reading it is not permitted.
        StorageError: the operating system cannot open it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = -1
        self.path = Path(path)
        try:
            # Looked at before it is opened, since opening a device can have effects; and again
            # afterwards, since the name may have been moved to something else in between.
            _require_regular(os.stat(self.path), self.path)  # noqa: PTH116
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            self._descriptor = os.open(self.path, flags)
            status = os.fstat(self._descriptor)
            _require_regular(status, self.path)
        except LoratoolsError:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise _open_failure(error, self.path) from error
        self.size = status.st_size
        self._modified = status.st_mtime_ns

    @property
    def label(self) -> str:
        """The base name."""
        return self.path.name

    def fileno(self) -> int:
        """The descriptor, for copies inside the kernel.

        Raises:
            StorageError: the file was closed.
        """
        if self._descriptor < 0:
            raise StorageError("The file was closed while it is still needed.", file=self.label)
        return self._descriptor

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of the file on.

        Raises:
            StorageError: the file ends earlier than it did when it was opened, or the read failed.
        """
        view = buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
        done, wanted, descriptor = 0, len(view), self.fileno()
        while done < wanted:
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                what = f"Reading failed: {error.strerror}."
                raise StorageError(what, fix=_FIX_DISK, file=self.label, offset=offset + done) from error
            if count == 0:
                raise StorageError(
                    f"The file changed or was truncated while being read: {wanted - done} bytes are missing.",
                    fix=_FIX_WRITER,
                    file=self.label,
                    offset=offset + done,
                )
            done += count

    def require_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened: what was read of it may be half old, half new.

        Raises:
            StorageError: it was.
        """
        if ((status := os.fstat(self.fileno())).st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise StorageError("The file was changed after it was opened.", fix=_FIX_WRITER, file=self.label)

    def close(self) -> None:
        """Release the descriptor; later reads raise `StorageError`."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._release(descriptor)

    _release = staticmethod(os.close)  # held by the class: when the interpreter ends, `os` may be gone before a file

    def __enter__(self) -> ReadOnlyFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ReadOnlyFile({self.label!r})"


_FIX_WRITER: Final = "Make sure that nothing writes to it, and run again."
_FIX_DISK: Final = "Check the disk and the mount, then run again."


def _require_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((text for test, text in _KINDS if test(status.st_mode)), "not a regular file")
    raise MalformedError(f"A regular file is needed here, and this is {kind}.", fix="Name the file itself.", file=path)


def _open_failure(error: OSError | ValueError, path: Path) -> LoratoolsError:
    """The typed error for a failed `open`; a NUL byte in the name comes as ValueError."""
    number = error.errno if isinstance(error, OSError) else errno.ENOENT
    if number in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
        return InputMissingError("There is no such file.", fix="Check the path.", file=path)
    if number in {errno.EACCES, errno.EPERM}:
        return AccessError("Reading this file is not permitted.", fix="Change its permissions.", file=path)
    if number == errno.ELOOP:
        return MalformedError("The symbolic links lead in a circle.", fix="Name the file itself.", file=path)
    if number in {errno.EMFILE, errno.ENFILE}:
        return StorageError("Too many files are open.", fix="Raise the limit (`ulimit -n 4096`).", file=path)
    return StorageError(f"The file cannot be opened: {os.strerror(number or errno.EIO)}.", fix=_FIX_DISK, file=path)


def blocks(
    file: AbstractBytes, start: int, stop: int, block_bytes: int = READ_BYTES, check: Check = None
) -> Iterator[memoryview]:
    """Bytes `start:stop` of `file` in order; each view is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(block_bytes, max(stop - start, 0))))
    for offset in range(start, stop, block_bytes):
        if check is not None:
            check()
        view = buffer[: min(block_bytes, stop - offset)]
        file.read_into(view, offset)
        yield view


def sha256_of(source: str | os.PathLike[str] | ReadOnlyFile, check: Check = None) -> str:
    """The SHA-256 of a whole file, in hexadecimal.

    Raises:
        LoratoolsError: as `ReadOnlyFile` and its `read_into` do; or whatever `check` raises.
    """
    if not isinstance(source, ReadOnlyFile):
        with ReadOnlyFile(source) as file:
            return sha256_of(file, check)
    digest = hashlib.sha256()
    for view in blocks(source, 0, source.size, check=check):
        digest.update(view)
    return digest.hexdigest()

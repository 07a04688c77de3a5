"""Small writers: tensors whose number is not known beforehand, and files that must be durable."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from loratools.errors import InternalError
from loratools.storage import syscalls
from loratools.storage.files import ReadOnlyFile
from loratools.tensors import TensorRef, TensorSpec

SCRATCH: Final = re.compile(r"\.scratch-[0-9a-f]{16}")
"""The name that a scratch file has for a moment; a kill in that moment leaves it."""


def write_bytes_durably(path: Path, data: bytes) -> None:
    """Create a small file and wait until it is on the disk; its mode follows the umask.

    Raises:
        OutputExistsError: the file exists.
        StorageError: the disk is full or failed; the file is removed again.
        AccessError: writing here is not permitted.
    """
    with _created(Path(path)) as descriptor:
        syscalls.write_at(descriptor, memoryview(data), 0, path)


def copy_durably(source: Path, path: Path) -> None:
    """Create a file with the bytes of another, in the kernel where it can, and wait until it is on the disk.

    Raises:
        LoratoolsError: as `write_bytes_durably`; or the source cannot be read.
    """
    with ReadOnlyFile(source) as file, _created(Path(path)) as descriptor:
        syscalls.copy_at(file, 0, descriptor, 0, file.size, path)


@contextmanager
def _created(path: Path) -> Iterator[int]:
    descriptor = syscalls.create(path)
    try:
        yield descriptor
        syscalls.sync_data(descriptor, path)
    except BaseException:
        syscalls.remove(path)
        raise
    finally:
        os.close(descriptor)


@final
class ScratchFile:
    """Keeps tensors on disk until the number and the shapes of all of them are known.

    The file has no name once it is open, so nothing remains of it however the process ends. The
    references stay readable after `close`, as long as one of them is held.

    Args:
        directory: where; the output's own `.partial` directory has the right disk.

    Raises:
        StorageError: the file cannot be made.
        AccessError: writing here is not permitted.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / f".scratch-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._end = 0
        self._descriptor = syscalls.create(self.path)
        try:
            self._source = ReadOnlyFile(self.path)
        except BaseException:
            self.close()
            raise
        finally:
            syscalls.remove(self.path)

    def append(self, name: str, data: memoryview | bytes | bytearray, spec: TensorSpec) -> TensorRef:
        """Store a tensor; from any thread.

        Args:
            name: the name that the reference gets.
            data: the tensor's bytes.
            spec: its dtype and shape.

        Raises:
            InternalError: the number of bytes is not that of `spec`.
            StorageError: the disk is full or failed.
        """
        view = memoryview(data).cast("B")
        if len(view) != spec.nbytes:
            raise InternalError(f"{len(view)} bytes were given for {spec.nbytes}.", tensor=name)
        with self._lock:
            offset, self._end = self._end, self._end + len(view)
        syscalls.write_at(self._descriptor, view, offset, self.path)
        return TensorRef(spec.renamed(name), self._source, offset)

    def close(self) -> None:
        """Take no more tensors."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> ScratchFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

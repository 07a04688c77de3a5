"""The safetensors writer: sizes first, then bytes in any order, then proof that they are on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, final

from loratools.errors import InternalError, StorageError
from loratools.storage import syscalls
from loratools.storage.files import Check, ReadOnlyFile, blocks
from loratools.storage.handed import Handed
from loratools.storage.headers import header_bytes
from loratools.storage.safetensors import read_header
from loratools.storage.scratch import ScratchFile, write_bytes_durably
from loratools.tensors import TensorRef, TensorSpec

__all__ = ["SafetensorsWriter", "ScratchFile", "WrittenFile", "header_bytes", "write_bytes_durably"]

_PART: Final = 256  # tensors that are verified together: a task for each would take more memory than the tensor


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that was written, flushed and read back.

    Attributes:
        name: base name.
        bytes: size of the file.
        sha256: of the whole file as the disk gives it back, in hexadecimal.
    """

    name: str
    bytes: int
    sha256: str


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _PART] for start in range(0, len(names), _PART))


@final
class SafetensorsWriter:
    """Writes one file whose tensors are known by name, dtype and shape, in any order, from any thread.

    As a context manager it removes the file when the block is left without `finish`.

    Args:
        path: the file; it must not exist.
        specs: the tensors in the order of their bytes.
        metadata: the `__metadata__` strings.
        threads: how many threads `finish` hashes with.
        check: called between two blocks of whatever takes long; raises to end it.
        left: a descriptor of the file as an earlier run left it, with this header and this size; taken over, and the
            file stays whatever happens.
        hashing: whether `digest` will be asked for.

    Raises:
        StorageError: the disk cannot hold the file, which is known before a tensor is computed.
        OutputExistsError: the file exists.
        AccessError: writing here is not permitted.
    """

    def __init__(  # noqa: PLR0913  (what all files have, and what only files that are gone on with have)
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        *,
        threads: int = 2,
        check: Check = None,
        left: int | None = None,
        hashing: bool = False,
    ) -> None:
        header, self._offsets = header_bytes(specs, metadata)
        self.path = Path(path)
        self.data_start = len(header)
        self._specs = {spec.name: spec for spec in specs}
        self._metadata = dict(metadata)
        self._handed: dict[str, Handed] = {}
        self._lock = threading.Lock()
        self._dirty = 0
        self._stop = threading.Event()
        self._check = check
        self._threads = max(threads, 1)
        self.size = len(header) + sum(spec.nbytes for spec in specs)
        self._hashing = hashing
        self._flushing = threading.Lock()
        if left is not None:
            self._descriptor = left
            return
        self._descriptor = syscalls.create(self.path)
        try:
            syscalls.allocate(self._descriptor, self.size, self.path)
            syscalls.write_at(self._descriptor, memoryview(header), 0, self.path)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, data: memoryview | bytes | bytearray, start: int = 0) -> None:
        """Write bytes of a tensor from its byte `start` on.

        Chunks of one tensor cost least in order: then one running hash covers them all.

        Raises:
            InternalError: no such tensor, outside of it, or bytes that were written before.
            StorageError: the disk is full or failed.
        """
        view = memoryview(data).cast("B")
        handed = self._claim(name, start, start + len(view))
        syscalls.write_at(self._open_descriptor(), view, self._offsets[name] + start, self.path)
        handed.add(start, view)
        self._count(len(view))

    def copy(self, name: str, ref: TensorRef) -> None:
        """Copy a whole tensor byte for byte, in the kernel where it lies in a file.

        Raises:
            InternalError: another dtype or size than announced, or bytes that were written before.
            StorageError: the source is cut short, the disk is full or failed.
        """
        self.copy_run((name,), (ref,))

    def copy_run(self, names: Sequence[str], refs: Sequence[TensorRef]) -> None:
        """`copy` many tensors: neighbours on both sides go with one system call.

        Raises:
            LoratoolsError: as `copy`.
        """
        pairs = list(zip(names, refs, strict=True))
        first = 0
        while first < len(pairs):
            last = first + 1
            while last < len(pairs) and self._adjoin(pairs[last - 1], pairs[last]):
                last += 1
            self._copy_adjoining(pairs[first:last])
            first = last

    def digest(self, name: str) -> str | None:
        """The SHA-256 of a tensor's bytes as they were handed in; None where they did not come in order."""
        return self._handed[name].digest()

    def place_of(self, name: str) -> tuple[TensorSpec, int]:
        """A tensor's dtype and shape, and the byte of the file where it begins."""
        return self._specs[name], self._offsets[name]

    def accept(self, handed: Mapping[str, Handed]) -> None:
        """Take tensors for written: whoever calls has compared the bytes in the file with what is said of them."""
        with self._lock:
            self._handed.update(handed)

    def flush(self) -> None:
        """Wait until what was written so far is on the disk.

        Raises:
            StorageError: flushing failed.
        """
        with self._flushing:
            if self._descriptor >= 0:
                syscalls.sync_data(self._descriptor, self.path)

    def finish(self) -> WrittenFile:
        """Flush the file, read it back, compare it with what was handed in, and close it.

        What `write` was given is compared by its CRC-32, what `copy` was given byte by byte with its
        source; both with the bytes that the file now returns.

        Raises:
            InternalError: some tensor was not written completely.
            StorageError: flushing failed, or the file returns other bytes.
        """
        empty = Handed()
        for name, spec in self._specs.items():
            self._handed.get(name, empty).require_complete(spec)
        descriptor = self._open_descriptor()
        pool = ThreadPoolExecutor(self._threads + 1)
        try:
            with ReadOnlyFile(self.path) as file:
                flushed = pool.submit(syscalls.sync_data, descriptor, self.path)
                self._require_header(file)
                whole = pool.submit(self._digest, file, 0, file.size)
                for _ in pool.map(lambda names: self._verify(names, file), _parts(list(self._specs))):
                    pass
                flushed.result()
                written = WrittenFile(self.path.name, file.size, whole.result())
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        self._close()
        return written

    def abort(self) -> None:
        """Close the file and remove it; does nothing after `finish`."""
        if self._descriptor >= 0:
            self._close()
            syscalls.remove(self.path)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self._close()

    def _close(self) -> None:
        with self._flushing:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _open_descriptor(self) -> int:
        if self._descriptor < 0:
            raise InternalError("The file was finished or given up already.", file=self.path.name)
        return self._descriptor

    def _claim(self, name: str, start: int, stop: int) -> Handed:
        spec = self._specs.get(name)
        if spec is None or not 0 <= start <= stop <= spec.nbytes:
            raise InternalError(f"Bytes {start}:{stop} are no part of this file's tensors.", tensor=name)
        with self._lock:
            handed = self._handed.setdefault(name, Handed(hashing=self._hashing))
        handed.claim(name, start, stop)
        return handed

    def _adjoin(self, left: tuple[str, TensorRef], right: tuple[str, TensorRef]) -> bool:
        """Whether `right` follows `left` without a gap in the source and here."""
        return (
            left[1].source is right[1].source
            and left[1].offset + left[1].nbytes == right[1].offset
            and self._offsets.get(left[0], -1) + left[1].nbytes == self._offsets.get(right[0])
        )

    def _copy_adjoining(self, pairs: Sequence[tuple[str, TensorRef]]) -> None:
        for name, ref in pairs:
            spec = self._specs.get(name)
            if spec is None or (spec.dtype, spec.nbytes) != (ref.dtype, ref.nbytes):
                raise InternalError("A tensor cannot be copied into one of another size or dtype.", tensor=name)
        source = pairs[0][1].source
        if not isinstance(source, ReadOnlyFile):
            for name, ref in pairs:
                start = 0
                for view in blocks(source, ref.offset, ref.offset + ref.nbytes, syscalls.COPY_BYTES):
                    self.write(name, view, start)
                    start += len(view)
            return
        handed = [self._claim(name, 0, ref.nbytes) for name, ref in pairs]
        count = sum(ref.nbytes for _, ref in pairs)
        offset = self._offsets[pairs[0][0]]
        syscalls.copy_at(source, pairs[0][1].offset, self._open_descriptor(), offset, count, self.path, self._check)
        for given, (_, ref) in zip(handed, pairs, strict=True):
            given.copied_from = ref
        self._count(count)

    def _require_header(self, file: ReadOnlyFile) -> None:
        header = read_header(file)
        intended = tuple((spec, self._offsets[name] - self.data_start) for name, spec in self._specs.items())
        read = (header.tensors, dict(header.metadata), header.data_start)
        if read != (intended, self._metadata, self.data_start):
            raise StorageError("The header on the disk is not the one that was written.", file=file.label)

    def _digest(self, file: ReadOnlyFile, start: int, stop: int) -> str:
        digest = hashlib.sha256()
        for view in blocks(file, start, stop, check=self._check_reading):
            digest.update(view)
        return digest.hexdigest()

    def _verify(self, names: Sequence[str], file: ReadOnlyFile) -> None:
        """Hold tensors' bytes on the disk against the ones handed in."""
        for name in names:
            handed = self._handed.get(name, Handed())
            handed.require_same(file, self._offsets[name], self._specs[name], self._check_reading)

    def _check_reading(self) -> None:
        if self._check is not None:
            self._check()
        if self._stop.is_set():
            raise StorageError("Reading back was stopped.", file=self.path.name)

    def _count(self, nbytes: int) -> None:
        """Let the kernel write out what has come together, so that `finish` does not wait for all of it."""
        with self._lock:
            self._dirty += nbytes
            enough = self._dirty >= syscalls.WRITEBACK_BYTES
            if enough:
                self._dirty = 0
        if enough:
            syscalls.start_writeback(self._open_descriptor())

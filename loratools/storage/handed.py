"""What a writer was handed for one tensor, kept so that the disk can be held against it."""

from __future__ import annotations

import bisect
import hashlib
import threading
import zlib
from collections.abc import Iterator
from typing import final

from loratools.errors import InternalError, StorageError
from loratools.storage.files import Check, ReadOnlyFile, blocks
from loratools.tensors import TensorRef, TensorSpec


@final
class Handed:
    """Checksums of the bytes of one tensor, or where they were copied from; used from several threads.

    Bytes that come in order go into one running CRC-32, others are summed piece by piece. The SHA-256 of the
    file is taken from what the disk gives back; here it is enough to notice that this differs from what was
    handed in, and a CRC costs a third; with `hashing` a SHA-256 is kept beside it, for another process to compare.
    """

    __slots__ = ("_claims", "_hash", "_lock", "_pieces", "_running", "_until", "copied_from")

    def __init__(self, *, hashing: bool = False) -> None:
        self.copied_from: TensorRef | None = None
        self._hash = hashlib.sha256() if hashing else None
        self._lock = threading.Lock()
        self._claims: list[tuple[int, int]] = []
        self._running = 0
        self._until = 0
        self._pieces: list[tuple[int, int, int]] = []

    def claim(self, name: str, start: int, stop: int) -> None:
        """Note that bytes `start:stop` are about to be written.

        Raises:
            InternalError: some of them were claimed before.
        """
        if start == stop:
            return
        with self._lock:
            at = bisect.bisect(self._claims, (start, stop))
            before = self._claims[at - 1][1] if at else 0
            after = self._claims[at][0] if at < len(self._claims) else stop
            if before > start or after < stop:
                raise InternalError(f"Bytes {start}:{stop} are written a second time.", tensor=name)
            self._claims.insert(at, (start, stop))

    def add(self, start: int, data: memoryview) -> None:
        """Sum bytes that were written at `start`."""
        with self._lock:
            if start == self._until:
                self._running = zlib.crc32(data, self._running)
                if self._hash is not None:
                    self._hash.update(data)
                self._until += len(data)
                return
        piece = (start, start + len(data), zlib.crc32(data))
        with self._lock:
            self._pieces.append(piece)

    def digest(self) -> str | None:
        """The SHA-256 of all that was handed in, or of what it was copied from; None where it did not come in order."""
        if self.copied_from is None:
            return None if self._hash is None or self._pieces else self._hash.hexdigest()
        digest, ref = hashlib.sha256(), self.copied_from
        for view in blocks(ref.source, ref.offset, ref.offset + ref.nbytes):
            digest.update(view)
        return digest.hexdigest()

    def require_complete(self, spec: TensorSpec) -> None:
        """Refuse to go on unless every byte of the tensor was handed in.

        Raises:
            InternalError: some were not.
        """
        reached = spec.nbytes if self.copied_from else 0
        for start, stop, _ in self._segments() if not self.copied_from else ():
            if start != reached:
                break
            reached = stop
        if reached != spec.nbytes:
            raise InternalError(
                f"The tensor was not written completely: byte {reached} of {spec.nbytes} is missing.", tensor=spec.name
            )

    def require_same(self, file: ReadOnlyFile, offset: int, spec: TensorSpec, check: Check) -> None:
        """Refuse a file whose bytes from `offset` on are not what was handed in.

        Raises:
            StorageError: they are not; or whatever `check` raises, between two blocks.
        """
        reader = _Reader(file, offset, spec.name, check)
        if self.copied_from is not None:
            reader.require_same_as(self.copied_from)
        else:
            reader.require_sums(self._segments())

    def _segments(self) -> list[tuple[int, int, int]]:
        return [(0, self._until, self._running), *sorted(self._pieces)]


@final
class _Reader:
    """Reads one tensor back."""

    def __init__(self, file: ReadOnlyFile, offset: int, tensor: str, check: Check) -> None:
        self._file = file
        self._offset = offset
        self._tensor = tensor
        self._check = check

    def require_same_as(self, ref: TensorRef) -> None:
        pairs = zip(self._blocks(0, ref.nbytes), blocks(ref.source, ref.offset, ref.offset + ref.nbytes), strict=True)
        for found, wanted in pairs:
            if bytes(found) != bytes(wanted):  # views are compared element by element, copies at once
                raise self._differs(f"those of its source, {ref.source.label}")

    def require_sums(self, segments: list[tuple[int, int, int]]) -> None:
        for start, stop, wanted in segments:
            found = 0
            for view in self._blocks(start, stop):
                found = zlib.crc32(view, found)
            if found != wanted:
                raise self._differs("those that were written")

    def _blocks(self, start: int, stop: int) -> Iterator[memoryview]:
        return blocks(self._file, self._offset + start, self._offset + stop, check=self._check)

    def _differs(self, what: str) -> StorageError:
        return StorageError(
            f"The bytes on the disk are not {what}.",
            fix="Check the disk, and that nothing else writes to these files; then run again.",
            file=self._file.label,
            tensor=self._tensor,
        )

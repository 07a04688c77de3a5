"""What a writer was handed for one tensor, kept so that the disk can be held against it."""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Iterator
from typing import final

from loratools.errors import InternalError, StorageError
from loratools.storage.files import ReadOnlyFile, blocks
from loratools.tensors import TensorRef, TensorSpec


@final
class Handed:
    """Hashes of the bytes of one tensor, or where they were copied from; used from several threads.

    Bytes that come in order go into one running hash, which then is the tensor's; others are
    hashed piece by piece, and the tensor's own hash is taken when the file is read back.
    """

    __slots__ = ("_claims", "_lock", "_pieces", "_running", "_until", "copied_from")

    def __init__(self) -> None:
        self.copied_from: TensorRef | None = None
        self._lock = threading.Lock()
        self._claims: list[tuple[int, int]] = []
        self._running = hashlib.sha256()
        self._until = 0
        self._pieces: list[tuple[int, int, bytes]] = []

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
        """Hash bytes that were written at `start`."""
        with self._lock:
            if start == self._until:
                self._running.update(data)
                self._until += len(data)
                return
        piece = (start, start + len(data), hashlib.sha256(data).digest())
        with self._lock:
            self._pieces.append(piece)

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

    def digest_of(self, file: ReadOnlyFile, offset: int, spec: TensorSpec, stop: threading.Event) -> str:
        """The SHA-256 of the tensor's bytes in `file` from `offset` on, once they are what was handed in.

        Raises:
            StorageError: they are not, or `stop` was set.
        """
        reader = _Reader(file, offset, spec.name, stop)
        if self.copied_from is not None:
            return reader.same_as(self.copied_from)
        return reader.hashed_as(self._segments(), spec.nbytes)

    def _segments(self) -> list[tuple[int, int, bytes]]:
        return [(0, self._until, self._running.digest()), *sorted(self._pieces)]


@final
class _Reader:
    """Reads one tensor back."""

    def __init__(self, file: ReadOnlyFile, offset: int, tensor: str, stop: threading.Event) -> None:
        self._file = file
        self._offset = offset
        self._tensor = tensor
        self._stop = stop

    def same_as(self, ref: TensorRef) -> str:
        digest = hashlib.sha256()
        pairs = zip(self._blocks(0, ref.nbytes), blocks(ref.source, ref.offset, ref.offset + ref.nbytes), strict=True)
        for found, wanted in pairs:
            if bytes(found) != bytes(wanted):  # views are compared element by element, copies at once
                raise self._differs(f"those of its source, {ref.source.label}")
            digest.update(found)
        return digest.hexdigest()

    def hashed_as(self, segments: list[tuple[int, int, bytes]], size: int) -> str:
        whole = hashlib.sha256()
        for start, stop, wanted in segments:
            part = whole if stop - start == size else hashlib.sha256()
            for view in self._blocks(start, stop):
                part.update(view)
                if part is not whole:
                    whole.update(view)
            if part.digest() != wanted:
                raise self._differs("those that were written")
        return whole.hexdigest()

    def _blocks(self, start: int, stop: int) -> Iterator[memoryview]:
        for view in blocks(self._file, self._offset + start, self._offset + stop):
            if self._stop.is_set():
                raise StorageError("Reading back was stopped.", file=self._file.label)
            yield view

    def _differs(self, what: str) -> StorageError:
        return StorageError(
            f"The bytes on the disk are not {what}.",
            fix="Check the disk, and that nothing else writes to these files; then run again.",
            file=self._file.label,
            tensor=self._tensor,
        )

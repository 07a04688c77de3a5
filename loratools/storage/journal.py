r"""An append-only file of records, each with its own checksum: what a killed run wrote last may be torn.

    <SHA-256> <bytes of the section> <one line of JSON>\n<section>

The checksum covers a seed and everything after it, so that no record of another journal is taken for one of this.
Reading ends at the first record that is not whole; what comes after it counts as not written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

from loratools.errors import LoratoolsError
from loratools.storage import syscalls
from loratools.storage.files import READ_BYTES
from loratools.storage.left import cut, read_at
from loratools.storage.strict_json import parse_json

_HEAD: Final = re.compile(rb"([0-9a-f]{64}) (0|[1-9][0-9]{0,17}) ")
_FIRST_BYTES: Final = 4096
_LINE_BYTES: Final = 4 << 20
"""Longest line that is read: facts about one tensor, not its bytes, which are the section's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A document, and where the bytes that belong to it lie."""

    document: Mapping[str, Any]
    offset: int = 0
    nbytes: int = 0


@final
class Journal:
    """Records in a file that is open for reading and writing; the descriptor stays the caller's.

    Args:
        descriptor: the file.
        path: its name, for errors.
        seed: what the records belong to.
    """

    def __init__(self, descriptor: int, path: Path, seed: bytes) -> None:
        self._descriptor = descriptor
        self._path = path
        self._seed = seed
        self._end = 0

    def read(self) -> list[Record]:
        """Every whole record from the beginning; what follows them is cut off, so that new ones are found.

        Raises:
            StorageError: reading or cutting failed.
        """
        records = list(self._records())
        cut(self._descriptor, self._end, self._path)
        return records

    def append(self, records: Iterable[tuple[Mapping[str, Any], bytes]]) -> None:
        """Write records, one after the other as they come, and wait until they are on the disk.

        Raises:
            StorageError: the disk is full or failed.
        """
        end = self._end
        for document, section in records:
            data = self._framed(document, section)
            syscalls.write_at(self._descriptor, memoryview(data), end, self._path)
            end += len(data)
        self._end = end
        syscalls.sync_data(self._descriptor, self._path)

    def section(self, record: Record) -> bytes:
        """The bytes that belong to a record.

        Raises:
            StorageError: reading failed.
        """
        return read_at(self._descriptor, record.nbytes, record.offset, self._path)

    def _framed(self, document: Mapping[str, Any], section: bytes) -> bytes:
        text = json.dumps(document, ensure_ascii=True, allow_nan=False)
        rest = f"{len(section)} {text}\n".encode("ascii")
        return f"{hashlib.sha256(self._seed + rest + section).hexdigest()} ".encode("ascii") + rest + section

    def _records(self) -> Iterator[Record]:
        while (line := self._line(self._end)) is not None:
            found = _HEAD.match(line)
            if found is None:
                return
            record = Record(self._document(line[found.end() :]), self._end + len(line), int(found[2]))
            if not record.document or self._digest(line[65:], record) != found[1].decode("ascii"):
                return
            self._end = record.offset + record.nbytes
            yield record

    def _line(self, offset: int) -> bytes | None:
        for size in (_FIRST_BYTES, _LINE_BYTES):
            data = read_at(self._descriptor, size, offset, self._path)
            if b"\n" in data:
                return data[: data.index(b"\n") + 1]
        return None

    def _document(self, text: bytes) -> Mapping[str, Any]:
        try:
            found = parse_json(text, file=self._path.name)
        except LoratoolsError:
            return {}
        return found if isinstance(found, dict) else {}

    def _digest(self, line: bytes, record: Record) -> str:
        digest = hashlib.sha256(self._seed + line)
        done = 0
        while done < record.nbytes:
            size = min(READ_BYTES, record.nbytes - done)
            data = read_at(self._descriptor, size, record.offset + done, self._path)
            if not data:
                return ""
            digest.update(data)
            done += len(data)
        return digest.hexdigest()

"""The importance matrices that llama.cpp wrote before it wrote them as GGUF (`imatrix.dat`): no value is read.

There is no specification but the program, `save_imatrix_legacy` and `load_imatrix_legacy` of
https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/imatrix.cpp. Little-endian: int32 number of entries; for
each int32 length of the name, the name, int32 number of calls, int32 number of values, and the values as float32, which
are the means of the squared inputs times the number of calls; then, unless the file is an old one, int32 number of
chunks, int32 length of the data set's name, and the name. The experts of a stacked tensor come one after the other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, final

from loratools.errors import MalformedError
from loratools.storage.files import ReadOnlyFile
from loratools.tensors import TensorRef, TensorSpec

MAX_NAME: Final = 255
_MAX_DATASET: Final = 65535
_INT: Final = 4
_LEAST_ENTRY: Final = _INT + 1 + _INT + _INT + _INT
_FIX: Final = (
    "Give a .safetensors file of RMS values, or the imatrix that llama-imatrix wrote; this one may be damaged."
)


def open_imatrix(path: str | os.PathLike[str]) -> Mapping[str, TensorRef]:
    """Open such a file: tensor name → its values, unread, (n,) float32.

    Raises:
        MalformedError: the layout is another; sizes that do not fit the file; a name twice.
        LoratoolsError: it cannot be read; see `ReadOnlyFile`.
    """
    file = ReadOnlyFile(path)
    try:
        return read_imatrix(file)
    except BaseException:
        file.close()
        raise


def read_imatrix(file: ReadOnlyFile) -> Mapping[str, TensorRef]:
    """Go through an open file; raises as `open_imatrix`."""
    cursor = _Cursor(file)
    entries = cursor.size("entries", _LEAST_ENTRY, least=1)
    found: dict[str, TensorRef] = {}
    for _ in range(entries):
        name = cursor.text(MAX_NAME)
        if name in found:
            raise _malformed("A tensor name comes twice.", file, tensor=name)
        cursor.size("calls", 0)
        values = cursor.size("values", _INT, least=1)
        found[name] = TensorRef(TensorSpec(name, "F32", (values,)), file, cursor.position)
        cursor.position += _INT * values
    if cursor.left:
        cursor.size("chunks", 0)
    if cursor.left:
        cursor.text(_MAX_DATASET, least=0)
    if cursor.left:
        raise _malformed(f"{cursor.left} bytes follow the last entry and belong to none.", file)
    return MappingProxyType(found)


@final
class _Cursor:
    """Goes through the file and never past its end."""

    def __init__(self, file: ReadOnlyFile) -> None:
        self._file = file
        self.position = 0

    @property
    def left(self) -> int:
        return self._file.size - self.position

    def size(self, what: str, width: int, *, least: int = 0) -> int:
        """A count of things of at least `width` bytes each, for which the file has room."""
        number: int = struct.unpack("<i", self._take(_INT))[0]
        if number < least or number * width > self.left:
            raise _malformed(f"It claims {number} {what} where {self.left} bytes are left.", self._file)
        return number

    def text(self, most: int, *, least: int = 1) -> str:
        length = self.size("bytes of a name", 1, least=least)
        if length > most:
            raise _malformed(f"It claims a name of {length} bytes.", self._file)
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise _malformed("A name is not UTF-8.", self._file) from error

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise _malformed("It ends in the middle of an entry.", self._file)
        data = bytearray(count)
        self._file.read_into(memoryview(data), self.position)
        self.position += count
        return bytes(data)


def _malformed(what: str, file: ReadOnlyFile, **where: object) -> MalformedError:
    return MalformedError(f"This is no importance matrix. {what}", fix=_FIX, file=file.label, **where)

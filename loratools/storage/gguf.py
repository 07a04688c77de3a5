"""The GGUF reader: strict, header first, no tensor byte touched.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian: the magic
`GGUF`, uint32 version, uint64 number of tensors, uint64 number of key-value pairs; the pairs; for every tensor its
name, uint32 number of dimensions, uint64 dimensions with the innermost first, uint32 type, uint64 offset; zeros up to
the alignment; the tensors. What ggml's own loader demands beyond it (`ggml/src/gguf.cpp`) is demanded here: an
alignment that is a power of two, no nested arrays, at most four dimensions, tensors that follow one another in order.

Tensors of plain types are read; quantised ones are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, final

from loratools.errors import MalformedError, UnsupportedError
from loratools.storage.files import READ_BYTES, ReadOnlyFile
from loratools.tensors import TensorRef, TensorSpec

MAGIC: Final = b"GGUF"
MAX_HEADER_BYTES: Final = 256 << 20
MAX_ITEMS: Final = 1 << 21
"""Pairs, tensors and array entries of one header together: each becomes an object."""

_VERSIONS: Final = (2, 3)
_BIG_ENDIAN: Final = frozenset(int.from_bytes(version.to_bytes(4, "big"), "little") for version in (1, *_VERSIONS))
_MAX_SIZE: Final = 2**63 - 1
_MAX_KEY: Final = 65535
_MAX_NAME: Final = 255  # the specification says 64; programs built with a larger GGML_MAX_NAME write longer ones
_MAX_DIMENSIONS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20
_ALIGNMENT_KEY: Final = "general.alignment"
_LEAST_TENSOR: Final = 8 + 1 + 4 + 4 + 8
_LEAST_PAIR: Final = 8 + 1 + 4 + 1
_STRING, _BOOL, _ARRAY, _UINT32 = 8, 7, 9, 4
_SCALARS: Final[Mapping[int, str]] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
)
_DTYPES: Final[Mapping[int, str]] = MappingProxyType(
    {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
)
_FIX: Final = "The file is damaged or was not written by a GGUF writer; get it again from where it came from."


@dataclasses.dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open file.

    Attributes:
        tensors: by name, in the order of their bytes; shapes outermost first, as torch has them.
        metadata: key → number, bool, string, or a tuple of such.
        file: the file that the tensors lie in.
    """

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, Any]
    file: ReadOnlyFile


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and read its header.

    Raises:
        MalformedError: it breaks the specification, or does not fit the file's size.
        UnsupportedError: big-endian, version 1, quantised tensors, or more entries than are read.
        LoratoolsError: it cannot be read; see `ReadOnlyFile`.
    """
    file = ReadOnlyFile(path)
    try:
        return read_gguf(file)
    except BaseException:
        file.close()
        raise


def read_gguf(file: ReadOnlyFile) -> GGUFFile:
    """Read and check the header of an open file; raises as `open_gguf`."""
    cursor = _Cursor(file)
    if cursor.take(4) != MAGIC:
        raise _malformed("The file does not begin with `GGUF`.", file=file.label)
    version = cursor.number("<I")
    if version in _BIG_ENDIAN or version == 1:
        what = "This GGUF file is of version 1." if version == 1 else "This GGUF file is big-endian."
        raise UnsupportedError(what, fix="Write it again with a current tool.", file=file.label)
    if version not in _VERSIONS:
        raise _malformed(f"GGUF version {version} is not known; 2 and 3 are.", file=file.label)
    tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
    cursor.count(tensors, _LEAST_TENSOR, "tensors")
    cursor.count(pairs, _LEAST_PAIR, "key-value pairs")
    metadata: dict[str, Any] = {}
    types: dict[str, int] = {}
    for _ in range(pairs):
        key = cursor.text(_MAX_KEY, "key")
        if key in metadata:
            raise _malformed("A key comes twice.", file=file.label, key=key)
        types[key] = cursor.number("<I")
        metadata[key] = _value(cursor, types[key], key)
    alignment = _alignment(metadata, types, file.label)
    infos = [_info(cursor, file.label) for _ in range(tensors)]
    start = cursor.position + -cursor.position % alignment
    return GGUFFile(MappingProxyType(_placed(infos, start, alignment, file)), MappingProxyType(metadata), file)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind != _ARRAY:
        return _single(cursor, kind, key)
    inner, length = cursor.number("<I"), cursor.number("<Q")
    if inner == _ARRAY:
        raise _malformed("An array holds arrays.", file=cursor.label, key=key)
    least = 8 if inner == _STRING else struct.calcsize(_SCALARS.get(inner, "<B"))
    cursor.count(length, least, "array entries")
    return tuple(_single(cursor, inner, key) for _ in range(length))


def _single(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text(MAX_HEADER_BYTES, "string")
    if kind not in _SCALARS:
        raise _malformed(f"Value type {kind} is not one that GGUF defines.", file=cursor.label, key=key)
    value = cursor.number(_SCALARS[kind])
    if kind == _BOOL and value not in {0, 1}:
        raise _malformed(f"A bool is {value}.", file=cursor.label, key=key)
    return bool(value) if kind == _BOOL else value


def _alignment(metadata: Mapping[str, Any], types: Mapping[str, int], label: str) -> int:
    value = metadata.get(_ALIGNMENT_KEY, 32)
    known = types.get(_ALIGNMENT_KEY, _UINT32) == _UINT32
    if not known or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise _malformed("The alignment is not a power of two in 32 bits.", file=label, alignment=value)
    return int(value)


def _info(cursor: _Cursor, label: str) -> tuple[TensorSpec, int]:
    """A tensor as its entry describes it, and its offset from the first tensor's byte."""
    name = cursor.text(_MAX_NAME, "tensor name")
    dimensions = cursor.number("<I")
    if dimensions > _MAX_DIMENSIONS:
        raise _malformed(
            f"The tensor has {dimensions} dimensions; {_MAX_DIMENSIONS} is the most.", file=label, tensor=name
        )
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if math.prod(size or 1 for size in shape) > _MAX_SIZE:
        raise _malformed("The shape has more elements than can be counted in 64 bits.", file=label, tensor=name)
    if kind not in _DTYPES:
        raise UnsupportedError("Quantised GGUF tensors are not read yet.", file=label, tensor=name, type=kind)
    return TensorSpec(name, _DTYPES[kind], shape), offset


def _placed(
    infos: list[tuple[TensorSpec, int]], start: int, alignment: int, file: ReadOnlyFile
) -> dict[str, TensorRef]:
    """References to all tensors, which must follow one another up to the end of the file."""
    found: dict[str, TensorRef] = {}
    due = end = 0
    for spec, offset in infos:
        if spec.name in found:
            raise _malformed("A tensor name comes twice.", file=file.label, tensor=spec.name)
        if offset != due:
            raise _malformed(f"The data begins at {offset} where {due} is due.", file=file.label, tensor=spec.name)
        end = offset + spec.nbytes
        due = end + -end % alignment
        if start + end > file.size:
            raise MalformedError(
                f"The file is cut short: the tensor ends at byte {start + end}, and the file has {file.size}.",
                fix="Download or copy the file again.",
                file=file.label,
                tensor=spec.name,
            )
        found[spec.name] = TensorRef(spec, file, start + offset)
    if file.size > start + due:
        raise _malformed(f"{file.size - start - due} bytes follow the last tensor and belong to none.", file=file.label)
    return found


@final
class _Cursor:
    """Goes through a header once, and never past the end of the file, nor past what a header may be."""

    def __init__(self, file: ReadOnlyFile) -> None:
        self._file = file
        self._buffer = b""
        self._at = 0
        self._loaded = 0
        self._items = 0

    @property
    def label(self) -> str:
        return self._file.label

    @property
    def position(self) -> int:
        return self._loaded - len(self._buffer) + self._at

    def take(self, count: int) -> bytes:
        if count > len(self._buffer) - self._at:
            self._load(count)
        self._at += count
        return self._buffer[self._at - count : self._at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int, what: str) -> str:
        length = self.number("<Q")
        if length > most:
            raise _malformed(f"A {what} of {length} bytes is longer than any may be.", file=self.label)
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _malformed(f"A {what} is not UTF-8.", file=self.label) from error

    def count(self, number: int, least: int, what: str) -> None:
        """Refuse a number of things that the rest of the file has no room for, or that would fill the memory."""
        if number * least > self._file.size - self.position:
            raise _malformed(f"The file claims {number} {what}, and has no room for them.", file=self.label)
        self._items += number
        if self._items > MAX_ITEMS:
            raise UnsupportedError(f"The header has more than {MAX_ITEMS} entries.", file=self.label)

    def _load(self, count: int) -> None:
        rest = self._buffer[self._at :]
        left = self._file.size - self._loaded
        if count > len(rest) + left or self.position + count > MAX_HEADER_BYTES:
            raise _malformed(f"The header goes on at byte {self.position}, and the file ends.", file=self.label)
        data = bytearray(min(max(count - len(rest), READ_BYTES), left))
        self._file.read_into(memoryview(data), self._loaded)
        self._buffer, self._at = rest + bytes(data), 0
        self._loaded += len(data)


def _malformed(what: str, **where: object) -> MalformedError:
    return MalformedError(what, fix=_FIX, **where)

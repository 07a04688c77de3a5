"""The safetensors reader: strict, header first, no tensor byte touched.

Specification: https://github.com/huggingface/safetensors#format. What the reference library refuses is refused; what
it takes and this reader does not is a list with reasons, `docs/formats/safetensors.md`, to which the tests hold both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Final

from loratools.errors import MalformedError
from loratools.storage.files import ReadOnlyFile
from loratools.storage.strict_json import decode_json, refuse_deep
from loratools.tensors import DTYPES, TensorRef, TensorSpec

PREFIX_BYTES: Final = 8  # the header's length, little-endian, unsigned
MAX_HEADER_BYTES: Final = 100_000_000
METADATA_KEY: Final = "__metadata__"

_MAX_SIZE: Final = 2**63 - 1
_MAX_ENTRY_DEPTH: Final = 125  # an entry lies two levels deep in the 127 that the library reads
_NOT_A_FLOAT: Final = 2**1024 - 2**970  # the first integer that rounds to infinity
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
_FIX: Final = "The file is damaged or was not written by a safetensors writer; get it again from where it came from."


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What the header says.

    Attributes:
        tensors: each tensor with the offset of its first byte, in bytes from `data_start`; in the
            order of their bytes.
        metadata: the `__metadata__` strings.
        data_start: where the tensors' bytes begin, in bytes from the start of the file.
    """

    tensors: tuple[tuple[TensorSpec, int], ...]
    metadata: Mapping[str, str]
    data_start: int


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """An open file: `tensors` by name in the order of their bytes, and the file they lie in."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    file: ReadOnlyFile
    data_start: int


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Open a safetensors file and read its header.

    Raises:
        MalformedError: it is not a valid safetensors file.
        LoratoolsError: it cannot be read; see `ReadOnlyFile`.
    """
    file = ReadOnlyFile(path)
    try:
        return read_safetensors(file)
    except BaseException:
        file.close()
        raise


def read_safetensors(file: ReadOnlyFile) -> SafetensorsFile:
    """The same of a file that is open already; raises as `read_header`."""
    header = read_header(file)
    start = header.data_start
    tensors = {spec.name: TensorRef(spec, file, start + offset) for spec, offset in header.tensors}
    return SafetensorsFile(MappingProxyType(tensors), header.metadata, file, start)


def read_header(file: ReadOnlyFile) -> Header:
    """Read and check the header of an open file.

    Raises:
        MalformedError: it is not a valid safetensors header, or does not fit the file's size.
        StorageError: reading failed.
    """
    if file.size < PREFIX_BYTES:
        raise _malformed(f"The file has {file.size} bytes; a safetensors file has 8 at the least.", file=file.label)
    prefix = bytearray(PREFIX_BYTES)
    file.read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES and prefix.lstrip().startswith((b"{", b"[")):
        raise MalformedError(
            "This is no safetensors file: it begins like JSON.",
            fix="Name the directory that it lies in, or the weights beside it.",
            file=file.label,
        )
    if length > MAX_HEADER_BYTES:
        raise _malformed(f"The header claims {length} bytes; 100,000,000 is the most.", file=file.label)
    if length > file.size - PREFIX_BYTES:
        raise _malformed(
            f"The header claims {length} bytes, and the file ends {file.size - PREFIX_BYTES} bytes after its length.",
            file=file.label,
        )
    data = bytearray(length)
    file.read_into(memoryview(data), PREFIX_BYTES)
    return parse_header(data, file=file.label, data_bytes=file.size - PREFIX_BYTES - length)


def parse_header(data: bytes | bytearray, *, file: str, data_bytes: int) -> Header:
    """Check a header and everything it says of the bytes that follow it.

    Args:
        data: the JSON, without the eight bytes of its length.
        file: name for messages.
        data_bytes: number of bytes that follow the header in the file.

    Raises:
        MalformedError: any rule is broken: strict JSON that begins with `{`; names once; known
            dtypes; shapes whose size is that of their bytes; bytes that follow one another from
            the header to the end of the file without hole, overlap or rest.
    """
    if len(data) > MAX_HEADER_BYTES:
        raise _malformed(f"The header has {len(data)} bytes; 100,000,000 is the most.", file=file)
    if data[:1] != b"{":
        raise _malformed("The header does not begin with `{`.", file=file)
    # JSON knows a negative zero, which is no integer to the library; Python drops its sign.
    entries = decode_json(data, file=file, integer=_signed if b"-0" in data else int)
    assert isinstance(entries, dict)  # JSON that begins with `{`
    metadata = _metadata(entries.pop(METADATA_KEY, None), file)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # few differ: shared, a header of 90 k tensors stays small
    rows = []
    for name, entry in entries.items():
        complaint = _complaint(entry, file)
        if complaint:
            raise _malformed(complaint, file=file, tensor=name)
        shape = tuple(entry["shape"])
        spec = TensorSpec(name, DTYPES[entry["dtype"]].name, shapes.setdefault(shape, shape))
        rows.append((*entry["data_offsets"], spec))
    rows.sort(key=itemgetter(0, 1))
    _require_cover(rows, file, data_bytes)
    tensors = tuple((spec, begin) for begin, _, spec in rows)
    return Header(tensors, metadata, PREFIX_BYTES + len(data))


def _metadata(value: object, file: str) -> Mapping[str, str]:
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _malformed("`__metadata__` may hold only strings.", file=file)
    return MappingProxyType(value)


def _complaint(entry: object, file: str) -> str:
    """What is wrong with one tensor's entry taken alone, or an empty string."""
    if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
        return "The entry must be an object with `dtype`, `shape` and `data_offsets`."
    if len(entry) != len(_FIELDS):
        _refuse_ignored(entry, file)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"Dtype {dtype!a:.40} is not one that safetensors defines."
    if not _are_sizes(shape):
        return "The shape must be a list of integers from 0 to 2^63 - 1."
    if not _are_sizes(offsets) or len(offsets) != 2:  # noqa: PLR2004  begin and end
        return "The data offsets must be two integers from 0 to 2^63 - 1."
    return _size_complaint(dtype, shape, offsets[0], offsets[1])


def _signed(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _refuse_ignored(entry: dict[str, object], file: str) -> None:
    """Refuse, in fields that nobody reads, what the library's reader does not get past."""
    refuse_deep(entry, file=file, limit=_MAX_ENTRY_DEPTH)
    values: list[object] = [entry]
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int) and abs(value) >= _NOT_A_FLOAT:
            raise _malformed("An integer in an unknown field is larger than any float64.", file=file)


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110  a generator costs twice as much, and a terabyte model has 90,000 of these
        # `type is int`: True and False are integers to Python, and not to JSON.
        if type(value) is not int or value < 0 or value > _MAX_SIZE:
            return False
    return True


def _size_complaint(dtype: str, shape: list[int], begin: int, end: int) -> str:
    if end < begin:
        return f"The data ends at {end}, before it begins at {begin}."
    bound, bits = 1, DTYPES[dtype].bits
    for size in shape:
        bound *= size or 1  # a zero must not hide factors that overflow in an array library
        bits *= size
        if bound > _MAX_SIZE:
            return "The shape has more elements than can be counted in 64 bits."
    if bits != 8 * (end - begin):
        return f"Shape {tuple(shape)!s:.60} in {dtype} takes {bits / 8:g} bytes; the offsets span {end - begin}."
    return ""


def _require_cover(rows: list[tuple[int, int, TensorSpec]], file: str, data_bytes: int) -> None:
    """Refuse holes, overlaps and bytes that belong to no tensor (where another file could hide)."""
    reached = 0
    for begin, end, spec in rows:
        if begin != reached:
            what = "a hole before it" if begin > reached else "an overlap with the tensor before it"
            raise _malformed(f"The data begins at {begin} where {reached} is due: {what}.", file=file, tensor=spec.name)
        reached = end
    if reached > data_bytes:
        name = next(spec.name for _, end, spec in rows if end > data_bytes)
        raise MalformedError(
            f"The file is cut short: its tensors need {reached} bytes, and {data_bytes} follow the header.",
            fix="Download or copy the file again.",
            file=file,
            tensor=name,
        )
    if reached < data_bytes:
        raise _malformed(f"{data_bytes - reached} bytes follow the last tensor and belong to none.", file=file)


def _malformed(what: str, **where: object) -> MalformedError:
    return MalformedError(what, fix=_FIX, **where)

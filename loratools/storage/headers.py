"""The header of a safetensors file that is about to be written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from loratools.errors import InternalError, UnsupportedError
from loratools.storage.safetensors import MAX_HEADER_BYTES, METADATA_KEY, PREFIX_BYTES
from loratools.tensors import DTYPES, TensorSpec

ALIGNMENT: Final = 8
_text: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Mapping[str, int]]:
    """The first bytes of a file, and where each tensor begins, in bytes from the start of the file.

    Args:
        specs: the tensors in the order of their bytes.
        metadata: the `__metadata__` strings.

    Raises:
        InternalError: a name comes twice or is reserved.
        UnsupportedError: the header is longer than the format allows, or a name is not Unicode.
    """
    entries = [f"{_text(METADATA_KEY)}:{_text(dict(metadata))}"] if metadata else []
    offsets, reached = {}, 0
    for spec in specs:
        if spec.name in offsets or spec.name == METADATA_KEY:
            raise InternalError("A tensor name is used twice or is reserved.", tensor=spec.name)
        end = reached + spec.nbytes
        if spec.numel * DTYPES[spec.dtype].bits % 8:
            raise UnsupportedError("The tensor does not fill whole bytes.", tensor=spec.name, dtype=spec.dtype)
        entry = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (reached, end)}
        entries.append(f"{_text(spec.name)}:{_text(entry)}")  # as text: objects take five times the memory
        offsets[spec.name] = reached
        reached = end
    try:
        text = f"{{{','.join(entries)}}}".encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError("A tensor name or a metadata string is not Unicode text.", text=error.object) from error
    start = PREFIX_BYTES + len(text)
    start += -start % ALIGNMENT
    length = start - PREFIX_BYTES
    if length > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"The header would have {length} bytes; the format allows {MAX_HEADER_BYTES}.", fix="Ask for more shards."
        )
    data = length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)
    return data, MappingProxyType({name: start + offset for name, offset in offsets.items()})

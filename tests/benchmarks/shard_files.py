"""Safetensors files written block by block and read by offset, with the standard library alone.

The benchmarks' inputs must not be made by the code under test, nor need a whole tensor in memory, nor torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"BF16": 2, "F32": 4}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    path: Path
    dtype: str
    offset: int


Produce = Callable[[TensorEntry], Iterator[bytes]]


def header(entries: Iterable[TensorEntry]) -> bytes:
    """Length and JSON header of a file that holds `entries` in this order, padded to 8 bytes."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        data_offsets = [offset, offset + entry.size]
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": data_offsets}
        offset += entry.size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(path: Path, entries: list[TensorEntry], produce: Produce) -> None:
    """Write one file, holding one block of one tensor at a time."""
    with path.open("wb") as file:
        file.write(header(entries))
        for entry in entries:
            written = sum(file.write(block) for block in produce(entry))
            if written != entry.size:
                raise ValueError(f"{entry.name}: {written} bytes produced, {entry.size} announced.")


def write_sparse(path: Path, entries: list[TensorEntry]) -> None:
    """Write a valid header and leave the data a hole: a terabyte of tensors in a few megabytes of disk."""
    start = header(entries)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(entry.size for entry in entries))


def shards(entries: Iterable[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    """Fill shards in order; a shard exceeds the limit only where one tensor does."""
    parts: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if parts[-1] and filled + entry.size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += entry.size
    return parts


def write_index(folder: Path, parts: list[list[TensorEntry]]) -> list[Path]:
    """Write the index of a sharded checkpoint and return its shards' paths."""
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    weight_map = {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part}
    total = sum(entry.size for part in parts for entry in part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def write_checkpoint(folder: Path, entries: list[TensorEntry], produce: Produce, limit: int) -> None:
    """Write a sharded checkpoint."""
    parts = shards(entries, limit)
    for path, part in zip(write_index(folder, parts), parts, strict=True):
        write_file(path, part, produce)


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Find every tensor of the shards in `folder` by reading the headers."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            document = json.loads(file.read(length))
        document.pop("__metadata__", None)
        for name, entry in document.items():
            found[name] = StoredTensor(path, entry["dtype"], 8 + length + entry["data_offsets"][0])
    return found

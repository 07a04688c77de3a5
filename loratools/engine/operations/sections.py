"""What a receipt holds of one tensor: the bytes of its section, a chunk of rows at a time; see docs/formats/receipt.md.

A chunk says after how many rounds Ŵ is reached (`predicting`), and the corrections that make W of it
(`linalg.corrections`), as varints, compressed by zlib. An empty chunk is one round and no correction.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from loratools.engine import memory
from loratools.engine.operations.predicting import MOST_ROUNDS
from loratools.errors import MalformedError

if TYPE_CHECKING:
    import torch

CHUNK_ENTRIES: Final = memory.RECEIPT_ENTRIES
"""Entries of a chunk: a quarter of a tile of 16 bits. It is part of the format, unlike tiles, so that a receipt has the
same bytes however much memory there was."""
_BLOCK: Final = 64
_LEVEL: Final = 1
_PER_ENTRY: Final = 30
"""No entry takes more bytes: a place and a distance, of ten bytes at most, and some for the rest."""


def chunk_rows(shape: Sequence[int]) -> int:
    """Rows of a chunk of a matrix of this shape: whole blocks of 64 where a row is not very long."""
    columns = 1
    for extent in shape[1:]:
        columns *= extent
    rows = max(1, CHUNK_ENTRIES // max(columns, 1))
    return rows - rows % _BLOCK if rows > _BLOCK else rows


def encode_chunk(W: torch.Tensor, merged: torch.Tensor, predicted: torch.Tensor, rounds: int) -> bytes:
    """The bytes that say what W was; all three tensors contiguous, on the CPU, of one dtype and shape."""
    import numpy as np

    from loratools import linalg
    from loratools.storage import varints

    found = linalg.corrections(W, merged, predicted)
    last = np.flatnonzero(found.risky)
    risky = found.risky[: int(last[-1]) + 1 if len(last) else 0]
    if rounds == 1 and not len(found.places) and not len(risky):
        return b""
    gaps = np.diff(found.places, prepend=-1) - 1
    head = np.array([rounds, len(gaps)], np.uint64)
    numbers = (head, gaps.view(np.uint64), varints.folded(found.others), varints.folded(risky))
    return zlib.compress(b"".join(map(varints.encode, numbers)), _LEVEL)


def decode_chunk(
    data: bytes, merged: torch.Tensor, predict: Callable[[int], torch.Tensor], *, what: str
) -> torch.Tensor:
    """W, from what `encode_chunk` made of it.

    Args:
        data: a chunk.
        merged: W' there, on the CPU.
        predict: Ŵ after so many rounds.
        what: the tensor's name, for messages.

    Raises:
        MalformedError: the bytes are no chunk of this tensor.
    """
    import numpy as np

    from loratools import linalg
    from loratools.storage import varints

    if not data:
        return predict(1)
    numbers = _unpacked(data, 64 + _PER_ENTRY * merged.numel(), what)
    (rounds, count), used = varints.decode(numbers, 2, what=what)
    if rounds > MOST_ROUNDS or count > merged.numel():
        raise MalformedError(f"{rounds} rounds and {count} places are more than there can be.", tensor=what)
    gaps, length = varints.decode(numbers[used:], int(count), what=what)
    others, more = varints.decode(numbers[used + length :], int(count), what=what)
    if len(gaps) and int(gaps.max()) >= merged.numel():
        raise MalformedError("A correction lies outside of its chunk.", tensor=what)
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    predicted = predict(int(rounds))
    total = linalg.risky_count(merged, predicted)
    rest = numbers[used + length + more :]
    there = int(np.count_nonzero(np.frombuffer(rest, np.uint8) < 1 << 7))
    if there > total or (len(places) and int(places[-1]) >= merged.numel()):
        raise MalformedError("There are corrections of more entries than the chunk has.", tensor=what)
    given, end = varints.decode(rest, there, what=what)
    if end != len(rest):
        raise MalformedError("The chunk ends inside of a number.", tensor=what)
    risky = np.zeros(total, np.int64)
    risky[:there] = varints.unfolded(given)
    return linalg.corrected(merged, predicted, linalg.Corrections(risky, places, varints.unfolded(others)))


def _unpacked(data: bytes, most: int, what: str) -> bytes:
    """Decompressed, and never more than a chunk can take."""
    stream = zlib.decompressobj()
    try:
        numbers = stream.decompress(data, most)
    except zlib.error as error:
        raise MalformedError(f"A chunk cannot be decompressed: {error}.", tensor=what) from error
    if not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise MalformedError("A chunk does not end where it should.", tensor=what)
    return numbers

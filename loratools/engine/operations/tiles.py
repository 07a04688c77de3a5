"""Row tiles: how an operation goes through a tensor that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratools.errors import NonFiniteError
from loratools.storage.files import Check
from loratools.tensors import COMPUTABLE, TensorRef

if TYPE_CHECKING:
    import torch


def row_ranges(shape: tuple[int, ...], row_bytes: int, tile_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """`(start, stop)` rows of consecutive tiles of about `tile_bytes`, of a multiple of so many rows each."""
    rows = shape[0] if shape else 1
    step = max(1, tile_bytes // max(row_bytes, 1) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def row_bytes(ref: TensorRef) -> int:
    """Stored bytes of one row."""
    return ref.nbytes // ref.shape[0] if ref.shape and ref.shape[0] else ref.nbytes


def require_all_finite(ref: TensorRef, tile_bytes: int) -> None:
    """Refuse a tensor with NaN or infinity anywhere, looking at a tile at a time; dtypes without them pass.

    Raises:
        NonFiniteError: says in how many entries.
    """
    from loratools.linalg import non_finite_count

    if ref.dtype not in COMPUTABLE:
        return
    pieces = [ref.rows(*rows) for rows in row_ranges(ref.shape, row_bytes(ref), tile_bytes)] if ref.shape else [ref]
    bad = sum(non_finite_count(piece.load()) for piece in pieces)
    if bad:
        raise NonFiniteError(
            f"{bad} of {ref.spec.numel} entries are NaN or infinite.",
            fix="The file is damaged, or training diverged; nothing was written.",
            tensor=ref.name,
            file=ref.source.label,
        )


def difference_into(rows: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`after − before` into float32 `rows`, exact where float32 is; returns ‖before‖², float64, on their device."""
    import torch

    rows.copy_(before)
    squares: torch.Tensor = torch.linalg.vector_norm(rows, dim=1).double().square().sum()
    if torch.float64 in {before.dtype, after.dtype}:  # float32 would hide what the two have in common
        rows.copy_(after.double() - before.double())
    else:
        rows.copy_(after).sub_(before)
    return squares


def same_bytes(one: TensorRef, other: TensorRef, chunk_bytes: int, check: Check = None) -> bool:
    """Whether two tensors of equal dtype and shape hold the same bytes; stops at the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = min(chunk_bytes, max(one.nbytes, 1))
    left, right = memoryview(bytearray(size)), memoryview(bytearray(size))
    for start, stop in one.chunks(size):
        if check is not None:
            check()
        one.read_into(left[: stop - start], start)
        other.read_into(right[: stop - start], start)
        if left[: stop - start] != right[: stop - start]:
            return False
    return True


def differing_bytes(one: TensorRef, other: TensorRef) -> int:
    """How many entries of two tensors differ in their bytes (bytes, in narrower dtypes); both are read whole."""
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return max(one.spec.numel, other.spec.numel)
    if not one.nbytes:
        return 0
    left, right = (torch.frombuffer(ref.read(), dtype=torch.uint8) for ref in (one, other))
    return int((left != right).view(-1, max(one.nbytes // one.spec.numel, 1)).any(1).sum())


def same_values(one: TensorRef, other: TensorRef, tile_bytes: int) -> bool:
    """Whether two tensors of equal shape hold the same numbers in different dtypes; stops at the first difference."""
    if one.shape != other.shape:
        return False
    if not one.shape:
        return bool(one.load().double() == other.load().double())
    for start, stop in row_ranges(one.shape, max(row_bytes(one), row_bytes(other)), tile_bytes):
        if not bool((one.rows(start, stop).load().double() == other.rows(start, stop).load().double()).all()):
            return False
    return True

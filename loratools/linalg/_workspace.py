"""How `truncated_svd` goes about a shape, and how much memory that takes: known before it runs, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRESETS = ("fast", "default", "certified", "exact")
BLOCKS = 6
CERTIFIED_BLOCKS = 10
LEAST_BLOCK = 32
CHUNK = 2**18  # entries handled at a time in passes over the matrix

_SMALL = 256  # up to this smaller side the dense path is as fast
_OVERSAMPLING = 8
_BLOCK_STEP = 16  # thin products are fastest for multiples of this
_FIXED = 2**19


def uses_dense(n: int, block: int) -> bool:
    """Whether the dense path is the faster one for a smaller side of n."""
    return n <= max(_SMALL, 4 * block)


def block_for(rank: int) -> int:
    """Width of a Krylov block for a rank."""
    return max(LEAST_BLOCK, -(-(rank + _OVERSAMPLING) // _BLOCK_STEP) * _BLOCK_STEP)


def workspace_bytes(
    m: int, n: int, rank: int, *, dtype: torch.dtype | None = None, preset: str = "default", scaled: bool = False
) -> int:
    """Upper bound on what `truncated_svd` allocates on the CPU beyond its input, its result included.

    With w = 6·block Krylov vectors: 4·w·(m + n) for the basis, 28·(w + block)² for the projected problem and
    16·block·max(m, n) for a block on its way; dense: 34·min(m, n)². Then singular triples of `rank` vectors,
    cache-sized pieces, and 4·m·n where the input is not float32 or must be scaled.

    Args:
        m: rows.
        n: columns.
        rank: explicit, or `max_rank` for an energy or error goal.
        dtype: of the input; None is float32.
        preset: as for `truncated_svd`.
        scaled: the entries may lie outside 2^±30 (and `overwrite` is not given).

    Returns:
        Bytes; at most 1.5 times what a matrix with a flat spectrum takes, more than what is taken where the iteration
        stops early.
    """
    low, high = min(m, n), max(m, n)
    kept = min(rank, low)
    block = block_for(rank)
    pieces = 10 * min(CHUNK, m * n) + _FIXED
    finish = 12 * kept * (m + n) + 64 * kept * kept + 8 * min(CHUNK, kept * high)
    copy = 4 * m * n if scaled or str(dtype or "torch.float32") != "torch.float32" else 0
    if preset in ("certified", "exact") or uses_dense(low, block):
        return copy + pieces + max(34 * low * low, finish)
    width = min(low, BLOCKS * block)
    krylov = 4 * width * (m + n) + 28 * (width + block) ** 2 + 16 * block * high
    return copy + pieces + max(krylov, finish)

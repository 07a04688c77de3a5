"""How `truncated_svd` goes about a shape, and how much memory that takes: known before it runs, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

PRESETS = ("fast", "default", "certified", "exact")
LEAST_BLOCK = 32
CHUNK = 2**18  # entries handled at a time in passes over the matrix

_SMALL = 256  # up to this smaller side the dense path is as fast
_DENSE, _QUICK = 7, 4  # blocks of a smaller side that are as fast as dense; measured on flat and falling spectra
_OVERSAMPLING = 8
_BLOCK_STEP = 8  # thin products are fastest for multiples of this
_FIXED = 2**18
BATCH_BYTES = 2**30
_PROBE = 40  # vectors that prove a certificate, in a basis of their own


def uses_dense(n: int, block: int, *, quick: bool = False) -> bool:
    """Whether the dense path is the faster one for a smaller side of n; `quick` for a few products at most."""
    return n <= max(_SMALL, (_QUICK if quick else _DENSE) * block)


def block_for(rank: int) -> int:
    """Width of a Krylov block for a rank."""
    return max(2 * _BLOCK_STEP, -(-(rank + _OVERSAMPLING) // _BLOCK_STEP) * _BLOCK_STEP)


def most_blocks(preset: str) -> int:
    """How many Krylov blocks a preset may take."""
    return {"fast": 2, "certified": 10}.get(preset, 6)


def workspace_bytes(  # noqa: PLR0913
    m: int,
    n: int,
    rank: int,
    *,
    dtype: torch.dtype | None = None,
    preset: str = "default",
    scaled: bool = False,
    streamed: bool = False,
) -> int:
    """Upper bound on what `truncated_svd` allocates on the CPU beyond its input, its result included.

    With w the Krylov vectors, at most 6 blocks: 4·w·(m + n) for the basis, 32·(w + block)² for the projected problem
    and 16·block·max(m, n) for a block on its way; dense: 34·min(m, n)². Then singular triples of `rank` vectors,
    cache-sized pieces, and 4·m·n where the input is not float32 or must be scaled.

    Args:
        m: rows.
        n: columns.
        rank: explicit, or `max_rank` for an energy or error goal.
        dtype: of the input; None is float32.
        preset: as for `truncated_svd`.
        scaled: the entries may lie outside 2^±30 (and `overwrite` is not given).
        streamed: the input is `ChunkedRows`, whose chunks are not counted.

    Returns:
        Bytes; at most 1.67 times what is taken of a matrix in memory when every block is spent, more than what is
        taken where the iteration stops early.
    """
    low, high = min(m, n), max(m, n)
    kept, block = min(rank, low), min(block_for(rank), low)
    pieces = 10 * min(CHUNK, m * n) + _FIXED
    finish = 12 * kept * (m + n) + 32 * kept * kept + 8 * min(CHUNK, kept * high)
    copy = 4 * m * n if not streamed and (scaled or str(dtype or "torch.float32") != "torch.float32") else 0
    if preset == "exact" or uses_dense(low, block, quick=preset == "fast"):
        narrow = min(low, (3 + -(-kept // LEAST_BLOCK)) * LEAST_BLOCK) if low > _SMALL and preset != "exact" else 0
        first = 4 * narrow * (m + n) + 32 * narrow * narrow  # what a rule for the rank tries before
        return copy + pieces + max(34 * low * low, finish, first)
    pieces = 2 * min(CHUNK, m * n) + 8 * min(CHUNK, block * high) + _FIXED
    width = min(low, most_blocks(preset) * block)
    if preset == "certified" and not streamed:
        high += _PROBE * (m + n) // max(block, 1)
    if streamed:
        return pieces + 4 * width * n + 32 * (width + block) ** 2 + 12 * block * (m + 3 * n) + finish
    krylov = 4 * width * (m + n) + 32 * (width + block) ** 2 + 16 * block * high
    return copy + pieces + max(krylov, finish)


def noise_bytes(m: int, n: int) -> int:
    """Upper bound on what `RoundingNoise` takes: its tables, and a piece of about `CHUNK` entries on its way."""
    piece = min(max(CHUNK, n), m * n)
    return 180 * piece + 8 * m + 720 * n + 600 * max(m, n) + 16 * _FIXED


def combining_bytes(m: int, n: int, ranks: Sequence[int]) -> int:
    """Upper bound on what `combined_rows` takes while it is read: the factors as pieces, a tile in every form.

    Args:
        m: rows.
        n: columns.
        ranks: of the products.
    """
    entries = min(max(CHUNK, n), m * n)
    return 64 * sum(ranks) * (m + n) + entries * (16 * len(ranks) + 144) + 16 * _FIXED

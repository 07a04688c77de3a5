"""Ways of forming s·B·A, some of which give the same bits on every machine.

Each is a function of A (r, n), B (m, r) and s that returns one that writes rows of ΔW into a float64 tile. Preparing
belongs to it, and is measured with it. All use one thread, tiles of the same size, and buffers that are there before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

import torch

from loratools.linalg import LowRankSum

Factor = torch.Tensor
Fill = Callable[[slice, torch.Tensor], object]
Way = Callable[[Factor, Factor, float], Fill]


def plain_float32(A: Factor, B: Factor, s: float) -> Fill:
    """What a merge usually does."""
    narrow = torch.empty(0)

    def fill(rows: slice, out: torch.Tensor) -> None:
        nonlocal narrow
        if narrow.shape != out.shape:
            narrow = torch.empty(out.shape)
        out.copy_(torch.mm(B[rows], A, out=narrow).mul_(s))

    return fill


def plain_float64(A: Factor, B: Factor, s: float) -> Fill:
    """The same, wider."""
    right, left = A.double(), B.double() * s
    return lambda rows, out: torch.mm(left[rows], right, out=out)


def one_piece(A: Factor, B: Factor, s: float) -> Fill:
    """Float64, 26 bits of each line's norm, with the proof that they will do."""
    return _prepared(LowRankSum.of([(A, B, s)], pieces=None))


def two_pieces(A: Factor, B: Factor, s: float) -> Fill:
    """Float64, 26 and 18 bits."""
    return _prepared(LowRankSum.of([(A, B, s)]))


def _prepared(held: LowRankSum) -> Fill:
    rest = torch.empty(0, dtype=torch.float64)

    def fill(rows: slice, out: torch.Tensor) -> None:
        nonlocal rest
        torch.mm(held.left[rows], held.right, out=out)
        if held.left_rest is not None and held.right_rest is not None:
            if rest.shape != out.shape:
                rest = torch.empty_like(out)
            out.add_(torch.mm(held.left_rest[rows], held.right_rest, out=rest))

    return fill


def below_largest(A: Factor, B: Factor, s: float) -> Fill:
    """Float64, as many bits below the largest entry of each line as the rank leaves: one grid fewer to think of."""
    bits = (52 - math.ceil(math.log2(A.shape[0]))) // 2
    left, right = _cut(B.double() * s, 1, [bits])[0][0], _cut(A.double(), 0, [bits])[0][0]
    return lambda rows, out: torch.mm(left[rows], right, out=out)


def split_float32(A: Factor, B: Factor, s: float) -> Fill:
    """Float32, slices of so few bits that their products add up below 2^24."""
    bits = (24 - math.ceil(math.log2(A.shape[0]))) // 2
    slices = [bits] * -(-26 // bits)
    lefts = [piece.float() for piece in _cut(B.double() * s, 1, slices)[0]]
    rights = [piece.float() for piece in _cut(A.double(), 0, slices)[0]]
    pairs, narrow = _pairs(len(slices)), torch.empty(0)

    def fill(rows: slice, out: torch.Tensor) -> None:
        nonlocal narrow
        if narrow.shape != out.shape:
            narrow = torch.empty(out.shape)
        out.zero_()
        for i, j in pairs:
            out.add_(torch.mm(lefts[i][rows], rights[j], out=narrow))

    return fill


def split_int8(A: Factor, B: Factor, s: float) -> Fill:
    """Eight-bit integers, whose products are added in 32 bits."""
    bits = (6, 7, 7, 7)  # the first may round up to a power of two, the others are rests of a rounding
    whole, units = [], []
    for x, axis in ((B.double() * s, 1), (A.double(), 0)):
        pieces, sizes = _cut(x, axis, bits)
        whole.append([(piece / size).to(torch.int8) for piece, size in zip(pieces, sizes, strict=True)])
        units.append(sizes)
    pairs = _pairs(len(bits))

    def fill(rows: slice, out: torch.Tensor) -> None:
        out.zero_()
        for i, j in pairs:
            product = torch._int_mm(whole[0][i][rows], whole[1][j]).double()
            out.add_(product.mul_(units[0][i][rows]).mul_(units[1][j]))

    return fill


def _pairs(count: int) -> list[tuple[int, int]]:
    """Which slices are multiplied, the smallest products first."""
    pairs = [pair for pair in itertools.product(range(count), repeat=2) if sum(pair) < count]
    return sorted(pairs, key=sum, reverse=True)


def fixed_order(A: Factor, B: Factor, s: float) -> Fill:
    """Float64, component by component, entry by entry: an order that no BLAS can change."""
    right, left = A.double(), B.double() * s
    piece = torch.empty(0, dtype=torch.float64)

    def fill(rows: slice, out: torch.Tensor) -> None:
        nonlocal piece
        if piece.shape != out.shape:
            piece = torch.empty_like(out)
        torch.mul(left[rows, :1], right[:1], out=out)
        for k in range(1, right.shape[0]):
            out.add_(torch.mul(left[rows, k : k + 1], right[k : k + 1], out=piece))

    return fill


def rounded_once(A: Factor, B: Factor, s: float) -> Fill:
    """Every entry the float64 next to the exact sum, by Python's `math.fsum`; 64 entries of a tile stand for all."""
    right, left = A.double(), B.double() * s

    def fill(rows: slice, out: torch.Tensor) -> None:
        for column in range(64):
            terms = (left[rows.start] * right[:, column]).tolist()
            out[0, column] = math.fsum(terms)

    return fill


def _cut(x: torch.Tensor, axis: int, bits: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Slices of so many bits below the largest entry of each line, which add up to x but for the rest; their units."""
    pieces, units, rest = [], [], x
    exponent = torch.frexp(x.abs().amax(axis, keepdim=True))[1]
    for count in bits:
        exponent = exponent - count
        units.append(torch.ldexp(torch.ones(exponent.shape, dtype=x.dtype), exponent))
        pieces.append((rest / units[-1]).round_().mul_(units[-1]))
        rest = rest - pieces[-1]
    return pieces, units


WAYS: Final[dict[str, Way]] = {
    "float32": plain_float32,
    "float64": plain_float64,
    "one piece": one_piece,
    "two pieces": two_pieces,
    "below the largest": below_largest,
    "split float32": split_float32,
    "split int8": split_int8,
    "fixed order": fixed_order,
    "rounded once": rounded_once,
}
SAMPLED: Final = {"rounded once": 64}
"""Entries of a tile that stand for all of them."""

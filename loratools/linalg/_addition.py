"""W + Σ s·B·A with one rounding, the same bits however the rows are tiled and whatever computes them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.errors import MismatchError, UsageError
from loratools.linalg._fixed_point import norm_exponents, split
from loratools.linalg._one_piece import one_piece_will_do
from loratools.linalg._rounding import power_of_two, round_into

Term = tuple[Tensor, Tensor, float]

_TILE = 2**18  # entries of a row tile: 2 MiB of float64, so that the passes over it stay in cache
_TILE_ON_DEVICE = 2**24
_KEPT = threading.local()
_KEPT_ENTRIES = 5 * 2**17  # 5 MiB of float64, the three buffers of a tile: what a thread keeps of them


@dataclasses.dataclass(frozen=True, slots=True)
class LowRankSum:
    """Σ s·B·A in the orientation of the stored weight, ready to be added to any of its rows.

    The factors sit on power-of-two grids (`_fixed_point`), so the product is exact and therefore independent of
    tiling, threads, BLAS and device. Powers of two bring the components of the right factor to norms between 1/4 and 1,
    so it must be whole; the left one, which takes their inverses, may be a slice of rows.

    Attributes:
        left: (rows, R) float64.
        right: (R, columns) float64.
        left_rest: (rows, 2R) float64, the correction's left factor, or None with one piece.
        right_rest: (2R, columns) float64, or None.
    """

    left: Tensor
    right: Tensor
    left_rest: Tensor | None = None
    right_rest: Tensor | None = None

    @classmethod
    def of(cls, terms: Sequence[Term], *, transposed: bool = False, pieces: int | None = 2) -> LowRankSum:
        """Prepare Σ scale·B·A.

        Law: the result's bits depend on the terms alone. With one piece, where None chose it, ‖error‖ ≤ 2e-7·‖Σ s·B·A‖
        (Frobenius); with two, an entry is off by at most (2^-43.4·√R + 2^-52.8·R)·‖left row‖·‖right column‖.

        Args:
            terms: (lora_A (r, n), lora_B (m, r), scale) each; one m and n for all, any ranks and float dtypes.
            transposed: the stored weight is (n, m), and (BA)ᵀ is added.
            pieces: 2; 1, a third of the time; None: 1 where that is proven to reach 2e-7, for results of 16 bits.

        Raises:
            UsageError: no terms.
            MismatchError: shapes that do not fit.
            UnsupportedError: a total rank above 2^17.
        """
        left, right = _stacked(terms, transposed=transposed)
        if not left.numel() or not right.numel():
            return cls(left, right)
        exponents = norm_exponents(right, 1)
        left, right = left * power_of_two(exponents.T), right * power_of_two(-exponents)
        lefts, rights = split(left, 1, pieces or 1), split(right, 0, pieces or 1)
        if pieces is None and not one_piece_will_do(left, right, (lefts[0], rights[0])):
            lefts, rights = split(left, 1, 2), split(right, 0, 2)
        if len(lefts) == 1:
            return cls(lefts[0], rights[0])
        return cls(lefts[0], rights[0], torch.cat(lefts, 1), torch.cat(rights[::-1], 0))

    def negated(self) -> LowRankSum:
        """−Σ s·B·A: exactly the negative in every entry."""
        rest = None if self.left_rest is None else -self.left_rest
        return LowRankSum(-self.left, self.right, rest, self.right_rest)

    def add_to(
        self,
        W: Tensor,
        *,
        start: int = 0,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        back: Tensor | None = None,
    ) -> Tensor:
        """round(W + Σ s·B·A) for the rows `start` to `start + len(W)` of the stored weight.

        Args:
            W: (rows, columns), a float dtype; not changed.
            start: the row of the stored weight that `W` begins with.
            out_dtype: float64, float32, float16 or bfloat16; default W's own.
            out: where to put the result, of W's shape and the wanted dtype; not W's memory.
            back: where to put round(result − Σ s·B·A), like `out`: what `negated().add_to(result)` gives.

        Returns:
            A new tensor like `W`, or `out`. The sum is formed in float64 and rounded once; what overflows is infinite
            (see `non_finite_count`).
        """
        if W.dim() != 2 or start < 0 or start + W.shape[0] > self.left.shape[0] or W.shape[1] != self.right.shape[1]:  # noqa: PLR2004
            have = (self.left.shape[0], self.right.shape[1])
            raise MismatchError("The update does not fit the weight.", weight=tuple(W.shape), update=have, start=start)
        if out is None:
            out = torch.empty(W.shape, dtype=out_dtype or W.dtype, device=W.device)
        self._fill(out, W, start, back)
        return out

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Σ s·B·A alone, (rows, columns), float32 or float64."""
        out = torch.empty((self.left.shape[0], self.right.shape[1]), dtype=dtype, device=self.left.device)
        self._fill(out, None, 0)
        return out

    def piece(self, rows: slice, columns: slice) -> Tensor:
        """Σ s·B·A for a rectangle of the stored weight, float64: the same bits as in any other piece."""
        total = self.left[rows] @ self.right[:, columns]
        if self.left_rest is not None and self.right_rest is not None:
            total += self.left_rest[rows] @ self.right_rest[:, columns]
        return total

    def _fill(self, out: Tensor, W: Tensor | None, start: int, back: Tensor | None = None) -> None:
        rows, columns = out.shape
        step = min(_tile_rows(out), rows)
        total, rest, scratch = _buffers(step, columns, out.device)
        for first in range(0, rows, step or 1):
            count = min(step, rows - first)
            mine = slice(start + first, start + first + count)
            tile = torch.mm(self.left[mine], self.right, out=total[:count])
            if self.left_rest is not None and self.right_rest is not None:
                tile.add_(torch.mm(self.left_rest[mine], self.right_rest, out=rest[:count]))
            if W is not None:
                narrow = W[first : first + count]
                if narrow.dtype == torch.float16:  # five times as fast in two exact steps
                    narrow = scratch[:count].copy_(narrow)
                summed = rest[:count].copy_(narrow).add_(tile)
            else:
                summed = tile
            done = out[first : first + count]
            round_into(summed, done, scratch[:count])
            if back is not None:
                narrow = scratch[:count].copy_(done) if done.dtype == torch.float16 else done
                before = rest[:count].copy_(narrow).sub_(tile)
                round_into(before, back[first : first + count], scratch[:count])


def add_low_rank(
    W: Tensor,
    terms: Sequence[Term],
    *,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    pieces: int | None = None,
) -> Tensor:
    """round(W + Σ scale·B·A), one rounding, ties to even.

    Law: bit-identical for any thread count, BLAS and device; with `pieces` given also for any tiling of W's rows (A
    whole and B's rows; `transposed`: B whole and A's columns). ΔW is as near as `LowRankSum.of` says.

    Args:
        W: (m, n), or (n, m) with `transposed`; not changed.
        terms: (lora_A (r, n), lora_B (m, r), scale) each.
        transposed: W is stored (in, out), and (BA)ᵀ is added; nothing is copied for it.
        out_dtype: default W's own.
        pieces: 1 or 2, see `LowRankSum.of`; default 2, and for 16-bit results 1 where the factors show that it will do.

    Returns:
        A new tensor of W's shape. Peak memory beyond W and the result: 5 MiB of tiles and
        8·R·(rows + columns)·(1 or 4) bytes of factors, R the total rank.

    Raises:
        MismatchError: shapes that do not fit.
        UsageError: no terms.
    """
    dtype = out_dtype or W.dtype
    wanted = pieces or (None if dtype in (torch.bfloat16, torch.float16) else 2)
    prepared = LowRankSum.of(terms, transposed=transposed, pieces=wanted)
    if prepared.left.shape[0] != W.shape[0]:
        update = (prepared.left.shape[0], prepared.right.shape[1])
        raise MismatchError("The update does not fit the weight.", weight=tuple(W.shape), update=update)
    return prepared.add_to(W, out_dtype=dtype)


def subtract_low_rank(
    W: Tensor, terms: Sequence[Term], *, transposed: bool = False, out_dtype: torch.dtype | None = None
) -> Tensor:
    """round(W − Σ scale·B·A): `add_low_rank` with the scales negated; the same ΔW bit for bit."""
    return add_low_rank(W, [(a, b, -scale) for a, b, scale in terms], transposed=transposed, out_dtype=out_dtype)


def low_rank_delta(lora_A: Tensor, lora_B: Tensor, scaling: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """scaling·B·A, (m, n), float32 or float64, reproducible like `add_low_rank`.

    Args:
        lora_A: (r, n), any float dtype.
        lora_B: (m, r), any float dtype.
        scaling: s.
        dtype: of the result.
    """
    return LowRankSum.of([(lora_A, lora_B, scaling)]).delta(dtype)


def _stacked(terms: Sequence[Term], *, transposed: bool) -> tuple[Tensor, Tensor]:
    if not terms:
        raise UsageError("There is no update to add.", fix="Pass at least one (lora_A, lora_B, scale).")
    n, m = terms[0][0].shape[-1], terms[0][1].shape[0]
    for a, b, _ in terms:
        if tuple(a.shape) != (b.shape[-1], n) or tuple(b.shape) != (m, a.shape[0]):
            raise MismatchError("The factors of an update do not fit.", lora_A=tuple(a.shape), lora_B=tuple(b.shape))
    right = torch.cat([a.to(torch.float64) for a, _, _ in terms], 0)
    left = torch.cat([b.to(torch.float64) * scale for _, b, scale in terms], 1)
    return (right.T, left.T) if transposed else (left, right)


def _tile_rows(out: Tensor) -> int:
    entries = _TILE if out.device.type == "cpu" else _TILE_ON_DEVICE
    return max(1, entries // max(out.shape[1], 1))


def _buffers(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The product, its correction or W, and the float32 form of a tile.

    Cut from one allocation that each thread keeps: the C library would hand it back to the system after every
    call, and the page faults of getting it anew double the time.
    """
    size = rows * columns
    wanted = 2 * size + (size + 1) // 2
    whole: Tensor | None = getattr(_KEPT, "buffer", None)
    if whole is None or whole.numel() < wanted or whole.device != device:
        whole = torch.empty(wanted, dtype=torch.float64, device=device)
        if wanted <= _KEPT_ENTRIES:
            _KEPT.buffer = whole
    narrow = whole[2 * size :].view(torch.float32)[:size]
    return whole[:size].view(rows, columns), whole[size : 2 * size].view(rows, columns), narrow.view(rows, columns)

"""Every tile of a stored tensor with what adapters make of it: what a merge writes, and what others hold against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratools.engine.context import Context
from loratools.engine.operations.change import Change, matrices
from loratools.engine.operations.sections import chunk_rows
from loratools.engine.operations.tiles import require_all_finite
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of one stored matrix.

    Attributes:
        stored: W as read, on the CPU.
        before: W, where the run computes.
        after: round(W + Σ w ΔW), there.
        back: round(after − Σ w ΔW), there, where it was asked for and is known.
        rows: which rows.
        matrix: the matrix.
        change: what is done to it.
        last: no more rows of this matrix follow.
    """

    stored: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    back: torch.Tensor | None
    rows: tuple[int, int]
    matrix: TensorRef
    change: Change
    last: bool

    def require_finite(self, context: Context) -> None:
        """Refuse a result with NaN or infinity, and name the input that it is from.

        Raises:
            NonFiniteError: there is one; an input holds it, or the sum overflows.
        """
        from loratools.linalg import non_finite_count

        if non_finite_count(self.after):
            for ref in (self.matrix, *self.change.inputs):
                require_all_finite(ref, context.settings.tile_bytes)
            dtype = self.after.dtype
            raise NonFiniteError(
                f"The merged weights overflow {dtype}.",
                fix=f"Merge with a smaller weight{', or with --dtype bf16' if dtype.itemsize == 2 else ''}.",  # noqa: PLR2004
                tensor=self.matrix.name,
            )


def recomputed(
    unit: Unit, ref: TensorRef, dtype: torch.dtype, context: Context, *, back: bool = False
) -> Iterator[Tile]:
    """The tiles of `ref`, a tensor of the base, in order; a tile's memory is used again for the next.

    Args:
        unit: whose parameters say what is done.
        ref: the tensor.
        dtype: of the results.
        context: where the run computes.
        back: take the products out of the result again, in tiles of whole chunks (`sections.chunk_rows`).
    """
    for matrix, expert in matrices(ref, unit):
        change = Change.of(unit, context, dtype, expert)
        ranges = change.tiles(matrix, context, step=chunk_rows(matrix.shape) if back else 1)
        if change.looks:
            for rows in ranges:
                change.look(context.on_device(matrix.rows(*rows).load()), rows)
        for rows in ranges:
            context.check()
            yield _tile(matrix, rows, change, dtype, context, back=back, last=rows is ranges[-1])


def _tile(  # noqa: PLR0913
    matrix: TensorRef,
    rows: tuple[int, int],
    change: Change,
    dtype: torch.dtype,
    context: Context,
    *,
    back: bool,
    last: bool,
) -> Tile:
    import torch

    part = matrix.rows(*rows)
    stored = part.load(context.buffer("tile", part.nbytes))
    before = context.on_device(stored)
    nbytes = before.numel() * dtype.itemsize
    again = None
    if back and change.products is not None and not change.needs_base:
        if before.device.type == "cpu":
            again = context.buffer("back", nbytes)[:nbytes].view(dtype).view(before.shape)
        else:
            again = torch.empty(before.shape, dtype=dtype, device=before.device)
    after = change.tile(before, rows, dtype, context.buffer("result", nbytes), again)
    return Tile(stored, before, after, again, rows, matrix, change, last)

"""How far two tensors are apart: one pass over both, a tile at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.context import Context
from loratools.engine.operations.tiles import row_bytes, row_ranges
from loratools.tensors import DTYPES, TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import DirectionProbe, RoundingNoise

WIDENED: Final = 8
"""A tile and its forms in wider dtypes, over its stored bytes: what is only measured should stay in the cache."""
SAMPLE: Final = 2**20
"""Entries of a tensor that its rounding noise is told from, in rows spread evenly, where no spectrum is asked for."""
SAMPLE_COLUMNS: Final = 4096
SAMPLE_PIECE: Final = 2**16
_SQUARABLE: Final = (1e-12, 1e15)  # the largest entry: float32 holds the sum of squares of a row
_MATRIX: Final = 2


@dataclasses.dataclass
class _Sums:
    """What is added up over the tiles."""

    difference: float = 0.0
    weight: float = 0.0
    largest: float = 0.0
    moved: int = 0
    rows: int = 0
    columns: torch.Tensor | None = None

    def add(self, before: torch.Tensor, difference: torch.Tensor) -> bool:
        """Take in a tile; whether all of it are numbers."""
        import torch

        low, high = (float(each) for each in torch.aminmax(difference))
        weight = _squares(before)
        self.difference += _squares(difference, max(-low, high))
        self.weight += weight
        self.largest = max(self.largest, -low, high)
        self._count(difference != 0)
        return math.isfinite(low) and math.isfinite(high) and math.isfinite(weight)

    def _count(self, moved: torch.Tensor) -> None:
        """Entries that moved; of a matrix the rows and columns that they lie in."""
        import torch

        self.moved += int(torch.count_nonzero(moved))
        if moved.dim() == _MATRIX:
            self.rows += int(torch.count_nonzero(moved.any(1)))
            columns = moved.any(0)
            self.columns = columns if self.columns is None else self.columns.logical_or_(columns)

    @property
    def touched(self) -> list[int] | None:
        """Rows and columns of a matrix in which an entry moved."""
        return [self.rows, int(self.columns.sum())] if self.columns is not None else None


@dataclasses.dataclass
class _Sample:
    """Rows, spread evenly over a tensor, from which the share of rounding is told; of long rows the beginning."""

    noise: RoundingNoise
    share: float
    squares: float = 0.0
    rows: int = 0

    @classmethod
    def of(cls, ref: TensorRef) -> _Sample:
        """Of a tensor with one or two axes."""
        from loratools.linalg import RoundingNoise

        width = min(ref.shape[-1], SAMPLE_COLUMNS)
        lines = ref.shape[0] if len(ref.shape) == _MATRIX else 1
        return cls(RoundingNoise.of_shape(lines, width), min(1.0, SAMPLE / max(width * lines, 1)))

    def see(self, difference: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Lines of one tile; a tensor of one axis is one line, and its first tile stands for it."""
        width = len(self.noise.flat)
        if self.rows == len(self.noise.rows) or difference.shape[1] < width:
            return
        wanted = min(math.ceil(len(difference) * self.share), len(self.noise.rows) - self.rows)
        step = max(1, min(SAMPLE_PIECE // max(width, 1), SAMPLE_COLUMNS))
        for at in range(0, wanted, step):
            rows = slice(at, min(at + step, wanted))
            piece = difference[rows, :width].float().contiguous()
            self.noise.see(self.rows, piece, before[rows, :width].contiguous(), after[rows, :width].contiguous())
            self.squares += float(piece.double().square().sum())
            self.rows += len(piece)


def measured(
    base: TensorRef,
    tuned: TensorRef,
    context: Context,
    kept: torch.Tensor | None = None,
    noise: RoundingNoise | None = None,
    *,
    directions: bool = True,
) -> dict[str, Any]:
    """What is known of `tuned − base`; of one shape, with one or two axes, of dtypes that are computed with.

    Args:
        base: the first tensor.
        tuned: the second.
        context: of the run.
        kept: (m, n) float32 that takes the difference, where a spectrum is asked for.
        noise: takes in all of it then, else a sample stands for the tensor.
        directions: estimate the effective rank; not of matrices that only lie below each other.

    Returns:
        `norm` ‖Δ‖_F, `weight_norm` of the base, `largest` |Δ|, `moved` entries, `rounding`, the share of ‖Δ‖² that is
        the noise of rounding to the tuned dtype, and of matrices the rows and columns `touched`, and `effective_rank`,
        estimate and standard error. Of a tensor with NaN or infinity `moved` and `non_finite`, the number of such
        entries on either side.
    """
    sums, probe = _Sums(), _probe(base, context) if directions else None
    sample = None if noise is not None else _Sample.of(base)
    for first, before, after, wide, difference in _differences(base, tuned, context):
        if not sums.add(wide, difference):
            return {"moved": moved_entries(base, tuned, context), "non_finite": _non_finite(base, tuned, context)}
        rows = _lines(difference)
        if kept is not None:
            kept[first : first + len(rows)] = rows
        if probe is not None:
            probe.see(rows.float())
        if noise is not None:
            noise.see(first, rows.float(), before, after)
        elif sample is not None:
            sample.see(rows, _lines(before), _lines(after))
    energy, squares = (noise.energy, sums.difference) if noise is not None else _energies(sample)
    return {
        "norm": math.sqrt(sums.difference),
        "weight_norm": math.sqrt(sums.weight),
        "largest": sums.largest,
        "moved": sums.moved,
        "touched": sums.touched if directions else None,
        "rounding": min(energy / squares, 1.0) if squares else None,
        "effective_rank": probe.effective_rank(sums.difference) if probe is not None else None,
    }


def _energies(sample: _Sample | None) -> tuple[float, float]:
    return (sample.noise.energy, sample.squares) if sample is not None else (0.0, 0.0)


def _probe(ref: TensorRef, context: Context) -> DirectionProbe | None:
    from loratools.linalg import DirectionProbe

    if len(ref.shape) != _MATRIX or min(ref.shape) < _MATRIX:
        return None
    return DirectionProbe(ref.shape[1], context.settings.device)


def _differences(
    base: TensorRef, tuned: TensorRef, context: Context
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """First row, both sides as stored, the base widened and the difference; valid until the next."""
    import torch

    wide = torch.float64 if "F64" in {base.dtype, tuned.dtype} else torch.float32
    for first, last in row_ranges(
        base.shape, max(row_bytes(base), row_bytes(tuned)), context.settings.tile_bytes // WIDENED
    ):
        context.check()
        refs = base.rows(first, last), tuned.rows(first, last)
        before, after = (
            context.on_device(ref.load(context.buffer(name, ref.nbytes)))
            for name, ref in zip(("tile", "tuned"), refs, strict=True)
        )
        old, new = _widened(before, "wide tile", wide, context), _widened(after, "wide tuned", wide, context)
        yield first, before, after, old, new.sub_(old)


def _widened(tensor: torch.Tensor, name: str, wide: torch.dtype, context: Context) -> torch.Tensor:
    if context.settings.device != "cpu":
        return tensor.to(wide, copy=True)
    nbytes = wide.itemsize * tensor.numel()
    return context.buffer(name, nbytes)[:nbytes].view(wide).view(tensor.shape).copy_(tensor)


def _squares(tensor: torch.Tensor, largest: float | None = None) -> float:
    """The sum of squares in float64: of float32 rows where those cannot over- or underflow."""
    import torch

    if largest is None:
        low, high = (float(each) for each in torch.aminmax(tensor))
        largest = max(-low, high)
    if tensor.dtype == torch.float32 and _SQUARABLE[0] < largest < _SQUARABLE[1]:
        return float(torch.linalg.vector_norm(_lines(tensor), dim=1).double().square().sum())
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _lines(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(1, -1) if tensor.dim() < _MATRIX else tensor


def moved_entries(base: TensorRef, tuned: TensorRef, context: Context) -> int | None:
    """How many entries differ in their bytes, of one dtype; None where two dtypes, or parts of a byte, are compared."""
    import torch

    bits = DTYPES[base.dtype].bits
    if base.dtype != tuned.dtype or bits % 8:
        return None
    moved, size = 0, context.settings.tile_bytes // WIDENED
    for start, stop in base.chunks(size):
        context.check()
        pieces = [bytearray(stop - start), bytearray(stop - start)]
        for ref, piece in zip((base, tuned), pieces, strict=True):
            ref.read_into(memoryview(piece), start)
        one, other = (torch.frombuffer(piece, dtype=torch.uint8) for piece in pieces)
        moved += int((one != other).view(-1, bits // 8).any(1).sum())
    return moved


def _non_finite(base: TensorRef, tuned: TensorRef, context: Context) -> list[int]:
    """Entries of either side that are no numbers."""
    from loratools.linalg import non_finite_count

    return [
        sum(
            non_finite_count(ref.rows(*rows).load())
            for rows in row_ranges(ref.shape, row_bytes(ref), context.settings.tile_bytes)
        )
        for ref in (base, tuned)
    ]

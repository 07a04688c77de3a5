"""W' = round(W + Σ w ΔW): one rounding, row tile by row tile; and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters.algebra import finite
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.bounds import Bound
from loratools.engine.operations.copying import write_cast
from loratools.engine.operations.tiles import require_all_finite, row_bytes, row_ranges
from loratools.engine.plan import Input, Unit
from loratools.errors import MismatchError, NonFiniteError
from loratools.tensors import TensorRef, torch_dtype

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum


_ONE_PIECE_RANK: Final = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What is added to one stored tensor.

    Attributes:
        products: Σ scale · B A, prepared, or None.
        wholes: (weight, replacement) pairs: `weight · (W' − W)` is added for each.
    """

    products: LowRankSum | None
    wholes: tuple[tuple[float, TensorRef], ...]

    def tile(
        self, base: torch.Tensor, rows: tuple[int, int] | None, dtype: torch.dtype, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One tile of the result, from the same tile of the base; in `buffer` (flat bytes) where it can be."""
        from loratools.linalg import round_to

        start = rows[0] if rows else 0
        if self.wholes:
            total = base.double()
            for weight, ref in self.wholes:
                given = (ref.rows(*rows) if rows else ref).load().to(base.device).double()
                total = given if weight == 1 and len(self.wholes) == 1 else total + weight * (given - base.double())
            base = total
        if self.products is None:
            return round_to(base, dtype)
        out = None
        if buffer is not None and base.device == buffer.device:
            out = buffer[: base.numel() * dtype.itemsize].view(dtype).view(base.shape)
        return self.products.add_to(base, start=start, out_dtype=dtype, out=out)


def _change(unit: Unit, context: Context, dtype: str) -> Change:
    from loratools.linalg import LowRankSum

    terms = []
    for term in unit.parameters.get("terms", ()):
        update = context.update(Input(term["source"], term["module"]))
        for product in update.terms:
            lora_A, lora_B = (context.on_device(finite(ref)) for ref in (product.lora_A, product.lora_B))
            terms.append((lora_A, lora_B, float(term["weight"]) * product.scale))
    wholes = tuple(
        (float(whole["weight"]), context.update(Input(whole["source"], whole["module"])).replaced[whole["parameter"]])
        for whole in unit.parameters.get("wholes", ())
    )
    transposed = bool(unit.parameters.get("transposed"))
    if not terms:
        return Change(None, wholes)
    pieces = _pieces(dtype, sum(lora_A.shape[0] for lora_A, _, _ in terms))
    return Change(LowRankSum.of(terms, transposed=transposed, pieces=pieces), wholes)


def merge(unit: Unit, context: Context) -> Outcome:
    """Write `round(W + Σ w ΔW)` for one stored tensor, then rows that the adapter appends.

    Raises:
        NonFiniteError: an input holds NaN or infinity, or the sum overflows the output's dtype.
    """
    dtype = torch_dtype(str(unit.parameters["dtype"]))
    ref = context.tensor(unit.inputs[0])
    change = _change(unit, context, str(unit.parameters["dtype"]))
    written = changed = 0
    bound = Bound.of(unit, context) if unit.parameters.get("bound") else None
    for rows in _tiles(ref, context):
        context.check()
        part = ref.rows(*rows) if rows else ref
        tile = context.on_device(part.load(context.buffer("tile", part.nbytes)))
        result = change.tile(tile, rows, dtype, context.buffer("result", tile.numel() * dtype.itemsize))
        _require_finite_result(result, ref, change, context)
        changed += differing_entries(result, tile)
        if bound is not None:
            bound.see(tile, result)
        context.sink.write(unit.file, unit.target, result.cpu(), written)
        written += result.numel() * result.element_size()
        context.advance(tile.numel() * tile.element_size(), unit.target)
    for result in _appended(unit, context, dtype):
        context.sink.write(unit.file, unit.target, result, written)
        written += result.numel() * result.element_size()
    facts = {"changed": changed, "entries": ref.spec.numel}
    return Outcome(unit.target, "merge", "merged", facts | ({"bound": bound.value} if bound else {}))


def _tiles(ref: TensorRef, context: Context) -> Sequence[tuple[int, int] | None]:
    if not ref.shape:
        return [None]
    return list(row_ranges(ref.shape, row_bytes(ref), context.settings.tile_bytes))


def _pieces(dtype: str, rank: int) -> int:
    """One exact piece per factor is enough for 16 bits up to this rank (see `linalg.LowRankSum`)."""
    return 1 if dtype in {"BF16", "F16"} and rank <= _ONE_PIECE_RANK else 2


def differing_entries(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many entries differ: by their bits where the dtypes agree, which is many times faster."""
    import torch

    if one.dtype != other.dtype:
        return int(torch.count_nonzero(one.double() != other.double()))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int(torch.count_nonzero(one.view(bits) ^ other.view(bits)))


def _require_finite_result(result: torch.Tensor, base: TensorRef, change: Change, context: Context) -> None:
    from loratools.linalg import non_finite_count

    if non_finite_count(result):
        for ref in (base, *(whole for _, whole in change.wholes)):
            require_all_finite(ref, context.settings.tile_bytes)
        raise NonFiniteError(
            f"The merged weights overflow {result.dtype}.",
            fix=f"Merge with a smaller weight{', or with --dtype bf16' if result.dtype.itemsize == 2 else ''}.",  # noqa: PLR2004
            tensor=base.name,
        )


def _appended(unit: Unit, context: Context, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows that an adapter appends, tile by tile, rounded once."""
    from loratools.linalg import non_finite_count, round_to

    rows: Mapping[str, Any] | None = unit.parameters.get("rows")
    if not rows:
        return
    ref = context.update(Input(rows["source"], rows["module"])).added_rows[rows["parameter"]]
    for first, last in row_ranges(ref.shape, row_bytes(ref), context.settings.tile_bytes):
        context.check()
        result = round_to(finite(ref.rows(first, last)).double(), dtype)
        if non_finite_count(result):
            raise NonFiniteError(f"The appended rows overflow {dtype}.", fix="Choose --dtype bf16.", tensor=ref.name)
        yield result


def add(unit: Unit, context: Context) -> Outcome:
    """A tensor that an adapter brings along: byte for byte, or rounded to the dtype that was asked for."""
    ref = context.update(unit.inputs[0]).replaced[str(unit.parameters["parameter"])]
    if ref.dtype == unit.parameters["dtype"]:
        context.sink.copy(unit.file, [unit.target], [ref])
        context.advance(unit.read_bytes, unit.target)
    else:
        write_cast(ref, unit, context)
    return Outcome(unit.target, "add", "added", {"entries": ref.spec.numel})


def restore(unit: Unit, context: Context) -> Outcome:
    """Put the base's bytes back, after checking that the merged tensor is what the adapters make of it.

    Inputs: the merged tensor, the base's. The check recomputes the merge; an entry may differ by two units in the last
    place of the largest of W, W' and what W' should be, since others round ΔW first, and |ΔW| ≤ |W| + |W'|.

    Raises:
        MismatchError: merged is not base + adapters.
    """
    import torch

    from loratools.linalg import ulp

    merged, base = context.tensor(unit.inputs[0]), context.tensor(unit.inputs[1])
    dtype = torch_dtype(merged.dtype)
    change = _change(unit, context, merged.dtype)
    differing = 0
    for rows in _tiles(base, context):
        context.check()
        found = (merged.rows(*rows) if rows else merged).load()
        before = (base.rows(*rows) if rows else base).load()
        expected = change.tile(before, rows, dtype)
        if differing_entries(found, expected):
            largest = torch.maximum(torch.maximum(found.abs(), expected.abs()), before.to(dtype).abs())
            differing += int((~((found.double() - expected.double()).abs() <= 2 * ulp(largest))).sum())
        context.advance(2 * found.numel() * found.element_size(), unit.target)
    if differing:
        raise MismatchError(
            f"The merged tensor is not this base plus these adapters: {differing} of {base.spec.numel} entries differ.",
            fix="Are these the base, the adapters and the weights that it was merged from?",
            tensor=unit.target,
        )
    context.sink.copy(unit.file, [unit.target], [base])
    return Outcome(unit.target, "restore", "restored", {"entries": base.spec.numel})

"""Two checkpoints, module by module: which tensors differ, by how much, and in how many directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.binding import matrix_shape
from loratools.engine.context import Context, Outcome
from loratools.engine.operations import extracting, extracting_experts
from loratools.engine.operations.tiles import require_all_finite, row_bytes, row_ranges, same_bytes, same_values
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError
from loratools.tensors import COMPUTABLE, TensorRef, torch_dtype

if TYPE_CHECKING:
    import torch

_INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64"})
_WIDENED: Final = 8
"""A tile and its forms in wider dtypes, over its stored bytes: what is only measured should stay in the cache."""


def compare(unit: Unit, context: Context) -> Outcome:
    """Compare the parameters of one module; with `svd`, say what an extraction would store of it.

    The outcome's facts: `tensors`, by the names on both sides, since one of them may stand for two (`kind`, and where
    numbers are compared `norm` and `weight_norm`); `whole`, bytes of what an adapter stores as it is; `spectrum`, of
    what it makes low-rank, or None.

    Raises:
        NonFiniteError: NaN or infinity in a tensor that differs.
    """
    facts: dict[str, Any] = {"tensors": {}, "whole": 0, "spectrum": None}
    replaced: set[str] = set()
    for parameter, sides in unit.parameters["rules"].items():
        context.check()
        base, tuned = extracting.pair_of(unit, context, parameter)
        if base is None:
            replaced.add(parameter)
        else:
            rule = sides["rule"]
            common = tuned.rows(0, base.shape[0]) if rule in {"rows", "rows-whole"} else tuned
            found = _compared(base, common, context, unit if rule in {"low-rank", "rows"} else None)
            facts["spectrum"] = found.pop("spectrum", None) or facts["spectrum"]
            facts["tensors"][base.name, tuned.name] = found
            facts["whole"] += tuned.nbytes - common.nbytes
            untouched = found["kind"] == "identical" or (found["kind"] == "equal" and base.dtype != common.dtype)
            if rule in {"whole", "rows-whole"} and not untouched:
                replaced.add(parameter)
                facts["whole"] -= tuned.nbytes - common.nbytes  # counted with the rest of it below
        context.advance(tuned.nbytes + (base.nbytes if base else 0), unit.target)
    if replaced:
        stored = unit.parameters["rules"] if unit.parameters["together"] else replaced
        facts["whole"] += sum(extracting.pair_of(unit, context, parameter)[1].nbytes for parameter in stored)
    return Outcome(unit.target, "compare", "compared", facts)


def compare_experts(unit: Unit, context: Context) -> Outcome:
    """Compare stacked experts, however they are stored; facts and errors as those of `compare`."""
    half = len(unit.inputs) // 2
    tuned, base = ([context.tensor(each) for each in side] for side in (unit.inputs[:half], unit.inputs[half:]))
    tensors = {(old.name, new.name): _compared(old, new, context) for old, new in zip(base, tuned, strict=True)}
    facts: dict[str, Any] = {"tensors": tensors, "whole": 0, "spectrum": None}
    if unit.parameters["svd"] is not None and any(each["kind"] != "identical" for each in tensors.values()):
        experts = int(unit.parameters["experts"])
        parts = [_expert(tuned, base, at, unit, context) for at in range(experts)]
        if any(part["values"] for _, part in parts):
            facts["spectrum"] = {"sides": parts[0][0], "parts": [part for _, part in parts]}
    context.advance(unit.read_bytes, unit.target)
    return Outcome(unit.target, "compare", "compared", facts)


def _expert(
    tuned: Sequence[TensorRef], base: Sequence[TensorRef], at: int, unit: Unit, context: Context
) -> tuple[int, dict[str, Any]]:
    """Rows plus columns of one expert's matrix, and its spectrum."""
    experts = int(unit.parameters["experts"])
    mine, theirs = (extracting_experts.parts_of(side, experts, at) for side in (tuned, base))
    difference, _ = extracting_experts.difference_of(mine, theirs, unit, context)
    return sum(difference.shape), _spectrum(difference, unit, (*theirs, *mine), context)


def _compared(base: TensorRef, tuned: TensorRef, context: Context, low_rank: Unit | None = None) -> dict[str, Any]:
    """What became of one tensor, and how large it is; with the spectrum, where a unit says how to look at it."""
    if same_bytes(base, tuned, context.settings.tile_bytes, context.check):
        return {"kind": "identical"}
    kind = _kind(base, tuned, context.settings.tile_bytes)
    if kind == "equal" or not {base.dtype, tuned.dtype} <= COMPUTABLE:
        return {"kind": kind}
    if low_rank is None or low_rank.parameters["svd"] is None:
        norm, weight = _norms(base, tuned, context)
        return {"kind": kind, "norm": norm, "weight_norm": weight}
    shape = matrix_shape(base.shape)  # (out, in, k, …) is the matrix (out, in·k·…)
    before, after = base.reshaped(shape), tuned.reshaped(shape)
    difference, weight = extracting.difference_of(before, after, context)
    sides = sum(difference.shape)
    part = _spectrum(difference, low_rank, (base, tuned), context)
    spectrum = {"sides": sides, "parts": [part]} if part["values"] else None
    return {"kind": kind, "norm": part["norm"], "weight_norm": weight, "spectrum": spectrum}


def _kind(base: TensorRef, tuned: TensorRef, tile_bytes: int) -> str:
    """`equal` in every number; `recast`, where one is the other rounded to its dtype; else `changed`."""
    dtypes = {base.dtype, tuned.dtype}
    if (dtypes <= COMPUTABLE or dtypes <= _INTEGERS) and same_values(base, tuned, tile_bytes):
        return "equal"
    if len(dtypes) > 1 and dtypes <= COMPUTABLE:
        return "recast" if _is_rounded(base, tuned, tile_bytes) or _is_rounded(tuned, base, tile_bytes) else "changed"
    return "changed"


def _is_rounded(fine: TensorRef, coarse: TensorRef, tile_bytes: int) -> bool:
    """Whether `coarse` is `fine` in its own dtype, entry by entry; stops at the first that is not."""
    from loratools.linalg import round_to

    dtype = torch_dtype(coarse.dtype, tensor=coarse.name)
    return all(
        bool((round_to(one.load().double(), dtype).double() == other.load().double()).all())
        for one, other in _tiles(fine, coarse, tile_bytes)
    )


def _tiles(one: TensorRef, other: TensorRef, tile_bytes: int) -> list[tuple[TensorRef, TensorRef]]:
    if not one.shape:
        return [(one, other)]
    ranges = row_ranges(one.shape, max(row_bytes(one), row_bytes(other)), tile_bytes)
    return [(one.rows(*rows), other.rows(*rows)) for rows in ranges]


def _norms(base: TensorRef, tuned: TensorRef, context: Context) -> tuple[float, float]:
    """‖tuned − base‖_F and ‖base‖_F, a tile at a time, with sums in float64.

    Raises:
        NonFiniteError: NaN or infinity in either of them.
    """
    import torch

    wide = torch.float64 if "F64" in {base.dtype, tuned.dtype} else torch.float32
    squares = [0.0, 0.0]
    for before, after in _tiles(base, tuned, context.settings.tile_bytes // _WIDENED):
        context.check()
        old, new = (
            context.buffer(f"wide {name}", wide.itemsize * ref.spec.numel)[: wide.itemsize * ref.spec.numel]
            .view(wide)
            .view(ref.shape)
            .copy_(ref.load(context.buffer(name, ref.nbytes)))
            for name, ref in (("tile", before), ("tuned", after))
        )
        for at, numbers in enumerate((new.sub_(old), old)):
            squares[at] += float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) ** 2
    if not all(square < float("inf") for square in squares):
        raise _non_finite((base, tuned), context)
    return squares[0] ** 0.5, squares[1] ** 0.5


def _spectrum(difference: torch.Tensor, unit: Unit, refs: Sequence[TensorRef], context: Context) -> dict[str, Any]:
    """The leading singular values, ‖ΔW‖ and what is left beyond them; all smaller ranks are read off these."""
    from loratools.linalg import truncated_svd

    options: Mapping[str, Any] = unit.parameters["svd"]
    try:
        _, S, _, info = truncated_svd(difference, **options, overwrite=True)
    except NonFiniteError as error:
        raise _non_finite(refs, context) from error
    return {"values": S.tolist(), "norm": info.norm, "rest": info.residual}


def _non_finite(refs: Sequence[TensorRef], context: Context) -> NonFiniteError:
    """Which of the tensors is damaged, and in how many entries; raised at the first that is."""
    for ref in refs:
        require_all_finite(ref, context.settings.tile_bytes)
    return NonFiniteError("The difference overflows float32.", tensor=refs[-1].name, shape=refs[-1].shape)

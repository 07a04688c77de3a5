"""Two checkpoints, module by module: which tensors differ, by how much, and in how many directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.binding import matrix_shape
from loratools.engine.context import Context, Outcome
from loratools.engine.operations import extracting, extracting_experts
from loratools.engine.operations.difference_rows import DifferenceRows
from loratools.engine.operations.explaining import cast_of, factor_of
from loratools.engine.operations.measuring import measured, moved_entries
from loratools.engine.operations.tiles import require_all_finite, row_bytes, row_ranges, same_bytes
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError
from loratools.tensors import COMPUTABLE, TensorRef, torch_dtype

if TYPE_CHECKING:
    import torch

    from loratools.linalg import ChunkedRows, RoundingNoise

_INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64"})
_BITS: Final = {2: "I16", 4: "I32", 8: "I64"}
_MATRIX: Final = 2


def compare(unit: Unit, context: Context) -> Outcome:
    """Compare the parameters of one module; with `svd`, say what an extraction would store of it.

    The outcome's facts: `tensors`, by the names on both sides, since one of them may stand for two (`kind`, and where
    numbers are compared what `measured` says); `whole`, bytes of what an adapter stores as it is; `spectrum`, of what
    it makes low-rank, or None.

    Raises:
        NonFiniteError: a difference that float32 cannot hold is to be decomposed.
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
    differs = any(each["kind"] != "identical" for each in tensors.values())
    if unit.parameters["svd"] is not None and differs and not any("non_finite" in each for each in tensors.values()):
        experts = int(unit.parameters["experts"])
        parts = [_expert(tuned, base, at, unit, context) for at in range(experts)]
        if any(part["values"] for _, part in parts):
            facts["spectrum"] = {"shape": parts[0][0], "parts": [part for _, part in parts]}
    context.advance(unit.read_bytes, unit.target)
    return Outcome(unit.target, "compare", "compared", facts)


def _expert(
    tuned: Sequence[TensorRef], base: Sequence[TensorRef], at: int, unit: Unit, context: Context
) -> tuple[list[int], dict[str, Any]]:
    """Rows and columns of one expert's matrix, and its spectrum."""
    from loratools.linalg import RoundingNoise

    experts = int(unit.parameters["experts"])
    mine, theirs = (extracting_experts.parts_of(side, experts, at) for side in (tuned, base))
    noise = RoundingNoise.of_shape(sum(ref.shape[0] for ref in mine), mine[0].shape[1])
    difference, _ = extracting_experts.difference_of(mine, theirs, unit, context, noise)
    return list(difference.shape), _spectrum(difference, noise, unit, (*theirs, *mine), context)


def _compared(base: TensorRef, tuned: TensorRef, context: Context, low_rank: Unit | None = None) -> dict[str, Any]:
    """What became of one tensor, and how large it is; with the spectrum, where a unit says how to look at it."""
    if same_bytes(base, tuned, context.settings.tile_bytes, context.check):
        return {"kind": "identical"}
    shape = matrix_shape(base.shape) if low_rank is not None else _lined(base.shape)  # a kernel: (out, in·k·…)
    before, after = base.reshaped(shape), tuned.reshaped(shape)
    if _is_equal(before, after, context.settings.tile_bytes):
        return {"kind": "equal"}
    if not {base.dtype, tuned.dtype} <= COMPUTABLE:
        return {"kind": "changed", "moved": moved_entries(base, tuned, context)}
    cast = cast_of(before, after, context.settings.tile_bytes)
    factor = None if cast else factor_of(before, after, context.settings.tile_bytes)
    facts = {"kind": "recast" if cast else "changed", "cast": cast, "factor": factor}
    if low_rank is None or low_rank.parameters["svd"] is None:
        matrix = low_rank is not None or len(base.shape) == _MATRIX
        return {**facts, **measured(before, after, context, directions=matrix)}
    return {**facts, **_with_spectrum(before, after, low_rank, context)}


def _lined(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same entries along one axis or two, so that rows are short."""
    return (1,) if not shape else shape if len(shape) <= _MATRIX else (math.prod(shape[:-1]), shape[-1])


def _with_spectrum(base: TensorRef, tuned: TensorRef, unit: Unit, context: Context) -> dict[str, Any]:
    """A matrix, measured and decomposed: held once, or read anew in passes, as the plan says."""
    from loratools.linalg import RoundingNoise

    noise = RoundingNoise.of_shape(*base.shape)
    if unit.parameters["streamed"]:
        found = measured(base, tuned, context, noise=noise)
        rows: torch.Tensor | ChunkedRows = DifferenceRows(base, tuned, context).chunked()
    else:
        rows = held_rows(base.shape, context)
        found = measured(base, tuned, context, rows, noise)
    if "non_finite" in found:
        return {**found, "spectrum": None}
    part = _spectrum(rows, noise, unit, (base, tuned), context)
    spectrum = {"shape": list(base.shape), "parts": [part]} if part["values"] else None
    return {**found, "norm": part["norm"], "spectrum": spectrum}


def _is_equal(base: TensorRef, tuned: TensorRef, tile_bytes: int) -> bool:
    """Whether both hold the same numbers; of integers of one dtype their bytes have told already."""
    dtypes = {base.dtype, tuned.dtype}
    comparable = dtypes <= COMPUTABLE or (dtypes <= _INTEGERS and len(dtypes) > 1)
    return comparable and all(_same_numbers(*tile) for tile in _tiles(base, tuned, tile_bytes))


def _same_numbers(one: TensorRef, other: TensorRef) -> bool:
    """In every entry; no number is another no number's equal where the dtypes differ, or their bits agree."""
    mine, theirs = one.load(), other.load()
    wide, others = mine.double(), theirs.double()
    same = wide == others
    if bool(same.all()):
        return True
    if mine.dtype == theirs.dtype:
        bits = torch_dtype(_BITS[mine.element_size()])
        same |= mine.view(bits) == theirs.view(bits)
    else:
        same |= wide.isnan() & others.isnan()
    return bool(same.all())


def _tiles(one: TensorRef, other: TensorRef, tile_bytes: int) -> Iterator[tuple[TensorRef, TensorRef]]:
    for rows in row_ranges(one.shape, max(row_bytes(one), row_bytes(other)), tile_bytes):
        yield one.rows(*rows), other.rows(*rows)


def held_rows(shape: tuple[int, ...], context: Context) -> torch.Tensor:
    """Room for a difference, float32, where the run computes; kept from one matrix to the next."""
    import torch

    if context.settings.device != "cpu":
        return torch.empty(shape, dtype=torch.float32, device=context.settings.device)
    nbytes = 4 * math.prod(shape)
    return context.buffer("difference", nbytes)[:nbytes].view(torch.float32).view(shape)


def _spectrum(
    difference: torch.Tensor | ChunkedRows,
    noise: RoundingNoise,
    unit: Unit,
    refs: Sequence[TensorRef],
    context: Context,
) -> dict[str, Any]:
    """The leading singular values, ‖ΔW‖ and what is left beyond them; all smaller ranks are read off these."""
    from loratools.linalg import truncated_svd

    options: Mapping[str, Any] = unit.parameters["svd"]
    try:
        U, S, Vh, info = truncated_svd(difference, **options, overwrite=True)
    except NonFiniteError as error:
        raise _non_finite(refs, context) from error
    peaks = [max(pair) for pair in zip(_peaks(U.T), _peaks(Vh), strict=True)]
    return {
        "values": S.tolist(),
        "peaks": peaks,
        "norm": info.norm,
        "rest": info.residual,
        "floor": noise.floor(info.norm),
        "noise": noise.energy,
    }


def _peaks(vectors: torch.Tensor) -> list[float]:
    """The largest square of every row's entries: one for a vector that is a single entry."""
    found: list[float] = vectors.square().amax(1).tolist() if vectors.numel() else []
    return found


def _non_finite(refs: Sequence[TensorRef], context: Context) -> NonFiniteError:
    """Which of the tensors is damaged, and in how many entries; raised at the first that is."""
    for ref in refs:
        require_all_finite(ref, context.settings.tile_bytes)
    return NonFiniteError("The difference overflows float32.", tensor=refs[-1].name, shape=refs[-1].shape)

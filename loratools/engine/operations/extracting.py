"""ΔW = W_tuned − W_base, module by module: identical, low-rank, whole, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loratools.adapters import Full, LowRank
from loratools.engine.binding import matrix_shape
from loratools.engine.context import Context, Outcome
from loratools.engine.operations import auto_rank
from loratools.engine.operations.difference_rows import DifferenceRows
from loratools.engine.operations.tiles import (
    difference_into,
    require_all_finite,
    row_bytes,
    row_ranges,
    same_bytes,
    same_values,
)
from loratools.engine.operations.truncating import Truncated, truncate
from loratools.engine.operations.weighting import share, weights_of
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError, UnsupportedError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import RoundingNoise


def extract(unit: Unit, context: Context) -> Outcome:
    """Evaluate the rules of one module's parameters (see `loratools.verbs.extract.RULES`).

    Raises:
        UnsupportedError: a changed tensor of a kind that is refused.
        NonFiniteError: NaN or infinity in the difference, or in what is stored whole.
    """
    rules: Mapping[str, Any] = unit.parameters["rules"]
    fates: dict[str, str] = {}
    facts: dict[str, Any] = {"fates": fates}
    replaced: dict[str, TensorRef] = {}
    added: dict[str, TensorRef] = {}
    low_rank: dict[str, Any] = {}
    for parameter, rule in rules.items():
        context.check()
        base, tuned = pair_of(unit, context, parameter)
        fate = _fate(rule["rule"], base, tuned, context)
        if fate == "low-rank":
            low_rank = _factors(unit, context, parameter, base, tuned, facts)
            fate = "low-rank" if low_rank else "equal in value"
        grown = rule["rule"] in {"rows", "rows-whole"}
        if fate == "whole":
            require_all_finite(tuned, context.settings.tile_bytes)
            replaced[parameter] = tuned.rows(0, base.shape[0]) if grown and base is not None else tuned
        if grown:
            assert base is not None
            added[parameter] = tuned.rows(base.shape[0], tuned.shape[0])
        fates[parameter] = fate
        context.advance(tuned.nbytes + (base.nbytes if base else 0), unit.target)
    _complete(unit, context, rules, replaced, fates)
    whole = MappingProxyType(replaced)
    rows = MappingProxyType(added)
    if low_rank:
        context.sink.update(unit.target, LowRank(**low_rank, replaced=whole, added_rows=rows))
    elif replaced or added:
        shared = bool(unit.parameters.get("shared"))
        context.sink.update(unit.target, Full(replaced=whole, added_rows=rows, shared=shared))
    return Outcome(
        unit.target, "extract", "low-rank" if low_rank else "whole" if replaced or added else "identical", facts
    )


def pair_of(unit: Unit, context: Context, parameter: str) -> tuple[TensorRef | None, TensorRef]:
    """A parameter on both sides: the base's, where a rule compares with it, and the tuned checkpoint's."""
    sides: Mapping[str, Any] = unit.parameters["rules"][parameter]
    tuned = context.tensor(unit.inputs[sides["tuned"]])
    return (context.tensor(unit.inputs[sides["base"]]) if sides["base"] is not None else None), tuned


def _fate(rule: str, base: TensorRef | None, tuned: TensorRef, context: Context) -> str:
    if base is None:
        return "whole" if rule == "added" else "left out: new in the tuned checkpoint"
    common = tuned.rows(0, base.shape[0]) if rule in {"rows", "rows-whole"} else tuned
    if same_bytes(base, common, context.settings.tile_bytes, context.check):
        return "identical"
    if base.dtype != common.dtype and same_values(base, common, context.settings.tile_bytes):
        return "equal in value"
    if rule.startswith("refused:"):
        raise UnsupportedError(
            f"A changed parameter of kind {rule.removeprefix('refused:')} cannot be extracted yet.",
            fix="Exclude the module (--exclude), or keep it whole (--save-full).",
            tensor=tuned.name,
            shape=tuned.shape,
            dtype=tuned.dtype if base.dtype == tuned.dtype else f"{tuned.dtype}, in the base {base.dtype}",
        )
    if rule == "left-out":
        return "left out: only low-rank updates were asked for"
    return "whole" if rule in {"whole", "rows-whole"} else "low-rank"


def _complete(
    unit: Unit, context: Context, rules: Mapping[str, Any], replaced: dict[str, TensorRef], fates: dict[str, str]
) -> None:
    """A module kept whole takes its unchanged parameters along: PEFT loads all of them or fails."""
    if not replaced or not unit.parameters.get("together"):
        return
    for parameter in rules:
        if parameter not in replaced:
            replaced[parameter] = pair_of(unit, context, parameter)[1]
            fates[parameter] = "whole: unchanged, kept since PEFT loads a module's parameters together"


def _factors(
    unit: Unit, context: Context, parameter: str, base: TensorRef | None, tuned: TensorRef, facts: dict[str, Any]
) -> dict[str, Any]:
    from loratools.linalg import balanced_factors

    assert base is not None
    kernel = tuned.shape[2:] if unit.parameters["layer"] == "conv" else ()
    if kernel:  # (out, in, k, …) is the matrix (out, in·k·…)
        base, tuned = (ref.reshaped(matrix_shape(ref.shape)) for ref in (base, tuned))
    try:
        found, weight_norm = _truncated(unit, context, base, tuned, kernel)
    except NonFiniteError as error:
        for ref in (base, tuned):
            require_all_finite(ref, context.settings.tile_bytes)
        raise NonFiniteError("The difference overflows float32.", tensor=tuned.name, shape=tuned.shape) from error
    U, S, Vh = found.U, found.S, found.Vh
    facts |= _measured(found, weight_norm, unit.parameters["svd"].get("error"))
    facts |= unit.parameters.get("carried", {})
    if not S.numel():
        return {}
    if unit.parameters["transposed"]:
        U, Vh = Vh.T, U.T
    lora_A, lora_B = balanced_factors(U, S, Vh)
    context.check()
    return {
        "lora_A": context.sink.keep(f"{unit.target}.{parameter}.lora_A", lora_A),
        "lora_B": context.sink.keep(f"{unit.target}.{parameter}.lora_B", lora_B),
        "alpha": float(S.numel()),
        "of": unit.parameters["layer"],
        "kernel": kernel,
    }


def _truncated(
    unit: Unit, context: Context, base: TensorRef, tuned: TensorRef, kernel: tuple[int, ...]
) -> tuple[Truncated, float]:
    """The truncated difference, held or read in passes as the plan says, and ‖base‖."""
    options: Mapping[str, Any] = unit.parameters["svd"]
    if unit.parameters.get("streamed"):
        from loratools.linalg import truncated_svd

        rows = DifferenceRows(base, tuned, context)
        U, S, Vh, info = truncated_svd(rows.chunked(), **options)
        return Truncated(U, S, Vh, info, None, {}), rows.weight_norm
    (weights,) = weights_of(unit, context, kernel)
    noise = auto_rank.wanted_noise(options, *base.shape)
    difference, weight_norm = difference_of(base, tuned, context, noise)
    transposed = unit.parameters["transposed"]
    return truncate(difference, options, weights=weights, noise=noise, transposed=transposed), weight_norm


def difference_of(
    base: TensorRef, tuned: TensorRef, context: Context, noise: RoundingNoise | None = None
) -> tuple[torch.Tensor, float]:
    """`tuned − base` in float32, tile by tile, and ‖base‖_F; rows that only the tuned side has are not part of it."""
    import torch

    if context.settings.device == "cpu":
        held = context.buffer("difference", 4 * base.spec.numel)
        difference = held[: 4 * base.spec.numel].view(torch.float32).view(base.shape)
    else:
        difference = torch.empty(base.shape, dtype=torch.float32, device=context.settings.device)
    squares = fill_difference(difference, base, tuned, context, noise)
    return difference, float(squares) ** 0.5


def fill_difference(
    difference: torch.Tensor, base: TensorRef, tuned: TensorRef, context: Context, noise: RoundingNoise | None
) -> torch.Tensor:
    """`tuned − base` into a tensor where the run computes, and ‖base‖² there: nothing waits for a device."""
    import torch

    squares = torch.zeros((), dtype=torch.float64, device=difference.device)
    for first, last in row_ranges(base.shape, max(row_bytes(base), row_bytes(tuned)), context.settings.tile_bytes):
        context.check()
        rows = difference[first:last]
        before, after = base.rows(first, last), tuned.rows(first, last)
        tile = context.on_device(before.load(context.buffer("tile", before.nbytes)))
        other = context.on_device(after.load(context.buffer("tuned", after.nbytes)))
        squares += difference_into(rows, tile, other)
        if noise is not None:
            noise.see(first, rows, tile, other)
    return squares


def _measured(found: Truncated, weight_norm: float, error: float | None) -> dict[str, Any]:
    """What a report says of a module; the goal is meant in the weighted norm, if there is one."""
    info, bound = found.info, found.weighted or found.info
    return {
        "rank": info.rank,
        "captured": info.captured,
        "residual": info.residual / info.norm if info.norm else 0.0,
        "certificate": info.certificate,
        "certificate_kind": info.certificate_kind,
        "norm": info.norm,
        "relative": info.norm / weight_norm if weight_norm else None,
        "method": info.method,
        "products": info.products,
        "clipped": info.clipped,
        "reached": info.reached and (error is None or bound.residual <= error * bound.norm * 1.000001),
        "sigma2": found.S.double().square().tolist(),
        **(share([bound]) if bound is not info else {}),
        **found.decided,
    }

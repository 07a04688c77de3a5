"""One module in several adapters: sizes, products and subspaces of its updates, mostly without ΔW being formed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.algebra import concatenated, finite
from loratools.adapters.experts import Stacked
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.tiles import same_bytes
from loratools.engine.plan import Unit
from loratools.errors import NonFiniteError
from loratools.tensors import ComputedBytes, TensorRef

if TYPE_CHECKING:
    import torch

_PAIR: Final = 2
_PIECE: Final = 2**18


def compare_updates(unit: Unit, context: Context) -> Outcome:
    """Compare what adapters do to one module.

    The outcome's facts: `gram`, the inner products ⟨ΔWᵢ, ΔWⱼ⟩, or None where the module was not measured; `unmeasured`,
    why not, where only the bytes tell. Of two adapters also `identical`; `whole`, what became of parameters given
    whole; `offsets`, norms and distance of vectors added to a bias; and what `_pair_of` says.

    Raises:
        NonFiniteError: NaN or infinity in one of many adapters.
    """
    updates = [context.update(each) for each in unit.inputs]
    facts: dict[str, Any] = {"gram": None, "identical": False}
    if len(updates) == _PAIR:
        facts["identical"] = alike(updates[0], updates[1])
        facts["whole"] = _whole(updates[0], updates[1])
    try:
        if len(updates) == _PAIR:
            facts["offsets"] = _offsets(updates[0], updates[1])
        facts |= _numbers(updates, unit, context)
    except NonFiniteError as error:
        if unit.parameters["many"]:
            raise
        facts["unmeasured"] = str(error)
    if facts["identical"] and facts["gram"] is not None:  # no rounding of sums where nothing differs
        facts |= {"apart": 0.0, "ratio": 1.0, "beside": 0.0, "values": None}
    context.advance(unit.read_bytes, unit.target)
    return Outcome(unit.target, "compare-updates", "compared", facts)


def _numbers(updates: Sequence[AbstractUpdate], unit: Unit, context: Context) -> dict[str, Any]:
    """What is measured, in the way that the plan says."""
    how = unit.parameters["how"]
    if how == "cores":
        return _measured([_cores(updates)], spectrum=unit.parameters["spectrum"])
    if how == "experts":
        return _measured(_of_experts(updates, context), spectrum=unit.parameters["spectrum"])
    return _dense(updates, unit) if how == "dense" else {}


def alike(one: Any, other: Any) -> bool:
    """Whether two updates are stored alike: the same kind, numbers and bytes, whatever their tensors are called."""
    if isinstance(one, TensorRef):
        return isinstance(other, TensorRef) and _same(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(itertools.starmap(alike, zip(one, other, strict=True)))
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(alike(getattr(one, name), getattr(other, name)) for name in names)
    return bool(one == other)


def _same(one: TensorRef, other: TensorRef) -> bool:
    """Bytes; a tensor that is computed is computed once."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    whole = isinstance(one.source, ComputedBytes) or isinstance(other.source, ComputedBytes)
    return same_bytes(one, other, max(one.nbytes, 1) if whole else min(max(one.nbytes, 1), 2**20))


def _whole(one: AbstractUpdate, other: AbstractUpdate) -> dict[str, str]:
    """Parameters and rows given whole by either → what became of them."""
    found = {}
    for field in ("replaced", "added_rows", "patches"):
        mine, theirs = getattr(one, field), getattr(other, field)
        for name in dict.fromkeys([*mine, *theirs]):
            both = name in mine and name in theirs
            kind = "removed" if name in mine else "added"
            label = name if field == "replaced" else f"{name} ({field.replace('_', ' ')})"
            found[label] = ("identical" if alike(mine[name], theirs[name]) else "changed") if both else kind
    return found


def _offsets(one: AbstractUpdate, other: AbstractUpdate) -> dict[str, list[float]]:
    """Vectors added to a parameter: their norms and their distance."""
    found = {}
    for name in dict.fromkeys([*one.offsets, *other.offsets]):
        vectors = [
            finite(update.offsets[name].vector).double() * update.offsets[name].scale
            if name in update.offsets
            else None
            for update in (one, other)
        ]
        mine, theirs = (vector if vector is not None else 0.0 for vector in vectors)
        difference: torch.Tensor = theirs - mine  # type: ignore[assignment]
        norms = [float(vector.norm()) if vector is not None else 0.0 for vector in vectors]
        found[name] = [*norms, float(difference.norm())]
    return found


def _cores(updates: Sequence[AbstractUpdate]) -> list[torch.Tensor]:
    from loratools.linalg import joint_cores

    return joint_cores([concatenated(update) for update in updates])


def _of_experts(updates: Sequence[AbstractUpdate], context: Context) -> list[list[torch.Tensor]]:
    """The cores of every expert."""
    stacks = [update for update in updates if isinstance(update, Stacked)]
    found = []
    for expert in range(stacks[0].experts):
        context.check()
        found.append(_cores([stack.part(expert) for stack in stacks]))
    return found


def _measured(matrices: Sequence[Sequence[torch.Tensor]], *, spectrum: bool) -> dict[str, Any]:
    """From the cores of one matrix, or of every expert's: inner products; of two adapters what `_pair_of` says.

    Beside it the `spaces` of every matrix, and the singular `values` of the difference where a spectrum is asked for.
    """
    import torch

    count = range(len(matrices[0]))
    gram = [[math.fsum(float((cores[i] * cores[j]).sum()) for cores in matrices) for j in count] for i in count]
    if len(count) != _PAIR:
        return {"gram": gram}
    values = [torch.linalg.svdvals(b - a).tolist() for a, b in matrices] if spectrum else None
    return {
        "gram": gram,
        **_pair_of(gram, [(a, b) for a, b in matrices]),
        **_spaces([_subspaces(a, b) for a, b in matrices]),
        "values": values,
    }


def _spaces(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `spaces`; and the `optimum` ‖A − best of B's rank‖ where every matrix of B has a smaller rank than A's."""
    tails = [math.hypot(*each["values"][each["ranks"][1] :]) for each in found]
    lower = all(each["ranks"][1] < each["ranks"][0] for each in found)
    spaces = [{key: value for key, value in each.items() if key != "values"} for each in found]
    return {"spaces": spaces, "optimum": math.hypot(*tails) if lower else None}


def _pair_of(gram: Sequence[Sequence[float]], pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """`apart` ‖B − A‖; the `ratio` c that makes `beside`, ‖B − c A‖, least."""
    ratio = gram[0][1] / gram[0][0] if gram[0][0] else 0.0
    apart, beside = (
        math.sqrt(math.fsum(float((b.double() - factor * a.double()).square().sum()) for a, b in pieces))
        for factor in (1.0, ratio)
    )
    return {"apart": apart, "ratio": ratio, "beside": beside}


def _subspaces(one: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Dimensions of the two updates, the first one's singular values, and the angles between column and row spaces."""
    from loratools.linalg import core_bases, principal_angles

    (U, S, V), (left, T, right) = core_bases(one), core_bases(other)
    return {
        "ranks": [len(S), len(T)],
        "values": S.tolist(),
        "columns": principal_angles(U, left),
        "rows": principal_angles(V, right),
    }


def _dense(updates: Sequence[AbstractUpdate], unit: Unit) -> dict[str, Any]:
    """The same of matrices that are formed; no subspaces, no spectrum.

    Raises:
        NonFiniteError: NaN or infinity in one of them.
    """
    import torch

    matrices = [update.delta_weight() for update in updates]
    step = max(1, _PIECE // max(matrices[0].shape[1], 1))
    pieces = [torch.split(each, step) for each in matrices]
    gram = [
        [math.fsum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True)) for other in pieces]
        for one in pieces
    ]
    if not all(math.isfinite(each) for row in gram for each in row):
        raise NonFiniteError("ΔW holds NaN or infinity.", module=unit.target)
    if len(matrices) != _PAIR:
        return {"gram": gram}
    return {"gram": gram, **_pair_of(gram, list(zip(*pieces, strict=True))), "spaces": None, "values": None}

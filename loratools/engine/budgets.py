"""A budget of bytes for the weights file: what is known of it from headers, and how large a file is.

The weights file holds a header, what is stored whole, and the factors. Ranks are bought with what the first two
leave. A matrix is first decomposed at a rank that the budget makes likely (`starting_rank`); where the allocation wants
more, it is decomposed again at twice that, up to its `ceiling`. What is wanted was paid for at half the rank, which
bounds what one round of these takes in scratch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.binding import matrix_shape
from loratools.engine.pairing import Pair
from loratools.engine.plan import Unit
from loratools.errors import UsageError
from loratools.storage.headers import ALIGNMENT, header_bytes
from loratools.tensors import TensorRef, TensorSpec

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint
    from loratools.formats import Encoded

TARGET: Final = "budget"
BYTES: Final = 4
"""Factors are float32."""
LEAST_START: Final = 32
"""A block of the SVD is at least as wide: lower ranks cost as much."""
LESS: Final = "; --only-low-rank leaves out what is no matrix"
_SPARE: Final = 4
_AGAIN: Final = 4
"""Budgets that a round of decompositions at twice the rank takes: by what was chosen, and by its relaxation."""


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """What one rank of a module costs.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        count: how many matrices share the module's rank: the experts, else 1.
        most: none of them has a higher rank; None: no more is known than their shape.
    """

    rows: int
    columns: int
    count: int = 1
    most: int | None = None

    @property
    def cost(self) -> int:
        """Bytes of one rank."""
        return BYTES * self.count * (self.rows + self.columns)

    def ceiling(self, max_rank: int, budget: int) -> int:
        """No rank above this comes out."""
        held = self.most if self.most is not None else self.rows
        return min(max_rank, self.rows, self.columns, held, max(budget // self.cost, 1))


def require_sensible(budget: int | None, *, uniform: bool) -> None:
    """Refuse a budget of nothing, and one rank for all where there is no budget.

    Raises:
        UsageError: it is one of these.
    """
    if budget is not None and budget < 1:
        raise UsageError("A budget is at least one byte.", budget=budget)
    if uniform and budget is None:
        raise UsageError("One rank for all modules that a budget holds needs a budget.", fix="Give --budget as well.")


def shape_of(rules: Mapping[str, Any], pairs: Mapping[str, Pair]) -> list[int] | None:
    """Rows and columns of what a module's unit decomposes, if anything; for its `matrix` parameter."""
    for name, each in rules.items():
        base = pairs[name].base
        if each["rule"] in {"low-rank", "rows"} and base is not None:
            rows, columns = matrix_shape(base.shape)
            return [rows, columns]
    return None


def matrix_of(unit: Unit) -> Matrix | None:
    """The matrix that a unit of an extraction decomposes, if any."""
    found = unit.parameters.get("matrix")
    return Matrix(*found) if found else None


def starting_rank(matrices: Sequence[Matrix], budget: int) -> int:
    """Four times the mean rank that the budget affords; where one is to have more, it is decomposed again."""
    mean = budget // max(sum(each.cost for each in matrices), 1)
    return max(LEAST_START, _SPARE * (mean + 1))


def at_rank(unit: Unit, rank: int) -> Unit:
    """A unit that decomposes at this rank."""
    svd = {**unit.parameters["svd"], "rank": rank, "max_rank": rank}
    return dataclasses.replace(unit, parameters={"start": rank, **unit.parameters, "svd": svd})


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """What was asked for.

    Attributes:
        budget: bytes of the weights file.
        max_rank: cap of every rank.
        uniform: one rank for all.
    """

    budget: int
    max_rank: int
    uniform: bool

    def ceiling(self, matrix: Matrix) -> int:
        """No rank above this comes out for a module."""
        return matrix.ceiling(self.max_rank, self.budget)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """An extraction's units, what closes it, and upper bounds of the bytes written and kept in between."""

    units: tuple[Unit, ...]
    closing: tuple[Unit, ...]
    written: int
    scratch: int


def work(units: Sequence[Unit], pool: Pool, tuned: Checkpoint) -> Work:
    """The units of an extraction, each at the rank that it begins with, and what chooses the ranks.

    Raises:
        UsageError: headers show that the budget is too small, and what the least is that could be enough.
    """
    written = sum(unit.write_bytes for unit in units)
    _require_room(units, pool, tuned)
    matrices = {unit.target: found for unit in units if (found := matrix_of(unit))}
    start = starting_rank(list(matrices.values()), pool.budget)
    begun = [
        at_rank(unit, min(start, pool.ceiling(matrices[unit.target]))) if unit.target in matrices else unit
        for unit in units
    ]
    rule = {"rule": "uniform-rank" if pool.uniform else "budget"}
    closing = Unit("allocate", TARGET, parameters={**dataclasses.asdict(pool), "rules": {"ranks": rule}})
    beside = sum(ref.nbytes for ref in _under("rows", units, tuned))
    return Work(tuple(begun), (closing,), min(written, pool.budget + beside), _scratch_bytes(begun, pool))


def _scratch_bytes(units: Sequence[Unit], pool: Pool) -> int:
    """Upper bound of what the factors take before they are cut, those that are decomposed again included."""
    total, whole, rounds = 0, 0, 0
    for unit in units:
        found = matrix_of(unit)
        if found:
            start, most = int(unit.parameters["svd"]["rank"]), pool.ceiling(found)
            total += start * found.cost
            whole += most * found.cost
            rounds = max(rounds, (-(-most // start) - 1).bit_length())
    return total + min(_AGAIN * rounds * pool.budget, 2 * whole)


def _under(rule: str, units: Sequence[Unit], tuned: Checkpoint) -> list[TensorRef]:
    """The tuned tensors that a rule decides about, or one whose name begins so."""
    return [
        tuned[unit.inputs[each["tuned"]].name]
        for unit in units
        for each in unit.parameters.get("rules", {}).values()
        if each["rule"].startswith(rule)
    ]


def _require_room(units: Sequence[Unit], pool: Pool, tuned: Checkpoint) -> None:
    """Refuse a budget that headers show to be too small: for what is stored in any case, or for any rank."""
    sure = sum(ref.nbytes for ref in _under("added", units, tuned))
    costs = [found.cost for unit in units if (found := matrix_of(unit))]
    least = len(header_bytes([], {})[0]) + sure + min(costs, default=0)
    if pool.budget < least:
        raise too_small(pool.budget, least, sure, "at least ", LESS)


def too_small(budget: int, least: int, whole: int, about: str = "", advice: str = "") -> UsageError:
    """The error for a budget that holds less than it has to; `advice` is how else to do with less."""
    beside = f" beside the {whole} bytes that are stored in any case" if whole else ""
    return UsageError(
        f"The budget does not hold a rank{beside}.",
        fix=f"Give {about}{least} bytes{advice}.",
        budget=budget,
    )


def header_share(key: str, spec: TensorSpec, budget: int) -> int:
    """Upper bound of what a tensor takes in the header of a file of at most `budget` bytes."""
    entry = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (budget, budget)}
    return len(json.dumps({key: entry}, ensure_ascii=False, separators=(",", ":")).encode()) - 1


def empty_bytes(metadata: Mapping[str, str]) -> int:
    """Upper bound of what else is in a header, the padding included."""
    return len(header_bytes([], metadata)[0]) + ALIGNMENT


def file_bytes(encoded: Encoded) -> int:
    """Size of the weights file, header included, to the byte."""
    tensors: Mapping[str, TensorRef] = encoded.tensors
    header, _ = header_bytes([ref.spec for ref in tensors.values()], encoded.metadata)
    return len(header) + sum(ref.nbytes for ref in tensors.values())

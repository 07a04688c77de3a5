"""One budget for all modules of an extraction: which rank each gets, and which have to be decomposed again first."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import AbstractUpdate, Full, LowRank
from loratools.adapters.algebra import without_products
from loratools.adapters.experts import Stacked
from loratools.adapters.leading import leading
from loratools.engine import budgets
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.cutting import numbers
from loratools.engine.plan import Unit
from loratools.errors import InternalError
from loratools.linalg import Allotment, allocate_ranks, uniform_rank
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    from loratools.linalg import Spectrum

_TRIES: Final = 8


@dataclasses.dataclass(frozen=True)
class _Module:
    """What its unit found of a module."""

    unit: Unit
    facts: Mapping[str, Any]
    matrix: budgets.Matrix
    ceiling: int

    @classmethod
    def of(cls, unit: Unit, outcome: Outcome, pool: budgets.Pool) -> _Module | None:
        matrix = budgets.matrix_of(unit)
        if matrix is None or not outcome.facts.get("rank"):
            return None
        return cls(unit, outcome.facts, matrix, pool.ceiling(matrix))

    @property
    def path(self) -> str:
        return self.unit.target

    @property
    def cap(self) -> int:
        return int(self.unit.parameters["svd"]["rank"])

    @property
    def sigma2(self) -> tuple[float, ...]:
        return tuple(self.facts["sigma2"])

    @property
    def cost(self) -> int:
        return self.matrix.cost

    @property
    def more(self) -> bool:
        """Whether there may be singular values that are not known yet."""
        return self.cap < self.ceiling and len(self.sigma2) >= self.cap


def allocate(unit: Unit, context: Context) -> Outcome:
    """Choose every module's rank, or say which modules have to be decomposed at a higher one before that can be done.

    Raises:
        UsageError: the budget does not hold what is stored whole and one rank.
    """
    pool = budgets.Pool(**{key: value for key, value in unit.parameters.items() if key != "rules"})
    modules = [found for each, outcome in context.done if (found := _Module.of(each, outcome, pool))]
    spectra, whole = _offers(modules, context, pool.budget)
    chosen = _fitting(modules, spectra, whole, pool, context)
    again = _again(modules, chosen, uniform=pool.uniform)
    if again:
        return Outcome(unit.target, unit.operation, "decomposed again", again=tuple(again))
    for path, update in _cut(modules, chosen.ranks, context).items():
        context.sink.update(path, update)
    size = budgets.file_bytes(context.sink.encoded())
    if size > pool.budget:
        raise InternalError("The weights file would be larger than its budget.", bytes=size, budget=pool.budget)
    return Outcome(unit.target, unit.operation, "allocated", _facts(modules, chosen, size, pool))


def _offers(modules: Sequence[_Module], context: Context, budget: int) -> tuple[list[Spectrum], int]:
    """What each module offers, its share of the header included; and upper bound of the bytes of all else."""
    from loratools.linalg import Spectrum

    encoded = context.sink.encoded()
    owners = {_place(ref): each.path for each in modules for ref in _factors(context.sink.held(each.path))}
    shares = dict.fromkeys((each.path for each in modules), 0)
    rest = budgets.empty_bytes(encoded.metadata)
    for key, ref in encoded.tensors.items():
        share = budgets.header_share(key, ref.spec, budget)
        path = owners.get(_place(ref))
        if path is None:
            rest += share + ref.nbytes
        else:
            shares[path] += share
    return [Spectrum(each.sigma2, each.cost, shares[each.path]) for each in modules], rest


def _place(ref: TensorRef) -> tuple[int, int]:
    return id(ref.source), ref.offset


def _factors(update: AbstractUpdate | None) -> tuple[TensorRef, ...]:
    return (update.lora_A, update.lora_B) if isinstance(update, (LowRank, Stacked)) else ()


def _fitting(
    modules: Sequence[_Module], spectra: Sequence[Spectrum], whole: int, pool: budgets.Pool, context: Context
) -> Allotment:
    """The best allotment whose file, measured to the byte, is within the budget.

    Shares of the header are upper bounds; what they leave over is spent too, as far as that is found to fit.

    Raises:
        UsageError: nothing fits.
    """
    choose = functools.partial(_level, modules) if pool.uniform else allocate_ranks

    def size(ranks: Sequence[int]) -> int:
        return budgets.file_bytes(context.sink.encoded(_cut(modules, ranks, context)))

    capacity, held, best = max(pool.budget - whole, 0), -1, None
    for _ in range(_TRIES):
        chosen = choose(spectra, capacity)
        spare = pool.budget - size(chosen.ranks)
        if spare >= 0 and best is not None and chosen.captured <= best.captured:
            break
        if spare >= 0:
            best, held = chosen, capacity
        capacity = max(capacity + spare, 0)
        if capacity <= held:
            break
    if best is None or (modules and not any(best.ranks)):
        cheapest = min(range(len(modules)), key=lambda at: spectra[at].nbytes(1), default=-1)
        least = [int(pool.uniform or at == cheapest) for at in range(len(modules))]
        extracting = any(each.operation.startswith("extract") for each, _ in context.done)
        whole, advice = size([0] * len(modules)), budgets.LESS if extracting else ""
        raise budgets.too_small(pool.budget, size(least), whole, advice=advice)
    return best


def _level(modules: Sequence[_Module], spectra: Sequence[Spectrum], capacity: int) -> Allotment:
    """One rank for all: the largest there is room for, unless no module has as much."""
    most = max((each.ceiling if each.more else len(each.sigma2) for each in modules), default=0)
    rank = min(uniform_rank(spectra, capacity), most)
    captured = math.fsum(math.fsum(each.sigma2[:rank]) for each in spectra)
    used = sum(each.nbytes(rank) for each in spectra)
    return Allotment((rank,) * len(modules), captured, captured, None, used)


def _again(modules: Sequence[_Module], chosen: Allotment, *, uniform: bool) -> list[Unit]:
    """The modules of which more singular values have to be known, at a higher rank.

    Those that get all that is known of them; and those whose last known σ²/cost is not below the density at which the
    bytes run out. What is not known of the others is less dense still, so that it has no part in the allocation.
    """
    units = []
    for module, rank in zip(modules, chosen.ranks, strict=True):
        if not module.more:
            continue
        if uniform and rank > module.cap:
            units.append(budgets.at_rank(module.unit, min(rank, module.ceiling)))
        dense = chosen.density is None or module.sigma2[-1] / module.cost >= chosen.density
        if not uniform and (rank >= module.cap or dense):
            units.append(budgets.at_rank(module.unit, min(2 * module.cap, module.ceiling)))
    return units


def _cut(modules: Sequence[_Module], ranks: Sequence[int], context: Context) -> dict[str, AbstractUpdate | None]:
    """Every module's update at its rank; of one without a rank what else is stored of it, if anything."""
    cut: dict[str, AbstractUpdate | None] = {}
    for module, rank in zip(modules, ranks, strict=True):
        update = context.sink.held(module.path)
        assert update is not None
        without = without_products(module.path, update)
        if isinstance(without, Full):
            without = dataclasses.replace(without, shared=bool(module.unit.parameters.get("shared")))
        cut[module.path] = leading(module.path, update, rank) if rank else without
    return cut


def _facts(modules: Sequence[_Module], chosen: Allotment, size: int, pool: budgets.Pool) -> dict[str, Any]:
    squares = math.fsum(each.facts["norm"] ** 2 for each in modules)
    return {
        "budget": pool.budget,
        "bytes": size,
        "captured": min(chosen.captured / squares, 1.0) if squares else None,
        "bound": min(chosen.bound / squares, 1.0) if squares and not pool.uniform else None,
        "density": chosen.density,
        "uniform_rank": max(chosen.ranks, default=0) if pool.uniform else None,
        "decomposed_again": [each.path for each in modules if each.cap > each.unit.parameters["start"]],
        "at_max_rank": [
            each.path
            for each, rank in zip(modules, chosen.ranks, strict=True)
            if rank == pool.max_rank <= len(each.sigma2) and rank < min(each.matrix.rows, each.matrix.columns)
        ],
        "modules": {each.path: numbers(each.facts, rank) for each, rank in zip(modules, chosen.ranks, strict=True)},
    }

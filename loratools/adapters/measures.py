"""Sizes, inner products and angles of updates, mostly without ΔW being formed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from loratools.adapters.actions import AbstractFixedAction, Region, everything
from loratools.adapters.algebra import concatenated, finite
from loratools.adapters.experts import Stacked
from loratools.adapters.shira import Shira
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError, UnsupportedError

if TYPE_CHECKING:
    import torch

_TILE: Final = 2**18
"""Entries of ΔW that are formed at a time where there is no better way."""
_ACTION: Final = 8
"""Times a kind's own rank: what forming an entry costs where an action does it; an exact sum takes several products."""


TELL: Final = "Tell it the weight's shape: `update.of_shape((out, in))`."


@dataclasses.dataclass(frozen=True, slots=True)
class PrincipalAngles:
    """Between two updates of one module, in radians, ascending; as many as the smaller space has dimensions.

    Attributes:
        columns: between the column spaces of both ΔW, in (out).
        rows: between the row spaces, in (in).
    """

    columns: tuple[float, ...]
    rows: tuple[float, ...]


def inner(path: str, one: AbstractUpdate, other: AbstractUpdate) -> float:
    """⟨ΔW, ΔW'⟩_F, in float64.

    Of products tr((BᵀB')(A'Aᵀ)); of kinds that are none, or where fewer operations do it, by row tiles of both; of
    sparse updates over their entries; of stacked experts over all of them.

    Raises:
        UnsupportedError: one of them gives parameters or rows whole, or depends on the base; or none says how large
            ΔW is.
        MismatchError: shapes or layouts differ.
    """
    for update in (one, other):
        require_own_change(path, update, "The size")
    if not one.changes_weight or not other.changes_weight:
        return 0.0
    pairs = _pairs(path, one, other)
    if pairs is not None:
        return math.fsum(inner(path, left, right) for left, right in pairs)
    if isinstance(one, Shira) and isinstance(other, Shira):
        return one.inner(other)
    one, other = _of_one_shape(path, one, other)
    shape = one.shape or other.shape
    if shape is None:
        raise UnsupportedError(
            f"The tensors of an update of kind {one.kind} do not say how large ΔW is, and its size depends on that.",
            fix=TELL,
            module=path,
        )
    if one.products and other.products and _gram_is_cheaper(one, other, shape):
        return _through_gram(one, other)
    left, right = (_rows_of(update, shape) for update in (one, other))
    return math.fsum(float((left(rows) * right(rows)).sum()) for rows in _tiles(shape))


def norm(path: str, update: AbstractUpdate) -> float:
    """‖ΔW‖_F; of products through their QR, which keeps digits that a Gram matrix loses where terms cancel.

    Raises:
        UnsupportedError: as for `inner`.
    """
    from loratools.linalg import product_norm

    require_own_change(path, update, "The size")
    if not update.products or update.shape is None or not _gram_is_cheaper(update, update, update.shape):
        return math.sqrt(max(inner(path, update, update), 0.0))
    return product_norm(*concatenated(update))


def angles(path: str, one: AbstractUpdate, other: AbstractUpdate) -> dict[str, PrincipalAngles]:
    """The angles between two updates, by the path of the matrix: of stacked experts `path.e` for every expert e.

    Through the cores of both in shared bases (`linalg.joint_cores`), O((m + n) R² + R³). A direction whose singular
    value is at float32's floor counts as none.

    Raises:
        UnsupportedError: as for `inner`; or one is no product of factors.
        MismatchError: shapes or layouts differ.
    """
    from loratools.linalg import core_bases, joint_cores, principal_angles

    for update in (one, other):
        require_own_change(path, update, "The space")
    if not one.changes_weight or not other.changes_weight:
        return {}
    pairs = _pairs(path, one, other)
    if pairs is not None:
        return {
            f"{path}.{index}": found
            for index, pair in enumerate(pairs)
            for found in angles(path, *pair).values()
        }  # fmt: skip
    one, other = _of_one_shape(path, one, other)
    for update in (one, other):
        if not update.products:
            raise UnsupportedError(
                f"{no_products(update)}: its space is not told.",
                fix=TELL if update.told_products else "Leave these modules out.",
                module=path,
            )
    (U, _, V), (left, _, right) = (core_bases(core) for core in joint_cores([concatenated(one), concatenated(other)]))
    return {path: PrincipalAngles(tuple(principal_angles(U, left)), tuple(principal_angles(V, right)))}


def require_own_change(path: str, update: AbstractUpdate, what: str) -> None:
    """Refuse an update whose ΔW its tensors alone do not say.

    Raises:
        UnsupportedError: says why, and what to do.
    """
    if update.gives_whole:
        raise UnsupportedError(
            f"{what} of what is given whole depends on the base.",
            fix="Leave these modules out, or merge and compare the checkpoints (`loratools diff`).",
            module=path,
        )
    if update.depends_on_base:
        raise UnsupportedError(
            f"{what} of an update of kind {update.kind} depends on the base.",
            fix="Leave these modules out, or merge and compare the checkpoints (`loratools diff`).",
            module=path,
        )


def no_products(update: AbstractUpdate) -> str:
    """Why an update is not taken as factors."""
    if update.told_products:
        return f"The tensors of an update of kind {update.kind} do not say how large ΔW is"
    return f"ΔW of kind {update.kind} has as a rule the full rank, so that factors would be larger than itself"


def _pairs(path: str, one: AbstractUpdate, other: AbstractUpdate) -> Iterator[tuple[AbstractUpdate, ...]] | None:
    """The updates of single experts, both of each; None where neither is stacked.

    Raises:
        MismatchError: experts or layouts differ.
    """
    stacks = [update for update in (one, other) if isinstance(update, Stacked)]
    if not stacks:
        return None
    alike = {(stack.experts, stack.matrix, stack.layout) for stack in stacks}
    if len(stacks) == 1 or len(alike) > 1:
        raise MismatchError("The adapters disagree about these experts, or how they lie in the file.", module=path)
    return ((stacks[0].part(expert), stacks[1].part(expert)) for expert in range(stacks[0].experts))


def _of_one_shape(path: str, one: AbstractUpdate, other: AbstractUpdate) -> tuple[AbstractUpdate, AbstractUpdate]:
    """Both, told the shape that either knows.

    Raises:
        MismatchError: the shapes differ.
    """
    shape = one.shape or other.shape
    if shape is not None:
        one, other = (update.of_shape(shape) if update.takes_shape else update for update in (one, other))
    for update in (one, other):
        if shape is not None and not (update.shape == shape or (update.shape is None and update.fits(shape))):
            raise MismatchError(f"Shapes differ: {shape} and {update.shape}.", module=path)
    return one, other


def _gram_is_cheaper(one: AbstractUpdate, other: AbstractUpdate, shape: tuple[int, int]) -> bool:
    ranks = [sum(term.rank for term in update.products) for update in (one, other)]
    tiled = sum(
        rank if update.terms else _ACTION * (update.rank or 1) for rank, update in zip(ranks, (one, other), strict=True)
    )
    return math.prod(ranks) * sum(shape) <= tiled * math.prod(shape)


def _through_gram(one: AbstractUpdate, other: AbstractUpdate) -> float:
    down, up = concatenated(one)
    other_down, other_up = (down, up) if other is one else concatenated(other)
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def _tiles(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _TILE // max(shape[1], 1))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def _rows_of(update: AbstractUpdate, shape: tuple[int, int]) -> Callable[[slice], torch.Tensor]:
    """What forms rows of ΔW in float64."""
    if update.terms:
        down, up = concatenated(update)
        return lambda rows: up[rows] @ down
    for ref in update.factors:
        finite(ref)
    action = update.action()
    assert isinstance(action, AbstractFixedAction)
    if update.span == "whole":
        whole = action.delta(everything(shape))
        return lambda rows: whole[rows]
    return lambda rows: action.delta(Region(rows, slice(0, shape[1])))

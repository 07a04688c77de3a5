"""What one stored tensor becomes: `round(W + Σ w · (W'_i − W))`, prepared once and evaluated tile by tile."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loratools.adapters import AbstractUpdate, Sum
from loratools.adapters.actions import AbstractAction, Region
from loratools.adapters.algebra import finite
from loratools.adapters.experts import Stacked
from loratools.engine.context import Context
from loratools.engine.operations.tiles import row_bytes, row_ranges
from loratools.engine.plan import Input, Unit
from loratools.errors import InternalError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What is added to one stored matrix, in the order in which it is done.

    Attributes:
        wholes: (weight, adapter, replacement): `weight · (G − W)` is added for each.
        patches: (weight, adapter, index of the row, its replacement) alike.
        products: Σ scale · B A, prepared, or None.
        actions: (weight, adapter, action): `weight · (G' − G)`, of the G that the same adapter makes of W otherwise.
        offsets: (factor, adapter, vector, whether the vector multiplies what is there) of what is added to a vector.
        transposed: the matrix is stored (in, out); actions see it the other way round.
        at_once: an action needs more than a row tile.
    """

    wholes: tuple[tuple[float, str, TensorRef], ...] = ()
    patches: tuple[tuple[float, str, int, TensorRef], ...] = ()
    products: LowRankSum | None = None
    actions: tuple[tuple[float, str, AbstractAction], ...] = ()
    offsets: tuple[tuple[float, str, torch.Tensor, bool], ...] = ()
    transposed: bool = False
    at_once: bool = False

    @classmethod
    def of(cls, unit: Unit, context: Context, dtype: torch.dtype, expert: int | None = None) -> Change:
        """Read and prepare the factors of everything that the unit's parameters name.

        Args:
            unit: see `engine.tensor_change.TensorChange`.
            context: where the updates are.
            dtype: of the result.
            expert: the one whose matrix this is, where the tensor stacks those of several.
        """
        from loratools.linalg import LowRankSum

        products, actions = [], []
        for term in unit.parameters.get("terms", ()):
            if term.get("only", expert) != expert:
                continue
            update = update_of(term, unit, context, expert)
            if not update.terms:
                actions.append((float(term["weight"]), str(term["source"]), update.action()))
            for product in update.terms:
                lora_A, lora_B = (context.on_device(finite(ref)) for ref in (product.lora_A, product.lora_B))
                products.append((lora_A, lora_B, float(term["weight"]) * product.scale))
        transposed = bool(unit.parameters.get("transposed"))
        pieces = None if dtype.itemsize == 2 else 2  # noqa: PLR2004  (16 bits)
        return cls(
            wholes=tuple(_wholes(unit, context, expert)),
            patches=tuple(_patches(unit, context)),
            products=LowRankSum.of(products, transposed=transposed, pieces=pieces) if products else None,
            actions=tuple(actions),
            offsets=tuple(_offsets(unit, context)),
            transposed=transposed,
            at_once=bool(unit.parameters.get("at_once")),
        )

    @property
    def inputs(self) -> list[TensorRef]:
        """The tensors of adapters that are taken as they are, and were not held against NaN when they were read."""
        return [*(ref for *_, ref in self.wholes), *(ref for *_, ref in self.patches)]

    @property
    def looks(self) -> bool:
        """Whether the actions have to see all of the base before: row tiles do not hold whole rows of theirs."""
        return self.transposed and not self.at_once and any(action.looks for *_, action in self.actions)

    def tiles(self, ref: TensorRef, context: Context, step: int = 1) -> Sequence[tuple[int, int]]:
        """Row ranges of the stored matrix, each but the last of a multiple of `step` rows."""
        if self.at_once:
            return [(0, ref.shape[0])]
        return list(row_ranges(ref.shape, row_bytes(ref), context.settings.tile_bytes, step))

    def look(self, base: torch.Tensor, rows: tuple[int, int]) -> None:
        """Show a tile of the base to the actions."""
        region = self._region(base, rows)
        for _, source, action in self.actions:
            action.look(self._matrix(self._own(source, base, rows, base)), region)

    def tile(
        self,
        base: torch.Tensor,
        rows: tuple[int, int],
        dtype: torch.dtype,
        buffer: torch.Tensor | None = None,
        back: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One tile of the result, from the same tile of the base; in `buffer` (flat bytes) where it can be.

        `back`, like the base, takes what the result gives when the products are taken out of it again and it is
        rounded; only where there are products and nothing that needs the base.
        """
        from loratools.linalg import round_to

        total = self._changed(base, rows) if self.needs_base else base
        if self.products is None:
            return round_to(total, dtype)
        flat, out = total.reshape(total.shape[0], -1), None
        if buffer is not None and total.device == buffer.device:
            out = buffer[: total.numel() * dtype.itemsize].view(dtype).view(flat.shape)
        before = None if back is None else back.view(flat.shape)
        return self.products.add_to(flat, start=rows[0], out_dtype=dtype, out=out, back=before).view(base.shape)

    @property
    def needs_base(self) -> bool:
        """Whether more happens than that products are added, which are the same whatever W is."""
        return bool(self.wholes or self.patches or self.actions or self.offsets)

    def _changed(self, base: torch.Tensor, rows: tuple[int, int], *, again: bool = False) -> torch.Tensor:
        """A tile with everything done but the products, in float64."""
        total = replaced = self.replaced(base, rows)
        if self.actions:
            total = self._acted(replaced, base, rows, again=again)
        for factor, source, vector, multiplies in self.offsets:
            piece = vector[slice(*rows)].to(total.device)
            total = total + factor * ((piece - 1) * self._own(source, base, rows, replaced) if multiplies else piece)
        return total.clone() if total is base else total

    def moves(self, near: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        """W' − W of one tile in float64, from a float64 tile that is near W and what the actions remember of W."""
        total = self._changed(near, rows, again=True) if self.needs_base else near.clone()
        if self.products is not None:
            flat = total.reshape(total.shape[0], -1)
            flat += self.products.piece(slice(*rows), slice(0, flat.shape[1])).to(flat.device)
        return total.sub_(near)

    def replaced(self, base: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        """A tile with all that is given whole, in float64."""
        total = base.double()
        for weight, _, ref in self.wholes:
            given = ref.rows(*rows).load().to(base.device).double()
            total = given if weight == 1 and len(self.wholes) == 1 else total + weight * (given - base.double())
        mine = [(weight, index, ref) for weight, _, index, ref in self.patches if rows[0] <= index < rows[1]]
        if mine and total is base:
            total = total.clone()
        times = Counter(index for _, index, _ in mine)
        for weight, index, ref in mine:
            given, before = finite(ref)[0].to(base.device).double(), base[index - rows[0]].double()
            if weight == 1 and times[index] == 1 and not self.wholes:  # the row itself, of which no sum loses a bit
                total[index - rows[0]] = given
            else:
                total[index - rows[0]] += weight * (given - before)
        return total

    def _own(self, source: str, base: torch.Tensor, rows: tuple[int, int], replaced: torch.Tensor) -> torch.Tensor:
        """What one adapter finds: the base with what this adapter itself replaces in it; `replaced` where none does."""
        if not self.wholes and not self.patches:
            return replaced.double()  # which is no copy where it is float64 already
        wholes = tuple((1.0, *each[1:]) for each in self.wholes if each[1] == source)
        patches = tuple((1.0, *each[1:]) for each in self.patches if each[1] == source)
        return Change(wholes=wholes, patches=patches).replaced(base, rows)

    def _acted(
        self, replaced: torch.Tensor, base: torch.Tensor, rows: tuple[int, int], *, again: bool = False
    ) -> torch.Tensor:
        region, total = self._region(base, rows), self._matrix(replaced).clone()
        for weight, source, action in self.actions:
            act = action.again if again else action.change
            change = act(self._matrix(self._own(source, base, rows, replaced)), region)
            total += change if weight == 1 else weight * change
        return (total.T if self.transposed else total).reshape(base.shape)

    def _matrix(self, tile: torch.Tensor) -> torch.Tensor:
        flat = tile.reshape(tile.shape[0], -1)
        return flat.T if self.transposed else flat

    def _region(self, tile: torch.Tensor, rows: tuple[int, int]) -> Region:
        mine, others = slice(*rows), slice(0, tile.numel() // max(tile.shape[0], 1))
        return Region(others, mine) if self.transposed else Region(mine, others)


def matrices(ref: TensorRef, unit: Unit) -> Iterator[tuple[TensorRef, int | None]]:
    """The matrix that a stored tensor is, or those of its experts one by one; a scalar is a vector of one."""
    if not unit.parameters.get("experts"):
        yield (ref if ref.shape else ref.reshaped((1,))), None
        return
    for expert in range(ref.shape[0]):
        yield ref.rows(expert, expert + 1).reshaped(ref.shape[1:]), expert


def update_of(term: Mapping[str, Any], unit: Unit, context: Context, expert: int | None) -> AbstractUpdate:
    """What a term of a unit adds to the stored matrix, or to that of one expert."""
    update = context.update(Input(term["source"], term["module"]))
    if "only" in term:
        return _placed(update, *term["at"], rows=context.tensor(unit.inputs[0]).shape[1])
    if expert is None:
        expert = term.get("expert")
    if expert is None:
        return update
    if not isinstance(update, Stacked):
        raise InternalError("An expert's part was asked of an update that has none.", module=term["module"])
    rows = term.get("rows")
    return update.part(
        expert, (int(rows[0]), int(rows[1])) if rows else None, columns=bool(unit.parameters.get("transposed"))
    )


def _placed(update: AbstractUpdate, first: int, last: int, *, rows: int) -> AbstractUpdate:
    """The update as one of a matrix of so many rows, whose rows first:last it is about."""

    def lower(ref: TensorRef) -> torch.Tensor:
        given = ref.load().double()
        whole = given.new_zeros(rows, given.shape[1])
        whole[first:last] = given
        return whole

    terms = (
        dataclasses.replace(term, lora_B=computed(term.lora_B.name, (rows, term.rank), (term.lora_B,),
                                                  partial(lower, term.lora_B)))
        for term in update.terms
    )  # fmt: skip
    return Sum(parts=tuple(terms), parameter="")


def _wholes(unit: Unit, context: Context, expert: int | None) -> Iterator[tuple[float, str, TensorRef]]:
    for whole in unit.parameters.get("wholes", ()):
        ref = context.update(Input(whole["source"], whole["module"])).replaced[whole["parameter"]]
        if expert is not None:
            ref = ref.rows(expert, expert + 1).reshaped(ref.shape[1:])
        yield float(whole["weight"]), str(whole["source"]), (ref if ref.shape else ref.reshaped((1,)))


def _patches(unit: Unit, context: Context) -> Iterator[tuple[float, str, int, TensorRef]]:
    for each in unit.parameters.get("patches", ()):
        patch = context.update(Input(each["source"], each["module"])).patches[each["parameter"]]
        for row, index in enumerate(patch.indices):
            yield float(each["weight"]), str(each["source"]), index, patch.rows.rows(row, row + 1)


def _offsets(unit: Unit, context: Context) -> Iterator[tuple[float, str, torch.Tensor, bool]]:
    for each in unit.parameters.get("offsets", ()):
        offset = context.update(Input(each["source"], each["module"])).offsets[each["parameter"]]
        vector = context.on_device(finite(offset.vector).double())
        yield float(each["weight"]) * offset.scale, str(each["source"]), vector, offset.multiplies

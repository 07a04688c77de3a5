"""What base and adapters say that a merged matrix is: W and Σ w ΔW in float64, tile by tile, and how sure that is.

Beside `change`, which a merge computes with, this is a path of its own: products are plain float64 products of the
factors, nothing is put on grids. Kinds that are no products say what they change through their action.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters.algebra import finite
from loratools.engine import memory
from loratools.engine.context import Context
from loratools.engine.operations.change import Change, update_of
from loratools.engine.plan import Unit
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_FLOAT32: Final = 2.0**-24
"""Relative error of one rounding in float32."""
_ACTION: Final = 64 * _FLOAT32
"""Of a float32 computation that sums over the weight: DoRA's norms, OFT's and HRA's rotations."""


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """Σ w·s·B·A of one adapter, the way round in which the weight is stored.

    Attributes:
        source: the adapter's name.
        left: (rows, R) float64; w·s is in the B of it.
        right: (R, columns) float64; each row's norm is between ½ and 1, so that the norms below are balanced.
        heights: (rows,) norms of left's rows; heights[i]·widths[j] ≥ Σ |left[i]|·|right[:, j]|.
        widths: (columns,) norms of right's columns.
        dtypes: torch's, of the factors as stored.
        scale: w·s where there is one factor, else None.
    """

    source: str
    left: torch.Tensor
    right: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor
    dtypes: frozenset[torch.dtype]
    scale: float | None

    @classmethod
    def of(cls, source: str, terms: Sequence[tuple[TensorRef, TensorRef, float]], *, transposed: bool) -> Product:
        """From `(lora_A, lora_B, scale)` of every term."""
        import torch

        downs = torch.cat([finite(lora_A).double() for lora_A, _, _ in terms], 0)
        ups = torch.cat([finite(lora_B).double() * scale for _, lora_B, scale in terms], 1)
        left, right = (downs.T, ups.T) if transposed else (ups, downs)
        norm = torch.linalg.vector_norm
        lengths = norm(right, dim=1)
        balance = torch.ldexp(torch.ones_like(lengths), torch.frexp(lengths)[1])
        left, right = left * balance, right / balance[:, None]
        read = frozenset(_stored(ref) for lora_A, lora_B, _ in terms for ref in (lora_A, lora_B))
        scales = {scale for *_, scale in terms}
        one = scales.pop() if len(scales) == 1 else None
        return cls(source, left, right, norm(left, dim=1), norm(right, dim=0), read, one)

    @property
    def rank(self) -> int:
        """R, over all terms."""
        return self.right.shape[0]


def _stored(ref: TensorRef) -> torch.dtype:
    """The dtype of a factor in its file; a computed one has that of what it is computed from."""
    from loratools.tensors import ComputedBytes, torch_dtype

    inner = ref
    while isinstance(inner.source, ComputedBytes):
        inner = inner.source.inputs[0]
    return torch_dtype(inner.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of the claim, float64, (rows, columns).

    Attributes:
        first: the row of the matrix that they begin with.
        weight: W.
        found: the merged matrix there.
        parts: what each adapter adds; their sum is Σ w ΔW.
        near: how far their sum can be off where ours computed it.
        far: for every part, how far it can be off where anybody computed it in float32.
    """

    first: int
    weight: torch.Tensor
    found: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    near: torch.Tensor | float
    far: tuple[torch.Tensor | float, ...]

    def times(self, factors: Sequence[float]) -> Tile:
        """The same with every part multiplied; parts are taken in turn where there are more factors than parts."""
        count = len(self.parts)
        picked = [(index % count, factor) for index, factor in enumerate(factors) if factor]
        return dataclasses.replace(
            self,
            parts=tuple(factor * self.parts[index] for index, factor in picked),
            near=self.near * max((abs(factor) for factor in factors), default=0.0) * (len(factors) // count),
            far=tuple(abs(factor) * self.far[index] for index, factor in picked),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One stored matrix: what it was, what it is, and what should have been added.

    Attributes:
        base: the base's matrix.
        merged: the merged one.
        products: one for each adapter that adds products.
        rest: everything else that happens to the matrix, or None.
        narrow: the result has 16 bits, for which a merge of ours takes one piece of its factors.
        whole: what `rest` adds, where it has to be computed at once.
    """

    base: TensorRef
    merged: TensorRef
    products: tuple[Product, ...]
    rest: Change | None
    narrow: bool
    whole: torch.Tensor | None = None

    @classmethod
    def of(cls, unit: Unit, context: Context, base: TensorRef, merged: TensorRef, expert: int | None = None) -> Claim:
        """Read the factors of everything that the unit's parameters name; see `Change.of`."""
        import torch

        from loratools.tensors import torch_dtype

        transposed = bool(unit.parameters.get("transposed"))
        held: dict[str, list[tuple[TensorRef, TensorRef, float]]] = {}
        actions: list[dict[str, Any]] = []
        for term in unit.parameters.get("terms", ()):
            if term.get("only", expert) != expert:
                continue
            update = update_of(term, unit, context, expert)
            scaled = [(each.lora_A, each.lora_B, float(term["weight"]) * each.scale) for each in update.terms]
            held.setdefault(str(term["source"]), []).extend(scaled)
            actions += [] if update.terms else [term]
        products = tuple(
            Product.of(context.sources[key].name, terms, transposed=transposed) for key, terms in held.items() if terms
        )
        others = dataclasses.replace(unit, parameters={**unit.parameters, "terms": actions})
        change = Change.of(others, context, torch.float64, expert)
        some = change.wholes or change.patches or change.actions or change.offsets
        rest = change if some else None
        narrow = torch_dtype(merged.dtype).itemsize == 2  # noqa: PLR2004
        claim = cls(base, merged, products, rest, narrow)
        return dataclasses.replace(claim, whole=claim._at_once(context)) if rest is not None else claim

    @property
    def sources(self) -> tuple[str, ...]:
        """The adapter behind every part; everything that is no product counts as one, `""`."""
        return (("",) if self.rest is not None else ()) + tuple(each.source for each in self.products)

    def _at_once(self, context: Context) -> torch.Tensor | None:
        import torch

        assert self.rest is not None
        if self.rest.at_once:
            weight = self.base.load()
            added = self.rest.tile(weight, (0, self.base.shape[0]), torch.float64) - weight.double()
            return added.reshape(weight.shape[0], -1)
        if self.rest.looks:
            for rows in self.ranges():
                context.check()
                self.rest.look(self.base.rows(*rows).load(), rows)
        return None

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Row ranges of a tile each."""
        rows = self.base.shape[0]
        step = max(1, memory.WIDE_ENTRIES // max(self.base.spec.numel // max(rows, 1), 1))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def tile(self, rows: tuple[int, int]) -> Tile:
        """Some rows of it."""
        before = self.base.rows(*rows).load()
        weight = before.double().reshape(before.shape[0], -1)
        found = self.merged.rows(*rows).load().double().view(weight.shape)
        parts: list[torch.Tensor] = []
        near: torch.Tensor | float = 0.0
        far: list[torch.Tensor | float] = []
        if self.rest is not None:
            parts.append(self._rest(before, weight, rows))
            size = float(weight.abs().max()) + float(parts[0].abs().max()) if weight.numel() else 0.0
            near = 2.0**-40 * size
            far.append(_ACTION * size)
        for product in self.products:
            parts.append(product.left[slice(*rows)] @ product.right)
            sizes = product.heights[slice(*rows), None] * product.widths
            far.append(sizes * ((product.rank + 4) * _FLOAT32))
        if self.products:
            rank = sum(each.rank for each in self.products)
            near = near + self._heights()[slice(*rows), None] * self._widths() * near_ours(rank, narrow=self.narrow)
        return Tile(rows[0], weight, found, tuple(parts), near, tuple(far))

    def _heights(self) -> torch.Tensor:
        """Norms of the rows of all products' left factors side by side, which is how a merge of ours takes them."""
        import torch

        heights = torch.stack([each.heights for each in self.products])
        return heights.square().sum(0).sqrt()

    def _widths(self) -> torch.Tensor:
        import torch

        widths = torch.stack([each.widths for each in self.products])
        return widths.square().sum(0).sqrt()

    def _rest(self, before: torch.Tensor, weight: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        import torch

        if self.whole is not None:
            return self.whole[slice(*rows)]
        assert self.rest is not None
        return self.rest.tile(before, rows, torch.float64).reshape(weight.shape) - weight


def near_ours(rank: int, *, narrow: bool) -> float:
    """How far a product of ours can be off, beside the norm of a row of its left factor times that of a column.

    Factors are on a grid 26 bits below those norms, or of 44 bits; twice, as ours may balance a component by another
    power of two than `Product` does; and what the product in float64 that it is compared with can be off.
    """
    bits = 25.4 if narrow else 43.4
    return float(2 * (math.sqrt(rank) * 2.0**-bits + rank * 2.0**-52.8) + (rank + 4) * 2.0**-52)

"""What an adapter is, told from its updates' shapes and scalars: a row a module, and the summary over them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.adapters.adapter import Adapter
from loratools.adapters.dora import Dora
from loratools.adapters.experts import Stacked
from loratools.adapters.low_rank import LowRank
from loratools.adapters.updates import AbstractUpdate
from loratools.tensors import COMPUTABLE, TensorRef


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateRow:
    """One module of an adapter: `shape` is that of ΔW, (out, in) or (experts, out, in), or of what is replaced whole.

    A convolution's is (out, channels, k, …) where the update says its kernel.

    `alpha` and `scaling` are None where there is no one number; `whole` are parameters given whole,
    `added_rows` those that are lengthened.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    dtype: str
    parameters: int
    rank: int | None
    alpha: float | None
    scaling: float | None
    whole: tuple[str, ...]
    added_rows: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """How many modules have one value."""

    value: float
    modules: int


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What only an adapter has.

    Attributes:
        base_model: what it says it modifies.
        base: name of the base that it carries fingerprints of, and of how many modules.
        ranks: low-rank modules by rank; alphas, scalings alike.
        targets: low-rank modules by the last component of their path.
        whole: modules with parameters given whole, by the last component of their path.
        rows: modules with rows that are replaced or appended, alike.
    """

    base_model: str | None
    base: Mapping[str, Any]
    ranks: tuple[Tally, ...]
    alphas: tuple[Tally, ...]
    scalings: tuple[Tally, ...]
    targets: Mapping[str, int]
    whole: Mapping[str, int]
    rows: Mapping[str, int]


def row_of(path: str, update: AbstractUpdate) -> UpdateRow:
    """What one update is."""
    patched = tuple(patch.rows for patch in update.patches.values())
    whole = tuple(update.replaced.values()) or tuple(update.added_rows.values()) or patched
    changed = update.changes_weight
    return UpdateRow(
        name=path,
        kind=update.kind,
        shape=_shape(update) if changed else whole[0].shape if len(whole) == 1 else _weight_shape(update),
        dtype="+".join(sorted({ref.dtype for ref in update.factors or whole})),
        parameters=sum(ref.spec.numel for ref in update.tensors if is_parameter(ref)),
        rank=update.rank,
        alpha=getattr(update, "alpha", None),
        scaling=update.scaling,
        whole=tuple(update.replaced),
        added_rows=tuple(update.added_rows),
    )


def _shape(update: AbstractUpdate) -> tuple[int, ...] | None:
    """As the base has it, so far as the update tells."""
    held = update.low_rank if isinstance(update, Dora) else update
    if isinstance(held, Stacked):
        return held.experts, *held.matrix
    if isinstance(held, LowRank) and held.kernel:
        out, columns = held.lora_B.shape[0], held.lora_A.shape[1]
        return out, columns // math.prod(held.kernel), *held.kernel
    return update.shape


def is_parameter(ref: TensorRef) -> bool:
    """Whether a tensor is one that is trained; places in a matrix are not."""
    return ref.dtype in COMPUTABLE


def tensors_of(adapter: Adapter, paths: Iterable[str]) -> list[TensorRef]:
    """Every tensor of these modules; what several of them share once."""
    refs = [ref for path in paths for ref in adapter[path].tensors]
    return list({(id(ref.source), ref.offset, ref.name): ref for ref in refs}.values())


def _weight_shape(update: AbstractUpdate) -> tuple[int, ...] | None:
    weight = update.replaced.get("weight")
    return weight.shape if weight is not None else None


def summary(adapter: Adapter, rows: Iterable[UpdateRow]) -> AdapterFacts:
    """What the rows have in common, and what the adapter says of its base."""
    rows = list(rows)
    updates = {row.name: adapter[row.name] for row in rows}
    prints = adapter.provenance.get("fingerprint", {})
    return AdapterFacts(
        base_model=adapter.base_model,
        base={"name": adapter.provenance.get("name"), "fingerprints": len(prints)},
        ranks=_tallies(row.rank for row in rows),
        alphas=_tallies(row.alpha for row in rows),
        scalings=_tallies(row.scaling for row in rows),
        targets=_endings(path for path, update in updates.items() if update.changes_weight),
        whole=_endings(path for path, update in updates.items() if update.replaced),
        rows=_endings(path for path, update in updates.items() if update.added_rows or update.patches),
    )


def _tallies(values: Iterable[float | None]) -> tuple[Tally, ...]:
    counts = Counter(value for value in values if value is not None)
    return tuple(Tally(value, counts[value]) for value in sorted(counts))


def _endings(paths: Iterable[str]) -> dict[str, int]:
    return dict(Counter(path.rpartition(".")[2] for path in paths).most_common())

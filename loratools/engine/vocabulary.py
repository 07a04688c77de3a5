"""Adapters of a resized vocabulary: their embeddings, given whole, have more rows than the base's."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loratools.adapters import AbstractUpdate, Adapter, Full, LowRank
from loratools.adapters.algebra import finite
from loratools.checkpoints import Checkpoint, families
from loratools.engine.binding import bind
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch


def lengthened(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter as one for `base`: what its longer embeddings have beyond the base's is appended.

    PEFT saves an embedding whole where the vocabulary was resized, and wants the base resized before it is loaded. The
    rows that the base has are replaced and changed as ever, the others are appended as PEFT merges them: what was
    given, and ΔW added to it.

    Raises:
        MismatchError, UnsupportedError: see `bind`.
    """
    vocabularies = _vocabularies(base)
    longer = {
        path: target.tensor("weight")
        for path, target in bind(adapter, base).targets.items()
        if (weight := adapter[path].replaced.get("weight")) is not None
        and (name := target.tensor("weight")) in vocabularies
        and isinstance(adapter[path], (Full, LowRank))
        and _is_longer(weight, vocabularies[name])
    }
    if not longer:
        return adapter
    counts = {path: vocabularies[name].shape[0] for path, name in longer.items()}
    updates = {path: _cut(path, each, counts[path]) if path in longer else each for path, each in adapter.items()}
    note = f"The vocabulary was resized after the base: rows are appended to {', '.join(longer.values())}."
    return dataclasses.replace(adapter, updates=MappingProxyType(updates), notes=(*adapter.notes, note))


def _vocabularies(base: Checkpoint) -> dict[str, TensorRef]:
    """Tensors that have a row a token; a tied head that is not stored as the embedding that it is."""
    embedding, tied = families.input_embedding(base), base.tied_head
    if embedding is None:
        return {}
    rows = {base[embedding].shape[0], base.config.get("vocab_size")}
    found = {name: base[name] for name in (embedding, families.head(base)) if name is not None}
    if tied is not None:
        found.setdefault(tied[1], base[tied[0]])
    return {name: ref for name, ref in found.items() if ref.shape[0] in rows}


def _is_longer(given: TensorRef, stored: TensorRef) -> bool:
    return len(given.shape) == len(stored.shape) and given.shape[0] > stored.shape[0]


def _cut(path: str, update: AbstractUpdate, count: int) -> AbstractUpdate:
    given = update.replaced["weight"]
    rows = given.rows(count, given.shape[0])
    changed: dict[str, Any] = {"replaced": MappingProxyType({**update.replaced, "weight": given.rows(0, count)})}
    if isinstance(update, LowRank):
        changed |= _cut_factor(update, count)
        rows = _moved(path, update, rows, count)
    return dataclasses.replace(update, added_rows=MappingProxyType({**update.added_rows, "weight": rows}), **changed)


def _cut_factor(update: LowRank, count: int) -> dict[str, Any]:
    """The factor that has an entry a token, without those that the base does not have."""
    if update.of != "embedding":
        return {"lora_B": update.lora_B.rows(0, count)}
    given = update.lora_A

    def columns() -> torch.Tensor:
        return given.load()[:, :count].contiguous()

    return {"lora_A": computed(given.name, (given.shape[0], count), (given,), columns, given.dtype)}


def _moved(path: str, update: LowRank, rows: TensorRef, count: int) -> TensorRef:
    def compute() -> torch.Tensor:
        lora_A, lora_B = finite(update.lora_A).double(), finite(update.lora_B).double()
        change = (lora_B @ lora_A[:, count:]).T if update.of == "embedding" else lora_B[count:] @ lora_A
        return finite(rows).double() + update.scaling * change

    return computed(f"{path}.weight", rows.shape, (rows, *update.factors), compute)

"""What a set of adapters does to a checkpoint, tensor by tensor: from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapters import AbstractUpdate, Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint
from loratools.engine.binding import Bindings, Renaming, Target, bind
from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import COMPUTABLE, TensorSpec


@dataclasses.dataclass(slots=True)
class TensorChange:
    """What happens to one stored tensor, as the parameters of a merge unit.

    Attributes:
        terms: `{source, module, weight}` of every product that is added.
        wholes: `{source, module, parameter, weight}` of every replacement.
        rows: `{source, module, parameter, count}` of rows that are appended, or None.
        transposed: the weight is stored (in, out).
        rank: total rank of the products.
        factor_elements: elements of all their factors.
    """

    terms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wholes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: dict[str, Any] | None = None
    transposed: bool = False
    rank: int = 0
    factor_elements: int = 0

    def parameters(self) -> dict[str, Any]:
        """Plain data for a unit."""
        return {"terms": self.terms, "wholes": self.wholes, "rows": self.rows, "transposed": self.transposed}


@dataclasses.dataclass(frozen=True, slots=True)
class AddedTensor:
    """A tensor that an adapter brings along and the base does not have."""

    source: str
    module: str
    parameter: str
    spec: TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """All of it.

    Attributes:
        tensors: base tensor name → change.
        added: output tensor name → what is added.
        untied: (embedding, head) where the head must become a tensor of its own, with the head's change.
        renaming: how output names differ from the base's, because an added head needs the prefix.
        notes: what was decided.
    """

    tensors: Mapping[str, TensorChange]
    added: Mapping[str, AddedTensor]
    untied: tuple[str, str, TensorChange] | None
    renaming: Renaming
    notes: tuple[str, ...]


def source_id(index: int) -> str:
    """The id of the index-th adapter in a plan."""
    return f"adapter{index}"


def collect(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], *, merged: bool = False
) -> Changes:
    """Bind every adapter and gather what it does.

    Args:
        base: the checkpoint.
        adapters: the adapters.
        weights: one each.
        merged: the checkpoint has the adapters in it already, so that its fingerprint says nothing.

    Raises:
        MismatchError: an adapter does not belong to this base.
        UnsupportedError: weights in a dtype that is not computed with.
    """
    tensors: dict[str, TensorChange] = {}
    added: dict[str, AddedTensor] = {}
    notes: list[str] = []
    renaming = Renaming()
    shared: set[str] = set()
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        bindings = bind(adapter, base)
        notes += [*adapter.notes, *bindings.notes]
        notes += () if merged else fingerprint.compare(adapter, bindings, base)
        if any(target.added for target in bindings.targets.values()):
            renaming = bindings.renaming.inverse()
        skipped = _mirrored(adapter, bindings, base, notes)
        if skipped or adapter.config.get("ensure_weight_tying") is True:
            shared |= {target.tensor("weight") for target in bindings.targets.values()}
        for path, target in bindings.targets.items():
            if path not in skipped:
                _gather(source_id(index), path, adapter[path], target, weight, tensors, added)
                if getattr(adapter[path], "shared", False):
                    shared.add(target.tensor("weight"))
    untied = _untie(base, tensors, shared, notes)
    _require_computable(base, tensors)
    return Changes(tensors, added, untied, renaming, tuple(dict.fromkeys(notes)))


def _gather(  # noqa: PLR0913, PLR0917
    source: str,
    path: str,
    update: AbstractUpdate,
    target: Target,
    weight: float,
    tensors: dict[str, TensorChange],
    added: dict[str, AddedTensor],
) -> None:
    for parameter, ref in update.replaced.items():
        name = target.tensor(parameter)
        if target.added:
            added[name] = AddedTensor(source, path, parameter, ref.spec.renamed(name))
            continue
        change = tensors.setdefault(name, TensorChange())
        change.wholes.append({"source": source, "module": path, "parameter": parameter, "weight": weight})
    for parameter, ref in update.added_rows.items():
        change = tensors.setdefault(target.tensor(parameter), TensorChange())
        if change.rows is not None:
            raise UnsupportedError("Two adapters append rows to one parameter.", module=path)
        change.rows = {"source": source, "module": path, "parameter": parameter, "count": ref.shape[0]}
    if update.terms:
        change = tensors.setdefault(target.tensor("weight"), TensorChange())
        change.terms.append({"source": source, "module": path, "weight": weight})
        change.transposed = target.transposed
        change.rank += update.rank
        change.factor_elements += sum(term.lora_A.spec.numel + term.lora_B.spec.numel for term in update.terms)


def _mirrored(adapter: Adapter, bindings: Bindings, base: Checkpoint, notes: list[str]) -> set[str]:
    """The head's update where it is the embedding's, written twice: PEFT's `ensure_weight_tying`.

    Raises:
        MismatchError: the two differ although the configuration says they are one.
    """
    tied = base.tied_head
    if tied is None or adapter.config.get("ensure_weight_tying") is not True:
        return set()
    by_tensor = {target.tensor("weight"): path for path, target in bindings.targets.items()}
    embedding, head = by_tensor.get(tied[0]), by_tensor.get(tied[1])
    if embedding is None or head is None:
        return set()
    one, other = adapter[embedding], adapter[head]
    if one.terms and other.terms:
        import torch

        same = torch.equal(one.terms[0].lora_A.load(), other.terms[0].lora_B.load().T)
        if not same or not torch.equal(one.terms[0].lora_B.load(), other.terms[0].lora_A.load().T):
            raise MismatchError("The updates of the tied embedding and head differ.", module=head, adapter=adapter.name)
    notes.append(f"{head} is tied to {embedding}: its update is the same one, applied once.")
    return {head}


def _untie(
    base: Checkpoint, tensors: dict[str, TensorChange], shared: set[str], notes: list[str]
) -> tuple[str, str, TensorChange] | None:
    """Keep tied matrices one where the adapter changes both; give the head its own tensor where it does not."""
    tied = base.tied_head
    if tied is None or (tied[0] not in tensors and tied[1] not in tensors):
        return None
    embedding, head = tied
    if embedding in shared and head not in tensors:
        if head in base:
            tensors[head] = tensors[embedding]
        return None
    change = tensors.get(head, TensorChange()) if head in base else tensors.pop(head, TensorChange())
    notes.append(
        f"The adapter changes one of the tied matrices {embedding} and {head} and not the other, so they are "
        "written apart and tie_word_embeddings becomes false: the merged model computes what the adapter did."
    )
    return embedding, head, change


def _require_computable(base: Checkpoint, tensors: Mapping[str, TensorChange]) -> None:
    for name in tensors:
        if name in base and base[name].dtype not in COMPUTABLE:
            raise UnsupportedError(
                f"Weights in {base[name].dtype} are not merged into yet.",
                fix="Merge into the 16-bit checkpoint of this model.",
                tensor=name,
            )

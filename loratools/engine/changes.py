"""What a set of adapters does to a checkpoint, tensor by tensor: from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import fingerprint
from loratools.engine.binding import Bindings, Renaming, Target, bind
from loratools.engine.memory import TILE_BYTES
from loratools.engine.operations.tiles import same_bytes
from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import COMPUTABLE, TensorRef, TensorSpec

_ONE_OF_THEM: Final = "Merge one of them, and stack the others without it (--exclude)."


@dataclasses.dataclass(slots=True)
class TensorChange:
    """What happens to one stored tensor, as the parameters of a merge unit.

    Attributes:
        terms: `{source, module, weight}` of every product that is added.
        wholes: `{source, module, parameter, weight}` of every replacement.
        rows: `{source, module, parameter, count}` of rows that are appended, or None.
        transposed: the weight is stored (in, out).
        factor_elements: elements of all their factors.
    """

    terms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wholes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: dict[str, Any] | None = None
    transposed: bool = False
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
    alone = False
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        bindings = bind(adapter, base)
        notes += [*adapter.notes, *bindings.notes]
        notes += () if adapter else [f"{adapter.name} is empty: it changes nothing."]
        if not merged:
            _require_fitting(adapter, bindings)
            notes += fingerprint.compare(adapter, bindings, base)
        if any(target.added for target in bindings.targets.values()):
            renaming = bindings.renaming.inverse()
            notes += () if weight == 1 else [f"{adapter.name}: modules that the base does not have are added whole."]
        for path, target in bindings.targets.items():
            _gather(source_id(index), path, adapter[path], target, weight, tensors, added)
        both = _changes_both(adapter, bindings, base)
        alone |= both is False
        if both and base.tied_head is not None:
            _mirror(source_id(index), base.tied_head, tensors)
            notes.append(f"{base.tied_head[1]} is tied to {base.tied_head[0]}: one update, applied once.")
    untied = _untie(base, tensors, alone=alone, notes=notes)
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
            if name in added:
                raise UnsupportedError("Two adapters bring this module along.", fix=_ONE_OF_THEM, module=path)
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
        if change.terms and change.transposed != target.transposed:
            raise MismatchError(
                "The adapters disagree about which way round this weight is stored.",
                fix="One of them has the wrong fan_in_fan_out in its adapter_config.json.",
                module=path,
            )
        change.terms.append({"source": source, "module": path, "weight": weight})
        change.transposed = target.transposed
        change.factor_elements += sum(term.lora_A.spec.numel + term.lora_B.spec.numel for term in update.terms)


def _require_fitting(adapter: Adapter, bindings: Bindings) -> None:
    """Refuse a whole parameter of another shape than the one that it replaces, and rows of another width."""
    for path, target in bindings.targets.items():
        known = target.module.parameters if target.module is not None else {}
        given = [(name, ref.shape, known[name].shape) for name, ref in adapter[path].replaced.items() if name in known]
        given += [(name, ref.shape[1:], known[name].shape[1:]) for name, ref in adapter[path].added_rows.items()]
        for name, shape, wanted in given:
            if shape != wanted:
                raise MismatchError(
                    f"The adapter gives the {name} as {shape}, the base has {wanted}.",
                    fix="Is this the base that the adapter was made for? A vocabulary may have been resized.",
                    module=path,
                    adapter=adapter.name,
                )


def _changes_both(adapter: Adapter, bindings: Bindings, base: Checkpoint) -> bool | None:
    """Whether the adapter changes tied matrices as the one that they are; None where it changes neither.

    It does under PEFT's `ensure_weight_tying`, and by plain keys, which PEFT writes into the shared parameter.

    Raises:
        MismatchError: the two updates differ although the configuration says they are one.
    """
    by_tensor = {target.tensor("weight"): path for path, target in bindings.targets.items()}
    paths = [by_tensor[name] for name in base.tied_head or () if name in by_tensor]
    updates = [adapter[path] for path in paths if _changes_weight(adapter[path])]
    if not updates:
        return None
    tying = adapter.config.get("ensure_weight_tying") is True
    if not tying and not all(getattr(update, "shared", False) for update in updates):
        return False
    if len(updates) == 1 or _same(updates[0], updates[1]):
        return True
    if tying:
        raise MismatchError("The updates of the tied embedding and head differ.", module=paths[1], adapter=adapter.name)
    return False


def _changes_weight(update: AbstractUpdate) -> bool:
    return bool(update.terms) or "weight" in update.replaced or "weight" in update.added_rows


def _same(embedding: AbstractUpdate, head: AbstractUpdate) -> bool:
    """Whether a head's update is the embedding's, seen from the other side."""
    given, mirrored = embedding.replaced.get("weight"), head.replaced.get("weight")
    if len(embedding.terms) != len(head.terms) or (given is None) != (mirrored is None):
        return False
    if given is not None and mirrored is not None and not same_bytes(given, mirrored, TILE_BYTES):
        return False
    return all(
        _turned(one.lora_A, other.lora_B) and _turned(one.lora_B, other.lora_A)
        for one, other in zip(embedding.terms, head.terms, strict=True)
    )


def _turned(one: TensorRef, other: TensorRef) -> bool:
    import torch

    return one.shape == other.shape[::-1] and torch.equal(one.load(), other.load().T)


def _mirror(source: str, tied: tuple[str, str], tensors: dict[str, TensorChange]) -> None:
    """Give both of two tied tensors what one adapter, which keeps them tied, gives to one of them.

    Raises:
        UnsupportedError: it would have to be added to updates that lie the other way round.
    """
    embedding, head = (tensors.setdefault(name, TensorChange()) for name in tied)
    for one, other in ((embedding, head), (head, embedding)):
        terms, wholes = ([each for each in items if each["source"] == source] for items in (one.terms, one.wholes))
        if any(each["source"] == source for each in (*other.terms, *other.wholes)):
            continue
        if terms and other.terms and one.transposed != other.transposed:
            raise UnsupportedError("Updates of tied matrices that are not written for both cannot be added to others.")
        if terms:
            other.transposed = one.transposed
            other.factor_elements += one.factor_elements
        other.terms += terms
        other.wholes += wholes
        other.rows = other.rows or one.rows


def _untie(
    base: Checkpoint, tensors: dict[str, TensorChange], *, alone: bool, notes: list[str]
) -> tuple[str, str, TensorChange] | None:
    """Keep tied matrices one where every adapter changes both; give the head its own tensor where one does not."""
    tied = base.tied_head
    if tied is None or (tied[0] not in tensors and tied[1] not in tensors):
        return None
    embedding, head = tied
    change = tensors.get(head, TensorChange()) if head in base else tensors.pop(head, TensorChange())
    if not alone:
        return None
    if change.rows is not None and head not in base:
        raise UnsupportedError("Rows appended to tied matrices that come apart are not merged yet.", tensor=head)
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

"""Tied matrices: whether an adapter changes both of them as one, and what happens where it does not."""

from __future__ import annotations

from loratools.adapters import AbstractUpdate, Adapter, RowPatch
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import Bindings
from loratools.engine.memory import TILE_BYTES
from loratools.engine.operations.tiles import same_bytes
from loratools.engine.tensor_change import TensorChange
from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import TensorRef


def changes_both(adapter: Adapter, bindings: Bindings, base: Checkpoint) -> bool | None:
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
    if base.tied_head is not None and updates[0].patches and base.tied_head[0] not in by_tensor:
        return False  # PEFT ties tokens of the head to those of the embedding, and not the other way round
    if len(updates) == 1 or _same(updates[0], updates[1]):
        return True
    if tying:
        raise MismatchError("The updates of the tied embedding and head differ.", module=paths[1], adapter=adapter.name)
    return False


def _changes_weight(update: AbstractUpdate) -> bool:
    given = (update.replaced, update.added_rows, update.patches)
    return update.changes_weight or any("weight" in each for each in given)


def _same(embedding: AbstractUpdate, head: AbstractUpdate) -> bool:
    """Whether a head's update is the embedding's, seen from the other side."""
    if any(update.changes_weight and not update.terms for update in (embedding, head)):
        return False
    if not _same_rows(embedding.patches.get("weight"), head.patches.get("weight")):
        return False
    given, mirrored = embedding.replaced.get("weight"), head.replaced.get("weight")
    if len(embedding.terms) != len(head.terms) or (given is None) != (mirrored is None):
        return False
    if given is not None and mirrored is not None and not same_bytes(given, mirrored, TILE_BYTES):
        return False
    return all(
        _turned(one.lora_A, other.lora_B) and _turned(one.lora_B, other.lora_A)
        for one, other in zip(embedding.terms, head.terms, strict=True)
    )


def _same_rows(one: RowPatch | None, other: RowPatch | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.indices == other.indices and same_bytes(one.rows, other.rows, TILE_BYTES)


def _turned(one: TensorRef, other: TensorRef) -> bool:
    import torch

    return one.shape == other.shape[::-1] and torch.equal(one.load(), other.load().T)


def mirror(source: str, tied: tuple[str, str], tensors: dict[str, TensorChange]) -> None:
    """Give both of two tied tensors what one adapter, which keeps them tied, gives to one of them.

    Raises:
        UnsupportedError: it would have to be added to updates that lie the other way round.
    """
    embedding, head = (tensors.setdefault(name, TensorChange()) for name in tied)
    for one, other in ((embedding, head), (head, embedding)):
        terms, wholes, patches = (
            [each for each in items if each["source"] == source] for items in (one.terms, one.wholes, one.patches)
        )
        if any(each["source"] == source for each in (*other.terms, *other.wholes, *other.patches)):
            continue
        if terms and other.terms and one.transposed != other.transposed:
            raise UnsupportedError("Updates of tied matrices that are not written for both cannot be added to others.")
        if terms:
            other.transposed = one.transposed
            other.factor_elements += one.factor_elements
            other.actions += one.actions
            other.span = one.span
        other.terms += terms
        other.wholes += wholes
        other.patches += patches
        other.rows = other.rows or one.rows


def untie(
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

"""Updates whose ΔW becomes a product larger than what they are stored as (LoHa, LoKr): what that takes; a note."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from loratools.adapters import AbstractUpdate
from loratools.adapters.sides import AbstractSided


def expands(update: AbstractUpdate) -> bool:
    """Whether its products are computed, and are not what it is stored as."""
    return bool(update.products) and not update.terms


def elements_of(update: AbstractUpdate, *, products: bool) -> int:
    """Entries of all its tensors; where it becomes a product, of the factors of that beside them."""
    stored = sum(ref.spec.numel for ref in update.tensors)
    if not products or not expands(update):
        return stored
    return stored + sum(ref.spec.numel for term in update.products for ref in (term.lora_A, term.lora_B))


def notes(modules: Iterable[Sequence[AbstractUpdate]]) -> Iterator[str]:
    """For every kind that becomes plain LoRA, at what rank; and what the output takes for granted.

    Args:
        modules: all updates of one module, for every module.
    """
    ranks: dict[str, list[int]] = {}
    vague, large = set(), 0
    for held in modules:
        large += _no_smaller(held)
        for update in held:
            if expands(update):
                ranks.setdefault(update.kind, []).append(sum(term.rank for term in update.products))
        if all(isinstance(update, AbstractSided) and update.vague for update in held):
            vague |= {update.kind for update in held}
    for kind, found in sorted(ranks.items()):
        least, most = min(found), max(found)
        count = "1 update" if len(found) == 1 else f"{len(found)} updates"
        yield (
            f"The output is plain LoRA: {count} of kind {kind} enter as exact products, "
            f"of rank {least if least == most else f'{least} to {most}'}."
        )
    if large:
        yield f"In {large} modules these factors take no fewer numbers than ΔW itself."
    if vague:
        yield (
            f"The factors of kind {', '.join(sorted(vague))} do not tell a convolution from a Linear, and the output "
            "has them as Linear: where they are for convolutions, name the base (--base)."
        )


def _no_smaller(held: Sequence[AbstractUpdate]) -> bool:
    """Whether the factors of a module's sum are no smaller than ΔW, where some are computed."""
    terms = [term for update in held for term in update.products]
    if not any(expands(update) for update in held):
        return False
    size = terms[0].lora_B.shape[0] * terms[0].lora_A.shape[1]
    return sum(ref.spec.numel for term in terms for ref in (term.lora_A, term.lora_B)) >= size

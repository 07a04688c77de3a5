"""The best update of lower rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.adapters.algebra import summed_bias, without_products
from loratools.adapters.experts import Stacked
from loratools.adapters.low_rank import LowRank
from loratools.adapters.measures import TELL, no_products
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import UnsupportedError
from loratools.tensors import in_memory

if TYPE_CHECKING:
    import torch


def truncated(path: str, update: AbstractUpdate, **rule: Any) -> AbstractUpdate | None:
    """The best update of lower rank, or None where ΔW is zero; `rule` is one of `linalg.truncate_low_rank`.

    Stacked experts share the rank of the one that needs most; the others are filled up with zeros.

    Raises:
        UnsupportedError: ΔW depends on the base, or is no product of factors.
    """
    if isinstance(update, Stacked):
        return _stacked(path, update, rule)
    if update.changes_weight and not update.products:
        why = f"ΔW of kind {update.kind} depends on the base" if update.depends_on_base else no_products(update)
        raise UnsupportedError(
            f"{why}: it is not truncated.",
            fix=TELL
            if update.told_products
            else "Merge it into the base, and extract the change (`loratools merge`, `loratools extract --rank`).",
            module=path,
        )
    if not update.products:
        return update
    factors = _factors(update, rule)
    if factors is None:
        return without_products(path, update)
    lora_A, lora_B = factors
    return LowRank(
        lora_A=in_memory(f"{path}.lora_A", lora_A),
        lora_B=in_memory(f"{path}.lora_B", lora_B),
        alpha=float(len(lora_A)),
        of=update.layer,
        parameter=update.target,
        kernel=update.kernel,
        bias=summed_bias(path, [(1.0, update)]),
        replaced=update.replaced,
        added_rows=update.added_rows,
        patches=update.patches,
    )


def _factors(update: AbstractUpdate, rule: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Balanced A (r, in) and B (out, r), float32; None where ΔW is zero."""
    from loratools.linalg import balanced_factors

    U, S, Vh = update.decomposed(**rule)
    if not S.numel():
        return None
    lora_A, lora_B = balanced_factors(U, S, Vh)
    return lora_A.float(), lora_B.float()


def _stacked(path: str, update: Stacked, rule: dict[str, Any]) -> AbstractUpdate | None:
    import torch

    found = [_factors(update.part(expert), rule) for expert in range(update.experts)]
    rank, (out, into) = max((len(pair[0]) for pair in found if pair is not None), default=0), update.matrix
    if not rank:
        return None
    downs, ups = torch.zeros(update.experts, rank, into), torch.zeros(out, rank, update.experts)
    for expert, pair in enumerate(found):
        if pair is not None:
            downs[expert, : len(pair[0])] = pair[0]
            ups[:, : len(pair[0]), expert] = pair[1]
    return Stacked(
        lora_A=in_memory(f"{path}.lora_A", downs.flatten(0, 1)),
        lora_B=in_memory(f"{path}.lora_B", ups.flatten(1)),
        experts=update.experts,
        alpha=float(rank),
        layout=update.layout,
    )

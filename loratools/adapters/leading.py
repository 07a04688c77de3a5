"""The leading ranks of an update whose factors are sorted by singular values, as those of an extraction are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from loratools.adapters.experts import Stacked
from loratools.adapters.low_rank import LowRank
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import InternalError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch


def leading(path: str, update: AbstractUpdate, rank: int) -> LowRank | Stacked:
    """`update` at `rank`, its first ones; zeros follow where it has fewer. alpha = rank: the scaling becomes 1.

    Law: for `U √S`, `√S Vᵀ` with descending S and scaling 1, ΔW at `rank` is the truncation of ΔW. Nothing is read
    before the factors are.

    Raises:
        InternalError: an update of another kind, or with another scaling.
    """
    if not isinstance(update, (LowRank, Stacked)) or update.scaling != 1 or rank < 1:
        raise InternalError("This update has no leading ranks.", module=path, kind=update.kind, rank=rank)
    held = 1 if isinstance(update, LowRank) else update.experts
    have = update.lora_A.shape[0] // held
    if rank == have:
        return update
    (_, into), (out, _) = update.lora_A.shape, update.lora_B.shape
    if rank < have and held == 1:
        lora_A = update.lora_A.rows(0, rank)
    else:
        lora_A = _resized(update.lora_A.reshaped((held, have, into)), rank).reshaped((held * rank, into))
    # of experts too the columns of one rank lie together: k · experts + e
    lora_B = _resized(update.lora_B.reshaped((out, have, held)), rank).reshaped((out, rank * held))
    return dataclasses.replace(update, lora_A=lora_A, lora_B=lora_B, alpha=float(rank))


def _resized(ref: TensorRef, size: int) -> TensorRef:
    """The first entries along the middle one of three axes, filled up with zeros."""
    first, have, last = ref.shape

    def compute() -> torch.Tensor:
        held = ref.load()
        if size <= have:
            return held[:, :size].contiguous()
        fresh = held.new_zeros((first, size, last))
        fresh[:, :have] = held
        return fresh

    return computed(ref.name, (first, size, last), (ref,), compute, ref.dtype)

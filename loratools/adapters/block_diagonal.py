"""LoRA with a block-diagonal factor: BD-LoRA, as PEFT computes it (`peft/tuners/lora/variants.py`)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from loratools.adapters.low_rank import require_alpha, require_product
from loratools.adapters.updates import AbstractUpdate, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiagonal(AbstractUpdate):
    """`ΔW = scaling · B A`, where one of the two is block-diagonal and stored without its zeros.

    Attributes:
        lora_A: (r, in), or (r, in / blocks) where it is the compact one: row block i stands in column block i.
        lora_B: (out, r), or (out, r / blocks) alike.
        alpha: the numerator of the scaling.
        blocks: how many.
        compact: which of the two is block-diagonal.
        use_rslora: divide by √r rather than by r.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    alpha: float
    blocks: int
    compact: Literal["A", "B"]
    use_rslora: bool = False

    def __post_init__(self) -> None:
        small = self.lora_A if self.compact == "A" else self.lora_B
        if self.blocks < 1 or len(small.shape) != 2 or small.shape[0] % self.blocks:  # noqa: PLR2004
            raise MismatchError(
                f"A factor of shape {small.shape} cannot be cut into {self.blocks} blocks.", tensor=small.name
            )
        compact_A = self.compact == "A"
        require_product(
            self._whole(self.lora_A) if compact_A else self.lora_A,
            self.lora_B if compact_A else self._whole(self.lora_B),
        )
        require_alpha(self.alpha, self.lora_A)

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "block-diagonal"

    @property
    def scaling(self) -> float:
        """See `LowRank.scaling`."""
        rank = self.lora_A.shape[0]
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.lora_A, self.lora_B)

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`."""
        if self.compact == "A":
            return (Term(self._whole(self.lora_A), self.lora_B, self.scaling),)
        return (Term(self.lora_A, self._whole(self.lora_B), self.scaling),)

    def _whole(self, small: TensorRef) -> TensorRef:
        def blocks() -> torch.Tensor:
            import torch

            tiles = small.load().double().chunk(self.blocks)
            whole = torch.zeros((small.shape[0], small.shape[1] * self.blocks), dtype=torch.float64)
            height, width = tiles[0].shape
            for index, tile in enumerate(tiles):
                whole[index * height : (index + 1) * height, index * width : (index + 1) * width] = tile
            return whole

        return computed(f"{small.name} in blocks", (small.shape[0], small.shape[1] * self.blocks), (small,), blocks)

    def scaled(self, weight: float) -> AbstractUpdate:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)

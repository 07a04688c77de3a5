"""LoRA on groups of inputs: QALoRA (Xu et al. 2023, https://arxiv.org/abs/2309.14717), as PEFT computes it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from loratools.adapters.low_rank import require_alpha, require_product
from loratools.adapters.updates import AbstractUpdate, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(AbstractUpdate):
    """`ΔW = scaling · B A P` with `(P x)_g = in / group² · Σ x over group g`: A sees scaled means of groups of inputs.

    Attributes:
        lora_A: (r, in / group).
        lora_B: (out, r).
        alpha: the numerator of the scaling.
        group: the number of inputs in a group.
        use_rslora: divide by √r rather than by r.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    alpha: float
    group: int
    use_rslora: bool = False

    def __post_init__(self) -> None:
        require_product(self.lora_A, self.lora_B)
        require_alpha(self.alpha, self.lora_A)
        if self.group < 1:
            raise MismatchError(f"The group size is {self.group}.", fix="It is at least 1.", tensor=self.lora_A.name)

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "qalora"

    @property
    def scaling(self) -> float:
        """See `LowRank.scaling`."""
        return self.alpha / (math.sqrt(self.lora_A.shape[0]) if self.use_rslora else self.lora_A.shape[0])

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.lora_A, self.lora_B)

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`: A P stands for A; its factor in / group² goes into the scale."""
        rank, groups = self.lora_A.shape

        def spread() -> torch.Tensor:
            return self.lora_A.load().double().repeat_interleave(self.group, dim=1)

        wide = computed(f"{self.lora_A.name} over groups", (rank, groups * self.group), (self.lora_A,), spread)
        return (Term(wide, self.lora_B, self.scaling * groups / self.group),)

    def scaled(self, weight: float) -> AbstractUpdate:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)

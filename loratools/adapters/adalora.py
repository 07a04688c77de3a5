"""AdaLoRA: singular values that training prunes (Zhang et al. 2023, https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from loratools.adapters.low_rank import require_alpha
from loratools.adapters.updates import AbstractUpdate, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

_EPSILON: Final = 1e-5
_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLora(AbstractUpdate):
    """`ΔW = alpha / (ranknum + 1e-5) · B (A ∘ E)`, E broadcast over the rows of A (`peft/tuners/adalora/layer.py`).

    A convolution's factors are those of its (out, in·k·k) view. Pruning may leave a rank of 0, and ΔW = 0.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        lora_E: (r, 1), the singular values.
        alpha: the numerator of the scaling; positive, since PEFT reads any other as the rank.
        ranknum: the rank before pruning.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    lora_E: TensorRef
    alpha: float
    ranknum: int

    def __post_init__(self) -> None:
        rank = self.lora_E.shape[0] if self.lora_E.shape else None
        matrices = len(self.lora_A.shape) == len(self.lora_B.shape) == _MATRIX
        if not matrices or self.lora_E.shape != (rank, 1) or {self.lora_A.shape[0], self.lora_B.shape[1]} != {rank}:
            raise MismatchError(
                f"lora_A of shape {self.lora_A.shape}, lora_B of shape {self.lora_B.shape} and lora_E of shape "
                f"{self.lora_E.shape} do not form a product.",
                fix="They must share their rank: (r, in), (out, r) and (r, 1).",
                tensor=self.lora_A.name,
            )
        require_alpha(self.alpha, self.lora_A)
        if self.alpha <= 0 or self.ranknum < 1:
            raise MismatchError(
                f"alpha is {self.alpha:g} and init_r {self.ranknum}; both must be positive.", tensor=self.lora_A.name
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "adalora"

    @property
    def divisor(self) -> float:
        """See `AbstractUpdate.divisor`."""
        return self.ranknum + _EPSILON

    @property
    def scaling(self) -> float:
        """`alpha / (ranknum + 1e-5)`."""
        return self.alpha / self.divisor

    @property
    def rank(self) -> int:
        """What pruning left, r."""
        return self.lora_E.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """See `AbstractUpdate.shape`."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`; A ∘ E is computed when it is read."""

        def compute() -> torch.Tensor:
            from loratools.adapters.algebra import finite

            return finite(self.lora_A).double() * finite(self.lora_E).double()

        lora_A = computed(self.lora_A.name, self.lora_A.shape, (self.lora_A, self.lora_E), compute)
        return (Term(lora_A, self.lora_B, self.scaling),)

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.lora_A, self.lora_B, self.lora_E)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "lora_E"

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """See `AbstractUpdate.scaled`; lora_E takes a sign that alpha may not have."""
        from loratools.adapters.algebra import times

        if weight > 0:
            return dataclasses.replace(self, alpha=self.alpha * weight)
        if weight == 0:
            return dataclasses.replace(self, lora_E=times(self.lora_E, 0.0))
        return dataclasses.replace(self, alpha=self.alpha * -weight, lora_E=times(self.lora_E, -1.0))

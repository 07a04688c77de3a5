"""LoRA on a parameter that stacks the matrices of many experts: PEFT's `target_parameters`.

The path of such an update in its adapter is that of the parameter, `model.layers.0.mlp.experts.gate_up_proj`, since a
module has several of them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import TYPE_CHECKING

from loratools.adapters.low_rank import LowRank, require_alpha, require_product
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import InternalError, MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

_LAST = threading.local()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked(AbstractUpdate):
    """`ΔW_e = scaling · B_e A_e` for every expert e of one parameter.

    Attributes:
        lora_A: (experts · r, in), row `e · r + k` is the k-th of expert e.
        lora_B: (out, r · experts), column `k · experts + e` is the k-th of expert e.
        experts: how many.
        alpha: the numerator of the scaling.
        use_rslora: divide by √r rather than by r.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    experts: int
    alpha: float
    use_rslora: bool = False

    def __post_init__(self) -> None:
        require_product(self.lora_A, self.lora_B)
        require_alpha(self.alpha, self.lora_A)
        if self.experts < 1 or self.lora_A.shape[0] % self.experts:
            raise MismatchError(
                f"lora_A has {self.lora_A.shape[0]} rows, which {self.experts} experts cannot share evenly.",
                tensor=self.lora_A.name,
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "experts"

    @property
    def target(self) -> str:
        """See `AbstractUpdate.target`: the path is the parameter's own."""
        return ""

    @property
    def rank(self) -> int:
        """Of every expert."""
        return self.lora_A.shape[0] // self.experts

    @property
    def scaling(self) -> float:
        """See `LowRank.scaling`."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.lora_A, self.lora_B)

    @property
    def changes_weight(self) -> bool:
        """See `AbstractUpdate.changes_weight`."""
        return True

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def part(self, expert: int, rows: tuple[int, int] | None = None) -> LowRank:
        """One expert's update; `rows` of its output alone, where a checkpoint keeps gate and up apart."""
        if not 0 <= expert < self.experts:
            raise InternalError("There is no such expert.", expert=expert, experts=self.experts)
        first, last = rows or (0, self.matrix[0])

        def columns() -> torch.Tensor:
            return _kept(self.lora_B)[first:last, expert :: self.experts].double()

        lora_B = computed(f"{self.lora_B.name}[{expert}]", (last - first, self.rank), (self.lora_B,), columns)
        return LowRank(
            lora_A=self.lora_A.rows(expert * self.rank, (expert + 1) * self.rank),
            lora_B=lora_B,
            alpha=self.alpha,
            use_rslora=self.use_rslora,
            parameter="",
        )

    def scaled(self, weight: float) -> AbstractUpdate:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)


def _kept(ref: TensorRef) -> torch.Tensor:
    """A factor whose columns belong to all experts in turn: each thread keeps the last one that it read."""
    if getattr(_LAST, "ref", None) is not ref:
        _LAST.tensor, _LAST.ref = ref.load(), ref
    tensor: torch.Tensor = _LAST.tensor
    return tensor

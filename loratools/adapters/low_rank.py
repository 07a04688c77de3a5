"""Products of two factors: LoRA itself, `ΔW = scaling · B A`, and sums of such."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.adapters.updates import AbstractUpdate, Layer, Offset, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractProducts(AbstractUpdate):
    """`ΔW` is a sum of products `B A`.

    Attributes:
        of: `linear` (an HF Conv1D too), `embedding`, where in = vocabulary and out = width, or `conv`.
        parameter: the name of what is changed in the module.
        kernel: a convolution's kernel size (k, …), where in = channels · k · …; else empty.
        bias: (out,), added to the module's bias with the scaling of the product.
    """

    of: Layer = "linear"
    parameter: str = "weight"
    kernel: tuple[int, ...] = ()
    bias: TensorRef | None = None

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "low-rank" if self.of == "linear" else self.of

    @property
    def layer(self) -> Layer:
        """See `AbstractUpdate.layer`."""
        return self.of

    @property
    def target(self) -> str:
        """See `AbstractUpdate.target`."""
        return self.parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(AbstractProducts):
    """`ΔW = scaling · B A`, `scaling = alpha / r`, or `alpha / √r` with rsLoRA (https://arxiv.org/abs/2312.03732).

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        alpha: the numerator of the scaling.
        use_rslora: divide by √r rather than by r.
        bias: (out,), `lora_bias`: `b' = b + scaling · bias`.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    alpha: float
    use_rslora: bool = False

    def __post_init__(self) -> None:
        require_product(self.lora_A, self.lora_B)
        require_alpha(self.alpha, self.lora_A)
        out = self.lora_B.shape[0]
        if self.bias is not None and self.bias.shape != (out,):
            raise MismatchError(f"The bias has shape {self.bias.shape}, lora_B has {out} rows.", tensor=self.bias.name)

    @property
    def scaling(self) -> float:
        """`alpha / r`, or `alpha / √r` with rsLoRA; a float64 Python scalar as in PEFT."""
        return self.alpha / (math.sqrt(self.lora_A.shape[0]) if self.use_rslora else self.lora_A.shape[0])

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`."""
        return (Term(self.lora_A, self.lora_B, self.scaling),)

    @property
    def offsets(self) -> Mapping[str, Offset]:
        """See `AbstractUpdate.offsets`."""
        return {"bias": Offset(self.bias, self.scaling)} if self.bias is not None else {}

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(AbstractProducts):
    """`ΔW = Σ weight_i · ΔW_i`, exact: nothing is multiplied out until it is written.

    Attributes:
        parts: the products with their weights folded into the scale, as into the bias.
    """

    parts: tuple[Term, ...]

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`."""
        return self.parts

    @property
    def offsets(self) -> Mapping[str, Offset]:
        """See `AbstractUpdate.offsets`."""
        return {"bias": Offset(self.bias, 1.0)} if self.bias is not None else {}


def with_identity(whole: TensorRef, scale: float) -> Term:
    """`scale · whole` of any matrix as a product: the identity stands on its shorter side."""
    out, into = whole.shape
    size = min(out, into)

    def unit() -> torch.Tensor:
        import torch

        return torch.eye(size, dtype=torch.float64)

    identity = computed(f"{whole.name}: identity", (size, size), (whole,), unit)
    return Term(whole, identity, scale) if out <= into else Term(identity, whole, scale)


def require_product(lora_A: TensorRef, lora_B: TensorRef) -> None:
    """Refuse factors that do not form a product.

    Raises:
        MismatchError: they are no matrices, do not share their rank, or have rank 0.
    """
    if len(lora_A.shape) != 2 or len(lora_B.shape) != 2 or lora_A.shape[0] != lora_B.shape[1]:  # noqa: PLR2004
        raise MismatchError(
            f"lora_A of shape {lora_A.shape} and lora_B of shape {lora_B.shape} do not form a product B A.",
            fix="The two factors must share their rank: (r, in) and (out, r).",
            tensor=lora_A.name,
        )
    if lora_A.shape[0] == 0:
        raise MismatchError("An update of rank 0 holds nothing.", fix="Leave the module out.", tensor=lora_A.name)


def require_alpha(alpha: float, ref: TensorRef) -> None:
    """Refuse an alpha that is no finite number.

    Raises:
        MismatchError: it is NaN or infinite.
    """
    if not math.isfinite(alpha):
        raise MismatchError(f"alpha is {alpha}.", fix="It must be a finite number.", tensor=ref.name)

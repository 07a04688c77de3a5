"""The kinds of update a module can receive. Each class is its formula.

One convention, PEFT's (Hu et al. 2021, https://arxiv.org/abs/2106.09685): `h = W x + scaling · B (A x)`
with `A: (r, in)`, `B: (out, r)`, `W: (out, in)`, hence `ΔW = scaling · B A`. An embedding and a Hugging
Face `Conv1D` keep `W` transposed on disk; that is a fact about the base, not about the update.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

Layer = Literal["linear", "embedding"]


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """One product `scale · B A` of a low-rank update.

    Attributes:
        lora_A: (r, in), unread.
        lora_B: (out, r), unread.
        scale: the factor in front: weight × scaling.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        """The number of rank-one pieces, r."""
        return self.lora_A.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractUpdate(abc.ABC):
    """One module's change.

    Attributes:
        replaced: parameters given whole, by their name in the module (`bias`, `weight`, `A_log`).
        added_rows: rows appended to a stored parameter (vocabulary that the base does not have).
    """

    replaced: Mapping[str, TensorRef] = dataclasses.field(default_factory=dict)
    added_rows: Mapping[str, TensorRef] = dataclasses.field(default_factory=dict)

    @property
    @abc.abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The products whose sum is ΔW; empty where the weight is not changed by a low-rank product."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The name of the kind, as reports give it."""

    @property
    def layer(self) -> Layer:
        """What sort of layer the factors address; an embedding's keys differ in most formats."""
        return "linear"

    @property
    def rank(self) -> int:
        """The number of rank-one pieces in all terms (an upper bound on the rank of ΔW)."""
        return sum(term.rank for term in self.terms)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of ΔW, or None where there is no low-rank part."""
        if not self.terms:
            return None
        return self.terms[0].lora_B.shape[0], self.terms[0].lora_A.shape[1]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor that this update consists of."""
        factors = [ref for term in self.terms for ref in (term.lora_A, term.lora_B)]
        return (*factors, *self.replaced.values(), *self.added_rows.values())

    def delta_weight(self) -> torch.Tensor:
        """ΔW, materialised: float32, (out, in), `Σ scale · B A`.

        Raises:
            UnsupportedError: the weight is replaced whole, so that ΔW depends on the base.
        """
        if not self.terms:
            raise UnsupportedError("This update replaces parameters whole: its ΔW depends on the base.")
        total: torch.Tensor | None = None
        for term in self.terms:
            product = term.scale * (term.lora_B.load().double() @ term.lora_A.load().double())
            total = product if total is None else total + product
        assert total is not None
        return total.float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(AbstractUpdate):
    """`ΔW = scaling · B A`, `scaling = alpha / r`, or `alpha / √r` with rsLoRA (https://arxiv.org/abs/2312.03732).

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        alpha: the numerator of the scaling.
        use_rslora: divide by √r rather than by r.
        of: `linear` (an HF Conv1D too) or `embedding`, where in = vocabulary and out = width.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    alpha: float
    use_rslora: bool = False
    of: Layer = "linear"

    def __post_init__(self) -> None:
        a, b = self.lora_A, self.lora_B
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:  # noqa: PLR2004
            raise MismatchError(
                f"lora_A of shape {a.shape} and lora_B of shape {b.shape} do not form a product B A.",
                fix="The two factors must share their rank: (r, in) and (out, r).",
                tensor=a.name,
            )
        if a.shape[0] == 0:
            raise MismatchError("An update of rank 0 holds nothing.", fix="Leave the module out.", tensor=a.name)
        if not math.isfinite(self.alpha):
            raise MismatchError(f"alpha is {self.alpha}.", fix="It must be a finite number.", tensor=a.name)

    @property
    def scaling(self) -> float:
        """`alpha / r`, or `alpha / √r` with rsLoRA; a float64 Python scalar as in PEFT."""
        return self.alpha / (math.sqrt(self.lora_A.shape[0]) if self.use_rslora else self.lora_A.shape[0])

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`."""
        return (Term(self.lora_A, self.lora_B, self.scaling),)

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "embedding" if self.of == "embedding" else "low-rank"

    @property
    def layer(self) -> Layer:
        """See `AbstractUpdate.layer`."""
        return self.of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(AbstractUpdate):
    """`ΔW = Σ weight_i · ΔW_i`, exact: nothing is multiplied out until it is written.

    Attributes:
        parts: the products with their weights folded into the scale.
        of: see `LowRank.of`.
    """

    parts: tuple[Term, ...]
    of: Layer = "linear"

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`."""
        return self.parts

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "embedding" if self.of == "embedding" else "low-rank"

    @property
    def layer(self) -> Layer:
        """See `AbstractUpdate.layer`."""
        return self.of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(AbstractUpdate):
    """Parameters replaced whole (`replaced`) or lengthened (`added_rows`): `W' = given`.

    Attributes:
        shared: another module uses the same parameter (tied embeddings), so that it must be set in
            place rather than kept beside the old one.
    """

    shared: bool = False

    @property
    def terms(self) -> tuple[Term, ...]:
        """Always empty: there is no product."""
        return ()

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "full"

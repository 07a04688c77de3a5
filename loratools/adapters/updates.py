"""What every update of a module has in common, and the three kinds that all others are made of or sit beside.

PEFT's convention (Hu et al. 2021, https://arxiv.org/abs/2106.09685): `h = W x + scaling · B (A x)`, `A: (r, in)`,
`B: (out, r)`, `W: (out, in)`, hence `ΔW = scaling · B A`. That an embedding and an HF `Conv1D` keep `W` transposed
on disk is a fact about the base. A convolution's kernel (out, in, k, …) is seen as (out, in·k·…).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from loratools.adapters.actions import AbstractAction, Span, everything
from loratools.errors import InternalError, UnsupportedError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

Layer = Literal["linear", "embedding", "conv"]


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


@dataclasses.dataclass(frozen=True, slots=True)
class Offset:
    """`scale · vector`, added to a parameter of one axis; a bias, mostly.

    Attributes:
        vector: as long as the parameter.
        scale: the factor in front.
        multiplies: the parameter is multiplied by the vector instead, where the module has it: what is added is
            `scale · (vector − 1) ∘ parameter`.
    """

    vector: TensorRef
    scale: float
    multiplies: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class RowPatch:
    """Rows of a stored parameter given whole: `W[indices] = rows`; `rows: (len(indices), …)`."""

    indices: tuple[int, ...]
    rows: TensorRef


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractUpdate(abc.ABC):
    """One module's change.

    A kind says what it does to the weight in one of two ways: by `terms`, products that are summed exactly and that
    algebra works on, or by an `action`. A kind with neither leaves the weight alone.

    Attributes:
        span: the least of the weight that the action can be asked about.
        takes_shape: the tensors do not say how large ΔW is: it takes the shape of the weight that it meets.
        told_products: that shape is all that it lacks to be a sum of products.
        effort: how much more memory its factors take to prepare than those of a product.
        everywhere: its ΔW has the same bits with every version of torch, on every processor and device.
        replaced: parameters given whole, by their name in the module (`bias`, `weight`, `A_log`).
        added_rows: rows appended to a stored parameter (vocabulary that the base does not have).
        patches: rows of a stored parameter given whole.
    """

    span: ClassVar[Span] = "piece"
    takes_shape: ClassVar[bool] = False
    told_products: ClassVar[bool] = False
    effort: ClassVar[int] = 1
    everywhere: ClassVar[bool] = True

    replaced: Mapping[str, TensorRef] = dataclasses.field(default_factory=dict)
    added_rows: Mapping[str, TensorRef] = dataclasses.field(default_factory=dict)
    patches: Mapping[str, RowPatch] = dataclasses.field(default_factory=dict)

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The name of the kind, as reports give it."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """The products whose sum is ΔW; empty where ΔW is not such a sum."""
        return ()

    @property
    def products(self) -> tuple[Term, ...]:
        """The products whose sum is ΔW as algebra takes them; empty where ΔW has no such form.

        `terms`, or factors that are computed when they are read, of a rank that may be as high as ΔW's shape allows: a
        merge has a cheaper way then. No factor has more entries than ΔW.
        """
        return self.terms

    @property
    def layer(self) -> Layer:
        """What sort of layer the factors address; an embedding's keys differ in most formats."""
        return "linear"

    @property
    def target(self) -> str:
        """The parameter that is changed: `weight`, or what the module calls it (`in_proj_weight`).

        Empty where the path in the adapter is that of a parameter already (experts).
        """
        return "weight"

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size (k, …) of the convolution that the factors address, where they say it; else empty."""
        return ()

    @property
    def rank(self) -> int | None:
        """The number of rank-one pieces in all terms (an upper bound on the rank of ΔW), or the kind's own r."""
        return sum(term.rank for term in self.terms) or None

    @property
    def scaling(self) -> float | None:
        """The factor in front of ΔW, where there is one number."""
        scales = {term.scale for term in self.terms}
        return scales.pop() if len(scales) == 1 else None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of ΔW, or None where the weight is left alone or more than one matrix is changed."""
        if not self.terms:
            return None
        return self.terms[0].lora_B.shape[0], self.terms[0].lora_A.shape[1]

    @property
    def divisor(self) -> float | None:
        """What alpha is divided by to give the scaling; None for kinds without an alpha."""
        return None

    @property
    def linear_in(self) -> str | None:
        """The field of a tensor that ΔW is proportional to, which takes a factor that alpha cannot; None: no such."""
        return None

    def decomposed(self, **rule: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out, r), S (r,), Vh (r, in), float32, of the best approximation of ΔW, where there are `products`.

        Args:
            rule: as for `linalg.truncate_low_rank`.
        """
        from loratools.adapters.algebra import concatenated
        from loratools.linalg import truncate_low_rank

        U, S, Vh, _ = truncate_low_rank(*concatenated(self), **rule)
        return U, S, Vh

    def joined(self, held: Sequence[tuple[float, AbstractUpdate]]) -> AbstractUpdate | None:
        """`Σ weight · ΔW` of updates of this kind, this one first, as one of this kind; None where there is none."""
        del held
        return None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether ΔW can have this shape, (out, in)."""
        return shape == self.shape

    def of_shape(self, shape: tuple[int, int]) -> AbstractUpdate:
        """The same update, told the (out, in) of the weight that it is for; see `takes_shape`."""
        del shape
        return self

    @property
    def offsets(self) -> Mapping[str, Offset]:
        """What is added to parameters of one axis, by their name in the module."""
        return {}

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that ΔW and the offsets are made of."""
        products = [ref for term in self.terms for ref in (term.lora_A, term.lora_B)]
        return (*products, *(offset.vector for offset in self.offsets.values()))

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor that this update consists of."""
        patches = [patch.rows for patch in self.patches.values()]
        return (*self.factors, *self.replaced.values(), *self.added_rows.values(), *patches)

    @property
    def changes_weight(self) -> bool:
        """Whether `target` becomes another matrix by a formula (rather than by being given whole)."""
        return self.takes_shape or self.shape is not None

    @property
    def own_keys(self) -> bool:
        """Whether a format may have keys of its own for the kind, beside those of parameters given whole."""
        return self.changes_weight

    def check_weight(self, shape: tuple[int, ...]) -> None:  # noqa: B027  (most kinds see a weight as a matrix)
        """Refuse a stored weight of this shape, kernel and all, where the (out, in) view does not tell enough.

        Raises:
            UnsupportedError: names the reason.
        """

    def action(self) -> AbstractAction:
        """The change of a kind that is no sum of products; reads the factors.

        Raises:
            InternalError: the kind has none.
        """
        raise InternalError("This kind of update has no action.", kind=self.kind)

    @property
    def gives_whole(self) -> bool:
        """Whether parameters or rows are given whole beside ΔW: a multiple of those depends on the base."""
        return bool(self.replaced or self.added_rows or self.patches)

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """`weight · ΔW` with the same factors, where the kind can say that; None where it cannot.

        For an update that gives nothing whole; `algebra.summed` sees to that.
        """
        return self if weight == 1 else None

    def delta_weight(self, base: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW = W' − W, materialised: float32, (out, in); a convolution's as (out, in·k·…).

        Args:
            base: W, (out, in), for kinds whose change depends on it (DoRA, OFT, IA3, …) or takes its shape.

        Raises:
            UnsupportedError: the change or its shape depends on a base that is not given; or the weight is given
                whole.
        """
        import torch

        shape = self.shape
        if shape is None and self.takes_shape:
            if base is None:
                raise UnsupportedError(f"A {self.kind} update does not say how large ΔW is.", fix="Pass the weight.")
            shape = (base.shape[0], base.shape[1])
        if shape is None:
            raise UnsupportedError("This update replaces parameters whole: its ΔW depends on the base.")
        if self.terms:
            total = torch.zeros(shape, dtype=torch.float64)
            for term in self.terms:
                total += term.scale * (term.lora_B.load().double() @ term.lora_A.load().double())
            return total.float()
        if base is None and self.depends_on_base:
            raise UnsupportedError(f"The change of kind {self.kind} depends on the base.", fix="Pass the weight.")
        weight = torch.zeros(shape) if base is None else base
        action, region = self.action(), everything(shape)
        if action.looks:
            action.look(weight.double(), region)
        return action.change(weight.double(), region).float()

    @property
    def depends_on_base(self) -> bool:
        """Whether W' − W is another one for another W."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(AbstractUpdate):
    """Parameters replaced whole (`replaced`), lengthened (`added_rows`) or patched (`patches`): `W' = given`.

    Attributes:
        shared: another module uses the same parameter (tied embeddings), so that it must be set in
            place rather than kept beside the old one.
    """

    shared: bool = False

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "full" if self.replaced else "rows"

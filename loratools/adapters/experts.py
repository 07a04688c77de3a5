"""LoRA on a parameter that stacks the matrices of many experts: PEFT's `target_parameters`.

The path of such an update in its adapter is that of the parameter, `model.layers.0.mlp.experts.gate_up_proj`, since a
module has several of them. Formula and layouts after `ParamWrapper` in PEFT's `peft/tuners/lora/layer.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from loratools.adapters.low_rank import LowRank, require_alpha, require_product
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import InternalError, MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

Layout = Literal["0.17", "0.19.0", "0.19.1"]
"""The PEFT version from which on factors lie this way; see `Stacked.layout`."""

CURRENT: Final[Layout] = "0.19.1"
_KEPT: Final = 4
"""Factors that a thread keeps: gate-up and down of two adapters take turns where a file orders tensors by expert."""
_CACHE = threading.local()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked(AbstractUpdate):
    """`ΔW_e = scaling · B_e A_e` for every expert e of one parameter.

    Attributes:
        lora_A: (experts · r, in), row `e · r + k` is the k-th of expert e.
        lora_B: (out, r · experts), column `k · experts + e` is the k-th of expert e.
        experts: how many.
        alpha: the numerator of the scaling.
        use_rslora: divide by √r rather than by r.
        layout: which axes of the parameter (experts, second, third) the factors belong to. Until 0.18 PEFT took the
            second for `in` and the third for `out`; 0.19.0 did the opposite for modules with `is_transposed` (GPT-OSS);
            since 0.19.1 it does the opposite for all others. None: not known, and then only shapes can tell.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    experts: int
    alpha: float
    use_rslora: bool = False
    layout: Layout | None = CURRENT

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

    @property
    def kept_bytes(self) -> int:
        """What a thread keeps in memory while it goes through the experts one by one."""
        return _KEPT * self.lora_B.nbytes

    def part(self, expert: int, span: tuple[int, int] | None = None, *, columns: bool = False) -> LowRank:
        """One expert's update.

        Args:
            expert: which.
            span: these rows of (out, in) alone, where a checkpoint keeps gate and up apart.
            columns: the span is one of columns: of a matrix that is stored (in, out).
        """
        if not 0 <= expert < self.experts:
            raise InternalError("There is no such expert.", expert=expert, experts=self.experts)
        first, last = (0, self.matrix[0]) if span is None or columns else span
        lora_A = self.lora_A.rows(expert * self.rank, (expert + 1) * self.rank)

        def ups() -> torch.Tensor:
            return _kept(self)[first:last, expert :: self.experts].double()

        lora_B = computed(f"{self.lora_B.name}[{expert}]", (last - first, self.rank), (self.lora_B,), ups)
        if span is not None and columns:
            lora_A = _columns(lora_A, span)
        return LowRank(lora_A=lora_A, lora_B=lora_B, alpha=self.alpha, use_rslora=self.use_rslora, parameter="")

    def delta_weight(self, base: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW of all experts: float32, (experts, out, in)."""
        import torch

        del base
        return torch.stack([self.part(expert).delta_weight() for expert in range(self.experts)])

    def scaled(self, weight: float) -> AbstractUpdate:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)

    def joined(self, held: Sequence[tuple[float, AbstractUpdate]]) -> AbstractUpdate | None:
        """See `AbstractUpdate.joined`: every expert's ranks concatenate; scales that differ go into lora_B."""
        updates = [update for _, update in held if isinstance(update, Stacked)]
        alike = {(update.experts, update.matrix, update.layout) for update in updates}
        if len(updates) != len(held) or len(alike) > 1:
            return None
        if self.layout is None and self.matrix[0] == self.matrix[1]:  # then each could lie the other way round
            return None
        rank, (out, into) = sum(update.rank for update in updates), self.matrix
        scales = [weight * update.scaling for (weight, _), update in zip(held, updates, strict=True)]
        shared = scales[0] if len(set(scales)) == 1 and scales[0] else 1.0
        downs = _by_rank([update.lora_A for update in updates], (self.experts, -1, into), [1.0] * len(held))
        ups = _by_rank(
            [update.lora_B for update in updates], (out, -1, self.experts), [scale / shared for scale in scales]
        )
        return Stacked(
            lora_A=downs.reshaped((self.experts * rank, into)),
            lora_B=ups.reshaped((out, rank * self.experts)),
            experts=self.experts,
            alpha=shared * rank,
            layout=self.layout,
        )


def _columns(ref: TensorRef, span: tuple[int, int]) -> TensorRef:
    def compute() -> torch.Tensor:
        return ref.load()[:, slice(*span)].double()

    return computed(ref.name, (ref.shape[0], span[1] - span[0]), (ref,), compute)


def _by_rank(refs: Sequence[TensorRef], shape: tuple[int, int, int], scales: Sequence[float]) -> TensorRef:
    """`scale · factor` of several updates as three axes, of which that of the rank, the middle one, concatenates."""

    def compute() -> torch.Tensor:
        import torch

        from loratools.adapters.algebra import finite

        parts = [finite(ref).double().view(shape) * scale for ref, scale in zip(refs, scales, strict=True)]
        return torch.cat(parts, dim=1)

    rank = sum(ref.spec.numel for ref in refs) // (shape[0] * shape[2])
    return computed(refs[0].name, (shape[0], rank, shape[2]), tuple(refs), compute)


def _kept(update: Stacked) -> torch.Tensor:
    """`lora_B`, whose columns belong to all experts in turn: each thread keeps the last ones that it read.

    They go with the update that they belong to, so that no file stays open for them.
    """
    held: OrderedDict[int, tuple[weakref.ref[Stacked], torch.Tensor]] = _CACHE.__dict__.setdefault(
        "held", OrderedDict()
    )
    key = id(update)
    if key not in held or held[key][0]() is not update:
        while len(held) >= _KEPT:
            held.popitem(last=False)
        held[key] = weakref.ref(update, lambda _: held.pop(key, None)), update.lora_B.load()
    held.move_to_end(key)
    return held[key][1]

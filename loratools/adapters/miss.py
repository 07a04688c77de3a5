"""MiSS: one matrix shared by all shards of the input, and its variants (https://arxiv.org/abs/2409.15371)."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region, Span
from loratools.adapters.updates import AbstractUpdate, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractMiss(AbstractUpdate):
    """What the variants share: no scaling, and a ΔW that takes the weight's shape (`peft/tuners/miss/layer.py`)."""

    takes_shape: ClassVar[bool] = True

    miss_block: TensorRef

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """r, the width of a shard of the input."""

    @property
    def scaling(self) -> float:
        """See `AbstractUpdate.scaling`: there is no alpha."""
        return 1.0

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.miss_block,)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "miss_block"

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """See `AbstractUpdate.scaled`."""
        from loratools.adapters.algebra import times

        if weight == 1:
            return super().scaled(weight)
        fresh: dict[str, Any] = {"miss_block": times(self.miss_block, weight)}
        return dataclasses.replace(self, **fresh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Miss(AbstractMiss):
    """`ΔW[o, i] = miss_block[i mod r, o mod width]`; exactly of rank r: B = miss_blockᵀ, A[j, i] = (i mod r = j).

    Attributes:
        miss_block: (r, width); width = out, or less with `mini`, where it repeats along the output.
        mini: the variant; width divides out.
        size: (out, in), where it is known (see `of_shape`): the tensors do not say it, and `terms` need it.
    """

    told_products: ClassVar[bool] = True

    mini: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.miss_block.shape) != _MATRIX or not self.miss_block.spec.numel:
            raise MismatchError(
                f"miss_block has shape {self.miss_block.shape}, where (r, out) is expected.",
                fix="With init_weights 'bat' in the configuration it would be (out / r, r, r).",
                tensor=self.miss_block.name,
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "miss-mini" if self.mini else "miss"

    @property
    def rank(self) -> int:
        """See `AbstractMiss.rank`."""
        return self.miss_block.shape[0]

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`; None as long as it is not known."""
        return self.size

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        width = self.miss_block.shape[1]
        if len(shape) != _MATRIX or shape[1] < self.rank:
            return False
        return shape[0] % width == 0 if self.mini else shape[0] == width

    def of_shape(self, shape: tuple[int, int]) -> AbstractUpdate:
        """See `AbstractUpdate.of_shape`."""
        if not self.fits(shape):
            raise MismatchError(
                f"miss_block of shape {self.miss_block.shape} does not fit a weight of shape {shape}.",
                tensor=self.miss_block.name,
            )
        return dataclasses.replace(self, size=shape)

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`; none as long as the shape is not known."""
        if self.size is None:
            return ()
        (out, columns), (rank, width) = self.size, self.miss_block.shape

        def shards() -> torch.Tensor:
            import torch

            return torch.eye(rank, dtype=torch.float64).repeat(1, -(-columns // rank))[:, :columns].contiguous()

        def rows() -> torch.Tensor:
            return _block(self.miss_block).T.repeat(out // width, 1).contiguous()

        lora_A = computed(f"{self.miss_block.name}.shards", (rank, columns), (self.miss_block,), shards)
        return (Term(lora_A, computed(self.miss_block.name, (out, rank), (self.miss_block,), rows), 1.0),)

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        return _Repeating(_block(self.miss_block))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissBat(AbstractMiss):
    """The variant `bat`: `ΔW_ij = W_ij B_i + B_i` for every (r, r) block W_ij of the weight, B_i = miss_block[i].

    Attributes:
        miss_block: (out / r, r, r).
    """

    span: ClassVar[Span] = "rows"

    def __post_init__(self) -> None:
        shape = self.miss_block.shape
        if len(shape) != _MATRIX + 1 or shape[1] != shape[2] or not self.miss_block.spec.numel:
            raise MismatchError(
                f"miss_block has shape {shape}, where (out / r, r, r) is expected.", tensor=self.miss_block.name
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "miss-bat"

    @property
    def rank(self) -> int:
        """See `AbstractMiss.rank`."""
        return self.miss_block.shape[2]

    @property
    def depends_on_base(self) -> bool:
        """See `AbstractUpdate.depends_on_base`."""
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        blocks, rank, _ = self.miss_block.shape
        return len(shape) == _MATRIX and shape[0] == blocks * rank and shape[1] % rank == 0

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        return _Blocks(_block(self.miss_block))


class _Repeating(AbstractFixedAction):
    """The block, repeated along both axes."""

    def __init__(self, block: torch.Tensor) -> None:
        self._block = block

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        import torch

        rank, width = self._block.shape
        rows = torch.arange(region.rows.start, region.rows.stop) % width
        columns = torch.arange(region.columns.start, region.columns.stop) % rank
        return self._block.T[rows][:, columns]


class _Blocks(AbstractAction):
    """Blocks of the weight times their matrix; exact products, so that tiles do not matter."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`."""
        import torch

        from loratools.linalg import low_rank_delta

        rank = self._blocks.shape[1]
        change = torch.empty_like(base)
        first, last = region.rows.start, region.rows.stop
        for index in range(first // rank, -(-last // rank)):
            start, stop = max(index * rank, first), min((index + 1) * rank, last)
            block = self._blocks[index].to(base.device)
            shards = base[start - first : stop - first].reshape(-1, rank)
            product = low_rank_delta(block, shards, 1.0, dtype=torch.float64).view(stop - start, -1, rank)
            product += block[start - index * rank : stop - index * rank, None, :]
            change[start - first : stop - first] = product.view(stop - start, -1)
        return change


def _block(ref: TensorRef) -> torch.Tensor:
    from loratools.adapters.algebra import finite

    return finite(ref).double()

"""IA3: outputs or inputs are scaled (Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, Region
from loratools.adapters.updates import AbstractUpdate, Offset
from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(AbstractUpdate):
    """`W'[o, i] = l[o] · W[o, i]`, `b' = l · b`; of a feedforward module `W'[o, i] = l[i] · W[o, i]`, and b as it is.

    Formulas after `peft/tuners/ia3/layer.py`; of a convolution, i is the channel.

    Attributes:
        ia3_l: (out, 1), feedforward (1, in); of a convolution (1, out, 1, …) or (1, in, 1, …).
        feedforward: it scales the input.
    """

    takes_shape: ClassVar[bool] = True

    ia3_l: TensorRef
    feedforward: bool = False

    def __post_init__(self) -> None:
        shape = self.ia3_l.shape
        axis = 1 if self.feedforward or len(shape) > _MATRIX else 0
        if len(shape) < _MATRIX or shape[axis] != math.prod(shape) or not math.prod(shape):
            expected = "(1, in)" if self.feedforward else "(out, 1)"
            raise MismatchError(
                f"ia3_l has shape {shape}, where {expected} is expected; of a convolution (1, channels, 1, …).",
                tensor=self.ia3_l.name,
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "ia3-feedforward" if self.feedforward else "ia3"

    @property
    def vector(self) -> TensorRef:
        """L, (out,) or (in,)."""
        return self.ia3_l.reshaped((self.ia3_l.spec.numel,))

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.ia3_l,)

    @property
    def offsets(self) -> Mapping[str, Offset]:
        """See `AbstractUpdate.offsets`."""
        return {} if self.feedforward else {"bias": Offset(self.vector, 1.0, multiplies=True)}

    @property
    def depends_on_base(self) -> bool:
        """See `AbstractUpdate.depends_on_base`."""
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        size = self.ia3_l.spec.numel
        if len(shape) != _MATRIX:
            return False
        if self.feedforward and len(self.ia3_l.shape) > _MATRIX:
            return shape[1] % size == 0
        return shape[1 if self.feedforward else 0] == size

    def check_weight(self, shape: tuple[int, ...]) -> None:
        """See `AbstractUpdate.check_weight`.

        Raises:
            UnsupportedError: it is a convolution of groups whose input is scaled.
        """
        stored = self.ia3_l.shape
        if len(shape) != len(stored) or (len(shape) > _MATRIX and self.feedforward and shape[1] != stored[1]):
            raise UnsupportedError(
                f"ia3_l of shape {stored} does not go with a weight of shape {shape}: it is another layer's, or a "
                "convolution's of several groups, whose scaled inputs are not merged yet.",
                tensor=self.ia3_l.name,
            )

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite

        return _Scaling(finite(self.vector).double(), inputs=self.feedforward, kernel=len(self.ia3_l.shape) > _MATRIX)


class _Scaling(AbstractAction):
    """Rows or columns times a number each."""

    def __init__(self, vector: torch.Tensor, *, inputs: bool, kernel: bool) -> None:
        self._vector, self._inputs, self._kernel = vector, inputs, kernel

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`; the rows of a kernel are always whole."""
        if not self._inputs:
            factor = self._vector[region.rows][:, None]
        elif self._kernel:
            factor = self._vector.repeat_interleave(base.shape[1] // len(self._vector))[None]
        else:
            factor = self._vector[region.columns][None]
        return (base * factor.to(base.device)).sub_(base)

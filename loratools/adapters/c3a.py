"""C3A: blocks that are circulant (Chen et al. 2024, https://arxiv.org/abs/2407.19342)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_DIMENSIONS: Final = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3a(AbstractUpdate):
    """`ΔW[i b + p, j b + q] = kernel[i, j, (q − p) mod b] / in` (`peft/tuners/c3a/layer.py` and `utils.py`).

    PEFT computes the circulant blocks by FFT; each of their entries is one of the kernel's.

    Attributes:
        c3a_kernel: (out / b, in / b, b).
    """

    c3a_kernel: TensorRef

    def __post_init__(self) -> None:
        if len(self.c3a_kernel.shape) != _DIMENSIONS or not self.c3a_kernel.spec.numel:
            raise MismatchError(
                f"c3a_kernel has shape {self.c3a_kernel.shape}, where (out / b, in / b, b) is expected.",
                tensor=self.c3a_kernel.name,
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "c3a"

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`."""
        down, across, size = self.c3a_kernel.shape
        return down * size, across * size

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.c3a_kernel,)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "c3a_kernel"

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite

        return _Circulant(finite(self.c3a_kernel).double())


class _Circulant(AbstractFixedAction):
    """Entries of the kernel, each where it belongs."""

    def __init__(self, kernel: torch.Tensor) -> None:
        self._kernel = kernel / (kernel.shape[1] * kernel.shape[2])

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        import torch

        size = self._kernel.shape[2]
        rows = torch.arange(region.rows.start, region.rows.stop)[:, None]
        columns = torch.arange(region.columns.start, region.columns.stop)[None]
        return self._kernel[rows // size, columns // size, (columns - rows) % size]

"""FourierFT: a few entries of ΔW's spectrum (Gao et al. 2024, https://arxiv.org/abs/2405.03003)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region, Span
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFt(AbstractUpdate):
    """`ΔW = scaling · Re(ifft2(C))`, C zero but for the spectrum's entries (`peft/tuners/fourierft/layer.py`).

    Where these entries are, the file does not say: they are the first n of a random permutation of out · in, drawn on
    the CPU from the seed, counted row by row.

    Attributes:
        spectrum: (n,).
        seed: of the permutation.
        factor: the scaling.
        size: (out, in), where it is known (see `of_shape`).
    """

    takes_shape: ClassVar[bool] = True
    span: ClassVar[Span] = "whole"
    everywhere: ClassVar[bool] = False

    spectrum: TensorRef
    seed: int
    factor: float
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.spectrum.shape) != 1 or not self.spectrum.spec.numel:
            raise MismatchError(
                f"The spectrum has shape {self.spectrum.shape}, where (n,) is expected.", tensor=self.spectrum.name
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "fourierft"

    @property
    def scaling(self) -> float:
        """See `AbstractUpdate.scaling`."""
        return self.factor

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.spectrum,)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        return len(shape) == _MATRIX and shape[0] * shape[1] >= self.spectrum.shape[0]

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`; None as long as it is not known."""
        return self.size

    def of_shape(self, shape: tuple[int, int]) -> AbstractUpdate:
        """See `AbstractUpdate.of_shape`."""
        if not self.fits(shape):
            raise MismatchError(
                f"A spectrum of {self.spectrum.shape[0]} entries does not fit a weight of shape {shape}.",
                tensor=self.spectrum.name,
            )
        return dataclasses.replace(self, size=shape)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "spectrum"

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite

        return _Waves(finite(self.spectrum).double(), self.seed, self.factor)


class _Waves(AbstractFixedAction):
    """The sum of the waves, over the whole weight at once."""

    def __init__(self, spectrum: torch.Tensor, seed: int, factor: float) -> None:
        self._spectrum, self._seed, self._factor = spectrum, seed, factor

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`.

        A cosine is even, so that the real part of the inverse transform of a real C is that of the transform, and half
        of it is enough: `ΔW[p, q] = ΔW[−p, −q]`.
        """
        import torch

        rows, columns = region.rows.stop, region.columns.stop
        generator = torch.Generator(device="cpu").manual_seed(self._seed)
        places = torch.randperm(rows * columns, generator=generator, device="cpu")[: len(self._spectrum)].clone()
        dense = torch.zeros(rows * columns, dtype=torch.float64)
        dense[places] = self._spectrum * (self._factor / (rows * columns))
        half = torch.fft.rfft2(dense.view(rows, columns)).real
        result = dense.view(rows, columns)
        kept = half.shape[1]
        result[:, :kept] = half
        mirrored = result[:, 1 : columns - kept + 1].flip(1)
        result[0, kept:] = mirrored[0]
        result[1:, kept:] = mirrored[1:].flip(0)
        return result

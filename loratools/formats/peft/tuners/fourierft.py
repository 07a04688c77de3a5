"""FourierFT: Linear and HF Conv1D.

Fields after `FourierFTConfig` of PEFT 0.21, keys after `peft/tuners/fourierft/layer.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.fourierft import FourierFt
from loratools.errors import MalformedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_SPECTRUM: Final = "fourierft_spectrum"
_SEED: Final = 777
_SEEDS: Final = range(-(1 << 63), 1 << 64)
"""What torch seeds a generator with."""
_SCALING: Final = 150.0


class FourierFtTuner(AbstractTuner):
    """`ΔW = scaling · Re(ifft2(C))`; where C is not zero follows from the seed."""

    peft_type = "FOURIERFT"
    roles = (_SPECTRUM,)
    own_biases = "fourier_only"

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return FourierFt(
            spectrum=module[_SPECTRUM],
            seed=_seed(module.config),
            factor=float(fields.number(module.config, "scaling", _SCALING)),
            **module.rest,
        )

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, FourierFt)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, FourierFt)
        return {_SPECTRUM: update.spectrum}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, FourierFt)}
        counts = {path: update.spectrum.shape[0] for path, update in held.items()}
        return {
            **fields.target_fields(list(updates), siblings),
            **fields.named_pattern("n_frequency", "n_frequency_pattern", counts),
            "random_loc_seed": fields.one_for_all(
                "random_loc_seed", {path: update.seed for path, update in held.items()}
            ),
            "scaling": fields.one_for_all("scaling", {path: update.factor for path, update in held.items()}),
        }


def _seed(config: Mapping[str, Any]) -> int:
    seed = fields.integer(config, "random_loc_seed", _SEED)
    if seed not in _SEEDS:
        raise MalformedError(
            "This field must be a number of 64 bits.", file=fields.CONFIG_FILE, field="random_loc_seed", value=seed
        )
    return seed

"""LN tuning: norms and other modules of a weight and a bias, given whole.

Keys after `peft/tuners/ln_tuning/layer.py` of PEFT 0.21 (https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.ln_tuning import LnTuning
from loratools.errors import MalformedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_LAYER: Final = "ln_tuning_layers."


class LnTuningTuner(AbstractTuner):
    """`W' = given`."""

    peft_type = "LN_TUNING"
    roles = (f"{_LAYER}weight", f"{_LAYER}bias")
    holds_biases = False
    tells_orientation = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        given = {role.removeprefix(_LAYER): ref for role, ref in module.roles.items()}
        if module.rest["replaced"]:
            raise MalformedError("The module is given twice, tuned and whole.", module=module.path)
        return LnTuning(**{**module.rest, "replaced": MappingProxyType(given)})

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, LnTuning)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        return {f"{_LAYER}{parameter}": ref for parameter, ref in update.replaced.items()}

    def beside(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.beside`."""
        return {} if isinstance(update, LnTuning) else super().beside(update)

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        return fields.target_fields(list(updates), siblings)

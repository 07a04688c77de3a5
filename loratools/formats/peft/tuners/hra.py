"""HRA: Linear and Conv2d.

Fields after `HRAConfig` of PEFT 0.21, keys after `peft/tuners/hra/layer.py` (https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loratools.adapters import AbstractUpdate
from loratools.adapters.hra import Hra
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef


class HraTuner(AbstractTuner):
    """`W' = W H_1 ⋯ H_r`, Householder reflections."""

    peft_type = "HRA"
    roles = ("hra_u",)
    own_biases = "hra_only"
    tells_orientation = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return Hra(hra_u=module["hra_u"], gram_schmidt=fields.flag(module.config, "apply_GS"), **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, Hra)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, Hra)
        return {"hra_u": update.hra_u}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, Hra)}
        return {
            **fields.target_fields(list(updates), siblings),
            "r": fields.one_for_all("r", {path: update.rank for path, update in held.items()}),
            "apply_GS": fields.one_for_all("apply_GS", {path: update.gram_schmidt for path, update in held.items()}),
        }

"""SHiRA: Linear.

Fields after `ShiraConfig` of PEFT 0.21, keys after `peft/tuners/shira/layer.py` (https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.shira import Shira
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_RANK: Final = 32


class ShiraTuner(AbstractTuner):
    """`ΔW[i, j] = weight`, at places that the file lists."""

    peft_type = "SHIRA"
    roles = ("shira_weight", "shira_indices")
    holds_biases = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return Shira(
            shira_weight=module["shira_weight"],
            shira_indices=module["shira_indices"],
            r=fields.integer(module.config, "r", _RANK),
            **module.rest,
        )

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, Shira)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, Shira)
        return {"shira_weight": update.shira_weight, "shira_indices": update.shira_indices}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, Shira)}
        return {
            **fields.target_fields(list(updates), siblings),
            "r": fields.one_for_all("r", {path: update.r for path, update in held.items()}),
        }

"""BOFT: Linear and Conv2d.

Fields after `BOFTConfig` of PEFT 0.21, keys after `peft/tuners/boft/layer.py` (https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loratools.adapters import AbstractUpdate
from loratools.adapters.boft import Boft
from loratools.errors import UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef


class BoftTuner(AbstractTuner):
    """`W' = diag(s) · W Rᵀ`, R a product of rotations in butterfly order."""

    peft_type = "BOFT"
    roles = ("boft_R", "boft_s")
    own_biases = "boft_only"

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        update = Boft(boft_R=module["boft_R"], boft_s=module["boft_s"], **module.rest)
        said = fields.integer(module.config, "boft_n_butterfly_factor", 1)
        if said != update.boft_R.shape[0]:
            module.notes.append(
                f"{fields.CONFIG_FILE} says {said} butterfly factors; the tensors have {update.boft_R.shape[0]}, which "
                "is what counts (PEFT trains with one where it cannot compile its CUDA extension)."
            )
        return update

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, Boft)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, Boft)
        return {"boft_R": update.boft_R, "boft_s": update.boft_s}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, Boft)}
        counts = {update.boft_R.shape[1] for update in held.values()}
        sizes = {update.boft_R.shape[2] for update in held.values()}
        if len(sizes) > 1 and len(counts) > 1:
            raise UnsupportedError(
                "PEFT's format cannot hold: BOFT blocks that share neither their size nor their number in one adapter.",
                fix="Write them as adapters of their own (--include, --exclude).",
            )
        return {
            **fields.target_fields(list(updates), siblings),
            "boft_block_size": sizes.pop() if len(sizes) == 1 else 0,
            "boft_block_num": 0 if not sizes else counts.pop(),
            "boft_n_butterfly_factor": fields.one_for_all(
                "boft_n_butterfly_factor", {path: update.boft_R.shape[0] for path, update in held.items()}
            ),
        }

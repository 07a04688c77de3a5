"""C3A: Linear.

Fields after `C3AConfig` of PEFT 0.21, keys after `peft/tuners/c3a/layer.py` (https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.c3a import C3a
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_KERNEL: Final = "c3a_kernel"


class C3aTuner(AbstractTuner):
    """Circulant blocks."""

    peft_type = "C3A"
    roles = (_KERNEL,)
    own_biases = "c3a_only"
    tells_orientation = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return C3a(c3a_kernel=module[_KERNEL], **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, C3a)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, C3a)
        return {_KERNEL: update.c3a_kernel}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        sizes = {path: update.c3a_kernel.shape[2] for path, update in updates.items() if isinstance(update, C3a)}
        return {
            **fields.target_fields(list(updates), siblings),
            **fields.named_pattern("block_size", "block_size_pattern", sizes),
        }

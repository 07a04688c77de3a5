"""LoKr: Linear, Conv1d, Conv2d.

Fields after `LoKrConfig` of PEFT 0.21, keys and formula after `peft/tuners/lokr/layer.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.lokr import LoKr
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.formats.peft.tuners.loha import compare_rank, scaled_fields
from loratools.tensors import TensorRef

_CORE: Final = "lokr_t2"


class LoKrTuner(AbstractTuner):
    """`ΔW = alpha / r · w1 ⊗ w2`."""

    peft_type = "LOKR"
    roles = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", _CORE)
    holds_biases = False
    tells_orientation = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        tensors: dict[str, Any] = {}
        for name in ("lokr_w1", "lokr_w2"):
            whole = name in module.roles or f"{name}_a" not in module.roles
            wanted = {name} if whole else {f"{name}_a", f"{name}_b"}
            wanted |= {role for role in module.roles if role.startswith(f"{name}_")}
            tensors |= {role: module[role] for role in wanted}
        if _CORE in module.roles:
            tensors[_CORE] = module[_CORE]
        claimed = fields.rank_of(module.config, module.path)
        downs = [tensors[role] for role in ("lokr_w1_b", "lokr_w2_b") if role in tensors]
        rank = next((down.shape[0] for down in downs if down.shape), claimed)
        compare_rank(module, rank)
        return LoKr(
            **tensors,
            alpha=fields.alpha_of(module.config, module.path, "alpha"),
            r=rank,
            decompose_factor=fields.integer(module.config, "decompose_factor", -1),
            **module.rest,
        )

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, LoKr)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        held = {role: getattr(update, role) for role in self.roles}
        return {role: ref for role, ref in held.items() if ref is not None}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, LoKr)}
        factors = {path: update.decompose_factor for path, update in held.items()}
        return {
            **scaled_fields({path: (update.r, update.alpha) for path, update in held.items()}, siblings),
            "decompose_factor": fields.one_for_all("decompose_factor", factors),
            "decompose_both": any(update.lokr_w1 is None for update in held.values()),
            "use_effective_conv2d": any(update.lokr_t2 is not None for update in held.values()),
        }

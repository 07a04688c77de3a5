"""LoHa: Linear, Conv1d, Conv2d.

Fields after `LoHaConfig` of PEFT 0.21, keys and formula after `peft/tuners/loha/layer.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.loha import LoHa
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_FACTORS: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES: Final = ("hada_t1", "hada_t2")


class LoHaTuner(AbstractTuner):
    """`ΔW = alpha / r · (w1_a w1_b) ∘ (w2_a w2_b)`."""

    peft_type = "LOHA"
    roles = (*_FACTORS, *_CORES)
    holds_biases = False
    tells_orientation = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        tensors: dict[str, Any] = {role: module[role] for role in _FACTORS}
        if module.roles.keys() & set(_CORES):
            tensors |= {role: module[role] for role in _CORES}
        update = LoHa(**tensors, alpha=fields.alpha_of(module.config, module.path, "alpha"), **module.rest)
        compare_rank(module, update.rank)
        return update

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, LoHa)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        held = {role: getattr(update, role) for role in self.roles}
        return {role: ref for role, ref in held.items() if ref is not None}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, LoHa)}
        return {
            **scaled_fields({path: (update.rank, update.alpha) for path, update in held.items()}, siblings),
            "use_effective_conv2d": any(update.hada_t1 is not None for update in held.values()),
        }


def scaled_fields(modules: Mapping[str, tuple[int, float]], siblings: Collection[str]) -> dict[str, Any]:
    """Targets, ranks and alphas, as LyCORIS' kinds say them in PEFT.

    Args:
        modules: (r, alpha) by module path.
        siblings: see `AbstractTuner.fields`.
    """
    ranks, alphas = ({path: float(each[index]) for path, each in modules.items()} for index in (0, 1))
    return {
        **fields.target_fields(list(modules), siblings),
        **fields.pattern_fields("r", "rank_pattern", ranks, fields.DEFAULT_RANK),
        **fields.pattern_fields("alpha", "alpha_pattern", alphas, fields.DEFAULT_ALPHA),
    }


def compare_rank(module: Module, found: int) -> None:
    """Note where the configuration says another rank than the tensors."""
    claimed = fields.rank_of(module.config, module.path)
    if claimed != found:
        module.notes.append(
            f"{module.path}: the configuration says rank {claimed}, the tensors have rank {found}, "
            "which is what counts."
        )

"""AdaLoRA: Linear, HF Conv1D, Conv2d; pruned or not.

Fields after `AdaLoraConfig` of PEFT 0.21, keys and formula after `peft/tuners/adalora/layer.py`
(https://github.com/huggingface/peft). `r`, `alpha_pattern` and `use_rslora` are in its configuration and mean nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.adalora import AdaLora
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_DEFAULT_RANK: Final = 12
_MAX_PATTERN: Final = 1 << 22  # true and false, of which a configuration that is read can have as many
_ROLES: Final = ("lora_A", "lora_B", "lora_E")
_REFUSED_WHEN_SET: Final[Mapping[str, str]] = {
    "layer_replication": "layer replication",
    "target_parameters": "target_parameters (fused experts)",
    "trainable_token_indices": "trainable tokens",
}


class AdaLoraTuner(AbstractTuner):
    """`ΔW = lora_alpha / (init_r + 1e-5) · B (A ∘ E)`, with what pruning left of the rank."""

    peft_type = "ADALORA"
    roles = _ROLES
    defaults: Mapping[str, Any] = MappingProxyType({"total_step": 1})

    def refuse(self, config: Mapping[str, Any]) -> None:
        """See `AbstractTuner.refuse`."""
        fields.refuse_set(config, _REFUSED_WHEN_SET)

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        lora_A, lora_B, lora_E = (module[role] for role in _ROLES)
        initial = fields.integer(module.config, "init_r", _DEFAULT_RANK)
        alpha = fields.number(module.config, "lora_alpha", fields.DEFAULT_ALPHA)
        rank = lora_E.shape[0] if lora_E.shape else 0
        claimed = _kept(module, initial)
        if rank != claimed:
            module.notes.append(
                f"{module.path}: the configuration says rank {claimed}, the tensors have rank {rank}, "
                "which is what counts."
            )
        if alpha <= 0:
            module.notes.append(f"lora_alpha is {alpha:g}, which PEFT's AdaLoRA reads as the rank of each module.")
        return AdaLora(
            lora_A=lora_A,
            lora_B=lora_B,
            lora_E=lora_E,
            alpha=alpha if alpha > 0 else float(max(rank, 1)),
            ranknum=initial,
            **module.rest,
        )

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, AdaLora)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, AdaLora)
        return {role: getattr(update, role) for role in _ROLES}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`.

        Which of the initial components were kept is not in the tensors, and PEFT only counts them.
        """
        held = {path: update for path, update in updates.items() if isinstance(update, AdaLora)}
        initial = fields.one_for_all("init_r", {path: update.ranknum for path, update in held.items()})
        return {
            **fields.target_fields(list(updates), siblings),
            "init_r": initial,
            "lora_alpha": fields.tidy(
                fields.one_for_all("lora_alpha", {path: update.alpha for path, update in held.items()})
            ),
            "rank_pattern": _pattern(held, initial),
        }


def _pattern(held: Mapping[str, AdaLora], initial: int) -> dict[str, list[bool]] | None:
    """What pruning kept, module by module; None where it took nothing.

    Raises:
        UnsupportedError: it would be too long to be read again.
    """
    if all(update.rank == initial for update in held.values()):
        return None
    if initial * len(held) > _MAX_PATTERN:
        raise UnsupportedError(
            f"PEFT's format cannot hold: a rank_pattern of {len(held)} modules with {initial} components each.",
            fix="Is init_r right?",
        )
    return {f"{path}.lora_E": [index < update.rank for index in range(initial)] for path, update in held.items()}


def _kept(module: Module, initial: int) -> int:
    """How many of a module's components pruning kept, by the configuration: `{module.lora_E: [true, false, …]}`."""
    pattern = module.config.get("rank_pattern")
    if not pattern:
        return initial
    mask = pattern.get(f"{module.path}.lora_E") if isinstance(pattern, Mapping) else None
    if not isinstance(mask, list) or not all(isinstance(each, bool) for each in mask):
        raise MalformedError(
            "AdaLoRA's rank_pattern must give every module a list of true and false.",
            file=fields.CONFIG_FILE,
            field="rank_pattern",
            module=module.path,
        )
    return sum(mask)

"""LoRA and what PEFT's LoRA layers add to it: rsLoRA, DoRA, lora_bias, QALoRA, BD-LoRA, trained tokens.

Fields after `LoraConfig` of PEFT 0.21, keys and formulas after `peft/tuners/lora/layer.py`, `dora.py` and `variants.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Full, LowRank
from loratools.adapters.block_diagonal import BlockDiagonal
from loratools.adapters.dora import Dora
from loratools.adapters.experts import Stacked
from loratools.adapters.grouped import Grouped
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft import keys, limits
from loratools.formats.peft.tuners import lora_forms, lora_parameters, lora_settings, multihead, tokens
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_MAGNITUDES: Final = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
"""As PEFT saves it, and as versions before 0.12 did."""


@dataclasses.dataclass(frozen=True)
class LoraTuner(AbstractTuner):
    """`ΔW = scaling · B A`, and what PEFT's LoRA layers add to it.

    Attributes:
        shapes: of the base's parameters, where they are known.
    """

    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    peft_type = "LORA"
    defaults = MappingProxyType({"lora_dropout": 0.0})
    restated = lora_settings.RESTATED
    roles = (
        lora_forms.A,
        lora_forms.B,
        lora_forms.EMBEDDING_A,
        lora_forms.EMBEDDING_B,
        lora_forms.BIAS,
        *_MAGNITUDES,
        tokens.LORA_ROLE,
    )

    def refuse(self, config: Mapping[str, Any]) -> None:
        """See `AbstractTuner.refuse`."""
        limits.require_ranks(config)
        lora_settings.refuse(config)

    def knowing(self, shapes: Mapping[str, tuple[int, ...]]) -> AbstractTuner:
        """See `AbstractTuner.knowing`."""
        return LoraTuner(shapes)

    def prepared(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `AbstractTuner.prepared`."""
        config = tokens.prepared(config, tokens.LORA_FIELD)
        setting = config.get("use_bdlora")
        return {**config, "use_bdlora": lora_forms.Blocks(setting)} if isinstance(setting, Mapping) else config

    def paths(self, modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any]) -> Mapping[str, str]:
        """See `AbstractTuner.paths`."""
        parameters = lora_parameters.paths_of(modules, config, self.shapes)
        found = {path: parameters.get(path) or multihead.path_of(path, modules) for path in modules}
        nested = next((path for path in found.values() if ".base_layer." in f"{path}."), None)
        if nested is not None:
            fix = "Its target_parameters should name what the inner ones are for."
            raise UnsupportedError("This adapter uses nested wrappers that are not known.", fix=fix, module=nested)
        return found

    def pattern_name(self, key_path: str, path: str) -> str:
        """See `AbstractTuner.pattern_name`."""
        return path if lora_parameters.is_parameter(key_path, path) else multihead.pattern_name(key_path)

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        if tokens.LORA_ROLE in module.roles:
            return tokens.update(module, tokens.LORA_ROLE, module.config.get(tokens.LORA_FIELD))
        if module.config.get("lora_alpha") is None:
            module.notes.append(
                f"{fields.CONFIG_FILE} has no lora_alpha; PEFT's default of {fields.DEFAULT_ALPHA} is taken."
            )
        if multihead.is_doubled(module.path, module.name):
            module.notes.append(multihead.DOUBLED)
        if lora_parameters.is_parameter(module.key_path, module.path):
            return dataclasses.replace(lora_parameters.update(module), **module.rest)
        multihead.refuse_bias(module)
        update = _form(module)
        lora_settings.compare_rank(lora_forms.rank_of(update), module)
        magnitude = next((module.roles[role] for role in _MAGNITUDES if role in module.roles), None)
        if magnitude is None:
            if fields.flag(module.config, "use_dora"):
                fix = "The file is incomplete."
                raise MalformedError("A DoRA update has no magnitude.", fix=fix, module=module.path)
            return dataclasses.replace(update, **module.rest)
        if not isinstance(update, LowRank):
            raise UnsupportedError(f"DoRA of an update of kind {update.kind} is not read.", module=module.path)
        return Dora(low_rank=update, magnitude=magnitude.reshaped((magnitude.spec.numel,)), **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, (LowRank, Dora, Grouped, BlockDiagonal, Stacked)) or tokens.are_all_of(update)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        if tokens.are_all_of(update):
            return {tokens.LORA_ROLE: update.patches["weight"].rows}
        if isinstance(update, (Grouped, BlockDiagonal, Stacked)):
            return {lora_forms.A: update.lora_A, lora_forms.B: update.lora_B}
        if not isinstance(update, Dora):
            assert isinstance(update, LowRank)
            return lora_forms.low_rank_tensors(update)
        low_rank = update.low_rank
        shape = update.magnitude.shape
        if low_rank.of == "conv":
            shape = (1, *shape, *(1 for _ in low_rank.kernel))
        return {**lora_forms.low_rank_tensors(low_rank), _MAGNITUDES[0]: update.magnitude.reshaped(shape)}

    def key_paths(self, updates: Mapping[str, AbstractUpdate]) -> Mapping[str, str]:
        """See `AbstractTuner.key_paths`."""
        return lora_parameters.wrapped_paths(updates)

    def keyed(self, updates: Mapping[str, AbstractUpdate]) -> dict[str, dict[str, TensorRef]]:
        """See `AbstractTuner.keyed`."""
        places = self.key_paths(updates)
        return {
            path: {keys.role_key(places[path], role): ref for role, ref in tensors.items()}
            for path, tensors in (
                (path, self.tensors(multihead.levelled(path, update, updates))) for path, update in updates.items()
            )
        }

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        layers = {path: update for path, update in updates.items() if not isinstance(update, Full)}
        named = multihead.by_target(layers)
        return {
            **lora_parameters.target_fields(named, layers, siblings),
            **lora_settings.scaling_fields(named),
            **lora_settings.variant_fields(named),
            **tokens.lora_fields(updates, siblings),
        }


def _form(module: Module) -> LowRank | Grouped | BlockDiagonal:
    setting = module.config.get("use_bdlora")
    if isinstance(setting, lora_forms.Blocks):
        return lora_forms.block_diagonal(module, setting)
    if fields.flag(module.config, "use_qalora"):
        return lora_forms.grouped(module)
    return lora_forms.low_rank(module, multihead.parameter(module.path))

"""LoRA: Linear, HF Conv1D, Embedding, ConvNd; rsLoRA, DoRA, lora_bias.

Fields after `LoraConfig` of PEFT 0.21, keys and formulas after `peft/tuners/lora/layer.py` and `dora.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.dora import Dora
from loratools.adapters.experts import Stacked
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners import lora_parameters
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_MATRIX: Final = 2
_A: Final = "lora_A.weight"
_B: Final = "lora_B.weight"
_EMBEDDING_A: Final = "lora_embedding_A"
_EMBEDDING_B: Final = "lora_embedding_B"
_BIAS: Final = "lora_B.bias"
_MAGNITUDES: Final = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
"""As PEFT saves it, and as versions before 0.12 did."""

_REFUSED_WHEN_SET: Final[Mapping[str, str]] = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA",
}
_REFUSED_INITIALISATIONS: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclasses.dataclass(frozen=True)
class LoraTuner(AbstractTuner):
    """`ΔW = scaling · B A`, and what PEFT's LoRA layers add to it.

    Attributes:
        shapes: of the base's parameters, where they are known.
    """

    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    peft_type = "LORA"
    roles = (_A, _B, _EMBEDDING_A, _EMBEDDING_B, _BIAS, *_MAGNITUDES)

    def refuse(self, config: Mapping[str, Any]) -> None:
        """See `AbstractTuner.refuse`."""
        fields.refuse_set(config, _REFUSED_WHEN_SET)
        initialisation = config.get("init_lora_weights")
        if isinstance(initialisation, str) and initialisation.lower().startswith(_REFUSED_INITIALISATIONS):
            raise UnsupportedError(
                f"The adapter was initialised by {initialisation}, which changes the base weights: it is valid only on "
                "that changed base.",
                fix="Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first.",
                file=fields.CONFIG_FILE,
                field="init_lora_weights",
            )

    def knowing(self, shapes: Mapping[str, tuple[int, ...]]) -> AbstractTuner:
        """See `AbstractTuner.knowing`."""
        return LoraTuner(shapes)

    def paths(self, modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any]) -> Mapping[str, str]:
        """See `AbstractTuner.paths`."""
        parameters, modules = lora_parameters.split(modules, config, self.shapes)
        nested = next((path for path in modules if ".base_layer." in f"{path}."), None)
        if nested is not None:
            raise UnsupportedError(
                "This adapter uses nested wrappers (MultiheadAttention, target_parameters), which is not read yet.",
                module=nested,
            )
        return {**parameters, **super().paths(modules, config)}

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        if module.config.get("lora_alpha") is None:
            module.notes.append(
                f"{fields.CONFIG_FILE} has no lora_alpha; PEFT's default of {fields.DEFAULT_ALPHA} is taken."
            )
        if lora_parameters.is_parameter(module):
            return lora_parameters.update(module)
        low_rank = _embedding(module) if {_EMBEDDING_A, _EMBEDDING_B} & module.roles.keys() else _products(module)
        _compare_rank(low_rank, module)
        magnitude = next((module.roles[role] for role in _MAGNITUDES if role in module.roles), None)
        if magnitude is None:
            if fields.flag(module.config, "use_dora"):
                raise MalformedError(
                    "A DoRA update has no magnitude.", fix="The file is incomplete.", module=module.path
                )
            return dataclasses.replace(low_rank, **module.rest)
        return Dora(low_rank=low_rank, magnitude=magnitude.reshaped((magnitude.spec.numel,)), **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        layer = isinstance(update, (LowRank, Dora)) and update.target == "weight"
        return layer or lora_parameters.holds(update)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        low_rank = _low_rank(update)
        lora_A, lora_B = low_rank.lora_A, low_rank.lora_B
        if low_rank.of == "embedding":
            tensors = {_EMBEDDING_A: lora_A, _EMBEDDING_B: lora_B}
        elif low_rank.of == "conv":
            kernel = low_rank.kernel
            rank, columns = lora_A.shape
            tensors = {
                _A: lora_A.reshaped((rank, columns // math.prod(kernel), *kernel)),
                _B: lora_B.reshaped((*lora_B.shape, *(1 for _ in kernel))),
            }
        else:
            tensors = {_A: lora_A, _B: lora_B}
        if low_rank.bias is not None:
            tensors[_BIAS] = low_rank.bias
        if isinstance(update, Dora):
            ones = tuple(1 for _ in low_rank.kernel)
            shape = (1, *update.magnitude.shape, *ones) if low_rank.of == "conv" else update.magnitude.shape
            tensors[_MAGNITUDES[0]] = update.magnitude.reshaped(shape)
        return tensors

    def keyed(self, updates: Mapping[str, AbstractUpdate]) -> dict[str, dict[str, TensorRef]]:
        """See `AbstractTuner.keyed`."""
        parameters = {path: update for path, update in updates.items() if lora_parameters.holds(update)}
        layers = super().keyed(lora_parameters.without(updates, parameters))
        return layers | lora_parameters.keyed(parameters)

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        parameters = {path: update for path, update in updates.items() if lora_parameters.holds(update)}
        layers = lora_parameters.without(updates, parameters)
        low_rank = {path: _scaled(update) for path, update in updates.items()}
        rslora = bool(low_rank) and all(update.use_rslora for update in low_rank.values())
        ranks = {path: float(update.rank or 0) for path, update in low_rank.items()}
        alphas = {
            path: update.alpha if update.use_rslora == rslora else update.scaling * ranks[path]
            for path, update in low_rank.items()
        }
        return {
            **(fields.target_fields(list(layers), siblings) if layers or not parameters else {"target_modules": []}),
            **(lora_parameters.target_fields(parameters) if parameters else {}),
            **fields.pattern_fields("r", "rank_pattern", ranks, fields.DEFAULT_RANK),
            **fields.pattern_fields("lora_alpha", "alpha_pattern", alphas, fields.DEFAULT_ALPHA),
            "use_rslora": rslora,
            **_one_for_all("use_dora", {path: isinstance(update, Dora) for path, update in layers.items()}),
            **_one_for_all("lora_bias", {path: _low_rank(update).bias is not None for path, update in layers.items()}),
        }


def _scaled(update: AbstractUpdate) -> LowRank | Stacked:
    return update if isinstance(update, Stacked) else _low_rank(update)


def _low_rank(update: AbstractUpdate) -> LowRank:
    found = update.low_rank if isinstance(update, Dora) else update
    assert isinstance(found, LowRank)
    return found


def _one_for_all(field: str, values: Mapping[str, bool]) -> dict[str, Any]:
    """A flag of the configuration; left out where it is false, so that older PEFT reads it too.

    Raises:
        UnsupportedError: modules differ in it.
    """
    if len(set(values.values())) > 1:
        some, others = (next(path for path, value in values.items() if value is wanted) for wanted in (True, False))
        raise UnsupportedError(
            f"PEFT's format cannot hold: {field} in {some} and not in {others}; the field is one for all modules.",
            fix="Write the two sorts as adapters of their own (--include, --exclude).",
        )
    return {field: True} if any(values.values()) else {}


def _embedding(module: Module) -> LowRank:
    return LowRank(
        lora_A=module[_EMBEDDING_A],
        lora_B=module[_EMBEDDING_B],
        alpha=fields.alpha_of(module.config, module.path),
        use_rslora=fields.flag(module.config, "use_rslora"),
        of="embedding",
    )


def _products(module: Module) -> LowRank:
    lora_A, lora_B = module[_A], module[_B]
    kernel: tuple[int, ...] = ()
    conv = len(lora_A.shape) > _MATRIX
    if conv:
        kernel = lora_A.shape[2:]
        lora_A, lora_B = _flat(module, lora_A, lora_B)
    return LowRank(
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=fields.alpha_of(module.config, module.path),
        use_rslora=fields.flag(module.config, "use_rslora"),
        of="conv" if conv else "linear",
        kernel=kernel,
        bias=module.roles.get(_BIAS),
    )


def _flat(module: Module, lora_A: TensorRef, lora_B: TensorRef) -> tuple[TensorRef, TensorRef]:
    """A convolution's factors as matrices: (r, in·k·…) and (out, r)."""
    rank = lora_A.shape[0]
    ones = (1,) * (len(lora_A.shape) - _MATRIX)
    if len(lora_B.shape) == len(lora_A.shape) and lora_B.shape[1] and rank % lora_B.shape[1] == 0:
        groups = rank // lora_B.shape[1]
        if groups > 1:
            raise UnsupportedError(
                f"This is an adapter of a convolution of {groups} groups: lora_A mixes them, so that its ΔW is no "
                "kernel of the base, and PEFT does not merge it either.",
                module=module.path,
            )
    if lora_B.shape[2:] != ones:
        raise MismatchError(
            f"lora_A of shape {lora_A.shape} and lora_B of shape {lora_B.shape} are no convolution's factors.",
            module=module.path,
        )
    return lora_A.reshaped((rank, math.prod(lora_A.shape[1:]))), lora_B.reshaped(lora_B.shape[:2])


def _compare_rank(update: LowRank, module: Module) -> None:
    claimed, found = fields.rank_of(module.config, module.path), update.lora_A.shape[0]
    if claimed != found:
        module.notes.append(
            f"{module.path}: the configuration says rank {claimed}, the tensors have rank {found}, "
            "which is what counts."
        )

"""`target_parameters`: LoRA on a parameter that is no layer's weight, mostly the stacked matrices of experts.

PEFT wraps the module once for every parameter, in the order in which the module registers them, the last outermost
(`_inject_parameters` and class ParamWrapper, https://github.com/huggingface/peft). Neither file says that order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.experts import Stacked
from loratools.errors import MalformedError, UndecidedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners import lora_forms, multihead
from loratools.formats.peft.tuners._tuner import Module
from loratools.tensors import TensorRef

_INNER: Final = ".base_layer"
_REGISTERED: Final = ("gate_proj", "gate_up_proj", "w1", "w13_weight", "up_proj", "w3", "down_proj", "w2", "w2_weight")
"""Parameters of experts in the order in which the model classes of transformers 5 register them."""


def paths_of(modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any]) -> dict[str, str]:
    """For every path in keys that belongs to a parameter: `module.parameter`.

    Raises:
        UndecidedError: a module has several, and the order of their wrappers is not known.
    """
    wanted = _wanted(config)
    depths: dict[str, list[str]] = {}
    for path in modules if wanted else ():
        depths.setdefault(_bare(path), []).append(path)
    found = {}
    for module, wrapped in depths.items():
        parameters = _parameters(module, wanted)
        if not parameters or all(lora_forms.A not in modules[path] for path in wrapped):
            continue
        ordered = sorted(wrapped, key=len, reverse=True)  # the innermost first
        for path, parameter in zip(ordered, _in_order(module, parameters, len(ordered)), strict=True):
            found[path] = f"{module}.{parameter}"
    return found


def names(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a path of the adapter is that of a parameter."""
    return any(path == name or path.endswith(f".{name}") for name in _wanted(config))


def is_parameter(key_path: str, path: str) -> bool:
    """Whether a path in keys stands for a parameter of its module."""
    return path.rpartition(".")[0] == _bare(key_path) and path != key_path and not path.endswith(".in_proj_weight")


def update(module: Module) -> LowRank | Stacked:
    """One matrix where lora_A has as many rows as the configuration's rank; several times that are experts.

    Raises:
        MalformedError: it has no multiple of that.
    """
    lora_A, lora_B = module[lora_forms.A], module[lora_forms.B]
    rank = fields.rank_of(module.config, module.name)
    alpha, rslora = fields.alpha_of(module.config, module.name), fields.flag(module.config, "use_rslora")
    if rank < 1 or not lora_A.shape or lora_A.shape[0] % rank:
        raise MalformedError(
            f"lora_A of shape {lora_A.shape} holds no whole number of experts of rank {rank}.",
            fix="Correct r or rank_pattern in adapter_config.json.",
            module=module.path,
        )
    if lora_A.shape[0] == rank:
        return LowRank(lora_A=lora_A, lora_B=lora_B, alpha=alpha, use_rslora=rslora, parameter="")
    experts = lora_A.shape[0] // rank
    return Stacked(lora_A=lora_A, lora_B=lora_B, experts=experts, alpha=alpha, use_rslora=rslora)


def wrapped_path(path: str, updates: Mapping[str, AbstractUpdate]) -> str:
    """The path in keys: the inverse of `paths_of`, and of `multihead.path_of` for all others."""
    if not _is_ours(path, updates[path]):
        return multihead.wrapped_path(path, updates)
    module, _, parameter = path.rpartition(".")
    beside = [name.rpartition(".")[2] for name, each in updates.items()
              if name.rpartition(".")[0] == module and _is_ours(name, each)]  # fmt: skip
    ordered = _in_order(module, beside, len(beside))
    return module + _INNER * (len(ordered) - 1 - ordered.index(parameter))


def target_fields(
    targets: Collection[str], updates: Mapping[str, AbstractUpdate], siblings: Collection[str]
) -> dict[str, Any]:
    """`target_modules` for layers, of which PEFT wants a list even where there are none, and `target_parameters`."""
    parameters = [path for path in targets if path in updates and _is_ours(path, updates[path])]
    layers = [path for path in targets if path not in set(parameters)]
    found = fields.target_fields(layers, siblings)
    if parameters:
        found |= {"target_parameters": parameters, "lora_dropout": 0.0} | ({} if layers else {"target_modules": []})
    return found


def _is_ours(path: str, update: AbstractUpdate) -> bool:
    return update.target == "" and not path.endswith(".in_proj_weight")


def _wanted(config: Mapping[str, Any]) -> list[str]:
    value = config.get("target_parameters") or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedError(
            "This field must be a list of names.", file=fields.CONFIG_FILE, field="target_parameters", value=value
        )
    return value


def _bare(path: str) -> str:
    while path.endswith(_INNER):
        path = path.removesuffix(_INNER)
    return path


def _parameters(module: str, wanted: Sequence[str]) -> list[str]:
    """The parameters that the configuration names of a module, each once."""
    pairs = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in wanted]
    return list(dict.fromkeys(last for head, last in pairs if not head or f".{module}".endswith(f".{head}")))


def _in_order(module: str, parameters: Sequence[str], count: int) -> list[str]:
    """As the module registers them."""
    known = all(parameter in _REGISTERED for parameter in parameters)
    if len(parameters) != count or (count > 1 and not known):
        raise UndecidedError(
            f"This module has {count} wrappers of parameters, and {', '.join(parameters)} are named: which is whose "
            "cannot be told from the files.",
            fix="Name in target_parameters exactly those that were trained.",
            module=module,
        )
    return sorted(parameters, key=lambda name: _REGISTERED.index(name) if name in _REGISTERED else 0)

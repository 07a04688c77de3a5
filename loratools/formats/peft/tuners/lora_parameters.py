"""`target_parameters`: LoRA on a parameter that is no layer's weight, mostly the stacked matrices of experts.

PEFT wraps the module once for every parameter, in the order in which the module registers them, the last outermost
(`_inject_parameters` and class ParamWrapper, https://github.com/huggingface/peft). Neither file says that order.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.experts import Layout, Stacked
from loratools.errors import MalformedError, MismatchError, UndecidedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.patterns import suffixes
from loratools.formats.peft.tuners import lora_forms, multihead
from loratools.formats.peft.tuners._tuner import Module
from loratools.formats.peft.tuners.lora_targets import PARAMETERS, Layers, Parameters
from loratools.tensors import TensorRef

_INNER: Final = ".base_layer"
_REGISTERED: Final = ("gate_proj", "gate_up_proj", "w1", "w13_weight", "up_proj", "w3", "down_proj", "w2", "w2_weight")
"""Parameters of experts in the order in which the model classes of transformers 5 register them."""
_MATRIX: Final = 2
_MAX_CHOICES: Final = 10_000
_STACK: Final = 3
_NUMBER: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)")
_WRITTEN: Final[Mapping[Layout | None, str | None]] = {
    "0.17": "0.18.0", "0.19.0": "0.19.0", "0.19.1": "0.19.1", None: None,
}  # fmt: skip
"""The oldest version that lays factors out so, and writes down that it does."""

Shapes = Mapping[str, tuple[int, ...]]


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """How the version of PEFT that wrote an adapter laid its factors out; None where that is not known.

    Versions before 0.18 do not say who they are; development versions between the eras may be of either.
    """
    said = config.get("peft_version")
    found = _NUMBER.match(said) if isinstance(said, str) else None
    if found is None:
        return None
    version = (int(found[1]), int(found[2]), int(found[3] or 0))
    if "dev" in found[4] and (0, 18, 0) < version <= (0, 19, 1):
        return None
    return "0.17" if version < (0, 19, 0) else "0.19.0" if version == (0, 19, 0) else "0.19.1"


def paths_of(
    modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any], shapes: Shapes
) -> dict[str, str]:
    """For every path in keys that belongs to a parameter: `module.parameter`.

    Args:
        modules: tensors by role, by path in keys.
        config: names the parameters, by whole path or by their last components.
        shapes: of the base's parameters, where it is known.

    Raises:
        MalformedError: a wrapper is missing, or there are more than parameters; a field is not what it must be.
        UndecidedError: a module has several, and neither the order of their wrappers nor shapes tell which is whose.
    """
    wanted = Parameters(config)
    if not wanted:
        return {}
    layers = Layers(config)
    depths: dict[str, list[str]] = {}
    for path in modules:
        depths.setdefault(_bare(path), []).append(path)
    known = Known(shapes)
    found: dict[str, str] = {}
    for module, wrapped in depths.items():
        bare = all(lora_forms.A not in modules[path] for path in wrapped)
        if bare or not wanted.name(module) or layers.hold(module):
            continue
        ordered = sorted(wrapped, key=len)  # the outermost first
        if any(path != module + _INNER * depth for depth, path in enumerate(ordered)):
            raise MalformedError(
                "A wrapper between others has no tensors.", fix="The file is incomplete.", module=module
            )
        chosen = _assigned(module, [modules[path] for path in ordered], wanted.of(module), known)
        found |= {path: f"{module}.{parameter}" for path, parameter in zip(ordered, chosen, strict=True)}
    return found


def is_parameter(key_path: str, path: str) -> bool:
    """Whether a path in keys stands for a parameter of its module."""
    return path.rpartition(".")[0] == _bare(key_path) and path != key_path and not multihead.is_packed(path)


def update(module: Module) -> LowRank | Stacked:
    """One matrix where lora_A has as many rows as the configuration's rank; several times that are experts.

    Raises:
        MalformedError: it has no multiple of that.
        UnsupportedError: a tensor that PEFT does not give parameters.
    """
    odd = sorted(set(module.roles) - {lora_forms.A, lora_forms.B})
    if odd:
        raise UnsupportedError(f"PEFT has no {odd[0]} on a parameter.", module=module.path)
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
    layout = layout_of(module.config)
    return Stacked(lora_A=lora_A, lora_B=lora_B, experts=experts, alpha=alpha, use_rslora=rslora, layout=layout)


def wrapped_paths(updates: Mapping[str, AbstractUpdate]) -> dict[str, str]:
    """The paths in keys: the inverse of `paths_of`, and of `multihead.path_of` for all others."""
    found: dict[str, str] = {}
    parameters: dict[str, list[str]] = {}
    for path, update in updates.items():
        if _is_ours(path, update):
            module, _, parameter = path.rpartition(".")
            parameters.setdefault(module, []).append(parameter)
        else:
            found[path] = multihead.wrapped_path(path, updates)
    for module, beside in parameters.items():
        for depth, parameter in enumerate(reversed(_registered(beside))):
            found[f"{module}.{parameter}" if module else parameter] = module + _INNER * depth
    return found


def target_fields(
    targets: Collection[str], updates: Mapping[str, AbstractUpdate], siblings: Collection[str]
) -> dict[str, Any]:
    """`target_modules` for layers, of which PEFT wants a list even where there are none, and `target_parameters`."""
    parameters = [path for path in targets if path in updates and _is_ours(path, updates[path])]
    known = set(parameters)
    layers = [path for path in targets if path not in known]
    found = fields.target_fields(layers, siblings)
    if parameters:
        found |= {PARAMETERS: parameters, "lora_dropout": 0.0} | ({} if layers else {"target_modules": []})
        found |= _version_fields([updates[path] for path in parameters])
    return found


def _version_fields(updates: Sequence[AbstractUpdate]) -> dict[str, Any]:
    """The version of PEFT that lays the factors out so: without it, square matrices could not be told apart.

    Raises:
        UnsupportedError: they lie in the ways of several versions.
    """
    layouts = list(dict.fromkeys(held.layout for held in updates if isinstance(held, Stacked)))
    if len(layouts) > 1:
        raise UnsupportedError(
            "PEFT's format cannot hold expert parameters laid out by several versions in one adapter: "
            f"{', '.join(str(layout) for layout in layouts)}."
        )
    return {"peft_version": _WRITTEN[layouts[0]]} if layouts else {}


def _is_ours(path: str, update: AbstractUpdate) -> bool:
    return update.target == "" and not multihead.is_packed(path)


def _bare(path: str) -> str:
    while path.endswith(_INNER):
        path = path.removesuffix(_INNER)
    return path


def _assigned(
    module: str,
    roles: Sequence[Mapping[str, TensorRef]],
    names: Sequence[str],
    shapes: Known,
) -> list[str]:
    """The parameter of each wrapper, from the outermost: by the order of registration, held against shapes."""
    if len(roles) > len(names):
        raise MalformedError(
            f"The module has {len(roles)} wrappers, and {PARAMETERS} names {len(names)} of its parameters.",
            module=module,
        )
    known = {name: shape for name in names if (shape := shapes.of(f"{module}.{name}")) is not None}
    names = [name for name in names if name in known] if known else names
    usual = sorted(names, key=_REGISTERED.index, reverse=True) if set(names) <= set(_REGISTERED) else None
    if math.perm(len(names), len(roles)) > _MAX_CHOICES:
        raise MalformedError(
            f"{PARAMETERS} names {len(names)} parameters of one module: too many to tell whose each wrapper is.",
            fix="Name what the module has.",
            module=module,
        )
    choices = [list(each) for each in itertools.permutations(names, len(roles)) if _fit(each, roles, known)]
    if len(choices) > 1 and usual is not None and len(usual) == len(roles) and usual in choices:
        return usual
    if len(choices) == 1 and (known or len(names) == 1):
        return choices[0]
    if known and not choices:
        raise MismatchError(
            "No assignment of the wrappers to the module's parameters fits their shapes.",
            fix="Is this the base that the adapter was made for?",
            module=module,
            **{name: known[name] for name in names},
        )
    raise UndecidedError(
        f"PEFT nests the wrappers of {', '.join(names)} in the order in which the module registers them, which is not "
        "in the files, and shapes do not tell.",
        fix="Load it together with its base (base=…), or name in target_parameters only what the module has.",
        module=module,
    )


@final
class Known:
    """The base's shapes of parameters, ready for many; names may differ by a prefix."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._turned = sorted(name[::-1] for name in shapes)

    def of(self, path: str) -> tuple[int, ...] | None:
        """The shape of a parameter: of its name, else of the only one whose name ends so or that ends this one."""
        if path in self._shapes:
            return self._shapes[path]
        found = [end for end in suffixes(path) if end in self._shapes]
        start = f".{path}"[::-1]
        at = bisect.bisect_left(self._turned, start)
        found += [turned[::-1] for turned in self._turned[at : at + 2] if turned.startswith(start)]
        return self._shapes[found[0]] if len(found) == 1 else None


def _fit(names: Iterable[str], roles: Sequence[Mapping[str, TensorRef]], known: Shapes) -> bool:
    return all(_fits(known[name], each) for name, each in zip(names, roles, strict=True) if name in known)


def _fits(shape: tuple[int, ...], roles: Mapping[str, TensorRef]) -> bool:
    if any(role not in roles or len(roles[role].shape) != _MATRIX for role in (lora_forms.A, lora_forms.B)):
        return False
    experts = shape[0] if len(shape) == _STACK else 1
    ends = {
        (roles[lora_forms.B].shape[0], roles[lora_forms.A].shape[1]),
        (roles[lora_forms.A].shape[1], roles[lora_forms.B].shape[0]),
    }
    return roles[lora_forms.A].shape[0] % max(experts, 1) == 0 and tuple(shape[-2:]) in ends


def _registered(parameters: Sequence[str]) -> list[str]:
    """As the module registers them; those of unknown classes as they stand, which is how they were read."""
    if all(parameter in _REGISTERED for parameter in parameters):
        return sorted(parameters, key=_REGISTERED.index)
    return list(parameters)

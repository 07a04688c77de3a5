"""LoRA on parameters themselves (`target_parameters`): which key is which parameter's, and back.

After `ParamWrapper` in `peft/tuners/lora/layer.py` and `_inject_parameters` in `peft/tuners/tuners_utils.py`
(https://github.com/huggingface/peft). A module with several targeted parameters is wrapped once for each, in the order
in which it registers them: the last is the outermost, so that `experts.lora_A.weight` is down_proj's and
`experts.base_layer.lora_A.weight` gate_up_proj's. No key says so.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.experts import Layout, Stacked
from loratools.errors import MalformedError, MismatchError, UndecidedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft import expressions, keys
from loratools.formats.peft.tuners._tuner import Module
from loratools.tensors import TensorRef

_A: Final = "lora_A.weight"
_B: Final = "lora_B.weight"
_FIELD: Final = "target_parameters"
_LEVEL: Final = f".{keys.BASE_LAYER}"
_VERSION: Final = "peft_version"
_STACK: Final = 3

_ORDER: Final = (
    "gate_up_proj", "gate_and_up_projs", "gate_proj", "up_proj", "down_proj", "down_projs", "weight", "bias",
)  # fmt: skip
"""The order in which the classes of transformers 5 register these parameters."""

_NUMBER: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)")

Shapes = Mapping[str, tuple[int, ...]]


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """How the version of PEFT that wrote an adapter laid its factors out; None where that is not known.

    Versions before 0.18 do not say who they are; development versions between the eras may be of either.
    """
    said = config.get(_VERSION)
    found = _NUMBER.match(said) if isinstance(said, str) else None
    if found is None:
        return None
    version = (int(found[1]), int(found[2]), int(found[3] or 0))
    if "dev" in found[4] and (0, 18, 0) < version <= (0, 19, 1):
        return None
    return "0.17" if version < (0, 19, 0) else "0.19.0" if version == (0, 19, 0) else "0.19.1"


_WRITTEN: Final[Mapping[Layout | None, str | None]] = {
    "0.17": "0.18.0", "0.19.0": "0.19.0", "0.19.1": "0.19.1", None: None,
}  # fmt: skip
"""The oldest version that lays factors out so, and writes down that it does."""


def split(
    modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any], shapes: Shapes
) -> tuple[dict[str, str], dict[str, Mapping[str, TensorRef]]]:
    """The parameter behind each path in the keys that stands for one, and the other paths as they are.

    Args:
        modules: tensors by role, by path in the keys.
        config: names the parameters, by whole path or by their last components.
        shapes: of the base's parameters, where it is known.

    Raises:
        MalformedError: there are more wrappers than parameters.
        UndecidedError: which wrapper is for which parameter cannot be told.
    """
    named = _named(config)
    levels: dict[str, list[str]] = {}
    rest = dict(modules)
    for path, roles in modules.items():
        module = _unwrapped(path)
        if named and {_A, _B} & roles.keys() and not _is_target(module, config) and _candidates(module, named):
            levels.setdefault(module, []).append(path)
            del rest[path]
    found: dict[str, str] = {}
    for module, paths in levels.items():
        outermost = sorted(paths, key=len)
        _require_unbroken(module, outermost)
        names = _candidates(module, named)
        ordered = _assigned(module, [modules[path] for path in outermost], names, shapes, config)
        found |= {path: f"{module}.{name}" for path, name in zip(outermost, ordered, strict=True)}
    return found, rest


def _named(config: Mapping[str, Any]) -> list[str]:
    value = config.get(_FIELD) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedError("This field must be a list of names.", file=fields.CONFIG_FILE, field=_FIELD, value=value)
    return value


def _unwrapped(path: str) -> str:
    while path.endswith(_LEVEL):
        path = path.removesuffix(_LEVEL)
    return path


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the module itself is wrapped as a layer: PEFT refuses to do both."""
    named = config.get("target_modules") or []
    if isinstance(named, str):
        return expressions.matches(f"^(?:{named})$", module, file=fields.CONFIG_FILE, field="target_modules")
    return any(module == name or module.endswith(f".{name}") for name in named if isinstance(name, str))


def _candidates(module: str, named: Iterable[str]) -> list[str]:
    """Parameters that the module may have, by PEFT's rule: the whole path, or its end at a dot."""
    found: dict[str, None] = {}
    for target in named:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found[parameter] = None
    return list(found)


def _require_unbroken(module: str, outermost: Sequence[str]) -> None:
    if any(path != module + _LEVEL * depth for depth, path in enumerate(outermost)):
        raise MalformedError("A wrapper between others has no tensors.", fix="The file is incomplete.", module=module)


def _assigned(
    module: str,
    roles: Sequence[Mapping[str, TensorRef]],
    names: Sequence[str],
    shapes: Shapes,
    config: Mapping[str, Any],
) -> list[str]:
    """The parameter of each wrapper, from the outermost: by the order of registration, held against shapes."""
    if len(roles) > len(names):
        raise MalformedError(
            f"The module has {len(roles)} wrappers, and {_FIELD} names {len(names)} of its parameters.", module=module
        )
    known = {name: shape for name in names if (shape := _shape_of(f"{module}.{name}", shapes)) is not None}
    names = [name for name in names if name in known] if known else names
    usual = sorted(names, key=_ORDER.index, reverse=True) if set(names) <= set(_ORDER) else None
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
    del config
    raise UndecidedError(
        f"PEFT nests the wrappers of {', '.join(names)} in the order in which the module registers them, which is not "
        "in the files, and shapes do not tell.",
        fix="Load it together with its base (base=…), or name in target_parameters only what the module has.",
        module=module,
    )


def _shape_of(path: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The base's shape of a parameter; names may differ by a prefix."""
    if path in shapes:
        return shapes[path]
    found = [shape for name, shape in shapes.items() if name.endswith(f".{path}") or path.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _fit(names: Iterable[str], roles: Sequence[Mapping[str, TensorRef]], known: Shapes) -> bool:
    return all(_fits(known[name], each) for name, each in zip(names, roles, strict=True) if name in known)


def _fits(shape: tuple[int, ...], roles: Mapping[str, TensorRef]) -> bool:
    if _A not in roles or _B not in roles or len(roles[_A].shape) != 2 or len(roles[_B].shape) != 2:  # noqa: PLR2004
        return False
    experts = shape[0] if len(shape) == _STACK else 1
    ends = {(roles[_B].shape[0], roles[_A].shape[1]), (roles[_A].shape[1], roles[_B].shape[0])}
    return roles[_A].shape[0] % max(experts, 1) == 0 and tuple(shape[-2:]) in ends


def is_parameter(module: Module) -> bool:
    """Whether `split` gave this module its path."""
    return module.stored != module.path and _unwrapped(module.stored) == module.path.rpartition(".")[0]


def update(module: Module) -> AbstractUpdate:
    """A parameter's update: `Stacked`, or `LowRank` where the rank says that there is one matrix only.

    Raises:
        MalformedError: a factor is missing.
        MismatchError: the rows of lora_A are no multiple of the rank.
        UnsupportedError: something that PEFT does not do to parameters.
    """
    odd = sorted(set(module.roles) - {_A, _B})
    if odd:
        raise UnsupportedError(f"PEFT has no {odd[0]} on a parameter.", module=module.path)
    lora_A, lora_B = module[_A], module[_B]
    rank, rows = fields.rank_of(module.config, module.path), lora_A.shape[0]
    if rank < 1 or rows % rank:
        raise MismatchError(
            f"lora_A has {rows} rows, which is no multiple of the rank {rank} that the configuration gives.",
            fix="The number of experts is their quotient: correct r or rank_pattern.",
            module=module.path,
        )
    scale: dict[str, Any] = {
        "alpha": fields.alpha_of(module.config, module.path),
        "use_rslora": fields.flag(module.config, "use_rslora"),
    }
    if rows == rank:
        return LowRank(lora_A=lora_A, lora_B=lora_B, parameter="", **scale, **module.rest)
    layout = layout_of(module.config)
    return Stacked(lora_A=lora_A, lora_B=lora_B, experts=rows // rank, layout=layout, **scale, **module.rest)


def holds(update: AbstractUpdate) -> bool:
    """Whether this is a change of a parameter that PEFT can wrap."""
    return isinstance(update, Stacked) or (
        isinstance(update, LowRank) and not update.parameter and update.of == "linear" and update.bias is None
    )


def keyed(updates: Mapping[str, AbstractUpdate]) -> dict[str, dict[str, TensorRef]]:
    """The tensors of each update by whole key; the parameters of one module nest, the first registered innermost."""
    owners: dict[str, list[str]] = {}
    for path in updates:
        owners.setdefault(path.rpartition(".")[0], []).append(path)
    found: dict[str, dict[str, TensorRef]] = {}
    for module, paths in owners.items():
        for depth, path in enumerate(_outermost_first(paths)):
            held = updates[path]
            assert isinstance(held, (LowRank, Stacked))
            prefix = module + _LEVEL * depth
            found[path] = {keys.role_key(prefix, _A): held.lora_A, keys.role_key(prefix, _B): held.lora_B}
    return {path: found[path] for path in updates}


def _outermost_first(paths: Sequence[str]) -> list[str]:
    """Parameters of unknown classes stand in the adapter in the order in which they are registered."""
    names = [path.rpartition(".")[2] for path in paths]
    if set(names) <= set(_ORDER):
        return sorted(paths, key=lambda path: _ORDER.index(path.rpartition(".")[2]), reverse=True)
    return list(reversed(paths))


def target_fields(updates: Mapping[str, AbstractUpdate]) -> dict[str, Any]:
    """What the configuration says of parameters beside ranks and alphas.

    Raises:
        UnsupportedError: their factors lie in the ways of several versions of PEFT.
    """
    stacks = {path: held for path, held in updates.items() if isinstance(held, Stacked)}
    layouts = dict.fromkeys(held.layout for held in stacks.values())
    if len(layouts) > 1:
        raise UnsupportedError(
            "PEFT's format cannot hold expert parameters laid out by several versions in one adapter: "
            f"{', '.join(str(layout) for layout in layouts)}.",
            first=next(iter(stacks)),
        )
    named: dict[str, Any] = {_FIELD: list(updates)}
    return named | dict.fromkeys([_VERSION] if layouts else [], _WRITTEN[next(iter(layouts), None)])


def without(updates: Mapping[str, AbstractUpdate], chosen: Collection[str]) -> dict[str, AbstractUpdate]:
    """The updates of other paths."""
    return {path: held for path, held in updates.items() if path not in chosen}

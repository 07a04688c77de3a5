"""`nn.MultiheadAttention` under PEFT's LoRA: the packed input projection and the output projection inside of it.

PEFT wraps the attention module for `in_proj_weight`, a parameter, and the Linear `out_proj` inside of that wrapper,
both with the rank and alpha of the attention module (`peft/tuners/lora/layer.py`, class MultiheadAttention). Its
forward and its merge add the update of `out_proj` twice (https://github.com/huggingface/peft/issues/3774); here it is
the formula, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.errors import MismatchError, UnsupportedError
from loratools.formats.peft.tuners import lora_forms
from loratools.formats.peft.tuners._tuner import Module
from loratools.tensors import TensorRef, in_memory

_PACKED: Final = ".in_proj_weight"
_OUT: Final = ".out_proj"
_WRAPPED_OUT: Final = ".base_layer.out_proj"
DOUBLED: Final = (
    "PEFT adds the update of an attention's out_proj twice, in training too; here it is added once, as the formula "
    "says. For the model that PEFT computes, rescale what came from PEFT: `loratools rescale --include '*.out_proj' "
    "--by 2`."
)


def path_of(path: str, modules: Mapping[str, Mapping[str, TensorRef]]) -> str:
    """The adapter's path for a path in keys: `attn.base_layer.out_proj` is `attn.out_proj`, `attn` the packed one."""
    if path.endswith(_WRAPPED_OUT):
        return path.removesuffix(_WRAPPED_OUT) + _OUT
    return path + _PACKED if path + _WRAPPED_OUT in modules and lora_forms.A in modules[path] else path


def is_packed(path: str) -> bool:
    """Whether an adapter's path is that of an attention's packed projection."""
    return path.endswith(_PACKED)


def pattern_name(path: str) -> str:
    """The module that PEFT looks up rank and alpha of: the attention, for both."""
    return path.removesuffix(_WRAPPED_OUT) if path.endswith(_WRAPPED_OUT) else path


def is_doubled(path: str, name: str) -> bool:
    """Whether a module, by its path and its pattern name, is the projection that PEFT adds twice."""
    return path.endswith(_OUT) and name != path


def refuse_bias(module: Module) -> None:
    """Refuse `lora_bias` on a packed projection.

    Raises:
        UnsupportedError: there is one, which PEFT uses in neither its forward nor its merge.
    """
    if is_packed(module.path) and lora_forms.BIAS in module.roles:
        raise UnsupportedError(
            "PEFT stores a lora_bias for an attention's packed projection and uses it nowhere: what the adapter was "
            "trained as cannot be told.",
            fix="Remove the tensor, to have what PEFT computes.",
            module=module.path,
        )


def parameter(path: str) -> str:
    """What `LowRank.parameter` is for a path: the packed weight's path is that of a parameter."""
    return "" if is_packed(path) else "weight"


def wrapped_path(path: str, updates: Mapping[str, AbstractUpdate]) -> str:
    """The path in keys: the inverse of `path_of`.

    Raises:
        UnsupportedError: one of the two is missing, which PEFT cannot load.
    """
    if is_packed(path) and updates[path].target == "":
        attention = path.removesuffix(_PACKED)
        if attention + _OUT not in updates:
            raise UnsupportedError(
                "PEFT's format cannot hold: an attention's in_proj without its out_proj.", module=path
            )
        return attention
    attention = path.removesuffix(_OUT)
    return attention + _WRAPPED_OUT if path.endswith(_OUT) and attention + _PACKED in updates else path


def by_target(updates: Mapping[str, AbstractUpdate]) -> dict[str, AbstractUpdate]:
    """Updates by the module that PEFT targets: one for the two of an attention, whose packed weight comes first."""
    found: dict[str, AbstractUpdate] = {}
    for path, update in updates.items():
        name = wrapped_path(path, updates).removesuffix(_WRAPPED_OUT)
        if name not in found or is_packed(path):
            found[name] = update
    return found


def levelled(path: str, update: AbstractUpdate, updates: Mapping[str, AbstractUpdate]) -> AbstractUpdate:
    """An attention's out_proj with the scaling of its packed weight; the difference goes into lora_B.

    Raises:
        MismatchError: their ranks differ, or their scalings do by something else than a power of two, which alone is
            exact: PEFT has one rank and one alpha for both.
    """
    packed = updates.get(path.removesuffix(_OUT) + _PACKED) if path.endswith(_OUT) else None
    if not isinstance(packed, LowRank) or not isinstance(update, LowRank) or packed.scaling == update.scaling:
        return update
    quotient = update.scaling / packed.scaling if packed.scaling else math.nan
    if packed.rank != update.rank or abs(math.frexp(quotient)[0]) != 0.5:  # noqa: PLR2004  (a power of two)
        raise MismatchError(
            "PEFT's format gives the two projections of an attention one rank and one alpha; here they differ.",
            fix="Bring them to one: `loratools rescale --bake`, or adapters of one rank.",
            module=path,
        )
    lora_B = _multiplied(path, update.lora_B, quotient)
    return dataclasses.replace(update, lora_B=lora_B, alpha=packed.alpha, use_rslora=packed.use_rslora)


def _multiplied(path: str, factor: TensorRef, quotient: float) -> TensorRef:
    """A factor times a power of two, in its own dtype where that can hold it, else in float32."""
    import torch

    given = factor.load()
    wanted = given.double() * quotient
    for dtype in (given.dtype, torch.float32):
        if torch.equal((found := wanted.to(dtype)).double(), wanted):
            return in_memory(factor.name, found)
    raise MismatchError(
        f"PEFT's format gives the two projections of an attention one alpha; {quotient:g} times this lora_B is beyond "
        "float32.",
        fix="Bring them closer to each other: `loratools rescale`.",
        module=path,
    )

"""Which modules of a checkpoint have a low-rank form that PEFT loads, and what to say about those that have none.

PEFT's LoRA on a convolution (`peft/tuners/lora/layer.py`) is a convolution A of the same kernel, stride and padding
from all input channels to r, then one B of kernel 1. Where the base has groups, A mixes them: its ΔW is no kernel of
the base, PEFT does not merge it, and its A is `groups` times as wide as the stored weight. A transposed convolution it
does not wrap at all, nor two modules of state-space models (`tuners_utils.py`). All of these load whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.checkpoints import Module, families
from loratools.checkpoints.convolutions import Form, form_of
from loratools.checkpoints.experts import is_moved_by_peft

_WHY: Final[Mapping[Form, str]] = {
    "one-channel": "PEFT's LoRA has no kernel for a depthwise convolution, and saves nothing over a single channel",
    "grouped": "PEFT's LoRA has no kernel for a convolution in groups",
    "transposed": "PEFT's LoRA does not wrap a transposed convolution",
}
_STATE_SPACE: Final = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
_NOT_WRAPPED: Final = frozenset({"out_proj", "conv1d"})
"""Last name components of modules that PEFT refuses to wrap in these families."""


def why_none(module: Module, config: Mapping[str, Any]) -> str | None:
    """Why PEFT's LoRA cannot say a change of this module's weight, or None where it can."""
    if str(config.get("model_type", "")) in _STATE_SPACE and families.last(module.name) in _NOT_WRAPPED:
        return "PEFT refuses to wrap these modules of a state-space model, whose fast path reads the bare weights"
    return _WHY.get(form_of(module, config)) if module.kind == "conv" else None


def is_biased_parameter(path: str, module: Module, family: object) -> bool:
    """Whether the weight would be wrapped as a bare parameter, beside a bias that may have changed too."""
    return "bias" in module.parameters and is_moved_by_peft(path, family)


def as_parameters(updates: Mapping[str, AbstractUpdate], family: object) -> dict[str, AbstractUpdate]:
    """The updates, with layers that PEFT would take for experts as what nothing is taken for: updates of `weight`."""
    found: dict[str, AbstractUpdate] = {}
    for path, update in updates.items():
        if isinstance(update, LowRank) and update.parameter == "weight" and is_moved_by_peft(path, family):
            found[f"{path}.weight"] = dataclasses.replace(update, parameter="")
        else:
            found[path] = update
    return found


def advice(
    updates: Mapping[str, AbstractUpdate], module: Callable[[str], Module], config: Mapping[str, Any]
) -> list[str]:
    """What to know of the modules of an adapter that are whole for such a reason, and of convolutions that are not."""
    reasons: dict[str, list[str]] = {}
    for path, update in updates.items():
        if "weight" in update.replaced and (why := why_none(module(path), config)):
            reasons.setdefault(why, []).append(path)
    notes = [f"Stored whole, since {why}: {_some(paths)}." for why, paths in reasons.items()]
    kernels = [path for path, update in updates.items() if update.changes_weight and module(path).kind == "conv"]
    if kernels:
        notes.append(
            f"{_some(kernels)}: convolutions in low-rank form. A checkpoint does not say whether a convolution has "
            "groups, dilation or a padding other than zeros, and PEFT's LoRA has none of them: --save-full keeps "
            "such a convolution whole. `loratools merge` is right in any case."
        )
    return notes


def _some(names: Iterable[str]) -> str:
    """One name, or the first of several with their number."""
    first, *others = names
    return f"{first} and {len(others)} more" if others else first

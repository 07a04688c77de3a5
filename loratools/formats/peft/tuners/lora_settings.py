"""The fields of `LoraConfig` that change ΔW: which are refused, and which are written for which updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.block_diagonal import BlockDiagonal
from loratools.adapters.dora import Dora
from loratools.adapters.experts import Stacked
from loratools.adapters.grouped import Grouped
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.names import Anywhere
from loratools.formats.peft.tuners import lora_forms
from loratools.formats.peft.tuners._tuner import Module

RESTATED: Final = (
    "use_dora", "lora_bias", "use_qalora", "qalora_group_size", "use_bdlora", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
"""What a sum of several adapters, or a selection from one, may no longer be."""

_REFUSED_WHEN_SET: Final[Mapping[str, str]] = {
    "layer_replication": "layer replication",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
_REFUSED_INITIALISATIONS: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")


def refuse(config: Mapping[str, Any]) -> None:
    """Raise for settings under which the tensors mean something else on this base, or depend on the input.

    Raises:
        UnsupportedError: names the setting and the way out.
        MalformedError: a setting is not what it must be.
    """
    fields.refuse_set(config, _REFUSED_WHEN_SET)
    blocks = config.get("use_bdlora")
    if blocks and not isinstance(blocks, Mapping):
        raise MalformedError("This field must be an object.", file=fields.CONFIG_FILE, field="use_bdlora", value=blocks)
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower().startswith(_REFUSED_INITIALISATIONS):
        raise UnsupportedError(
            f"The adapter was initialised by {initialisation}, which changes the base weights: it is valid only on "
            "that changed base.",
            fix="Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first.",
            file=fields.CONFIG_FILE,
            field="init_lora_weights",
        )


def compare_rank(found: int, module: Module) -> None:
    """Say where the configuration claims another rank than the tensors have."""
    claimed = fields.rank_of(module.config, module.name)
    if claimed != found:
        module.notes.append(
            f"{module.path}: the configuration says rank {claimed}, the tensors have rank {found}, "
            "which is what counts."
        )


def scaling_fields(updates: Mapping[str, AbstractUpdate]) -> dict[str, Any]:
    """Rank, alpha and rsLoRA, by the names that PEFT looks them up under; plain where the updates are mixed."""
    forms = {path: _form(update) for path, update in updates.items()}
    rslora = bool(forms) and all(form.use_rslora for form in forms.values())
    ranks = {path: float(lora_forms.rank_of(form)) for path, form in forms.items()}
    alphas = {
        path: form.alpha if form.use_rslora == rslora else form.scaling * ranks[path] for path, form in forms.items()
    }
    return {
        **fields.pattern_fields("r", "rank_pattern", ranks, fields.DEFAULT_RANK),
        **fields.pattern_fields("lora_alpha", "alpha_pattern", alphas, fields.DEFAULT_ALPHA),
        "use_rslora": rslora,
    }


def variant_fields(updates: Mapping[str, AbstractUpdate]) -> dict[str, Any]:
    """The flags of variants; left out where they are off, so that older PEFT reads the configuration too.

    Raises:
        UnsupportedError: modules differ in what is one setting for all of them.
    """
    found = _one_for_all("use_dora", {path: isinstance(update, Dora) for path, update in updates.items()})
    biased = {path: bool(update.offsets) for path, update in updates.items()}
    found |= _one_for_all("lora_bias", biased)
    groups = {path: update.group if isinstance(update, Grouped) else 0 for path, update in updates.items()}
    if found_groups := _one_for_all("qalora_group_size", groups):
        found |= {"use_qalora": True, **found_groups}
    blocks = {path: update for path, update in updates.items() if isinstance(update, BlockDiagonal)}
    if blocks:
        _one_for_all("nblocks", {path: update.blocks for path, update in blocks.items()})
        sides = {side: [path for path, update in blocks.items() if update.compact == side] for side in ("A", "B")}
        _require_told_apart(sides, updates)
        found["use_bdlora"] = {
            "target_modules_bd_a": sides["A"],
            "target_modules_bd_b": sides["B"],
            "nblocks": next(iter(blocks.values())).blocks,
            "match_strict": len(blocks) == len(updates),
        }
    return found


def _require_told_apart(sides: Mapping[str, list[str]], updates: Mapping[str, AbstractUpdate]) -> None:
    """Refuse block-diagonal modules whose names others contain: PEFT would take these for such ones too."""
    for side, names in sides.items():
        known, named = set(names), Anywhere(names)
        for path in updates:
            caught = named.find(path) if path not in known else None
            if caught is not None:
                raise UnsupportedError(
                    f"PEFT's format cannot hold: {caught} has a block-diagonal lora_{side} and {path} has not, and "
                    "PEFT looks for the first name anywhere in the second.",
                    fix="Write the two as adapters of their own (--include, --exclude).",
                )


def _form(update: AbstractUpdate) -> LowRank | Grouped | BlockDiagonal | Stacked:
    found = update.low_rank if isinstance(update, Dora) else update
    assert isinstance(found, (LowRank, Grouped, BlockDiagonal, Stacked))
    return found


def _one_for_all(field: str, values: Mapping[str, int]) -> dict[str, Any]:
    if len(set(values.values())) > 1:
        first, *others = values.items()
        other = next(path for path, value in others if value != first[1])
        raise UnsupportedError(
            f"PEFT's format cannot hold: {first[0]} and {other} differ in {field}, which is one for all modules.",
            fix="Write the two sorts as adapters of their own (--include, --exclude).",
        )
    return {field: next(iter(values.values()))} if any(values.values()) else {}

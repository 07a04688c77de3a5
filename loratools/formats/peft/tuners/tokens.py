"""Trained tokens: rows of an embedding given whole, beside LoRA (`trainable_token_indices`) or as TRAINABLE_TOKENS.

Despite its name, `trainable_tokens_delta` holds the new rows themselves (`peft/tuners/trainable_tokens/layer.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Full, RowPatch
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

LORA_ROLE: Final = "token_adapter.trainable_tokens_delta"
ROLE: Final = "trainable_tokens_delta"


class TrainableTokensTuner(AbstractTuner):
    """`W[indices] = rows`, one list of indices for all modules (https://huggingface.co/docs/peft, Trainable Tokens)."""

    peft_type = "TRAINABLE_TOKENS"
    roles = (ROLE,)
    holds_biases = False
    tells_orientation = False

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return update(module, ROLE, module.config.get("token_indices"))

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return are_all_of(update)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        return {ROLE: update.patches["weight"].rows}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        lists = {update.patches["weight"].indices for update in updates.values()}
        if len(lists) > 1:
            raise UnsupportedError("PEFT's TRAINABLE_TOKENS has one list of tokens for all modules; these differ.")
        return {**fields.target_fields(list(updates), siblings), "token_indices": list(next(iter(lists), ()))}


def are_all_of(update: AbstractUpdate) -> bool:
    """Whether an update is nothing but rows of its weight."""
    given = update.replaced or update.added_rows
    return isinstance(update, Full) and list(update.patches) == ["weight"] and not given


def update(module: Module, role: str, listed: object) -> Full:
    """The rows of one module, at the indices that the configuration lists, for all modules or by their names.

    Raises:
        MalformedError: the list is missing or no list of row numbers.
        MismatchError: it is as long as the rows are not.
        UnsupportedError: the same module has a low-rank update too.
    """
    if len(module.roles) > 1:
        raise UnsupportedError(
            "Trained tokens of a module that has a low-rank update too are not read.", module=module.path
        )
    rows = module[role]
    if isinstance(listed, Mapping):
        listed = next((value for name, value in listed.items() if module.path.endswith(str(name))), None)
    if not isinstance(listed, list) or not all(type(index) is int and index >= 0 for index in listed):
        raise MalformedError(
            "The configuration does not list the rows of these trained tokens.",
            file=fields.CONFIG_FILE,
            module=module.path,
        )
    if len(set(listed)) != len(listed) or rows.shape[:1] != (len(listed),):
        raise MismatchError(
            f"{len(listed)} token indices are listed ({len(set(listed))} of them different), and there are "
            f"{rows.shape[0] if rows.shape else 0} rows.",
            module=module.path,
        )
    rest = {key: value for key, value in module.rest.items() if key != "patches"}
    return Full(patches={"weight": RowPatch(tuple(listed), rows)}, shared=True, **rest)


def lora_fields(updates: Mapping[str, AbstractUpdate]) -> dict[str, Any]:
    """What `LoraConfig` says of them; left out where there are none, so that older PEFT reads it too."""
    listed = {path: list(each.patches["weight"].indices) for path, each in updates.items() if "weight" in each.patches}
    return {"trainable_token_indices": listed} if listed else {}

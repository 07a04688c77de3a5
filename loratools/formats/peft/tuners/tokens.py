"""Trained tokens: rows of an embedding given whole, beside LoRA (`trainable_token_indices`) or as TRAINABLE_TOKENS.

Despite its name, `trainable_tokens_delta` holds the new rows themselves (`peft/tuners/trainable_tokens/layer.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, final

from loratools.adapters import AbstractUpdate, Full, RowPatch
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.names import begins_another
from loratools.formats.peft.patterns import suffixes
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

LORA_ROLE: Final = "token_adapter.trainable_tokens_delta"
LORA_FIELD: Final = "trainable_token_indices"
ROLE: Final = "trainable_tokens_delta"


class TrainableTokensTuner(AbstractTuner):
    """`W[indices] = rows`, one list of indices for all modules (https://huggingface.co/docs/peft, Trainable Tokens)."""

    peft_type = "TRAINABLE_TOKENS"
    roles = (ROLE,)
    holds_biases = False
    tells_orientation = False

    def prepared(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `AbstractTuner.prepared`."""
        return prepared(config, "token_indices")

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return update(module, ROLE, module.config.get("token_indices"))

    def paths(self, modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any]) -> Mapping[str, str]:
        """See `AbstractTuner.paths`."""
        nested = next((path for path in modules if path.endswith(".base_layer")), None)
        if nested is not None:
            raise UnsupportedError(
                "Two tied modules were targeted, which PEFT wraps into each other and cannot run.",
                fix="Target the embedding alone: PEFT trains the head with it.",
                module=nested,
            )
        return super().paths(modules, config)

    def kept_fields(self, updates: Mapping[str, AbstractUpdate], config: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `AbstractTuner.kept_fields`: what was not targeted was stored since it is tied, and stays so."""
        named = config.get("target_modules")
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        known = {name for name in names if isinstance(name, str)}
        found = [path for path in updates if any(end in known for end in suffixes(path))]
        return {"target_modules": found} if found else {}

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


@final
class Listed:
    """Indices by module name, ready for many modules: PEFT looks for names that end a path, at a dot or not."""

    def __init__(self, lists: Mapping[str, object]) -> None:
        self._lists = {str(name): value for name, value in lists.items()}
        self._lengths = sorted({len(name) for name in self._lists})

    def of(self, path: str) -> object:
        """What is listed for a module; None where nothing is.

        Raises:
            MalformedError: several names end its path, with other lists.
        """
        ends = (path[len(path) - length :] for length in self._lengths if length <= len(path))
        found = {name: self._lists[name] for name in ends if name in self._lists}
        if any(value != next(iter(found.values())) for value in found.values()):
            raise MalformedError(
                f"The module's path ends with each of {', '.join(found)}, which list other tokens.",
                file=fields.CONFIG_FILE,
                module=path,
            )
        return next(iter(found.values()), None)


def prepared(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The configuration with the indices in `field` ready for many modules, where they are listed by module."""
    lists = config.get(field)
    return {**config, field: Listed(lists)} if isinstance(lists, Mapping) else config


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
    if isinstance(listed, Listed):
        listed = listed.of(module.path)
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


def lora_fields(updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> dict[str, Any]:
    """What `LoraConfig` says of them; left out where there are none, so that older PEFT reads it too.

    Raises:
        UnsupportedError: PEFT, which takes each module whose path ends with a name, would take another one too.
    """
    listed = {path: list(each.patches["weight"].indices) for path, each in updates.items() if "weight" in each.patches}
    known = {*siblings, *listed} if listed else ()
    turned = sorted(path[::-1] for path in known)
    for name in listed:
        if begins_another(name[::-1], turned):
            caught = min(path for path in known if path != name and path.endswith(name))
            raise UnsupportedError(
                f"PEFT's format cannot hold: trained tokens of {name}, since it would take {caught} for it too."
            )
    return {LORA_FIELD: listed} if listed else {}

"""What no honest `adapter_config.json` says, refused before anything in it is used.

A configuration comes from a stranger. Some values are there to fill the memory, or to have PEFT import something;
others are numbers that no adapter can have. Expressions that are made to match for ever are no matter of looks: the
keys of patterns are matched in bounded time (`loratools.patterns`), and no other expression is matched at all.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from loratools.errors import MalformedError

_FILE: Final = "adapter_config.json"
_MAX_RANK: Final = 1 << 20
_RANKS: Final = ("r", "init_r", "target_r")
_MAX_KEYS: Final = 1 << 17  # the largest public models have 94 thousand modules
_DISTRUST: Final = "Do not trust this adapter: get it from its publisher."


def refuse_absurd(config: Mapping[str, Any]) -> None:
    """Raise for a configuration that cannot be meant.

    Raises:
        MalformedError: patterns of more keys than a model has modules, an enormous rank, a module to import that
            holds no model.
    """
    for field in _RANKS:
        _require_rank(config.get(field), field, least=0)  # OFT says 0 where the size of blocks is given
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field)
        if isinstance(pattern, Mapping):
            _require_keys(pattern, field)
    _require_harmless(config)


def require_ranks(config: Mapping[str, Any]) -> None:
    """Raise for a rank that no product of two factors can have.

    Raises:
        MalformedError: zero, negative, enormous, or no integer.
    """
    _require_rank(config.get("r"), "r")
    pattern = config.get("rank_pattern")
    for value in pattern.values() if isinstance(pattern, Mapping) else ():
        _require_rank(value, "rank_pattern")


def _require_rank(value: Any, field: str, least: int = 1) -> None:
    if value is None:
        return
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not whole or not least <= value <= _MAX_RANK:
        raise MalformedError(
            f"A rank must be an integer from {least} to {_MAX_RANK}.",
            fix="Correct it, or remove the field: the tensors' own rank counts.",
            file=_FILE,
            field=field,
            value=value,
        )


def _require_keys(pattern: Mapping[str, Any], field: str) -> None:
    if len(pattern) > _MAX_KEYS:
        raise MalformedError(
            f"{len(pattern)} keys are more than the {_MAX_KEYS} that are read; no model has so many modules.",
            fix=_DISTRUST,
            file=_FILE,
            field=field,
        )


def _require_harmless(config: Mapping[str, Any]) -> None:
    """Refuse names of modules that PEFT would import, where they cannot hold a model.

    A model's class may be defined anywhere, but not in Python's own library. Nothing of this is imported here.
    """
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else mapping
    core = config.get("megatron_core")
    for field, value, wrong in (
        ("auto_mapping", library, not isinstance(library, str) or _is_of_python(library)),
        ("megatron_core", core, not isinstance(core, str) or core.partition(".")[0] != "megatron"),
    ):
        if value is not None and (wrong or (field == "auto_mapping" and not isinstance(mapping, Mapping))):
            raise MalformedError(
                "The configuration names a module to import that holds no model.",
                fix=_DISTRUST,
                file=_FILE,
                field=field,
                value=value,
            )


def _is_of_python(library: str) -> bool:
    return library.partition(".")[0] in sys.stdlib_module_names - {"__main__"}

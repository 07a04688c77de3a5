"""What no honest `adapter_config.json` says, refused before anything in it is used.

A configuration comes from a stranger. Some values are there to hang whoever matches them, to fill the memory, or to
have PEFT import something; others are numbers that no adapter can have.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, Final

from loratools.errors import MalformedError, UnsupportedError

_FILE: Final = "adapter_config.json"
_MAX_RANK: Final = 1 << 20
_MAX_KEYS: Final = 1 << 17  # the largest public models have 94 thousand modules
_MAX_EXPRESSION: Final = 2000
_PIECE: Final = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[*+?]|\{\d*,?\d*\}|[()|]|.", re.DOTALL)
_LOOSE: Final = re.compile(r"[*+]|\{\d*,?\d*\}")
"""A quantifier that can repeat: all but `?`."""
_DISTRUST: Final = "Do not trust this adapter: get it from its publisher."


def refuse_absurd(config: Mapping[str, Any]) -> None:
    """Raise for a configuration that cannot be meant.

    Raises:
        MalformedError: patterns of more keys than a model has modules, a module to import that holds no model.
        UnsupportedError: an expression that could take hours to match.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field)
        if isinstance(pattern, Mapping):
            _require_keys(pattern, field)
            for key in pattern:
                _require_tame(key, field)
    for field in ("target_modules", "exclude_modules"):
        value = config.get(field)
        if isinstance(value, str) and not _is_listed(value):
            _require_tame(value, field)
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


def _require_rank(value: Any, field: str) -> None:
    if value is None:
        return
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not whole or not 1 <= value <= _MAX_RANK:
        raise MalformedError(
            f"A rank must be an integer from 1 to {_MAX_RANK}.",
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


def _require_tame(expression: str, field: str) -> None:
    if len(expression) > _MAX_EXPRESSION or _repeats_inside(expression):
        raise UnsupportedError(
            "This pattern could take hours to match, and is not tried.",
            fix="Name the modules plainly.",
            file=_FILE,
            field=field,
            pattern=expression,
        )


def _is_listed(expression: str) -> bool:
    r"""Whether it is names between bars, as `exclude_modules` is written here: as long as a model is deep."""
    return not re.sub(r"\\[^0-9A-Za-z]|[\w|-]", "", expression) and "\\" in expression


def _repeats_inside(expression: str) -> bool:
    """Whether a group that repeats holds something that repeats or branches: matching can take exponential time."""
    groups = [False]  # for every open group: does it repeat or branch inside?
    closed = False
    for piece in _PIECE.findall(expression):
        loose = _LOOSE.fullmatch(piece) is not None
        if loose and closed:
            return True
        groups[-1] |= piece == "|" or loose
        closed = False
        if piece == "(":
            groups.append(False)
        elif piece == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
    return False


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

"""What `target_parameters` and `target_modules` name, sorted once for all modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from loratools.errors import MalformedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.names import listed
from loratools.formats.peft.patterns import WholeExpression, suffixes

PARAMETERS: Final = "target_parameters"
_MODULES: Final = "target_modules"


@final
class Parameters:
    """`target_parameters`: by whole path or by its last components.

    Raises:
        MalformedError: it is no list of names.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._of: dict[str, dict[str, int]] = {}
        for position, name in enumerate(listed(config, PARAMETERS, file=fields.CONFIG_FILE)):
            head, _, last = name.rpartition(".")
            self._of.setdefault(head, {}).setdefault(last, position)

    def __bool__(self) -> bool:
        return bool(self._of)

    def name(self, module: str) -> bool:
        """Whether a parameter of the module is named."""
        return "" in self._of or any(end in self._of for end in suffixes(module))

    def of(self, module: str) -> list[str]:
        """The parameters that are named of a module, each once, in the order of the list."""
        found: dict[str, int] = {}
        for end in {"", *suffixes(module)}:
            for last, position in self._of.get(end, {}).items():
                found[last] = min(position, found.get(last, position))
        return sorted(found, key=found.__getitem__)


@final
class Layers:
    """`target_modules`: the modules that are wrapped as layers.

    Raises:
        MalformedError: it is neither a list nor an expression.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        named = config.get(_MODULES) or []
        if not isinstance(named, (list, str)):
            raise MalformedError(
                "This field must be a list of names, or an expression.",
                file=fields.CONFIG_FILE,
                field=_MODULES,
                value=named,
            )
        self._expression = (
            WholeExpression(named, file=fields.CONFIG_FILE, field=_MODULES) if isinstance(named, str) else None
        )
        self._names = frozenset(_texts(named))

    def hold(self, module: str) -> bool:
        """Whether the module is one of them."""
        if self._expression is not None:
            return self._expression.matches(module)
        return any(end in self._names for end in suffixes(module))


def _texts(named: Sequence[Any]) -> list[str]:
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []

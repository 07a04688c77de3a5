"""What a PEFT configuration names and no tensor of its adapter is for."""

from __future__ import annotations

from typing import Any, Final

from loratools.adapters import Adapter
from loratools.formats.peft import config as fields
from loratools.formats.peft.patterns import ModuleKeys, suffixes

_TOLD: Final = 20
"""Names that are told one by one, before they are only counted."""
_PRUNED: Final = ".lora_E"
"""What stands behind the module's path in AdaLoRA's rank_pattern."""


def notes(adapter: Adapter) -> list[str]:
    """A sentence for each name."""
    carried = [path for path, update in adapter.items() if update.own_keys or update.patches]
    parameters = [path for path in carried if not adapter[path].target]
    carried += [path.rpartition(".")[0] for path in parameters]
    found: list[tuple[str, str]] = []
    for field, paths in (
        ("target_modules", carried),
        ("target_parameters", parameters),
        ("modules_to_save", list(adapter)),
    ):
        ends = {end for path in paths for end in suffixes(path)}
        found += [(field, name) for name in _strings(adapter.config.get(field)) if name not in ends]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = ModuleKeys(_by_module(adapter.config.get(field)) or (), file=fields.CONFIG_FILE, field=field)
        found += [(field, key) for key in keys.idle(carried)]
    told = [f"{field} names {name}, and no tensor of the adapter is for it." for field, name in found[:_TOLD]]
    rest = len(found) - len(told)
    return [*told, f"Of {rest} more names in the configuration the same is true."] if rest else told


def _by_module(pattern: Any) -> Any:
    if not isinstance(pattern, dict):
        return pattern
    return {str(key).removesuffix(_PRUNED): value for key, value in pattern.items()}


def _strings(value: Any) -> list[str]:
    names = value if isinstance(value, list) else []
    return [name for name in names if isinstance(name, str) and name != fields.NO_TARGETS]

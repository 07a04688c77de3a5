"""`adapter_config.json`, as data: what in it changes ΔW, what we refuse, what we write.

Field by field after `LoraConfig` of PEFT 0.21 (https://github.com/huggingface/peft). Nothing in it is ever
imported, evaluated or opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from loratools.errors import InputDataError, MalformedError, UnsupportedError
from loratools.formats.peft.names import listed
from loratools.formats.peft.patterns import ModuleKeys, ModulePattern, suffixes

CONFIG_FILE: Final = "adapter_config.json"
_LARGEST: Final = 1e300
DEFAULT_RANK: Final = 8
DEFAULT_ALPHA: Final = 8
NO_TARGETS: Final = "dummy-target-modules"
"""PEFT's own placeholder for an adapter that injects no LoRA layer (`peft.utils.constants`)."""

_NOT_REPEATED: Final = (
    "auto_mapping", "megatron_config", "megatron_core", "layers_to_transform", "layers_pattern", "exclude_modules",
    "runtime_config", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "init_lora_weights",
)  # fmt: skip
"""Keys that name code to import, or that say how layers were chosen or initialised: moot once modules are listed."""

_OF_EVERY_KIND: Final = ("base_model_name_or_path", "revision", "task_type")


def peft_type(config: Mapping[str, Any]) -> str:
    """The kind of adapter, in capitals.

    Raises:
        MalformedError: the configuration does not say.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise MalformedError("The configuration has no peft_type.", file=CONFIG_FILE)
    return kind.upper()


def refuse_set(config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Raise for a field that is set and makes ΔW another one than the tensors alone would.

    Raises:
        UnsupportedError: names what `named` says of the field.
    """
    for field, name in named.items():
        if config.get(field):
            raise UnsupportedError(f"This adapter uses {name}, which is not read yet.", file=CONFIG_FILE, field=field)


def number(config: Mapping[str, Any], field: str, default: float) -> float:
    """A finite number of the configuration.

    Raises:
        MalformedError: it is something else.
    """
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        raise MalformedError("This field must be a finite number.", file=CONFIG_FILE, field=field, value=value)
    return value


def integer(config: Mapping[str, Any], field: str, default: int) -> int:
    """A whole number of the configuration.

    Raises:
        MalformedError: it is something else.
    """
    value = number(config, field, default)
    if not float(value).is_integer():
        raise MalformedError("This field must be a whole number.", file=CONFIG_FILE, field=field, value=value)
    return int(value)


def flag(config: Mapping[str, Any], field: str) -> bool:
    """A boolean of the configuration; absent is false.

    Raises:
        MalformedError: it is something else: the text "false" would count as true.
    """
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise MalformedError("This field must be true or false.", file=CONFIG_FILE, field=field, value=value)
    return bool(value)


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The names in `modules_to_save`.

    Raises:
        MalformedError: it is no list of names.
    """
    return listed(config, "modules_to_save", file=CONFIG_FILE)


def matched(pattern: Any, module: str, default: float, *, field: str) -> float:
    r"""The value that PEFT takes from a `rank_pattern` or `alpha_pattern` for `module`.

    For many modules `pattern` is best a `ModulePattern`.

    Raises:
        MalformedError: the pattern is no mapping of strings to numbers, or a key is no expression.
        UnsupportedError: a key takes too long to match.
    """
    if not pattern:
        return default
    made = pattern if isinstance(pattern, ModulePattern) else ModulePattern(pattern, file=CONFIG_FILE, field=field)
    return number(made, made.key(module), default)


def alpha_of(config: Mapping[str, Any], module: str, field: str = "lora_alpha") -> float:
    """`alpha` of a module; `field` is what the kind calls it."""
    default = number(config, field, DEFAULT_ALPHA)
    return matched(config.get("alpha_pattern"), module, default, field="alpha_pattern")


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that the configuration claims for a module; the tensor's is the true one."""
    default = number(config, "r", DEFAULT_RANK)
    return int(matched(config.get("rank_pattern"), module, default, field="rank_pattern"))


def patterns(values: Mapping[str, float], default: float, targets: Sequence[str]) -> dict[str, float]:
    """A pattern under which every target gets its own value, whatever order PEFT sorts the keys into.

    Plain module paths where they are unambiguous; anchored and escaped ones otherwise.
    """
    exceptions = {module: value for module, value in values.items() if value != default}
    for spelling in (lambda path: path, lambda path: f"^{re.escape(path)}"):
        spelled = {spelling(module): value for module, value in sorted(exceptions.items())}
        ordered = dict(sorted(spelled.items()))
        if _tells_apart(ordered, values, default, targets):
            return ordered
    raise UnsupportedError("No rank or alpha pattern of PEFT tells these modules apart.", first=targets[0])


def _tells_apart(
    pattern: Mapping[str, float], values: Mapping[str, float], default: float, targets: Sequence[str]
) -> bool:
    """Whether every target gets its own value; not where a plain path is no expression, such as `a[b`."""
    made = ModulePattern(pattern)
    try:
        return all(matched(made, module, default, field="") == values[module] for module in targets)
    except InputDataError:
        return False


def collateral(targets: Sequence[str], siblings: Collection[str]) -> list[str]:
    """Modules that PEFT would target too: a target's path is a suffix of theirs, at a dot."""
    wanted = set(targets)
    caught = []
    for path in siblings:
        pieces = path.split(".")
        if path not in wanted and any(".".join(pieces[index:]) in wanted for index in range(1, len(pieces))):
            caught.append(path)
    return sorted(caught)


def most_common(values: Sequence[float]) -> float:
    """The value that most modules share; the smaller of equals, so that the choice does not depend on order."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def tidy(value: float) -> float:
    """An integer where the number is one: PEFT declares `lora_alpha` and `r` as integers."""
    return int(value) if float(value).is_integer() else value


def target_fields(targets: Sequence[str], siblings: Collection[str]) -> dict[str, Any]:
    """`target_modules` as full paths, and what has to be excluded because it ends like one of them."""
    if not targets:
        return {"target_modules": NO_TARGETS}
    fields: dict[str, Any] = {"target_modules": list(targets)}
    if excluded := collateral(targets, siblings):
        fields["exclude_modules"] = exclusion(excluded, targets)
    return fields


def pattern_fields(name: str, pattern: str, values: Mapping[str, float], default: float) -> dict[str, Any]:
    """The field `name` for what most modules share, and the field `pattern` for the exceptions."""
    if not values:
        return {name: default, pattern: {}}
    common = most_common(list(values.values()))
    exceptions = patterns(values, common, list(values))
    return {name: tidy(common), pattern: {key: tidy(value) for key, value in exceptions.items()}}


def named_pattern(name: str, pattern: str, values: Mapping[str, int]) -> dict[str, Any]:
    r"""The field `name`, and the field `pattern` where exceptions are module paths.

    The rule of FourierFT and C3A: the first key with `re.match(rf".*\.{key}$", path)`, else the path itself as a key.

    Raises:
        UnsupportedError: whatever is the default, a path with another value ends with an exception's path.
    """
    if not values:
        return {pattern: {}}
    counts = Counter(values.values())
    for common in sorted(counts, key=lambda value: (-counts[value], value)):
        exceptions = {path: value for path, value in values.items() if value != common}
        keys = ModuleKeys(exceptions, field=pattern)
        if all(exceptions[key] == value for path, value in values.items() for key in keys.ending(path)):
            return {name: tidy(common), pattern: exceptions}
    raise UnsupportedError(
        f"PEFT's format cannot hold these {name}: modules with different ones have paths that end alike.",
        fix="Write them as adapters of their own (--include, --exclude).",
        first=next(iter(values)),
    )


def exclusion(modules: Sequence[str], targets: Sequence[str]) -> list[str] | str:
    """`exclude_modules` for exactly these: a list, or an expression where PEFT's suffix rule would hit a target too."""
    if not _caught_by(targets).isdisjoint(modules):
        return "|".join(re.escape(module) for module in modules)
    return list(modules)


def inherited_exclusion(config: Mapping[str, Any], targets: Sequence[str]) -> list[str] | str | None:
    """What of the `exclude_modules` that was read still holds: without it, a target's namesake would be wrapped.

    An expression is kept only if it is an alternation of plain paths, as `exclusion` writes it.
    """
    given = config.get("exclude_modules")
    if isinstance(given, str):
        names = [re.sub(r"\\(.)", r"\1", piece) for piece in given.split("|")]
        if "|".join(map(re.escape, names)) != given:
            return None
        return "|".join(re.escape(name) for name in dict.fromkeys(names) if name not in set(targets)) or None
    named = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    caught = _caught_by(targets)
    return [name for name in named if name not in caught] or None


def _caught_by(targets: Iterable[str]) -> set[str]:
    """The names that would exclude one of `targets`, since PEFT takes the end of a path for a path."""
    return {suffix for target in targets for suffix in suffixes(target)}


def inherited(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What a re-written configuration of `kind` keeps of the one that was read, unknown keys included.

    Of one of another kind only what is no setting of that kind.
    """
    if "peft_type" in config and peft_type(config) != kind:
        return {key: config[key] for key in _OF_EVERY_KIND if key in config}
    return {key: value for key, value in config.items() if key not in _NOT_REPEATED}


def one_for_all(field: str, values: Mapping[str, Any]) -> Any:
    """The value that all modules share, for a field that a configuration has once.

    Args:
        field: its name.
        values: by module path; at least one.

    Raises:
        UnsupportedError: modules differ in it.
    """
    (first, value), *others = values.items()
    for path, other in others:
        if other != value:
            raise UnsupportedError(
                f"PEFT's format cannot hold: {field} {value} in {first} and {other} in {path}; it is one for all.",
                fix="Write the two sorts as adapters of their own (--include, --exclude).",
            )
    return value

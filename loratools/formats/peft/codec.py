"""PEFT adapters: the codec.

Specification: the checkpoint format page of PEFT's documentation
(https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint) and `LoraConfig`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.adapters import AbstractUpdate, Adapter, Full, Sum
from loratools.adapters.adapter import hub_name
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats._codec import AbstractCodec, Contents, Decoded, Encoded
from loratools.formats.peft import config as fields
from loratools.formats.peft import keys, limits
from loratools.formats.peft.names import Endings, begins_another
from loratools.formats.peft.patterns import prepared
from loratools.formats.peft.tuners import TUNERS, AbstractTuner, Module, tuner_of
from loratools.tensors import TensorRef

WEIGHTS_FILE: Final = "adapter_model.safetensors"
_MIXED: Final = " in one adapter"
_APART: Final = "Write the kinds as adapters of their own, or merge them one after the other."
_WRAPPABLE: Final = ({"weight"}, {"weight", "bias"})


class PeftCodec(AbstractCodec):
    """What all PEFT adapters share; what a kind of them is made of is its tuner's."""

    name = "peft"
    spec_url = "https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint"

    def fingerprint(self, contents: Contents) -> str | None:
        """See `AbstractCodec.fingerprint`."""
        if contents.config is not None and "peft_type" in contents.config:
            return f"{fields.CONFIG_FILE} has a peft_type"
        if any(key.startswith(keys.PREFIX) and ".lora_" in key for key in contents.tensors):
            return f"keys start with {keys.PREFIX!r}"
        return None

    def decode(self, contents: Contents) -> Decoded:
        """See `AbstractCodec.decode`."""
        config = contents.config
        if config is None:
            raise MalformedError(
                f"A PEFT adapter has its alpha in {fields.CONFIG_FILE}, which is not there: its scaling is unknown.",
                fix="Put the configuration beside the weights.",
            )
        tuner = tuner_of(config).knowing(contents.shapes)
        limits.refuse_absurd(config)
        tuner.refuse(config)
        config = tuner.prepared(prepared(config, fields.CONFIG_FILE))
        notes: list[str] = []
        shared = {key: ref for key, ref in contents.tensors.items() if key in tuner.shared}
        own = {key: ref for key, ref in contents.tensors.items() if key not in shared}
        modules, order = _grouped(_without_copies(own, notes), tuner)
        added = _added_rows(contents.side_tensors)
        for module in added:
            modules.setdefault(module, _Found())
        paths = tuner.paths({path: found.roles for path, found in modules.items()}, config)
        _require_one_each(paths)
        beside = _Beside(
            added, shared, _wrapped({paths[raw] for raw, found in modules.items() if not found.roles}, config)
        )
        updates = {
            paths[raw]: _update((raw, paths[raw]), found, tuner, config, beside, notes)
            for raw, found in sorted(modules.items(), key=lambda item: order.get(item[0], len(order)))
        }
        base = config.get("base_model_name_or_path")
        return Decoded(
            MappingProxyType(updates), base if isinstance(base, str) and base else None, tuple(dict.fromkeys(notes))
        )

    def cannot_hold(self, adapter: Adapter) -> list[str]:
        """See `AbstractCodec.cannot_hold`."""
        lost = [
            f"{path}: the {parameter} of an embedding or Conv1D under a low-rank update"
            for path, update in adapter.items()
            for parameter in update.replaced
            if update.changes_weight and parameter not in {"bias", "weight"}
        ]
        changed = _carried(adapter)
        if _tuner_for(changed, adapter.config) is None:
            kinds = sorted({update.kind for update in changed.values()})
            lost.append(f"updates of kind {', '.join(kinds)}{_MIXED}")
        return lost

    def encode(self, adapter: Adapter, *, siblings: Collection[str] = ()) -> Encoded:
        """See `AbstractCodec.encode`."""
        lost = self.cannot_hold(adapter)
        if lost:
            fix = _APART if lost[-1].endswith(_MIXED) else ""
            raise UnsupportedError(f"PEFT's format cannot hold: {'; '.join(lost)}.", fix=fix)
        changed = _carried(adapter)
        tuner = _tuner_for(changed, adapter.config)
        assert tuner is not None
        whole = _saved_modules(adapter, siblings)
        keyed = tuner.keyed(changed)
        places = tuner.key_paths(changed)
        tensors: dict[str, TensorRef] = dict(tuner.shared_tensors(changed))
        for path, update in adapter.items():
            tensors |= keyed.get(path, {})
            place = places.get(path, path)
            for parameter, ref in tuner.beside(update).items():
                tensors[keys.parameter_key(place, parameter, wrapped=update.changes_weight)] = ref
        config = _config(adapter, tuner, changed, whole, siblings)
        return Encoded(
            weights_name=WEIGHTS_FILE,
            tensors=_renamed(tensors),
            metadata={"format": "pt"},
            texts={fields.CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True, allow_nan=False)},
            side_tensors=_side(adapter),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A module's tensors: those of its tuner by role, and parameters given whole by name."""

    roles: dict[str, TensorRef] = dataclasses.field(default_factory=dict)
    parameters: dict[str, TensorRef] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class _Beside:
    """What modules have beside their own tensors: added rows by module, tensors of the model, PEFT's wrapper."""

    added: Mapping[str, Mapping[str, TensorRef]]
    shared: Mapping[str, TensorRef]
    wrapped: Collection[str]


def _carried(adapter: Adapter) -> dict[str, AbstractUpdate]:
    """The updates that are a tuner's: all but parameters that are given whole."""
    return {path: update for path, update in adapter.items() if update.own_keys or update.patches}


def _tuner_for(updates: Mapping[str, AbstractUpdate], config: Mapping[str, Any]) -> AbstractTuner | None:
    """The tuner that holds all of these updates; the one that they were read from, where it still does."""
    for path, update in updates.items():
        if isinstance(update, Sum):
            raise UnsupportedError("A sum of updates must be concatenated before it is written.", module=path)
    able = [each for each in TUNERS.values() if all(map(each.holds, updates.values()))]
    return next((each for each in able if each.peft_type == config.get("peft_type")), able[0] if able else None)


def _renamed(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    return {key: dataclasses.replace(ref, spec=ref.spec.renamed(key)) for key, ref in tensors.items()}


def _without_copies(tensors: Mapping[str, TensorRef], notes: list[str]) -> dict[str, TensorRef]:
    """Without what PEFT writes beside a saved embedding's own key, and does not load: see `keys.copied`."""
    copies = [key for key in tensors if keys.copied(key) in tensors]
    if copies:
        notes.append(f"Left out, since PEFT writes these copies and does not load them: {', '.join(copies)}.")
    left_out = set(copies)
    return {key: ref for key, ref in tensors.items() if key not in left_out}


def _grouped(tensors: Mapping[str, TensorRef], tuner: AbstractTuner) -> tuple[dict[str, _Found], dict[str, int]]:
    modules: dict[str, _Found] = {}
    order: dict[str, int] = {}
    for key, ref in tensors.items():
        parsed = keys.parse(key, tuner.roles)
        order.setdefault(parsed.module, len(order))
        found = modules.setdefault(parsed.module, _Found())
        whole = parsed.role in {keys.BASE_LAYER, keys.PARAMETER}
        name, place = (parsed.parameter, found.parameters) if whole else (parsed.role, found.roles)
        if name in place or any(rival in place for rival in keys.rivals(name)):
            raise MalformedError("The module has this under two keys; one of them would be ignored.", tensor=key)
        place[name] = ref
    return modules, order


def _update(
    names: tuple[str, str],
    found: _Found,
    tuner: AbstractTuner,
    config: Mapping[str, Any],
    beside: _Beside,
    notes: list[str],
) -> AbstractUpdate:
    raw, path = names
    rest: dict[str, Any] = {
        "replaced": MappingProxyType(found.parameters),
        "added_rows": MappingProxyType(dict(beside.added.get(raw, {}))),
    }
    if not found.roles:
        return Full(shared=path not in beside.wrapped, **rest)
    roles = MappingProxyType({**beside.shared, **found.roles})
    update = tuner.update(Module(path, tuner.pattern_name(raw, path), roles, config, rest, notes, raw))
    _require_all_used(path, found, tuner, update)
    return update


def _require_all_used(path: str, found: _Found, tuner: AbstractTuner, update: AbstractUpdate) -> None:
    """Refuse an update that is less than what the file holds of the module: `tensors` is the inverse of `update`."""
    used = {role.removesuffix(".weight") for role in tuner.tensors(update)}
    unused = [role for role in found.roles if role.removesuffix(".weight") not in used]
    if unused:
        raise UnsupportedError(
            f"The module has {unused[0]} beside an update of kind {update.kind}, which is not read with it.",
            module=path,
        )


def _wrapped(whole: Collection[str], config: Mapping[str, Any]) -> set[str]:
    """Which of the modules given whole PEFT wraps: those that `modules_to_save` names."""
    named = Endings(fields.saved_modules(config) if whole else ())
    return {path for path in whole if named.end(path)}


def _require_one_each(paths: Mapping[str, str]) -> None:
    """Refuse two entries of the file that stand for one module: one of them would be ignored."""
    taken: dict[str, str] = {}
    for key_path, path in paths.items():
        if taken.setdefault(path, key_path) != key_path:
            raise UnsupportedError(
                f"{taken[path]} and {key_path} are two updates of one module, wrapped twice by PEFT.", module=path
            )


def _added_rows(side: Mapping[str, Mapping[str, TensorRef]]) -> dict[str, dict[str, TensorRef]]:
    added: dict[str, dict[str, TensorRef]] = {}
    for name, ref in side.get(keys.ADDED_ROWS_FILE, {}).items():
        module, _, parameter = name.rpartition(".")
        added.setdefault(module, {})[parameter] = ref
    return added


def _side(adapter: Adapter) -> dict[str, dict[str, TensorRef]]:
    rows = {
        f"{path}.{parameter}": ref for path, update in adapter.items() for parameter, ref in update.added_rows.items()
    }
    return {keys.ADDED_ROWS_FILE: _renamed(rows)} if rows else {}


def _saved_modules(adapter: Adapter, siblings: Collection[str]) -> list[str]:
    """Modules that go under `modules_to_save`; the others' parameters are plain keys.

    PEFT wraps every module whose name ends with an entry, as a plain string suffix, and then demands
    all parameters of each: an entry that is a suffix of a neighbour's name would break the load. A
    plain key sets the parameter of the base in place, which is all that a bare parameter allows.
    """
    known = {*siblings, *adapter}
    named = Endings(fields.saved_modules(adapter.config))
    candidates = [
        path
        for path, update in adapter.items()
        if path and isinstance(update, Full) and not update.shared and set(update.replaced) in _WRAPPABLE
    ]
    if not siblings:
        candidates = [path for path in candidates if named.end(path)]
    names, turned = sorted(known), sorted(name[::-1] for name in known)
    return [
        path for path in candidates if not begins_another(f"{path}.", names) and not begins_another(path[::-1], turned)
    ]


def _config(
    adapter: Adapter,
    tuner: AbstractTuner,
    changed: Mapping[str, AbstractUpdate],
    whole: list[str],
    siblings: Collection[str],
) -> dict[str, Any]:
    read = fields.inherited(adapter.config, tuner.peft_type)
    kept = {field: value for field, value in read.items() if field not in tuner.restated}
    config = {**tuner.defaults, **kept, **tuner.fields(changed, siblings), **tuner.kept_fields(changed, kept)}
    if not siblings and changed and (excluded := fields.inherited_exclusion(adapter.config, list(changed))):
        config["exclude_modules"] = excluded
    config |= {
        "peft_type": tuner.peft_type,
        "inference_mode": True,
        "base_model_name_or_path": hub_name(config.get("base_model_name_or_path")) or hub_name(adapter.base_model),
    }
    if whole or tuner.holds_biases or "modules_to_save" in config:
        config["modules_to_save"] = whole or None
    if tuner.holds_biases:
        config["bias"] = _biases(adapter, changed, whole, tuner.own_biases)
    config.setdefault("task_type", None)
    if tuner.tells_orientation:
        config.setdefault("fan_in_fan_out", False)
    return config


def _biases(adapter: Adapter, changed: Mapping[str, AbstractUpdate], whole: Collection[str], own: str) -> str:
    """Which biases are given whole: of no layer, of the layers that are changed, or of others too."""
    apart = {*changed, *whole}
    others = [path for path in adapter if path not in apart]
    if any("bias" in adapter[path].replaced for path in others):
        return "all"
    return own if any("bias" in update.replaced for update in changed.values()) else "none"

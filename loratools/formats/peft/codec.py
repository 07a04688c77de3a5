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

from loratools.adapters import AbstractUpdate, Adapter, Full, LowRank
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats._codec import AbstractCodec, Contents, Decoded, Encoded
from loratools.formats.peft import config as fields
from loratools.formats.peft import keys
from loratools.tensors import TensorRef

WEIGHTS_FILE: Final = "adapter_model.safetensors"
_WRAPPABLE: Final = ({"weight"}, {"weight", "bias"})


class PeftCodec(AbstractCodec):
    """LoRA on Linear, HF Conv1D and Embedding; biases and whole modules beside them."""

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
        if contents.config is None:
            raise MalformedError(
                f"A PEFT adapter has its alpha in {fields.CONFIG_FILE}, which is not there: its scaling is unknown.",
                fix="Put the configuration beside the weights.",
            )
        fields.refuse_unsupported(contents.config)
        notes: list[str] = []
        modules, order = _grouped(_without_copies(contents.tensors, notes))
        added = _added_rows(contents.side_tensors)
        for module in added:
            modules.setdefault(module, {})
        if contents.config.get("lora_alpha") is None:
            notes.append(f"{fields.CONFIG_FILE} has no lora_alpha; PEFT's default of {fields.DEFAULT_ALPHA} is taken.")
        updates = {
            module: _update(module, roles, contents.config, added.get(module, {}), notes)
            for module, roles in sorted(modules.items(), key=lambda item: order.get(item[0], len(order)))
        }
        base = contents.config.get("base_model_name_or_path")
        return Decoded(MappingProxyType(updates), base if isinstance(base, str) and base else None, tuple(notes))

    def cannot_hold(self, adapter: Adapter) -> list[str]:
        """See `AbstractCodec.cannot_hold`."""
        return [
            f"{path}: the {parameter} of an embedding or Conv1D under a low-rank update"
            for path, update in adapter.items()
            for parameter in update.replaced
            if update.terms and parameter not in {"bias", "weight"}
        ]

    def encode(self, adapter: Adapter, *, siblings: Collection[str] = ()) -> Encoded:
        """See `AbstractCodec.encode`."""
        lost = self.cannot_hold(adapter)
        if lost:
            raise UnsupportedError(f"PEFT's format cannot hold: {'; '.join(lost)}.")
        low_rank = {path: _settled(path, update) for path, update in adapter.items() if update.terms}
        whole = _saved_modules(adapter, siblings)
        tensors: dict[str, TensorRef] = {}
        for path, update in adapter.items():
            if update.terms:
                a_key, b_key = keys.low_rank_keys(path, update.layer)
                tensors |= {a_key: low_rank[path].lora_A, b_key: low_rank[path].lora_B}
            for parameter, ref in update.replaced.items():
                tensors[keys.parameter_key(path, parameter, wrapped=bool(update.terms))] = ref
        config = _config(adapter, low_rank, whole, siblings)
        return Encoded(
            weights_name=WEIGHTS_FILE,
            tensors=_renamed(tensors),
            metadata={"format": "pt"},
            texts={fields.CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True, allow_nan=False)},
            side_tensors=_side(adapter),
        )


def _renamed(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    return {key: dataclasses.replace(ref, spec=ref.spec.renamed(key)) for key, ref in tensors.items()}


def _without_copies(tensors: Mapping[str, TensorRef], notes: list[str]) -> dict[str, TensorRef]:
    """Without what PEFT writes beside a saved embedding's own key, and does not load: see `keys.copied`."""
    copies = [key for key in tensors if keys.copied(key) in tensors]
    if copies:
        notes.append(f"Left out, since PEFT writes these copies and does not load them: {', '.join(copies)}.")
    return {key: ref for key, ref in tensors.items() if key not in set(copies)}


def _grouped(
    tensors: Mapping[str, TensorRef],
) -> tuple[dict[str, dict[tuple[str, str], TensorRef]], dict[str, int]]:
    modules: dict[str, dict[tuple[str, str], TensorRef]] = {}
    order: dict[str, int] = {}
    for key, ref in tensors.items():
        parsed = keys.parse(key)
        order.setdefault(parsed.module, len(order))
        roles = modules.setdefault(parsed.module, {})
        if any((role, parsed.parameter) in roles for role in keys.rivals(parsed.role)):
            raise MalformedError("The module has this under two keys; one of them would be ignored.", tensor=key)
        roles[parsed.role, parsed.parameter] = ref
    return modules, order


def _update(
    module: str,
    roles: Mapping[tuple[str, str], TensorRef],
    config: Mapping[str, Any],
    added: Mapping[str, TensorRef],
    notes: list[str],
) -> AbstractUpdate:
    replaced = {parameter: ref for (role, parameter), ref in roles.items() if role in {"base_layer", "parameter"}}
    embedding = ("lora_embedding_A", "") in roles or ("lora_embedding_B", "") in roles
    stem = "lora_embedding_" if embedding else "lora_"
    lora_A, lora_B = roles.get((f"{stem}A", "")), roles.get((f"{stem}B", ""))
    if lora_A is None and lora_B is None:
        wrapped = any(module.endswith(name) for name in fields.saved_modules(config))
        return Full(replaced=MappingProxyType(replaced), added_rows=MappingProxyType(dict(added)), shared=not wrapped)
    if lora_A is None or lora_B is None:
        there, missing = ("lora_B", "lora_A") if lora_A is None else ("lora_A", "lora_B")
        raise MalformedError(f"The module has {there} and no {missing}.", fix="The file is incomplete.", module=module)
    update = LowRank(
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=fields.alpha_of(config, module),
        use_rslora=fields.flag(config, "use_rslora"),
        of="embedding" if embedding else "linear",
        replaced=MappingProxyType(replaced),
        added_rows=MappingProxyType(dict(added)),
    )
    claimed = fields.rank_of(config, module)
    if claimed != update.lora_A.shape[0]:
        notes.append(
            f"{module}: the configuration says rank {claimed}, the tensors have rank {update.lora_A.shape[0]}, "
            "which is what counts."
        )
    return update


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


def _settled(path: str, update: AbstractUpdate) -> LowRank:
    if not isinstance(update, LowRank):
        raise UnsupportedError("A sum of updates must be concatenated before it is written.", module=path)
    return update


def _saved_modules(adapter: Adapter, siblings: Collection[str]) -> list[str]:
    """Modules that go under `modules_to_save`; the others' parameters are plain keys.

    PEFT wraps every module whose name ends with an entry, as a plain string suffix, and then demands
    all parameters of each: an entry that is a suffix of a neighbour's name would break the load. A
    plain key sets the parameter of the base in place, which is all that a bare parameter allows.
    """
    known = {*siblings, *adapter}
    named = fields.saved_modules(adapter.config)
    candidates = [
        path
        for path, update in adapter.items()
        if path and isinstance(update, Full) and not update.shared and set(update.replaced) in _WRAPPABLE
    ]
    if not siblings:
        candidates = [path for path in candidates if any(path == name or path.endswith(name) for name in named)]
    return [path for path in candidates if _alone(path, known)]


def _alone(path: str, known: Collection[str]) -> bool:
    return not any(other != path and (other.endswith(path) or other.startswith(f"{path}.")) for other in known)


def _config(
    adapter: Adapter, low_rank: Mapping[str, LowRank], whole: list[str], siblings: Collection[str]
) -> dict[str, Any]:
    config = fields.inherited(adapter.config) | fields.lora_fields(low_rank, siblings)
    if not siblings and low_rank and (excluded := fields.inherited_exclusion(adapter.config, list(low_rank))):
        config["exclude_modules"] = excluded
    biases = any("bias" in update.replaced for update in low_rank.values())
    plain_biases = any(
        "bias" in update.replaced for path, update in adapter.items() if not update.terms and path not in whole
    )
    config |= {
        "peft_type": "LORA",
        "inference_mode": True,
        "bias": "all" if plain_biases else "lora_only" if biases else "none",
        "modules_to_save": whole or None,
        "base_model_name_or_path": config.get("base_model_name_or_path") or adapter.base_model,
    }
    config.setdefault("task_type", None)
    config.setdefault("fan_in_fan_out", False)
    config.setdefault("lora_dropout", 0.0)
    return config

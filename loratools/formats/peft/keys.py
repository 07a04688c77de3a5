"""The grammar of PEFT's tensor keys: `base_model.model.<module>.<role>`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Final

from loratools.errors import MalformedError, UnsupportedError

PREFIX: Final = "base_model.model."
ADDED_ROWS_FILE: Final = "added_rows.safetensors"
"""Our side file beside PEFT's own: vocabulary rows that the base does not have (see docs/formats/peft.md)."""

BASE_LAYER: Final = "base_layer"
PARAMETER: Final = "parameter"

_BASE_LAYER: Final = re.compile(r"^(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)$")

_COPY: Final = re.compile(r"^(?P<module>.+)\.(modules_to_save|original_module)\.(?P<parameter>weight|bias)$")

_REFUSED: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.lora_magnitude_vector(\.|$)", "DoRA"),
        (r"\.lora_B\.bias$", "lora_bias"),
        (r"^base_model\..*\.lora_(embedding_)?[AB](\.weight)?$", "LoRA"),
        (r"\.token_adapter\.|\.trainable_tokens_delta$", "trainable tokens"),
        (r"\.lora_E$", "AdaLoRA"),
        (r"\.hada_[wt]\d", "LoHa"),
        (r"\.lokr_[wt]\d", "LoKr"),
        (r"\.vera_|base_model\.vera_", "VeRA"),
        (r"\.ia3_l$", "IA3"),
        (r"\.oft_r(\.|$)", "OFT of PEFT before 0.14 (oft_r), which PEFT does not load any more either"),
        (r"\.oft_(embedding_)?R", "OFT"),
        (r"\.boft_[Rs]", "BOFT"),
        (r"\.ln_tuning_layers\.", "LN tuning of a module that has other parameters than a weight and a bias"),
        (r"\.shira_(weight|indices)$", "SHiRA"),
        (r"\.c3a_kernel$", "C3A"),
        (r"\.hira_", "HiRA"),
        (r"\.hra_u$", "HRA"),
        (r"\.miss_block$|\.bone_", "MiSS"),
        (r"\.fourierft_", "FourierFT"),
        (r"\.lora_(A|B)\.[^.]+\.weight$", "keys that carry an adapter name (a raw state dict, not a saved adapter)"),
        (r"\.modules_to_save\.", "keys that carry the wrapper's name (a raw state dict, not a saved adapter)"),
        (r"prompt_embeddings", "prompt tuning"),
    )
)


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A parsed key: which module, which role there, and for whole parameters their name."""

    module: str
    role: str
    parameter: str = ""


def parse(key: str, roles: Collection[str]) -> Key:
    """What a key says.

    Args:
        key: as it stands in the file.
        roles: what may follow a module's path in this kind of adapter, such as `lora_A.weight`.

    Raises:
        MalformedError: it does not start as PEFT's keys do.
        UnsupportedError: it belongs to another kind of update than the configuration says; named.
    """
    if not key.startswith(PREFIX):
        _refuse_named(key)
        raise MalformedError(
            f"A key of a PEFT adapter starts with {PREFIX!r}.", fix="Is this another format?", tensor=key
        )
    rest = key[len(PREFIX) :]
    pieces = rest.split(".")
    for depth in (2, 1):  # `token_adapter.trainable_tokens_delta` before `trainable_tokens_delta`
        if ".".join(pieces[-depth:]) in roles and len(pieces) > depth:
            return Key(".".join(pieces[:-depth]), ".".join(pieces[-depth:]))
    _refuse_named(key)
    if found := _BASE_LAYER.match(rest):
        return Key(found["module"], BASE_LAYER, found["parameter"])
    module, _, parameter = rest.rpartition(".")
    return Key(module, PARAMETER, parameter)


def _refuse_named(key: str) -> None:
    for pattern, kind in _REFUSED:
        if pattern.search(key):
            raise UnsupportedError(
                f"This adapter uses {kind}, which is not what its configuration says, or is not read yet.",
                fix="Nothing was written.",
                tensor=key,
            )


_RIVALS: Final[Mapping[str, str]] = {
    "lora_A.weight": "lora_embedding_A",
    "lora_B.weight": "lora_embedding_B",
    "lora_embedding_A": "lora_A.weight",
    "lora_embedding_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}


def rivals(role: str) -> tuple[str, ...]:
    """Other roles that say the same of a module as `role` does: it can have one of them."""
    return (_RIVALS[role],) if role in _RIVALS else ()


def copied(key: str) -> str | None:
    """The key that `key` accompanies, if it is one of the wrapper's own parameters.

    `save_embedding_layers` stores a module of `modules_to_save` three times: under its own key, which is what PEFT
    loads, and as `modules_to_save` and `original_module` (the base's) below it.
    """
    found = _COPY.match(key)
    return f"{found['module']}.{found['parameter']}" if found else None


def role_key(module: str, role: str) -> str:
    """The key of one of a module's own tensors."""
    return f"{PREFIX}{module}.{role}"


def parameter_key(module: str, parameter: str, *, wrapped: bool) -> str:
    """The key of a parameter given whole: under `base_layer` where the module is a LoRA layer too."""
    path = f"{module}." if module else ""
    return f"{PREFIX}{path}{'base_layer.' if wrapped else ''}{parameter}"

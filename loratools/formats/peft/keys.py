"""The grammar of PEFT's tensor keys: `base_model.model.<module>.<role>`."""

from __future__ import annotations

import dataclasses
import re
from typing import Final, Literal

from loratools.errors import MalformedError, UnsupportedError

PREFIX: Final = "base_model.model."
ADDED_ROWS_FILE: Final = "added_rows.safetensors"
"""Our side file beside PEFT's own: vocabulary rows that the base does not have (see docs/formats/peft.md)."""

Role = Literal["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer", "parameter"]

_LORA: Final = re.compile(r"^(?P<module>.+)\.(?P<role>lora_A|lora_B)\.weight$")
_EMBEDDING: Final = re.compile(r"^(?P<module>.+)\.(?P<role>lora_embedding_A|lora_embedding_B)$")
_BASE_LAYER: Final = re.compile(r"^(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)$")

_COPY: Final = re.compile(r"^(?P<module>.+)\.(modules_to_save|original_module)\.(?P<parameter>weight|bias)$")

_REFUSED: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.lora_magnitude_vector(\.|$)", "DoRA"),
        (r"\.lora_B\.bias$", "lora_bias"),
        (r"\.token_adapter\.|\.trainable_tokens_delta$", "trainable tokens"),
        (r"\.lora_E$", "AdaLoRA"),
        (r"\.base_layer\.(base_layer|out_proj)\.", "nested wrappers (MultiheadAttention, target_parameters)"),
        (r"\.hada_[wt]\d", "LoHa"),
        (r"\.lokr_[wt]\d", "LoKr"),
        (r"\.vera_|base_model\.vera_", "VeRA"),
        (r"\.ia3_l$", "IA3"),
        (r"\.oft_[rR]", "OFT"),
        (r"\.boft_[Rs]", "BOFT"),
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
    role: Role
    parameter: str = ""


def parse(key: str) -> Key:
    """What a key says.

    Raises:
        MalformedError: it does not start as PEFT's keys do.
        UnsupportedError: it belongs to a kind of update that is not handled; named.
    """
    for pattern, kind in _REFUSED:
        if pattern.search(key):
            raise UnsupportedError(
                f"This adapter uses {kind}, which is not read yet.", fix="Nothing was written.", tensor=key
            )
    if not key.startswith(PREFIX):
        raise MalformedError(
            f"A key of a PEFT adapter starts with {PREFIX!r}.", fix="Is this another format?", tensor=key
        )
    rest = key[len(PREFIX) :]
    if found := _LORA.match(rest):
        return Key(found["module"], "lora_A" if found["role"] == "lora_A" else "lora_B")
    if found := _EMBEDDING.match(rest):
        return Key(found["module"], "lora_embedding_A" if found["role"].endswith("A") else "lora_embedding_B")
    if found := _BASE_LAYER.match(rest):
        return Key(found["module"], "base_layer", found["parameter"])
    module, _, parameter = rest.rpartition(".")
    return Key(module, "parameter", parameter)


def rivals(role: Role) -> tuple[str, ...]:
    """The roles that say the same of a module as `role` does: it can have one of them."""
    if role in {"base_layer", "parameter"}:
        return ("base_layer", "parameter")
    return f"lora_{role[-1]}", f"lora_embedding_{role[-1]}"


def copied(key: str) -> str | None:
    """The key that `key` accompanies, if it is one of the wrapper's own parameters.

    `save_embedding_layers` stores a module of `modules_to_save` three times: under its own key, which is what PEFT
    loads, and as `modules_to_save` and `original_module` (the base's) below it.
    """
    found = _COPY.match(key)
    return f"{found['module']}.{found['parameter']}" if found else None


def low_rank_keys(module: str, layer: str) -> tuple[str, str]:
    """The keys of `lora_A` and `lora_B`; an embedding's have no `.weight`."""
    if layer == "embedding":
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def parameter_key(module: str, parameter: str, *, wrapped: bool) -> str:
    """The key of a parameter given whole: under `base_layer` where the module is a LoRA layer too."""
    path = f"{module}." if module else ""
    return f"{PREFIX}{path}{'base_layer.' if wrapped else ''}{parameter}"

"""Experts: where a checkpoint keeps the matrices that a model class of transformers 5 holds as one stacked parameter.

In memory `gate_up_proj` is (experts, 2·I, H), gate before up, and `down_proj` (experts, H, I); files mostly hold a
matrix an expert, under names that differ by family (`transformers/conversion_mapping.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Final

_FIRST: Final = re.compile(r"^(?P<head>.*?)(?P<block>\w+)\.experts\.0\.(?P<name>\w+)\.weight$")
_STACKS: Final = (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)),
                  ("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))  # fmt: skip
"""A stacked parameter, and the matrices of one expert that lie in it below one another."""
_IN_MEMORY: Final = {"block_sparse_moe": "mlp"}
"""What a file calls the block → what the model class does, where they differ (Mixtral)."""

_ROUTERS: Final = (".mlp.gate", ".block_sparse_moe.gate")


def is_router(path: str, family: object) -> bool:
    """Whether a module weighs the experts: no Linear in the model class, so that no LoRA layer can wrap it."""
    return family in FUSED_FAMILIES and f".{path}".endswith(_ROUTERS)


def in_memory_path(path: str) -> str:
    """What the model class calls a module of a block that files call otherwise."""
    return ".".join(_IN_MEMORY.get(piece, piece) for piece in path.split("."))


def on_disk_paths(path: str) -> list[str]:
    """What files may call a module of such a block."""
    pieces = path.split(".")
    named = [
        (*pieces[:at], stored, *pieces[at + 1 :])
        for at, piece in enumerate(pieces)
        for stored, memory in _IN_MEMORY.items()
        if piece == memory
    ]
    return [".".join(each) for each in named]


TRANSPOSED_FAMILIES: Final = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""`model_type` of classes whose stacked parameters are (experts, in, out) (`is_transposed` in transformers)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """A stacked parameter that a checkpoint keeps apart.

    Attributes:
        experts: how many.
        head: what the names of an expert's tensors begin with, up to its number.
        names: the matrices of one expert that lie below one another.
    """

    experts: int
    head: str
    names: tuple[str, ...]

    def tensors(self, expert: int) -> list[str]:
        """The names of one expert's tensors, in the order of their rows."""
        return [f"{self.head}{expert}.{name}.weight" for name in self.names]


def stacks_of(names: Collection[str]) -> dict[str, Stack]:
    """Path of the stacked parameter in the model class → where the file has it."""
    found: dict[str, Stack] = {}
    known = set(names)
    for name in names:
        first = _FIRST.match(name)
        if first is None:
            continue
        head = f"{first['head']}{first['block']}.experts."
        for parameter, parts in _STACKS:
            if first["name"] != parts[0] or any(f"{head}0.{part}.weight" not in known for part in parts):
                continue
            count = 0
            while f"{head}{count}.{parts[0]}.weight" in known:
                count += 1
            for block in dict.fromkeys((_IN_MEMORY.get(first["block"], first["block"]), first["block"])):
                found[f"{first['head']}{block}.experts.{parameter}"] = Stack(count, head, parts)
    return found


FUSED_FAMILIES: Final = frozenset(
    {
        "mixtral", "minimax", "minimax_m2", "qwen2_moe", "qwen3_moe", "qwen3_next", "afmoe", "deepseek_v2",
        "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "glm4v_moe", "longcat_flash", "flex_olmo", "olmoe",
        "exaone_moe", "cohere2_moe",
    }
)  # fmt: skip
"""`model_type` of classes that stack, since transformers 5, what their files keep apart (`conversion_mapping.py`)."""

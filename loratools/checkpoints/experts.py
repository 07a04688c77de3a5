"""Experts: where a checkpoint keeps the matrices that a model class of transformers 5 holds as one stacked parameter.

In memory `gate_up_proj` is (experts, 2·I, H), gate before up, and `down_proj` (experts, H, I); files mostly hold a
matrix an expert, under names that differ by family (`transformers/conversion_mapping.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.tensors import TensorRef

_ONE: Final = re.compile(r"^(?P<head>.*\bexperts)\.(?P<expert>\d{1,6})\.(?P<name>\w+)$")
_STACKS: Final = (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)),
                  ("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))  # fmt: skip
"""A stacked parameter, and the matrices of one expert that lie in it below one another."""
_IN_MEMORY: Final = {"block_sparse_moe": "mlp"}
"""What a file calls the block → what the model class does, where they differ (Mixtral)."""

_ROUTERS: Final = frozenset({"gate", "router"})


def routers_of(paths: Collection[str]) -> frozenset[str]:
    """The modules that weigh experts beside them: mostly no Linear in the model class, which no LoRA layer can wrap."""
    blocks = {path[: at - 1] for path in paths if (at := f".{path}.".find(".experts.")) > 0}
    return frozenset(
        path for path in paths if path.rpartition(".")[2] in _ROUTERS and path.rpartition(".")[0] in blocks
    )


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

TURNED_IN_FILES: Final = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
"""`model_type` of families whose files hold (experts, in, out) or (experts, out, in), and whose classes the latter."""


def is_turned(parameter: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a file holds a stacked parameter of this shape as (experts, in, out).

    Classes that transformers marks `is_transposed` hold it so too; of a family whose files differ, it turns what has
    not the class's shape when it loads them (class Transpose, `core_model_loading.py`).
    """
    family, inner = model_type(config), config.get("text_config")
    hidden = (inner if isinstance(inner, Mapping) else config).get("hidden_size")
    straight = shape[1 if parameter.startswith("down") else 2] == hidden
    return family in TRANSPOSED_FAMILIES or (family in TURNED_IN_FILES and not straight)


def is_transposed(config: Mapping[str, Any]) -> bool | None:
    """Whether the family's class holds (experts, in, out); None where the family is not known."""
    family = model_type(config)
    known = FUSED_FAMILIES | TURNED_IN_FILES | _OTHERS
    return True if family in TRANSPOSED_FAMILIES else False if family in known else None


def model_type(config: Mapping[str, Any]) -> str | None:
    """The configuration's `model_type`, of its text model where it has one."""
    inner = config.get("text_config")
    for each in (inner if isinstance(inner, Mapping) else {}, config):
        if isinstance(each.get("model_type"), str):
            return str(each["model_type"])
    return None


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


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One expert's matrix in a stored stack: the `at`-th of `of` that lie below one another."""

    tensor: str
    expert: int
    at: int
    of: int


def piece_of(name: str, known: Collection[str]) -> Piece | None:
    """Where a stack among the `known` names holds the matrix that other files call `name`, a module path."""
    found = _ONE.match(name)
    if found is None:
        return None
    for parameter, parts in _STACKS:
        for head in (found["head"], in_memory_path(found["head"]), *on_disk_paths(found["head"])):
            tensor = f"{head}.{parameter}"
            if found["name"] in parts and tensor in known:
                return Piece(tensor, int(found["expert"]), parts.index(found["name"]), len(parts))
    return None


def parameter_shapes(base: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of what is stored, and of the stacked parameters whose matrices are stored one by one."""
    shapes = {name: ref.shape for name, ref in base.items()}
    for path, stack in stacks_of(list(base)).items():
        parts = [shapes[name] for name in stack.tensors(0)]
        if all(len(part) == 2 for part in parts):  # noqa: PLR2004
            shapes[path] = (stack.experts, sum(part[0] for part in parts), parts[0][1])
    return shapes


def stacks_of(names: Collection[str]) -> dict[str, Stack]:
    """Path of the stacked parameter in the model class → where the file has it."""
    found: dict[str, Stack] = {}
    known = set(names)
    for name in names:
        front, found_it, matrix = name.removesuffix(".weight").rpartition(".experts.0.")
        if not found_it or "." in matrix or not name.endswith(".weight"):
            continue
        outer, dot, block = front.rpartition(".")
        start, head = outer + dot, f"{front}.experts."
        for parameter, parts in _STACKS:
            if matrix != parts[0] or any(f"{head}0.{part}.weight" not in known for part in parts):
                continue
            count = 0
            while f"{head}{count}.{parts[0]}.weight" in known:
                count += 1
            for named in dict.fromkeys((_IN_MEMORY.get(block, block), block)):
                found[f"{start}{named}.experts.{parameter}"] = Stack(count, head, parts)
    return found


FUSED_FAMILIES: Final = frozenset(
    {
        "mixtral", "minimax", "minimax_m2", "qwen2_moe", "qwen3_moe", "qwen3_next", "afmoe", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
        "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "flex_olmo", "olmoe", "exaone_moe", "cohere2_moe",
        "solar_open",
    }
)  # fmt: skip
"""`model_type` of classes that stack, since transformers 5, what their files keep apart (`conversion_mapping.py`)."""

_OTHERS: Final = frozenset(
    {
        "gemma4", "gemma4_text", "granitemoe", "granitemoehybrid", "granitemoeshared", "jamba", "lfm2_moe", "llama4",
        "llama4_text", "phimoe", "qwen3_5_moe", "qwen3_5_moe_text",
    }
)  # fmt: skip
"""`model_type` of other classes that stack experts and do not say `is_transposed`."""

_MOVED_BY_PEFT: Final = (
    (frozenset({"w1", "w2", "w3"}), frozenset({"minimax", "minimax_m2", "mixtral"})),
    (
        frozenset({"gate_proj", "up_proj", "down_proj"}),
        frozenset(
            {
                "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
                "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
                "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
                "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
            }
        ),
    ),
)  # fmt: skip


def is_moved_by_peft(path: str, family: object) -> bool:
    """Whether PEFT takes a target of this name for the experts' of the stacked class, wherever it is.

    In these families (`_MODEL_TO_CONVERSION_PATTERN`) PEFT 0.19 and later turn it into a target parameter of that name
    and double the rank of `gate_up_proj` (`_convert_peft_config_moe`, `peft/utils/transformers_weight_conversion.py`):
    a dense layer or a shared expert is then not wrapped, and the experts are in another shape.
    """
    last = path.rpartition(".")[2]
    return _ONE.match(path) is None and any(last in names and family in known for names, known in _MOVED_BY_PEFT)

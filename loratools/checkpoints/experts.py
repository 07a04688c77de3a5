"""Experts as checkpoints store them, and as the model classes of transformers 5 hold them.

Many families store a matrix per expert and projection (`mlp.experts.3.up_proj.weight`); their classes fuse them into
`gate_up_proj` (experts, 2 · intermediate, hidden), the gate's rows first, and `down_proj` (experts, hidden,
intermediate). Facts as data, after `conversion_mapping.py`, `integrations/moe.py` and the modelling files of
transformers 5 (https://github.com/huggingface/transformers).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.checkpoints.checkpoint import Checkpoint

_W: Final = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_NAMED: Final = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_FC: Final = {"fc1": "gate_up_proj", "fc3": "gate_up_proj", "fc2": "down_proj"}
PIECES: Final[Mapping[str, str]] = MappingProxyType({**_W, **_NAMED, **_FC})
"""A stored projection → the parameter that it is a piece of; a parameter's pieces stand in their order."""

SIDES: Final[Mapping[str, str]] = MappingProxyType({"block_sparse_moe.experts": "mlp.experts"})
"""How files end a path that model classes end otherwise."""

_W_FAMILIES: Final = frozenset({"mixtral", "phimoe", "minimax", "minimax_m2"})
_NAMED_FAMILIES: Final = frozenset(
    {
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
        "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "jamba", "longcat_flash", "olmoe",
        "qwen2_moe", "qwen3_moe", "qwen3_next", "solar_open",
    }
)  # fmt: skip
FUSED: Final = _W_FAMILIES | _NAMED_FAMILIES | {"lfm2_moe"}
"""config `model_type` of families that store a matrix per expert, and whose classes fuse them as above."""

TRANSPOSED: Final = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""config `model_type` of families whose class says `is_transposed`: (experts, in, out)."""

STORED_TURNED: Final = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
"""config `model_type` of families whose files hold (experts, in, out), and whose class (experts, out, in)."""

STRAIGHT: Final = FUSED | STORED_TURNED | frozenset(
    {"granitemoe", "granitemoehybrid", "granitemoeshared", "llama4", "llama4_text", "qwen3_5_moe", "qwen3_5_moe_text",
     "gemma4", "gemma4_text", "mistral4"}
)  # fmt: skip
"""config `model_type` of families whose class does not say `is_transposed`."""

_STORED: Final = re.compile(r"^(?P<module>.+)\.(?P<expert>\d+)\.(?P<piece>[^.]+)\.weight$")


@dataclasses.dataclass(frozen=True, slots=True)
class Fused:
    """A parameter of a model class that a checkpoint stores in pieces.

    Attributes:
        module: the path before the number of the expert, as stored.
        parameter: what the class calls it, `gate_up_proj` or `down_proj`.
        pieces: per expert the names of the tensors whose rows, one after the other, are its matrix.
        rows: of each piece, alike for all experts.
        columns: of all of them.
    """

    module: str
    parameter: str
    pieces: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in), as the class holds it."""
        return len(self.pieces), sum(self.rows), self.columns

    @property
    def path(self) -> str:
        """The class's path of the parameter."""
        module = self.module
        for stored, held in SIDES.items():
            if module == stored or module.endswith(f".{stored}"):
                module = module.removesuffix(stored) + held
        return f"{module}.{self.parameter}"

    def spans(self) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """(expert, tensor name, its rows in the expert's matrix) of every stored tensor."""
        for expert, names in enumerate(self.pieces):
            start = 0
            for name, rows in zip(names, self.rows, strict=True):
                yield expert, name, (start, start + rows)
                start += rows


def fused(checkpoint: Checkpoint) -> dict[str, Fused]:
    """Every parameter that is stored in pieces, by the class's path and by the stored one."""
    groups: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for name, ref in checkpoint.items():
        found = _STORED.match(name)
        if found is None or found["piece"] not in PIECES or len(ref.shape) != 2:  # noqa: PLR2004
            continue
        if not found["module"].endswith("experts"):
            continue
        key = found["module"], PIECES[found["piece"]]
        groups.setdefault(key, {}).setdefault(int(found["expert"]), {})[found["piece"]] = name
    whole: dict[str, Fused] = {}
    for (module, parameter), experts in groups.items():
        each = _fused(module, parameter, experts, checkpoint)
        if each is not None:
            whole[each.path] = each
            whole[f"{module}.{parameter}"] = each
    return whole


def _fused(module: str, parameter: str, experts: Mapping[int, Mapping[str, str]], base: Checkpoint) -> Fused | None:
    """None where experts are missing or differ: then nothing can be said of a parameter."""
    order = [piece for piece in PIECES if PIECES[piece] == parameter and piece in experts.get(0, {})]
    if sorted(experts) != list(range(len(experts))) or any(set(each) != set(order) for each in experts.values()):
        return None
    pieces = tuple(tuple(experts[index][piece] for piece in order) for index in range(len(experts)))
    shapes = {tuple(base[name].shape for name in names) for names in pieces}
    columns = {base[name].shape[1] for names in pieces for name in names}
    if len(shapes) != 1 or len(columns) != 1:
        return None
    return Fused(module, parameter, pieces, tuple(shape[0] for shape in shapes.pop()), columns.pop())


def parameter_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of what is stored, and of parameters that are stored in pieces."""
    shapes = {name: ref.shape for name, ref in checkpoint.items()}
    return shapes | {path: each.shape for path, each in fused(checkpoint).items()}


def family(config: Mapping[str, Any]) -> str | None:
    """The configuration's `model_type`, of its text model where it has one."""
    inner = config.get("text_config")
    for each in (inner if isinstance(inner, Mapping) else {}, config):
        if isinstance(each.get("model_type"), str):
            return str(each["model_type"])
    return None


def is_transposed(config: Mapping[str, Any]) -> bool | None:
    """Whether the family's class says `is_transposed`; None where it is not known."""
    name = family(config)
    return True if name in TRANSPOSED else False if name in STRAIGHT else None

"""The forms that the tensors of a LoRA layer take, and back: matrices, embeddings, kernels, groups, blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.block_diagonal import BlockDiagonal
from loratools.adapters.experts import Stacked
from loratools.adapters.grouped import Grouped
from loratools.errors import MalformedError, MismatchError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.names import Anywhere, listed
from loratools.formats.peft.tuners._tuner import Module
from loratools.tensors import TensorRef

A: Final = "lora_A.weight"
B: Final = "lora_B.weight"
EMBEDDING_A: Final = "lora_embedding_A"
EMBEDDING_B: Final = "lora_embedding_B"
BIAS: Final = "lora_B.bias"
_MATRIX: Final = 2


def low_rank(module: Module, parameter: str = "weight") -> LowRank:
    """LoRA on a Linear, an embedding, a convolution, or a named parameter."""
    common: dict[str, Any] = {
        "alpha": fields.alpha_of(module.config, module.name),
        "use_rslora": fields.flag(module.config, "use_rslora"),
        "parameter": parameter,
    }
    if {EMBEDDING_A, EMBEDDING_B} & module.roles.keys():
        return LowRank(lora_A=module[EMBEDDING_A], lora_B=module[EMBEDDING_B], of="embedding", **common)
    lora_A, lora_B, bias = module[A], module[B], module.roles.get(BIAS)
    if len(lora_A.shape) <= _MATRIX:
        return LowRank(lora_A=lora_A, lora_B=lora_B, bias=bias, **common)
    kernel = lora_A.shape[2:]
    lora_A, lora_B = _flat(module, lora_A, lora_B)
    return LowRank(lora_A=lora_A, lora_B=lora_B, bias=bias, of="conv", kernel=kernel, **common)


def _flat(module: Module, lora_A: TensorRef, lora_B: TensorRef) -> tuple[TensorRef, TensorRef]:
    """A convolution's factors as matrices: (r, in·k·…) and (out, r)."""
    rank = lora_A.shape[0]
    ones = (1,) * (len(lora_A.shape) - _MATRIX)
    if len(lora_B.shape) == len(lora_A.shape) and 0 < lora_B.shape[1] < rank and rank % lora_B.shape[1] == 0:
        raise UnsupportedError(
            f"This is an adapter of a convolution of {rank // lora_B.shape[1]} groups: lora_A mixes them, so that its "
            "ΔW is no kernel of the base, and PEFT does not merge it either.",
            module=module.path,
        )
    if lora_B.shape[2:] != ones:
        raise MismatchError(
            f"lora_A of shape {lora_A.shape} and lora_B of shape {lora_B.shape} are no convolution's factors.",
            module=module.path,
        )
    return lora_A.reshaped((rank, math.prod(lora_A.shape[1:]))), lora_B.reshaped(lora_B.shape[:2])


def low_rank_tensors(update: LowRank) -> dict[str, TensorRef]:
    """The inverse of `low_rank`."""
    lora_A, lora_B = update.lora_A, update.lora_B
    if update.of == "embedding":
        return {EMBEDDING_A: lora_A, EMBEDDING_B: lora_B}
    if update.of == "conv":
        rank, columns = lora_A.shape
        lora_A = lora_A.reshaped((rank, columns // math.prod(update.kernel), *update.kernel))
        lora_B = lora_B.reshaped((*lora_B.shape, *(1 for _ in update.kernel)))
    return {A: lora_A, B: lora_B} | ({BIAS: update.bias} if update.bias is not None else {})


def grouped(module: Module) -> Grouped:
    """QALoRA; `qalora_group_size` inputs are one to A."""
    return Grouped(
        lora_A=module[A],
        lora_B=module[B],
        alpha=fields.alpha_of(module.config, module.name),
        group=fields.integer(module.config, "qalora_group_size", 16),
        use_rslora=fields.flag(module.config, "use_rslora"),
    )


@final
class Blocks:
    """`use_bdlora`, ready for many modules. PEFT looks for each name of its lists anywhere in the module's path.

    Raises:
        MalformedError: a list is none of names, or the number of blocks none.
    """

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self._named = {
            side: Anywhere(listed(setting, f"target_modules_bd_{side.lower()}", file=fields.CONFIG_FILE))
            for side in ("A", "B")
        }
        self.number = fields.integer(setting, "nblocks", 1)

    def sides(self, path: str) -> list[str]:
        """For which factors the lists name a module."""
        return [side for side, names in self._named.items() if names.find(path) is not None]


def block_diagonal(module: Module, setting: Blocks) -> BlockDiagonal | LowRank:
    """BD-LoRA, where `use_bdlora` says that this module has a block-diagonal factor; else plain LoRA."""
    compact = setting.sides(module.path)
    if not compact:
        return low_rank(module)
    if len(compact) > 1:
        raise MalformedError("use_bdlora names the module for both factors.", module=module.path)
    return BlockDiagonal(
        lora_A=module[A],
        lora_B=module[B],
        alpha=fields.alpha_of(module.config, module.name),
        blocks=setting.number,
        compact="A" if compact == ["A"] else "B",
        use_rslora=fields.flag(module.config, "use_rslora"),
    )


def rank_of(update: AbstractUpdate) -> int:
    """The rank that the configuration gives of a form."""
    if isinstance(update, Stacked):
        return update.rank
    assert isinstance(update, (LowRank, Grouped, BlockDiagonal))
    return update.lora_A.shape[0]

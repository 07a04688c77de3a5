"""OFT: Linear, Conv2d, Embedding.

Fields after `OFTConfig` of PEFT 0.21, keys after `peft/tuners/oft/layer.py` (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.oft import Oft
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_R: Final = "oft_R.weight"
_EMBEDDING_R: Final = "oft_embedding_R.weight"
_EPS: Final = 6e-5
_TERMS: Final = 5
_MAX_TERMS: Final = 1024
_FIELD: Final = "num_cayley_neumann_terms"
_SERIES_SINCE: Final = (0, 18)


class OftTuner(AbstractTuner):
    """`W' = W Rᵀ`, R block-diagonal and orthogonal."""

    peft_type = "OFT"
    roles = (_R, _EMBEDDING_R)
    own_biases = "oft_only"

    def refuse(self, config: Mapping[str, Any]) -> None:
        """See `AbstractTuner.refuse`."""
        if "oft_block_size" not in config:
            raise UnsupportedError(
                "This is OFT of PEFT before 0.14 (the configuration has no oft_block_size), which was another one; "
                "PEFT does not load it any more either.",
                file=fields.CONFIG_FILE,
            )
        version = config.get("peft_version")
        if _series(config) is not None and _numbers(version) < _SERIES_SINCE:
            raise UnsupportedError(
                f"The Cayley-Neumann series of OFT was another before PEFT 0.18; this is of {version or 'unknown'}.",
                fix="If it was trained with PEFT 0.18 or later, say so in peft_version.",
                file=fields.CONFIG_FILE,
                field="peft_version",
            )

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        embedding = _EMBEDDING_R in module.roles
        coft = fields.flag(module.config, "coft")
        return Oft(
            oft_R=module[_EMBEDDING_R if embedding else _R],
            block_share=fields.flag(module.config, "block_share"),
            neumann_terms=_series(module.config),
            coft=float(fields.number(module.config, "eps", _EPS)) if coft else None,
            embedding=embedding,
            **module.rest,
        )

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, Oft)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, Oft)
        return {_EMBEDDING_R if update.embedding else _R: update.oft_R}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, Oft)}
        shared = fields.one_for_all("block_share", {path: update.block_share for path, update in held.items()})
        terms = fields.one_for_all(
            "num_cayley_neumann_terms", {path: update.neumann_terms for path, update in held.items()}
        )
        coft = fields.one_for_all("coft", {path: update.coft for path, update in held.items()})
        return {
            **fields.target_fields(list(updates), siblings),
            **_blocks(held),
            "block_share": shared,
            "use_cayley_neumann": terms is not None,
            "num_cayley_neumann_terms": _TERMS if terms is None else terms,
            "coft": coft is not None,
            "eps": _EPS if coft is None else coft,
        }


def _series(config: Mapping[str, Any]) -> int | None:
    neumann = True if config.get("use_cayley_neumann") is None else fields.flag(config, "use_cayley_neumann")
    if not neumann:
        return None
    terms = fields.integer(config, _FIELD, _TERMS)
    if terms > _MAX_TERMS:
        raise MalformedError(
            f"A series of more than {_MAX_TERMS} terms cannot be meant.",
            file=fields.CONFIG_FILE,
            field=_FIELD,
            value=terms,
        )
    return terms


def _numbers(version: Any) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _blocks(held: Mapping[str, Oft]) -> dict[str, int]:
    """`oft_block_size`, or `r`, the number of blocks, from which PEFT derives the other for every module.

    Raises:
        UnsupportedError: there is no such number.
    """
    sizes = {update.block_size for update in held.values()}
    if len(sizes) == 1:
        return {"oft_block_size": sizes.pop(), "r": 0}
    widths = {(update.columns, update.block_size) for update in held.values()}
    known = [(columns, size) for columns, size in widths if columns is not None]
    if len(known) == len(widths):
        for number in range(1, 2 * max(sizes) + 1):
            if all(adjusted(columns, number) == size for columns, size in known):
                return {"oft_block_size": number, "r": 0}
        for number in range(1, max(columns // size for columns, size in known) * 2 + 1):
            if all(columns // adjusted(columns, number) == size for columns, size in known):
                return {"oft_block_size": 0, "r": number}
    raise UnsupportedError(
        f"PEFT's format cannot hold: blocks of {', '.join(map(str, sorted(sizes)))} in one OFT adapter, "
        "for which there is no one oft_block_size or r.",
        fix="Write them as adapters of their own (--include, --exclude).",
    )


def adjusted(columns: int, number: int) -> int:
    """What PEFT makes of a block size or a number of blocks that does not divide the width: the nearest that does.

    The smaller of two that are equally near; the width itself where the number is not below it
    (`OFTLayer.adjust_oft_parameters`).
    """
    if number >= columns:
        return columns
    if number < 1:
        raise MalformedError("oft_block_size and r must be positive.", file=fields.CONFIG_FILE)
    higher = next(each for each in range(number, columns + 1) if columns % each == 0)
    lower = next(each for each in range(number, 0, -1) if columns % each == 0)
    return lower if number - lower <= higher - number else higher

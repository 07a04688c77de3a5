"""MiSS: Linear; also its variants `bat` and `mini`.

Fields after `MissConfig` of PEFT 0.21, keys and formulas after `peft/tuners/miss/layer.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.miss import AbstractMiss, Miss, MissBat
from loratools.errors import UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_BLOCK: Final = "miss_block"
_FORMS: Final = (True, False, None, "bat", "mini")


class MissTuner(AbstractTuner):
    """`ΔW[o, i] = miss_block[i mod r, o]`; which variant it is, `init_weights` says."""

    peft_type = "MISS"
    roles = (_BLOCK,)
    own_biases = "MiSS_only"
    tells_orientation = False

    def refuse(self, config: Mapping[str, Any]) -> None:
        """See `AbstractTuner.refuse`."""
        form = config.get("init_weights")
        if form not in _FORMS:
            raise UnsupportedError(
                f"This is MiSS with init_weights {form!r}, which is not known.", file=fields.CONFIG_FILE
            )

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        block, form = module[_BLOCK], module.config.get("init_weights")
        if form == "bat":
            return MissBat(miss_block=block, **module.rest)
        return Miss(miss_block=block, mini=form == "mini", **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, AbstractMiss)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, AbstractMiss)
        return {_BLOCK: update.miss_block}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        held = {path: update for path, update in updates.items() if isinstance(update, AbstractMiss)}
        form = fields.one_for_all("init_weights", {path: _form(update) for path, update in held.items()})
        widths = {path: update.miss_block.shape[1] for path, update in held.items()}
        return {
            **fields.target_fields(list(updates), siblings),
            "r": fields.one_for_all("r", {path: update.rank for path, update in held.items()}),
            "init_weights": form,
            **({"mini_r": fields.one_for_all("mini_r", widths)} if form == "mini" else {}),
        }


def _form(update: AbstractMiss) -> bool | str:
    if isinstance(update, MissBat):
        return "bat"
    return "mini" if isinstance(update, Miss) and update.mini else True

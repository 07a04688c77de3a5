"""VeRA: Linear and HF Conv1D.

Fields after `VeraConfig` of PEFT 0.21, keys and formula after `peft/tuners/vera/layer.py` and `model.py`
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.vera import Vera
from loratools.errors import MalformedError, UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_VECTORS: Final = ("vera_lambda_b", "vera_lambda_d")
_MATRICES: Final = ("vera_A", "vera_B")
_PREFIX: Final = "base_model."


class VeraTuner(AbstractTuner):
    """`ΔW = diag(lambda_b) vera_B · diag(lambda_d) vera_A`, the matrices cut to the module's size."""

    peft_type = "VERA"
    roles = _VECTORS
    shared = tuple(_PREFIX + name for name in _MATRICES)
    own_biases = "vera_only"

    def refuse(self, config: Mapping[str, Any]) -> None:
        """See `AbstractTuner.refuse`."""
        if config.get("save_projection") is False:
            raise UnsupportedError(
                "This VeRA adapter was saved without its projections (save_projection is false): they would have to be "
                "drawn again at random, and other versions of torch draw other numbers.",
                fix="Load it with the PEFT and torch that trained it, and save it with save_projection=True.",
                file=fields.CONFIG_FILE,
                field="save_projection",
            )

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        missing = [name for name in _MATRICES if _PREFIX + name not in module.roles]
        if missing:
            raise MalformedError(f"The adapter has no {_PREFIX}{missing[0]}.", fix="The file is incomplete.")
        tensors: dict[str, Any] = {name: module[name] for name in _VECTORS}
        tensors |= {name: module[_PREFIX + name] for name in _MATRICES}
        return Vera(**tensors, **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, Vera)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        return {name: getattr(update, name) for name in _VECTORS}

    def shared_tensors(self, updates: Mapping[str, AbstractUpdate]) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.shared_tensors`."""
        held: dict[str, TensorRef] = {}
        for path, update in updates.items():
            for name in _MATRICES:
                mine: TensorRef = getattr(update, name)
                if not _same(held.setdefault(_PREFIX + name, mine), mine):
                    raise UnsupportedError(
                        f"PEFT's format cannot hold: a {name} of their own for several modules.", module=path
                    )
        return held

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`."""
        return {
            **fields.target_fields(list(updates), siblings),
            "r": fields.one_for_all("r", {path: update.rank for path, update in updates.items()}),
            "save_projection": True,
        }


def _same(one: TensorRef, other: TensorRef) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return (one.source is other.source and one.offset == other.offset) or one.read() == other.read()

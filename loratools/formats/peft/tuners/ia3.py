"""IA3: Linear, HF Conv1D, Conv2d, Conv3d.

Fields after `IA3Config` of PEFT 0.21, keys after `peft/tuners/ia3/layer.py` (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.ia3 import Ia3
from loratools.errors import MalformedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.names import Endings
from loratools.formats.peft.patterns import WholeExpression
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.tensors import TensorRef

_L: Final = "ia3_l"
_FIELD: Final = "feedforward_modules"
_MATRIX: Final = 2


class Ia3Tuner(AbstractTuner):
    """Outputs times l; of feedforward modules inputs times l."""

    peft_type = "IA3"
    roles = (_L,)
    holds_biases = False

    def prepared(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `AbstractTuner.prepared`."""
        value = config.get(_FIELD)
        if value is None or isinstance(value, WholeExpression):
            return config
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise MalformedError("This field must be a list of names, or an expression.", field=_FIELD, value=value)
        return {**config, _FIELD: Endings(value)}

    def update(self, module: Module) -> AbstractUpdate:
        """See `AbstractTuner.update`."""
        return Ia3(ia3_l=module[_L], feedforward=_feedforward(module), **module.rest)

    def holds(self, update: AbstractUpdate) -> bool:
        """See `AbstractTuner.holds`."""
        return isinstance(update, Ia3)

    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """See `AbstractTuner.tensors`."""
        assert isinstance(update, Ia3)
        return {_L: update.ia3_l}

    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """See `AbstractTuner.fields`.

        A name in the list is any end of a module's path, at a dot or not: an expression is written where that would
        catch others.
        """
        inputs = [path for path, update in updates.items() if isinstance(update, Ia3) and update.feedforward]
        known, ends = set(inputs), Endings(inputs)
        caught = any(ends.end(path) for path in updates if path not in known)
        return {
            **fields.target_fields(list(updates), siblings),
            _FIELD: "|".join(re.escape(path) for path in inputs) if caught else inputs,
        }


def _feedforward(module: Module) -> bool:
    """Whether the input is scaled: as the configuration says, and as a matrix's l shows.

    Raises:
        MalformedError: the two disagree, or neither says it.
    """
    shape = module[_L].shape
    shown = shape[0] == 1 if len(shape) == _MATRIX and shape != (1, 1) else None
    said = _said(module)
    if said is None and shown is None:
        raise MalformedError(
            "Whether l scales inputs or outputs cannot be told: the configuration has no feedforward_modules.",
            file=fields.CONFIG_FILE,
            module=module.path,
        )
    if None not in {said, shown} and said is not shown:
        raise MalformedError(
            f"ia3_l has shape {shape}, and by feedforward_modules the module is {'' if said else 'not '}feedforward.",
            module=module.path,
        )
    return bool(said if shown is None else shown)


def _said(module: Module) -> bool | None:
    value = module.config.get(_FIELD)
    if value is None:
        return None
    if isinstance(value, WholeExpression):
        return value.matches(module.path)
    assert isinstance(value, Endings)
    return value.end(module.path)

"""The kinds of adapter that PEFT calls tuners: one file each, what its tensors are called and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.errors import UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.formats.peft.tuners.adalora import AdaLoraTuner
from loratools.formats.peft.tuners.loha import LoHaTuner
from loratools.formats.peft.tuners.lokr import LoKrTuner
from loratools.formats.peft.tuners.lora import LoraTuner
from loratools.formats.peft.tuners.miss import MissTuner
from loratools.formats.peft.tuners.tokens import TrainableTokensTuner
from loratools.formats.peft.tuners.vera import VeraTuner

__all__ = ["TUNERS", "AbstractTuner", "Module", "tuner_of"]

TUNERS: Final[Mapping[str, AbstractTuner]] = MappingProxyType(
    {
        tuner.peft_type: tuner
        for tuner in (
            LoraTuner(),
            TrainableTokensTuner(),
            AdaLoraTuner(),
            LoHaTuner(),
            LoKrTuner(),
            MissTuner(),
            VeraTuner(),
        )
    }
)
"""`peft_type` → its tuner; all others are refused by name."""


def tuner_of(config: Mapping[str, Any]) -> AbstractTuner:
    """The tuner that a configuration names.

    Raises:
        MalformedError: it names none.
        UnsupportedError: it is not one of those that are read.
    """
    kind = fields.peft_type(config)
    if kind not in TUNERS:
        raise UnsupportedError(
            f"Adapters of type {config['peft_type']} are not read yet.",
            fix=f"These are: {', '.join(TUNERS)}.",
            file=fields.CONFIG_FILE,
        )
    return TUNERS[kind]

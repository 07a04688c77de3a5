"""The kinds of adapter that PEFT calls tuners: one file each, what its tensors are called and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratools.errors import UnsupportedError
from loratools.formats.peft import config as fields
from loratools.formats.peft.tuners._tuner import AbstractTuner, Module
from loratools.formats.peft.tuners.adalora import AdaLoraTuner
from loratools.formats.peft.tuners.boft import BoftTuner
from loratools.formats.peft.tuners.c3a import C3aTuner
from loratools.formats.peft.tuners.fourierft import FourierFtTuner
from loratools.formats.peft.tuners.hra import HraTuner
from loratools.formats.peft.tuners.ia3 import Ia3Tuner
from loratools.formats.peft.tuners.ln_tuning import LnTuningTuner
from loratools.formats.peft.tuners.loha import LoHaTuner
from loratools.formats.peft.tuners.lokr import LoKrTuner
from loratools.formats.peft.tuners.lora import LoraTuner
from loratools.formats.peft.tuners.miss import MissTuner
from loratools.formats.peft.tuners.oft import OftTuner
from loratools.formats.peft.tuners.refused import REFUSED
from loratools.formats.peft.tuners.shira import ShiraTuner
from loratools.formats.peft.tuners.tokens import TrainableTokensTuner
from loratools.formats.peft.tuners.vera import VeraTuner

__all__ = ["REFUSED", "TUNERS", "AbstractTuner", "Module", "tuner_of"]

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
            Ia3Tuner(),
            OftTuner(),
            BoftTuner(),
            HraTuner(),
            FourierFtTuner(),
            ShiraTuner(),
            C3aTuner(),
            LnTuningTuner(),
        )
    }
)
"""`peft_type` → its tuner; all others are refused by name, those in `REFUSED` with their reason."""


def tuner_of(config: Mapping[str, Any]) -> AbstractTuner:
    """The tuner that a configuration names.

    Raises:
        MalformedError: it names none.
        UnsupportedError: it is not one of those that are read.
    """
    kind = fields.peft_type(config)
    if kind not in TUNERS:
        reason = REFUSED.get(kind)
        raise UnsupportedError(
            f"Adapters of type {config['peft_type']} are not read{f': {reason}' if reason else ' yet'}.",
            fix=f"These are: {', '.join(TUNERS)}.",
            file=fields.CONFIG_FILE,
        )
    return TUNERS[kind]

"""The `peft_type` of every kind of adapter that PEFT has and that is not read, with the reason.

With `TUNERS` it covers `peft.PeftType`; a test says so, and shows what a new version of PEFT adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_NO_WEIGHTS: Final = "it trains tokens, keys or values in front of the input and changes no weight"
_ROUTED: Final = "what it adds depends on the input, so that no weight can hold it, and PEFT does not merge it either"
_SVD: Final = "its change is defined by decompositions of the base (SVD), which are not reproducible to the bit"
_TODO: Final = "its W' is exact, but its formula is not implemented"

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "PROMPT_TUNING": _NO_WEIGHTS,
        "MULTITASK_PROMPT_TUNING": _NO_WEIGHTS,
        "P_TUNING": _NO_WEIGHTS,
        "PREFIX_TUNING": _NO_WEIGHTS,
        "CPT": _NO_WEIGHTS,
        "CARTRIDGE": _NO_WEIGHTS,
        "ADAPTION_PROMPT": "it adds gated attention to learned tokens, which no weight of the base can hold",
        "SHADOW": "it runs a second network beside the base, which no weight can hold",
        "XLORA": _ROUTED,
        "POLY": _ROUTED,
        "LILY": _ROUTED,
        "OSF": _SVD,
        "ADAMSS": _SVD,
        "PSOFT": _SVD,
        "TINYLORA": _SVD,
        "FROD": _SVD,
        "BEFT": _TODO,
        "DEFT": _TODO,
        "DELORA": _TODO,
        "GLORA": _TODO,
        "GRALORA": _TODO,
        "HIRA": _TODO,
        "PEANUT": _TODO,
        "PVERA": _TODO,
        "RANDLORA": _TODO,
        "ROAD": _TODO,
        "SUPERTUNING": _TODO,
        "UNILORA": _TODO,
        "VBLORA": _TODO,
        "WAVEFT": _TODO,
    }
)

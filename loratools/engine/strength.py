"""How `rescale` multiplies one module: by a number, or down to a norm; and which factor takes the number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from loratools.adapters import AbstractUpdate, LowRank
from loratools.adapters.experts import Stacked
from loratools.errors import UnsupportedError

NORM_RULE: Final = (
    "a module whose ‖ΔW‖_F exceeds the cap is multiplied by cap / ‖ΔW‖_F; every other one keeps its bytes"
)
MULTIPLE: Final = 0.5
"""Stands for a factor that only the bytes tell, where it is asked whether a kind has multiples."""


@dataclasses.dataclass(frozen=True, slots=True)
class Strength:
    """What is done to one module.

    Attributes:
        weight: the number that ΔW is multiplied by.
        cap: the norm that ΔW is brought down to, where it is larger; `weight` is 1 then.
        factor: what takes the number: `lora_A`, `lora_B`, or `both` its root; None: alpha, and no factor.
        said: what the report says of the module, where headers tell it.
    """

    weight: float = 1.0
    cap: float | None = None
    factor: str | None = None
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parameters(self) -> dict[str, Any]:
        """What a unit of this module is told beside what all are."""
        told = {"cap": self.cap, "factor": self.factor, "said": dict(self.said) or None}
        return {name: each for name, each in told.items() if each is not None}

    def require(self, path: str, update: AbstractUpdate) -> None:
        """Refuse what cannot be done to this update.

        Raises:
            UnsupportedError: see `require_norm`; or there are no such factors.
        """
        if self.cap is not None:
            require_norm(path, update)
        if self.factor is not None and self.least != 1 and not isinstance(update, (LowRank, Stacked)):
            raise UnsupportedError(
                f"An update of kind {update.kind} has no lora_A and lora_B.",
                fix="Exclude these modules, or leave --factor out.",
                module=path,
            )

    def peak_bytes(self, update: AbstractUpdate) -> int:
        """Working bytes, beside those of writing the factors."""
        return norm_bytes(update) if self.cap is not None else 0

    @property
    def least(self) -> float:
        """A weight to ask with whether the module has such multiples."""
        return self.weight if self.cap is None else MULTIPLE


def require_norm(path: str, update: AbstractUpdate) -> None:
    """Refuse an update whose ‖ΔW‖ is not that of products of factors.

    Raises:
        UnsupportedError: names the kind.
    """
    if update.changes_weight and not update.products and not isinstance(update, Stacked):
        why = "depends on the base" if update.depends_on_base else "is not computed from its tensors"
        raise UnsupportedError(
            f"The norm of an update of kind {update.kind} {why}.",
            fix="Exclude these modules, or scale them by a number (--by) where their kind has multiples.",
            module=path,
        )


def norm_bytes(update: AbstractUpdate) -> int:
    """Working bytes of ‖ΔW‖ through the factors: both in float64, scaled, and what their QR works on."""
    elements = sum(term.lora_A.spec.numel + term.lora_B.spec.numel for term in update.products)
    if isinstance(update, Stacked):
        elements = sum(ref.spec.numel for ref in update.factors)
        return 40 * elements // update.experts + 8 * update.lora_B.spec.numel + update.kept_bytes
    return 40 * elements

"""LN tuning: norms given whole (Zhao et al. 2023, https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

import dataclasses

from loratools.adapters.updates import AbstractUpdate


@dataclasses.dataclass(frozen=True, kw_only=True)
class LnTuning(AbstractUpdate):
    """A norm's parameters, given whole in `replaced`; PEFT keeps them as a kind of their own."""

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "ln-tuning"

    @property
    def own_keys(self) -> bool:
        """See `AbstractUpdate.own_keys`."""
        return True

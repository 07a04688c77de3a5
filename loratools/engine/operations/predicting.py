"""Ŵ: what W must have been, as far as W' and the adapters tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from loratools.engine.operations.change import Change
from loratools.engine.operations.differences import differing_entries

if TYPE_CHECKING:
    import torch

MOST_ROUNDS: Final = 24
_WORTH_IT: Final = 0.99
"""A round that leaves more than this share of the differences was the last."""


@final
class Predictor:
    """Ŵ tile by tile, of one stored matrix.

    What is a sum of products is taken out at once: Ŵ = round(W' − ΔW). Of everything else W' − W depends on W, which is
    not there: x₀ = W', x₁ = W' − change(x₀), x₂ = W' − change(x₁), … come near it wherever the change is small beside W
    (a contraction; Banach 1922), and Ŵ is x_k, rounded. Whoever has W says how many rounds are worth it; none is W'.

    Args:
        change: what was done to the matrix; its actions remember or recall what W' does not tell.
    """

    def __init__(self, change: Change) -> None:
        self._change = change
        self._negated = change.products.negated() if change.products is not None and not change.needs_base else None

    def at(self, merged: torch.Tensor, rows: tuple[int, int], rounds: int) -> torch.Tensor:
        """Ŵ of the tile `merged`, which holds these rows, after so many rounds; like `merged`."""
        from loratools.linalg import round_to

        if rounds and self._negated is not None:
            return self._negated.add_to(merged.reshape(len(merged), -1), start=rows[0]).view(merged.shape)
        wide = merged.double()
        near = wide
        for _ in range(rounds):
            near = wide - self._change.moves(near, rows)
        return round_to(near, merged.dtype) if rounds else merged

    def best(self, W: torch.Tensor, merged: torch.Tensor, rows: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """Ŵ with fewest entries that are not W's, and after how many rounds it is reached."""
        from loratools.linalg import round_to

        if self._negated is not None:
            return self.at(merged, rows, 1), 1
        wide = merged.double()
        near, best, rounds, fewest = wide, merged, 0, differing_entries(merged, W)
        last, many = float("inf"), W.numel() // 2
        for tried in range(1, MOST_ROUNDS + 1 if fewest else 1):
            further = wide - self._change.moves(near, rows)
            step = float((further - near).abs().mean())
            if not step < last:  # no contraction, or not any more
                break
            found = round_to(further, merged.dtype)
            off = differing_entries(found, W)
            enough = off > _WORTH_IT * fewest and fewest <= many
            if off < fewest:
                best, rounds, fewest = found, tried, off
            if not off or enough:
                break
            near, last = further, step
        return best, rounds

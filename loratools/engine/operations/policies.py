"""How a merge may have rounded: every way in which known tools do it, as the reals that it leaves for each entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

from loratools.engine.operations.claims import Claim, Tile

if TYPE_CHECKING:
    import torch

_FLOAT32: Final = 2.0**-24
OURS: Final = "one-rounding"
"""The name of the policy of `loratools merge`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """One way of rounding W + Σ w ΔW.

    Attributes:
        ours: ΔW as ours computes it, and one rounding; else sums and products in float32, at best.
        delta: the dtypes that ΔW of each adapter is rounded to first, in turn; empty for none.
        product: B A is rounded before the scaling multiplies it, to the first of `delta`.
        one_by_one: rounded after every adapter.
        recast: base and result have different dtypes: `first`, the base is rounded before anything is added; `last`,
            the result is rounded in the base's dtype and again; empty: the sum is rounded to the result's dtype.
    """

    ours: bool = False
    delta: tuple[torch.dtype, ...] = ()
    product: bool = False
    one_by_one: bool = False
    recast: Literal["", "first", "last"] = ""

    @property
    def name(self) -> str:
        """What reports call it."""
        if self.ours:
            return OURS
        first = "product-first" if self.product else "delta-first" if self.delta else "float32"
        dtypes = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
        said = [first, *(dtypes[str(dtype).removeprefix("torch.")] for dtype in self.delta[:1])]
        more = ["one-by-one"] if self.one_by_one else []
        return ", ".join([" ".join(said), *more, *([f"recast-{self.recast}"] if self.recast else [])])


def policies(claim: Claim) -> Iterator[Policy]:
    """Every policy that can make a difference for a matrix, ours first and the commonest next."""
    from loratools.tensors import torch_dtype

    before, after = torch_dtype(claim.base.dtype), torch_dtype(claim.merged.dtype)
    yield Policy(ours=True)
    deltas: dict[tuple[tuple[torch.dtype, ...], bool], None] = {((), False): None, ((after,), False): None}
    for dtype in sorted({dtype for each in claim.products for dtype in each.dtypes if dtype.itemsize == 2}, key=str):  # noqa: PLR2004
        deltas[(dtype,), False] = deltas[(dtype,), True] = None
    for recast in ("", "first", "last") if before != after else ("",):
        for one_by_one in (False, True) if len(claim.sources) > 1 else (False,):
            for delta, product in deltas:
                yield Policy(delta=delta, product=product, one_by_one=one_by_one, recast=recast)


def unmoved(claim: Claim, tile: Tile) -> torch.Tensor:
    """W in the result's dtype, which is what stays where nothing is added; float64."""
    from loratools.linalg import to_grid
    from loratools.tensors import torch_dtype

    same = claim.base.dtype == claim.merged.dtype
    return tile.weight if same else to_grid(tile.weight, torch_dtype(claim.merged.dtype))


def interval(policy: Policy, claim: Claim, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """The reals, from the first to the second, one of which was rounded last if a merge followed the policy."""
    from loratools.linalg import to_grid
    from loratools.tensors import torch_dtype

    weight = unmoved(claim, tile) if policy.recast == "first" else tile.weight
    if policy.ours:
        total = weight
        for part in tile.parts:
            total = total + part
        slack = total.abs() * 2.0**-51 + tile.near
        return total - slack, total + slack
    held = torch_dtype(claim.base.dtype if policy.recast == "last" else claim.merged.dtype)
    low = high = weight
    for index in range(len(tile.parts)):
        least, most = _part(policy, claim, tile, index)
        low, high = low + least, high + most
        slack = low.abs().maximum(high.abs()) * _FLOAT32
        low, high = low - slack, high + slack
        last = index == len(tile.parts) - 1
        if (policy.one_by_one and not last) or (policy.recast == "last" and last):
            low, high = to_grid(low, held), to_grid(high, held)
    return low, high


def _part(policy: Policy, claim: Claim, tile: Tile, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one adapter adds, between what and what."""
    from loratools.linalg import to_grid

    part, far = tile.parts[index], tile.far[index]
    low, high = part - far, part + far
    scale = _scale(claim, index) if policy.product else None
    if scale:
        low, high = to_grid(low / abs(scale), policy.delta[0]), to_grid(high / abs(scale), policy.delta[0])
        low, high = low * abs(scale), high * abs(scale)
    for dtype in policy.delta:
        low, high = to_grid(low, dtype), to_grid(high, dtype)
    return low, high


def _scale(claim: Claim, index: int) -> float | None:
    parts = [None] * (claim.rest is not None) + [each.scale for each in claim.products]
    return parts[index % len(parts)]

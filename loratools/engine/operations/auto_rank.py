"""`--rank auto`: what of a difference stands out of the rounding noise of the tuned checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.engine.svd_options import AUTO, FALLBACK

if TYPE_CHECKING:
    import torch

    from loratools.linalg import RoundingNoise, SVDInfo

    Truncation = tuple[torch.Tensor, torch.Tensor, torch.Tensor, SVDInfo]

_REST: Final = 1.5  # times the noise's energy: more is no noise
_DOUBT: Final = 1.02  # times the noise's energy: known to two percent


def wanted_noise(options: Mapping[str, Any], m: int, n: int) -> RoundingNoise | None:
    """An empty profile to fill, if the rank is `auto`."""
    from loratools.linalg import RoundingNoise

    return RoundingNoise.of_shape(m, n) if options.get("rank") == AUTO else None


def truncated(
    difference: torch.Tensor, options: Mapping[str, Any], noise: RoundingNoise | None
) -> tuple[Truncation, dict[str, Any]]:
    """The truncated SVD of a difference by the unit's options, and what `auto` decided, for the report.

    `auto` keeps the singular values above the noise's floor. It takes the least rank with captured ≥ 0.9 instead, still
    under the cap, where the difference is not low-rank and noise: none or too many stand out (more than the cap, or
    factors larger than the matrix), or what is left has more energy than noise.

    Args:
        difference: (m, n) float32; may be scaled in place.
        options: of `truncated_svd`, `rank` possibly `auto`.
        noise: the profile of the same difference, for `auto`.
    """
    import torch

    from loratools.linalg import truncated_svd

    if noise is None:
        return truncated_svd(difference, **options, overwrite=True), {}
    rest = {key: value for key, value in options.items() if key != "rank"}
    floor = noise.floor(float(torch.linalg.vector_norm(difference, dim=1).double().norm()))
    found = truncated_svd(difference, floor=floor, **rest)
    info = found[-1]
    reason = _why_not(info, floor, noise, difference.shape)
    share = min(noise.energy / info.norm**2, 1.0) if info.norm else 0.0
    facts = {"rank_rule": AUTO, "noise_floor": floor, "noise_share": share, "above_noise": info.rank}
    facts["evidence"] = [_evidence(found[1], info, floor, noise)] if info.norm else []
    if reason is None:
        return found, facts
    facts["rank_rule"] = f"energy {FALLBACK}: {reason}"
    short = _shortened(found, rest["max_rank"])
    return short or truncated_svd(difference, energy=FALLBACK, **rest, overwrite=True), facts


def _evidence(S: torch.Tensor, info: SVDInfo, floor: float, noise: RoundingNoise) -> dict[str, Any]:
    """What `loratools.engine.recognition` has to know of a matrix. Noise has no energy in the directions taken out."""
    m, n = noise.shape
    expected = noise.energy * (1 - info.rank / m) * (1 - info.rank / n)
    hidden = max(info.residual**2 - _DOUBT * expected - floor * floor * (expected <= 0), 0.0)
    unit = floor / noise.margin
    return {
        "sigma": (S.double().cpu() / unit).tolist(),
        "ended": info.reached,
        "hidden": hidden / (floor * floor),
        "limit": min(m, n),
    }


def _why_not(info: SVDInfo, floor: float, noise: RoundingNoise, shape: Sequence[int]) -> str | None:
    """Why a difference is not of low rank beside noise, or None where it is, or is zero."""
    if not info.norm:
        return None
    if not info.rank:
        return "nothing stands out of the rounding noise"
    if not info.reached:
        return "more than the cap stand out of the rounding noise"
    if info.rank * sum(shape) > math.prod(shape):
        return "as good as all stand out of the rounding noise"
    unknown = (floor * floor) if noise.energy == 0 else 0.0
    if info.residual**2 > _REST * noise.energy + unknown:
        return "what is left is larger than the rounding noise"
    return None


def _shortened(found: Truncation, max_rank: int) -> Truncation | None:
    """The first of these triples that reach the energy, or all of them at the cap; None where more are needed."""
    from loratools.linalg import rank_for_energy

    U, S, Vh, info = found
    squares = S.double().cpu().square()
    total = info.norm**2
    rank = rank_for_energy(squares, total, FALLBACK)
    reached = float(squares[:rank].sum()) >= FALLBACK * total
    if not reached and info.rank < max_rank:
        return None
    left = math.sqrt(info.residual**2 + float(squares[rank:].sum()))
    captured = max(1 - (left / info.norm) ** 2, 0.0)
    short = dataclasses.replace(
        info, rank=rank, captured=captured, residual=left, certificate=None, certificate_kind=None, reached=reached
    )
    return U[:, :rank].contiguous(), S[:rank], Vh[:rank], short


def together(decided: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says of several matrices that share a module; nothing where the rank was not `auto`."""
    if not all(decided):
        return {}
    rules = [str(each["rank_rule"]) for each in decided]
    others = [rule for rule in rules if rule != AUTO]
    return {
        "rank_rule": others[0] if others else AUTO,
        **{name: max(each[name] for each in decided) for name in ("noise_floor", "noise_share", "above_noise")},
        "evidence": [told for each in decided for told in each["evidence"]],
    }

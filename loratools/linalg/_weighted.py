"""A truncation that is best where the inputs are large: ‖(M − M̂)·diag(x)‖_F instead of ‖M − M̂‖_F.

For inputs whose entries are uncorrelated and of mean square x², this is the mean of ‖(M − M̂)·input‖². The cheap form of
EoRA (arXiv 2410.21271), SVD-LLM (arXiv 2403.07378) and CorDA (arXiv 2406.05223), which take the whole correlation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch
from torch import Tensor

from loratools.errors import MismatchError, NonFiniteError, UnsupportedError
from loratools.linalg._info import SVDInfo
from loratools.linalg._precision import full_float32
from loratools.linalg._truncated_svd import truncated_svd

INPUT_FLOOR: Final = 1e-3
"""The least weight, relative to the root mean square of all."""

_CHUNK: Final = 2**17  # entries at a time in float64
_ROUNDING: Final = 2.0**-23  # of an entry of M·diag(weights): the weight in float32, and the product
_EXPONENTS: Final = 96  # of the scaling: beyond it, float32 weights would overflow


def input_weights(rms: Tensor) -> Tensor:
    """Weights from what is known of a module's inputs.

    Args:
        rms: (n,), the root mean square √E[x²] of every input; not negative, not all zero.

    Returns:
        (n,) float64: max(rms, 1e-3·r)/r, with r the root mean square of them all. An input that was never seen keeps a
        little weight, since it may be seen later; a common factor of all inputs changes nothing.

    Raises:
        NonFiniteError: NaN or infinity.
        MismatchError: not a vector; a negative entry; all are zero.
    """
    wide = rms.detach().to(torch.float64)
    if wide.dim() != 1 or not wide.numel():
        raise MismatchError("Weights of inputs are a vector.", shape=tuple(rms.shape))
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError("The root mean squares of inputs hold NaN or infinity.")
    largest = float(wide.max())
    if float(wide.min()) < 0 or not largest:
        raise MismatchError("Root mean squares of inputs are not negative, and not all zero.")
    wide = wide / largest
    mean = wide.square().mean().sqrt()
    return wide.clamp_min(INPUT_FLOOR * float(mean)) / mean


def truncated_svd_weighted(
    M: Tensor, weights: Tensor, *, overwrite: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor, SVDInfo, SVDInfo]:
    """The low-rank M̂ that is near-optimal in ‖(M − M̂)·diag(weights)‖_F, as singular triples.

    M·diag(weights) is truncated by `truncated_svd`, of which only the left vectors U are used: for them M̂ = U·Uᵀ·M is
    the best in any weighting, nothing is divided by a weight, and M̂ is a projection of M, so that columns with a small
    weight cannot blow up.

    Law: the weighted residual is within the certificate of the optimum (Eckart–Young for M·diag(weights));
    ‖M̂‖² + ‖M − M̂‖² = ‖M‖² in the plain norm too; with equal weights this is `truncated_svd`.

    Args:
        M: (m, n), float64, float32, float16 or bfloat16.
        weights: (n,), positive; see `input_weights`.
        overwrite: M may be scaled and scaled back in place if it is float32, which costs two roundings: its entries,
            and with them what is measured, are then off by up to 1.2e-7 of themselves.
        options: goal, seed and preset, as `truncated_svd` takes them; goals are met in the weighted norm.

    Returns:
        U (m, r), S (r,), Vh (r, n), the singular triples of M̂, float32; what is known of them in the plain norm, and in
        the weighted one. Residuals are measured, those of the triples as returned; the certificate is of the weighted.

    Raises:
        MismatchError: `weights` is not a positive vector of n entries.
        LoratoolsError: as `truncated_svd`.
    """
    if M.dim() == 2 and (weights.shape != M.shape[1:] or not bool((weights > 0).all())):  # noqa: PLR2004
        raise MismatchError("There must be a positive weight for every column.", shape=tuple(weights.shape))
    if M.dim() == 2 and not M.is_floating_point():  # noqa: PLR2004
        raise UnsupportedError("A truncated SVD needs float64, float32, float16 or bfloat16.", dtype=M.dtype)
    M, weights = M.detach(), weights.to(M.device, torch.float64)
    with full_float32():
        exponent = _exponent(M)
        scale = (weights * math.ldexp(1.0, -exponent)).to(torch.float32)
        kept = overwrite and M.dtype == torch.float32
        scaled = M.mul_(scale) if kept else M.to(torch.float32, copy=True).mul_(scale)
        U, S, Vh, found = truncated_svd(scaled, **options)
        M = scaled.div_(scale) if kept else M
        found = dataclasses.replace(found, residual=math.ldexp(found.residual, exponent))
        del scaled
        if S.numel():
            U, S, Vh = _projected(M, U)
        return U, S, Vh, *_measured(M, (U, S, Vh), weights, found)


def _exponent(M: Tensor) -> int:
    """Of the power of two next to the largest entry: M is brought there, so that nobody scales it again."""
    if not M.numel():
        return 0
    low, high = (float(value) for value in torch.aminmax(M))
    largest = max(-low, high)
    if not 0 < largest < math.inf:
        return 0
    return max(-_EXPONENTS, min(math.frexp(largest)[1], _EXPONENTS))


def _projected(M: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of U·Uᵀ·M, with U's columns made orthonormal beyond float32 first."""
    left = torch.linalg.qr(U.to(torch.float64)).Q
    across = left.to(torch.float32).T @ M.to(torch.float32)
    right, core = torch.linalg.qr(across.to(torch.float64).T)
    P, S, Wt = torch.linalg.svd(core.T)
    return (left @ P).to(torch.float32), S.to(torch.float32), (Wt @ right.T).to(torch.float32)


def _measured(
    M: Tensor, triples: tuple[Tensor, Tensor, Tensor], weights: Tensor, found: SVDInfo
) -> tuple[SVDInfo, SVDInfo]:
    """Residuals of the triples, in float64, row chunk by row chunk."""
    U, S, Vh = (each.to(torch.float64) for each in triples)
    left = U * S
    squares = torch.zeros(4, dtype=torch.float64, device=M.device)
    step = max(1, (_CHUNK if M.device.type == "cpu" else 64 * _CHUNK) // max(M.shape[1], 1))
    for first in range(0, M.shape[0], step):
        rows = M[first : first + step].to(torch.float64, copy=True)
        whole = torch.stack([rows.square().sum(), (rows * weights).square().sum()])
        rows.addmm_(left[first : first + step], Vh, alpha=-1)
        squares += torch.cat([whole, torch.stack([rows.square().sum(), rows.mul_(weights).square().sum()])])
    plain, heavy, left_plain, left_heavy = squares.tolist()
    bound = _certificate(found, math.sqrt(heavy), math.sqrt(left_heavy))
    kind = None if bound is None else found.certificate_kind
    found = dataclasses.replace(found, certificate=bound, certificate_kind=kind)
    return _info(found, plain, left_plain), _info(found, heavy, left_heavy)


def _certificate(found: SVDInfo, whole: float, left: float) -> float | None:
    """What is certain of the triples as returned: M·diag(weights) was rounded before it was truncated."""
    if found.certificate is None:
        return None
    least = found.residual / (1 + found.certificate) - _ROUNDING * whole  # of any approximation of this rank
    return max(left / least - 1, found.certificate) if least > 0 else None


def _info(found: SVDInfo, whole: float, left: float) -> SVDInfo:
    captured = min(max(1.0 - left / whole, 0.0), 1.0) if whole else 1.0
    return dataclasses.replace(found, captured=captured, residual=math.sqrt(left), norm=math.sqrt(whole))

"""Float64 to a narrower dtype with one rounding, and the spacing of floats.

`Tensor.to` converts float64 to float16 and bfloat16 through float32, which rounds twice: a value just
beside the middle of two neighbours lands on the middle first and is then rounded to even. Only a float32
that is such a middle can be wrong, and a middle ends in twelve zero bits, so `round_to` looks for those
(one pass of block minima, about a tenth of the conversion's own cost) and nudges them back towards the
float64 value before the second rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import UnsupportedError

_BLOCK = 256
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_HALF_OF_BFLOAT16 = -(2**15)  # the lower half of a float32 in the middle of two bfloat16, as int16
_LOW_BITS_OF_FLOAT16 = 0xFFF  # zero in every float32 in the middle of two float16, subnormals included


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to the `exponent` as float64, exactly; exponents are clamped to the normal range -1022..1023."""
    return ((exponent.to(torch.int64).clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def non_finite_count(tensor: Tensor) -> int:
    """How many entries are NaN or infinite."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return 0
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # exact; torch looks for extremes in no float of eight bits
    low, high = torch.aminmax(tensor)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def ulp(t: Tensor) -> Tensor:
    """Distance from |t| to the next larger float of t's dtype.

    Args:
        t: any shape, a float dtype.

    Returns:
        Float64 of the same shape; the smallest subnormal at zero, NaN where `t` is not finite.
    """
    info = torch.finfo(t.dtype)
    smallest = int(torch.frexp(torch.tensor(info.smallest_normal, dtype=torch.float64))[1]) - 1
    fraction = int(torch.frexp(torch.tensor(info.eps, dtype=torch.float64))[1]) - 1
    wide = t.to(torch.float64)
    exponent = torch.where(wide == 0, smallest + 1, torch.frexp(wide)[1])
    spacing = power_of_two((exponent - 1).clamp_min(smallest)) * 2.0**fraction
    return torch.where(torch.isfinite(wide), spacing, torch.nan)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, rounded once, to nearest, ties to even (IEEE 754), overflow to infinity.

    Args:
        x: float64, or narrower where it is exact in float32; any shape.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        A tensor of the same shape; `x` itself where nothing changes.

    Raises:
        UnsupportedError: another dtype.
    """
    if dtype == torch.float64:
        return x.to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    round_into(x.contiguous(), out)
    return out


def round_into(x: Tensor, out: Tensor, scratch: Tensor | None = None) -> None:
    """`round_to` into `out`; `scratch` is float32 of the same shape. `x` and `scratch` are contiguous."""
    if out.dtype in (torch.float64, torch.float32):
        out.copy_(x)
        return
    if out.dtype not in _SIXTEEN_BIT:
        raise UnsupportedError("Results are rounded to float64, float32, float16 or bfloat16.", dtype=out.dtype)
    if scratch is None:
        scratch = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    scratch.copy_(x)
    _leave_the_middle(x.view(-1), scratch.view(-1), out.dtype)
    out.copy_(scratch)


def _leave_the_middle(x: Tensor, narrow: Tensor, dtype: torch.dtype) -> None:
    """Move every float32 that may lie between two neighbours, but x does not, one step towards x."""
    whole = x.numel() // _BLOCK * _BLOCK
    if whole:
        suspects = _suspects(narrow[:whole].view(-1, _BLOCK), dtype).nonzero().squeeze(1)
        if suspects.numel():
            blocks = narrow[:whole].view(-1, _BLOCK)
            blocks[suspects] = _towards(x[:whole].view(-1, _BLOCK)[suspects], blocks[suspects])
    if whole < x.numel():
        narrow[whole:] = _towards(x[whole:], narrow[whole:])


def _suspects(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return blocks.view(torch.int16).amin(1) == _HALF_OF_BFLOAT16
    return (blocks.view(torch.int32) & _LOW_BITS_OF_FLOAT16).amin(1) == 0


def _towards(x: Tensor, narrow: Tensor) -> Tensor:
    """`narrow`, stepped towards `x` where it ends in twelve zero bits and differs from `x`."""
    back = narrow.to(torch.float64)
    even = (narrow.view(torch.int32) & _LOW_BITS_OF_FLOAT16) == 0
    direction = torch.where(x > back, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(even & (back != x) & ~torch.isnan(x), torch.nextafter(narrow, direction), narrow)

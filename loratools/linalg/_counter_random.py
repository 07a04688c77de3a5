"""Random numbers that are a function of where they are used: any part of a matrix has the same ones, in any order."""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SIZE: Final = 64


def random_key(seed: int, *names: object) -> int:
    """A key for `uniform`: 64 bits of a hash, so that names that differ at all give unrelated numbers."""
    text = "\0".join(str(each) for each in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniform(key: int, first: int, count: int) -> Tensor:
    """The numbers `first` to `first + count` of a key's sequence, uniform in [0, 1), multiples of 2^-53.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): number i is a mixture of
    key + (i + 1)·golden, and needs no other.

    Law: `uniform(key, a, b)` is a part of `uniform(key, 0, a + b)`.

    Returns:
        (count,) float64.
    """
    state = torch.arange(first + 1, first + count + 1, dtype=torch.int64).mul_(_signed(_GOLDEN)).add_(_signed(key))
    state = (state ^ _shifted(state, 30)).mul_(_signed(_FIRST))
    state = (state ^ _shifted(state, 27)).mul_(_signed(_SECOND))
    return _shifted(state ^ _shifted(state, 31), 11).to(torch.float64).mul_(2.0**-53)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Towards the low end, with zeros coming in."""
    return (x >> bits).bitwise_and_((1 << (_SIZE - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << _SIZE) if word >> (_SIZE - 1) else word

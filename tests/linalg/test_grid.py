"""The grids of dtypes in float64, against the dtypes' own numbers."""

import pytest
import torch

from loratools.errors import UnsupportedError
from loratools.linalg import grid_step, rounded_from, to_grid, ulp
from tests.tiny import rounded

NARROW = (torch.bfloat16, torch.float16)


def every_number(dtype):
    """All finite numbers of a 16-bit dtype, both zeros among them, in order."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[torch.isfinite(numbers)].double().sort().values


@pytest.mark.parametrize("dtype", NARROW)
def test_the_step_of_every_number_is_its_ulp(dtype):
    """Law: `grid_step` of a number of the dtype is `ulp`, which comes from torch's own facts."""
    numbers = every_number(dtype)
    assert torch.equal(grid_step(numbers, dtype), ulp(numbers.to(dtype)))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_rounding_is_to_the_nearest_even(dtype):
    """Against rounding by comparing neighbours: subnormals, middles, numbers just beside them, overflow."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-150.0, 128.0, dtype=torch.float64)
    x = (torch.randn(2000, 278, generator=generator, dtype=torch.float64) * torch.exp2(exponents)).flatten()
    if dtype != torch.float32:
        numbers = every_number(dtype)
        middles = (numbers[1:] + numbers[:-1]) / 2
        beside = middles.abs() * 2.0**-40
        x = torch.cat([x, numbers, middles, middles + beside, middles - beside])
    x = x[x.abs() < torch.finfo(dtype).max]  # beyond it the neighbours of `rounded` are no numbers
    assert torch.equal(to_grid(x, dtype), rounded(x, dtype).double())


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_what_overflows_is_infinite(dtype):
    largest = torch.finfo(dtype).max
    step = float(grid_step(torch.tensor([largest], dtype=torch.float64), dtype)[0])
    x = torch.tensor([largest + 0.49 * step, largest + 0.51 * step, -largest - step], dtype=torch.float64)
    assert to_grid(x, dtype).tolist() == [largest, torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", NARROW)
def test_exactly_what_rounds_to_a_number_is_explained(dtype):
    """Every number with its neighbours: to the middles and no further, beside zero and powers of two too."""
    numbers = every_number(dtype).unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = (numbers[1:] - numbers[:-1]) * 2.0**-20
    for found, inside, outside in (
        (numbers[:-1], middles - beside, middles + beside),
        (numbers[1:], middles + beside, middles - beside),
    ):
        assert bool(rounded_from(found, inside, inside, dtype).all())
        assert not bool(rounded_from(found, outside, outside, dtype).any())
        assert bool(rounded_from(found, middles, middles, dtype).all())  # a middle goes either way
        assert bool(rounded_from(found, outside - 2 * beside, outside + 2 * beside, dtype).all())


def test_nothing_rounds_to_infinity_or_nan():
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    wide = torch.full_like(odd, 1e300)
    assert not bool(rounded_from(odd, -wide, wide, torch.bfloat16).any())


def test_other_dtypes_are_refused():
    with pytest.raises(UnsupportedError, match="float8"):
        grid_step(torch.zeros(1, dtype=torch.float64), torch.float8_e4m3fn)

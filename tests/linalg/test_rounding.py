import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import linalg
from loratools.errors import UnsupportedError

FORMATS = {torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15), torch.float32: (24, -126, 127)}


def nearest_even(value: float, dtype: torch.dtype) -> float:
    """The definition, in exact arithmetic."""
    precision, lowest, highest = FORMATS[dtype]
    exact = abs(Fraction(value))
    exponent = max(math.frexp(value)[1] - 1, lowest)
    unit = Fraction(2) ** (exponent - precision + 1)
    whole, rest = divmod(exact, unit)
    whole += rest * 2 > unit or (rest * 2 == unit and whole % 2 == 1)
    rounded = whole * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** highest
    result = float("inf") if rounded > largest else float(rounded)
    return -result if value < 0 else result


def beside_ties(dtype: torch.dtype) -> list[float]:
    """Middles of two neighbours, and the float64 values closest to them, over the whole range of the dtype."""
    precision, lowest, highest = FORMATS[dtype]
    values = []
    for exponent in (lowest - precision, lowest - 3, lowest - 1, lowest, lowest + 1, -1, 0, 5, highest):
        for odd in (1, 3, 5, 2**precision + 1, 2**precision + 3, 2 ** (precision + 1) - 1):
            unit = 2.0 ** (max(exponent, lowest) - precision)
            middle = torch.tensor(odd * unit, dtype=torch.float64)
            for toward in (middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)):
                values += [
                    float(toward),
                    -float(toward),
                    float(toward) * (1 + 2.0**-30),
                    float(toward) * (1 - 2.0**-30),
                ]
    return values


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_ties_and_their_neighbours(dtype):
    values = beside_ties(dtype)
    found = linalg.round_to(torch.tensor(values, dtype=torch.float64), dtype).double().tolist()
    assert found == [nearest_even(value, dtype) for value in values]


def test_torch_itself_rounds_twice():
    """The reason for `round_to`; where torch changes, the nudge can go."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(value.to(torch.bfloat16)) == 1.0
    assert float(linalg.round_to(value, torch.bfloat16)) == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_values_in_blocks(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(-30, 8, (1500,))
    ties = torch.tensor(beside_ties(dtype), dtype=torch.float64)
    x = torch.cat([x, ties, x, ties])[torch.randperm(3000 + 2 * len(ties), generator=generator)]
    assert linalg.round_to(x, dtype).double().tolist() == [nearest_even(value, dtype) for value in x.tolist()]


@settings(max_examples=150, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(list(FORMATS)))
def test_any_float64(value, dtype):
    value = max(min(value, 1e39), -1e39)
    assert float(linalg.round_to(torch.tensor([value], dtype=torch.float64), dtype)) == nearest_even(value, dtype)


def test_special_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e300], dtype=torch.float64)
    for dtype in FORMATS:
        out = linalg.round_to(x, dtype).double()
        assert bool(out[0].isnan())
        assert out[1:].tolist() == [float("inf"), -float("inf"), 0.0, 0.0, float("inf")]
        assert torch.signbit(out[3:5]).tolist() == [True, False]
    assert linalg.round_to(x, torch.float64) is x
    with pytest.raises(UnsupportedError):
        linalg.round_to(x, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64], ids=str)
def test_ulp_is_the_distance_to_the_next_float(dtype):
    info = torch.finfo(dtype)
    t = torch.tensor(
        [0.0, 1.0, 1.5, -2.0, 3.9, info.smallest_normal, info.smallest_normal * 1.75, info.max], dtype=dtype
    )
    t = torch.cat([t, t[5:6] / 4])
    spacing = linalg.ulp(t)
    assert spacing.dtype == torch.float64
    assert float(spacing[1]) == info.eps
    below = t.double().abs() - spacing
    if dtype is not torch.float64:
        magnitude = t.abs()
        up = (magnitude.view(torch.int32 if dtype == torch.float32 else torch.int16) + 1).view(dtype).double()
        assert (up[:-2] - magnitude.double()[:-2]).tolist()[:7] == spacing[:7].tolist()
    assert float(below[-2].to(dtype)) < info.max
    assert bool(linalg.ulp(torch.tensor([float("nan"), float("inf")], dtype=dtype)).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_non_finite_count(dtype):
    t = torch.ones(5, 7, dtype=dtype)
    assert linalg.non_finite_count(t) == 0
    t[1, 2], t[3, 3], t[4, 6] = float("nan"), float("inf"), -float("inf")
    assert linalg.non_finite_count(t) == 3
    assert linalg.non_finite_count(torch.empty(0)) == 0
    assert linalg.non_finite_count(torch.ones(3, dtype=torch.int8)) == 0

"""The way back from a merge: W from W' and what W' − ΔW rounds to, whatever bits there are."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools import linalg
from tests.tiny import normal

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.view(WORDS[tensor.element_size()])


def any_floats(dtype):
    size = 8 * dtype.itemsize
    values = st.integers(-(2 ** (size - 1)), 2 ** (size - 1) - 1)
    return st.lists(values, min_size=3, max_size=60).map(
        lambda words: torch.tensor(words[: len(words) // 3 * 3], dtype=WORDS[dtype.itemsize]).view(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_bits_come_back(dtype, data):
    """NaN with payloads, infinities, −0, denormals: three tensors of any bits, and W is there again."""
    W, merged, predicted = (part.clone() for part in data.draw(any_floats(dtype)).view(3, -1))
    found = linalg.corrections(W, merged, predicted)
    assert len(found.risky) == linalg.risky_count(merged, predicted)
    assert torch.equal(bits(linalg.corrected(merged, predicted, found)), bits(W))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_distance_counts_floats(dtype):
    """Hand-made: two floats up from 1, one down across zero, at an entry at risk and at others."""
    one = torch.ones((), dtype=dtype)
    up = one + 2 * torch.finfo(dtype).eps
    W = torch.stack([up, -torch.zeros((), dtype=dtype), one])
    found = linalg.corrections(W, torch.tensor([4.0, 0, 1], dtype=dtype), torch.tensor([1.0, 0, 1], dtype=dtype))
    assert (found.risky.tolist(), found.places.tolist(), found.others.tolist()) == ([2], [1], [-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("rows", [7, 300])
def test_the_way_back_is_that_of_the_negative(dtype, pieces, rows):
    """`back` holds round(W' − ΔW), the bits that `negated` gives, with and without a tile that is cut in between."""
    A, B = normal(1, 5, 1500), normal(2, rows, 5)
    W = normal(3, rows, 1500, dtype=dtype)
    total = linalg.LowRankSum.of([(A, B, 0.7)], pieces=pieces)
    back = torch.empty_like(W)
    merged = total.add_to(W, back=back)
    assert torch.equal(bits(merged), bits(total.add_to(W)))
    assert torch.equal(bits(back), bits(total.negated().add_to(merged)))
    exact = Fraction(float(merged[3, 4])) - Fraction(float(total.piece(slice(3, 4), slice(4, 5))))
    assert abs(Fraction(float(back[3, 4])) - exact) <= Fraction(float(linalg.ulp(back[3, 4]))) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_corrections_are_needed(dtype):
    """At ‖ΔW‖ = ‖W‖ / 100: one entry in twelve at most is at risk, hardly any other differs, distances are short."""
    W = normal(1, 512, 256, scale=0.02).to(dtype)
    A, B = normal(2, 8, 256), normal(3, 512, 8)
    scale = 0.01 * float(W.double().norm() / (B @ A).norm())
    back = torch.empty_like(W)
    merged = linalg.LowRankSum.of([(A, B, scale)], pieces=1).add_to(W, back=back)
    found = linalg.corrections(W, merged, back)
    assert 0 < len(found.risky) < W.numel() / 12
    assert len(found.places) < W.numel() / 1000
    assert (np.abs(found.risky) <= 1).mean() > 0.8

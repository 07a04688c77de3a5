from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import linalg
from loratools.errors import MismatchError, UsageError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def update(m, n, rank, *, seed=0, dtype=torch.float32, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rank, n, generator=generator) * scale).to(dtype), torch.randn(m, rank, generator=generator).to(
        dtype
    )


def weight(m, n, dtype, *, seed=9):
    return (torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def exact(W, terms):
    delta = sum((b.double() @ a.double()) * scale for a, b, scale in terms)
    return W.double() + delta


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tiling_gives_the_same_bits(dtype):
    m, n = 80, 333
    W = weight(m, n, dtype)
    (a, b), (c, d) = update(m, n, 16), update(m, n, 7, seed=1, dtype=torch.bfloat16)
    terms = [(a, b, 0.7), (c, d, -1.3)]
    whole = linalg.add_low_rank(W, terms)
    prepared = linalg.LowRankSum.of(terms, pieces=1 if dtype.itemsize == 2 else 2)
    for step in (1, 7, 64, m):
        parts, sliced = [], []
        for first in range(0, m, step):
            rows = slice(first, first + step)
            parts.append(linalg.add_low_rank(W[rows], [(a, b[rows], 0.7), (c, d[rows], -1.3)]))
            sliced.append(prepared.add_to(W[rows], start=first))
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(torch.cat(sliced), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_thread_count_gives_the_same_bits(dtype, two_threads):
    m, n = 700, 900
    W, (a, b) = weight(m, n, dtype), update(m, n, 16)
    two = linalg.add_low_rank(W, [(a, b, 0.7)])
    torch.set_num_threads(1)
    assert torch.equal(linalg.add_low_rank(W, [(a, b, 0.7)]), two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_weights(dtype):
    m, n = 150, 70
    a, b = update(m, n, 16)
    stored = weight(n, m, dtype)
    whole = linalg.add_low_rank(stored, [(a, b, 0.5)], transposed=True)
    wanted = exact(stored.T, [(a, b, 0.5)]).T
    assert float((whole.double() - wanted).abs().max()) <= float(linalg.ulp(whole).max()) / 2 + 1e-12
    for step in (1, 7, 64, n):
        tiles = [
            linalg.add_low_rank(stored[i : i + step], [(a[:, i : i + step], b, 0.5)], transposed=True)
            for i in range(0, n, step)
        ]
        assert torch.equal(torch.cat(tiles), whole)


def test_the_order_of_the_sum_over_the_rank_is_immaterial():
    a, b = update(40, 50, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    plain, shuffled = (
        linalg.low_rank_delta(x, y, 0.3, dtype=torch.float64) for x, y in ((a, b), (a[order], b[:, order]))
    )
    assert torch.equal(plain, shuffled)


@pytest.mark.parametrize("rank", [1, 16, 64, 256])
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_update_is_accurate(rank, pieces):
    a, b = update(300, 200, rank)
    wanted = b.double() @ a.double() * 1.7
    found = linalg.LowRankSum.of([(a, b, 1.7)], pieces=pieces).delta(torch.float64)
    limit = 2e-7 if pieces == 1 else 2e-12
    assert float((found - wanted).norm() / wanted.norm()) <= limit
    if pieces == 2:
        size = b.double().abs() @ a.double().abs() * 1.7
        assert float(((found - wanted).abs() / size).max()) < 1e-9
    assert linalg.low_rank_delta(a, b, 1.7).dtype == torch.float32


def test_components_of_very_different_sizes():
    a, b = update(60, 50, 6)
    scale = 10.0 ** torch.arange(-9, 9, 3)
    wanted = b.double() @ a.double()
    found = linalg.LowRankSum.of([(a * scale[:, None], b / scale, 1.0)], pieces=1).delta(torch.float64)
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-7


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_one_rounding(dtype):
    """Entry by entry against rational arithmetic: the nearest float of the exact sum of W and the update as formed."""
    m, n = 24, 20
    W, (a, b) = weight(m, n, dtype), update(m, n, 4)
    out = linalg.add_low_rank(W, [(a, b, 0.9)])
    delta = linalg.LowRankSum.of([(a, b, 0.9)], pieces=1 if dtype.itemsize == 2 else 2).delta(torch.float64)
    half = linalg.ulp(out) / 2
    for i in range(m):
        for j in range(n):
            truth = Fraction(float(W[i, j])) + Fraction(float(delta[i, j]))
            assert abs(Fraction(float(out[i, j])) - truth) <= Fraction(float(half[i, j])) * (1 + Fraction(1, 2**24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_go_to_even_and_what_is_beside_a_tie_does_not(dtype):
    eps = torch.finfo(dtype).eps
    W = torch.tensor([[1.0, 1.0 + eps, 1.0]], dtype=dtype)
    half = torch.tensor([[eps / 2, eps / 2, eps / 2 * (1 + 2.0**-22)]])
    out = linalg.add_low_rank(W, [(half, torch.ones(1, 1), 1.0)])
    assert out.tolist() == [[1.0, 1.0 + 2 * eps, 1.0 + eps]]


def test_cancelling_adapters_leave_the_weight():
    a, b = update(30, 40, 8)
    for dtype in DTYPES:
        W = weight(30, 40, dtype)
        assert torch.equal(linalg.add_low_rank(W, [(a, b, 0.7), (a, b, -0.7)]), W)


def test_subtracting_is_adding_the_negative():
    a, b = update(30, 40, 8)
    W = weight(30, 40, torch.float32)
    assert torch.equal(linalg.subtract_low_rank(W, [(a, b, 0.7)]), linalg.add_low_rank(W, [(a, b, -0.7)]))
    merged = linalg.add_low_rank(W, [(a, b, 0.7)])
    back = linalg.subtract_low_rank(merged, [(a, b, 0.7)])
    assert bool(((back.double() - W.double()).abs() <= linalg.ulp(merged) + linalg.ulp(W)).all())


def test_overflow_is_left_for_the_caller():
    W = torch.full((2, 3), 6e4, dtype=torch.float16)
    out = linalg.add_low_rank(W, [(torch.ones(1, 3), torch.tensor([[1e4], [0.0]]), 1.0)])
    assert linalg.non_finite_count(out) == 3


def test_other_output_dtypes_zero_rank_and_empty():
    a, b = update(30, 40, 8)
    W = weight(30, 40, torch.bfloat16)
    wide = linalg.add_low_rank(W, [(a, b, 1.0)], out_dtype=torch.float32)
    assert torch.equal(wide, linalg.round_to(exact(W, [(a, b, 1.0)]), torch.float32))
    nothing = (torch.zeros(0, 40), torch.zeros(30, 0), 1.0)
    assert torch.equal(linalg.add_low_rank(W, [nothing]), W)
    assert linalg.add_low_rank(W[:0], [(a, b[:0], 1.0)]).shape == (0, 40)
    zeros = (torch.zeros(8, 40), b, 1.0)
    assert torch.equal(linalg.add_low_rank(W, [zeros]), W)


def test_refusals():
    a, b = update(30, 40, 8)
    W = weight(30, 40, torch.float32)
    with pytest.raises(UsageError):
        linalg.add_low_rank(W, [])
    for wrong in ([(a[:4], b, 1.0)], [(a, b, 1.0), (a[:, 1:], b, 1.0)], [(a, b[1:], 1.0)]):
        with pytest.raises(MismatchError):
            linalg.add_low_rank(W, wrong)
    with pytest.raises(MismatchError):
        linalg.add_low_rank(W.T, [(a, b, 1.0)])
    with pytest.raises(MismatchError):
        linalg.LowRankSum.of([(a, b, 1.0)]).add_to(W, start=1)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**16),
    st.floats(-1e4, 1e4),
    st.sampled_from(DTYPES),
)
def test_any_small_sum(shape, first, second, seed, scale, dtype):
    m, n = shape
    W = weight(m, n, dtype, seed=seed)
    terms = [(*update(m, n, first, seed=seed), scale), (*update(m, n, second, seed=seed + 1, scale=1e-6), 1.0)]
    out = linalg.add_low_rank(W, terms, out_dtype=torch.float32)
    size = W.double().abs() + sum((b.double().abs() @ a.double().abs()) * abs(s) for a, b, s in terms)
    assert bool(((out.double() - exact(W, terms)).abs() <= linalg.ulp(size.float())).all())
    rows = [
        linalg.add_low_rank(W[i : i + 1], [(a, b[i : i + 1], s) for a, b, s in terms], out_dtype=torch.float32)
        for i in range(m)
    ]
    assert torch.equal(torch.cat(rows), out)

"""Ranks out of one pool: never over it, as good as it gets, and by how much at most it is not."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import Spectrum, allocate_ranks, uniform_rank

VALUES = st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=5)


COSTS, SETUPS = st.integers(1, 40), st.integers(0, 15)


@st.composite
def pools(draw, costs=COSTS, setups=SETUPS):
    """A few matrices, and bytes that may hold none or all of them."""
    count = draw(st.integers(1, 4))
    spectra = [Spectrum(tuple(sorted(draw(VALUES), reverse=True)), draw(costs), draw(setups)) for _ in range(count)]
    return spectra, draw(st.integers(0, 300))


def nbytes(spectra, ranks):
    return sum(rank * each.cost + (each.setup if rank else 0) for each, rank in zip(spectra, ranks, strict=True))


def captured(spectra, ranks):
    return sum(sum(each.sigma2[:rank]) for each, rank in zip(spectra, ranks, strict=True))


def optimum(spectra, capacity):
    """Every choice of ranks there is."""
    choices = itertools.product(*(range(len(each.sigma2) + 1) for each in spectra))
    return max(captured(spectra, ranks) for ranks in choices if nbytes(spectra, ranks) <= capacity)


@given(pools())
@settings(max_examples=300, deadline=None)
def test_laws(pool):
    """Within the capacity; what it says it captures; between one rank for all and a bound above any choice."""
    spectra, capacity = pool
    found = allocate_ranks(spectra, capacity)
    best = optimum(spectra, capacity)
    assert found.nbytes == nbytes(spectra, found.ranks) <= capacity
    assert found.captured == pytest.approx(captured(spectra, found.ranks))
    assert found.captured <= best * (1 + 1e-12) + 1e-12
    assert best <= found.bound * (1 + 1e-12) + 1e-12
    for rank in range(6):
        level = [min(rank, len(each.sigma2)) for each in spectra]
        if nbytes(spectra, level) <= capacity:
            assert found.captured >= captured(spectra, level) - 1e-9


@given(pools(costs=st.just(7), setups=st.just(0)))
@settings(max_examples=200, deadline=None)
def test_equal_costs_give_the_optimum(pool):
    """The exchange argument: with one price, the largest values are the best ones."""
    spectra, capacity = pool
    assert allocate_ranks(spectra, capacity).captured == pytest.approx(optimum(spectra, capacity), rel=1e-12)


@given(pools())
@settings(max_examples=200, deadline=None)
def test_what_is_left_holds_no_further_rank(pool):
    """No matrix with values left could have one more rank."""
    spectra, capacity = pool
    found = allocate_ranks(spectra, capacity)
    for at, (each, rank) in enumerate(zip(spectra, found.ranks, strict=True)):
        if rank < len(each.sigma2) and each.sigma2[rank] > 0:
            more = [*found.ranks[:at], rank + 1, *found.ranks[at + 1 :]]
            assert nbytes(spectra, more) > capacity


@given(pools())
@settings(max_examples=200, deadline=None)
def test_below_the_density_nothing_counts(pool):
    """Values less dense than the threshold change the bound by nothing: they need not be known."""
    spectra, capacity = pool
    found = allocate_ranks(spectra, capacity)
    if found.density is None:
        assert found.bound == pytest.approx(captured(spectra, [len(each.sigma2) for each in spectra]))
        return
    known = [
        Spectrum(tuple(x for x in each.sigma2 if x / each.cost >= found.density), each.cost, each.setup)
        for each in spectra
    ]
    assert allocate_ranks(known, capacity).bound == pytest.approx(found.bound)


@given(pools())
@settings(max_examples=200, deadline=None)
def test_one_rank_for_all(pool):
    """The largest that fits: it does, and one more does not."""
    spectra, capacity = pool
    rank = uniform_rank(spectra, capacity)
    assert nbytes(spectra, [rank] * len(spectra)) <= capacity
    assert nbytes(spectra, [rank + 1] * len(spectra)) > capacity


def programmed(spectra, capacity):
    """Exact, by dynamic programming over bytes in units of 8."""
    best = [0.0] * (capacity // 8 + 1)
    for each in spectra:
        before = list(best)
        total = 0.0
        for rank, value in enumerate(each.sigma2, 1):
            total += value
            price = rank * each.cost // 8
            for left in range(price, len(best)):
                best[left] = max(best[left], before[left - price] + total)
    return best[-1]


@pytest.mark.parametrize("seed", range(3))
def test_mixed_shapes_of_a_model_are_near_the_optimum(seed):
    """Eight layers of a few shapes with power-law spectra: within 0.999 of dynamic programming; the bound says so."""
    import random

    choose = random.Random(seed)
    shapes = [(64, 64), (16, 64), (176, 64), (64, 176)]
    spectra = []
    for layer in range(8):
        m, n = shapes[layer % 4]
        decay, scale = choose.uniform(0.2, 1.5), 10 ** choose.uniform(-1, 1)
        spectra.append(Spectrum(tuple(scale * k ** (-2 * decay) for k in range(1, min(m, n) + 1)), 4 * (m + n)))
    capacity = 10 * sum(each.cost for each in spectra)
    found, exact = allocate_ranks(spectra, capacity), programmed(spectra, capacity)
    assert exact * 0.999 <= found.captured <= exact * (1 + 1e-9) <= found.bound * (1 + 2e-9)
    assert found.captured >= 0.998 * found.bound


def test_nothing_to_share():
    """No matrices, and no room."""
    assert allocate_ranks([], 10).ranks == ()
    assert uniform_rank([], 10) == 0
    found = allocate_ranks([Spectrum((4.0, 1.0), 10, 5)], 14)
    assert found.ranks == (0,)
    assert found.density == pytest.approx(0.1)

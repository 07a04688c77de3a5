"""Every method of combination is its formula on dense float64 matrices, and obeys its law."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loratools import linalg
from loratools.errors import MismatchError, UsageError
from tests.linalg import combinations
from tests.linalg.combinations import dense, factors

SHAPES = [((40, 25), (3, 5)), ((18, 44), (4, 2, 6)), ((9, 30), (7, 8))]


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def product(pair):
    A, B = pair
    return B @ A


def combination(coefficients, products):
    return sum(c * each for c, each in zip(coefficients, dense(products), strict=True))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_inner_products(shape, ranks):
    products = factors(*shape, ranks, sizes=[10.0**index for index in range(len(ranks))])
    flat = torch.stack([each.flatten() for each in dense(products)])
    assert torch.allclose(linalg.product_gram(products), flat @ flat.T, rtol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(t):
    products = factors(30, 20, (4, 2))
    gram = linalg.product_gram(products)
    found = combination(linalg.slerp_coefficients(gram, t), products)
    assert off(found, combinations.slerp(*dense(products), t)) < 1e-12
    assert t not in {0.0, 1.0} or off(found, dense(products)[int(t)]) < 1e-12


def test_slerp_of_parallel_and_of_nothing():
    A, B = factors(30, 20, (4,))[0]
    for other in (3 * B, -B):
        found = linalg.slerp_coefficients(linalg.product_gram([(A, B), (A, other)]), 0.25)
        assert found == (0.75, 0.25)
    with pytest.raises(MismatchError, match="second ΔW is zero"):
        linalg.slerp_coefficients(linalg.product_gram([(A, B), (A, 0 * B)]))
    with pytest.raises(UsageError, match="t must lie"):
        linalg.slerp_coefficients(linalg.product_gram([(A, B), (A, B)]), 1.5)


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 0.5, 1), (2, 0, 1)])
def test_karcher_is_the_mean_on_the_sphere(weights):
    products = factors(30, 20, (4, 2, 3))
    products[1] = (products[0][0], products[1][1][:, :1] + products[0][1])  # near the first, so that steps matter
    gram = linalg.product_gram(products)
    found = combination(linalg.karcher_coefficients(gram, weights, max_iter=50, tol=1e-10), products)
    there = [index for index in range(3) if weights[index]]
    wanted = combinations.karcher([dense(products)[i] for i in there], [weights[i] for i in there])
    assert off(found, wanted) < 1e-8


def test_karcher_of_few():
    products = factors(30, 20, (4, 4), sizes=(1.0, 1.0))
    (A, B), (C, D) = products
    D = D * float(dense(products)[0].norm() / dense(products)[1].norm())
    gram = linalg.product_gram([(A, B), (C, D)])
    assert linalg.karcher_coefficients(gram, (1, 1)) == pytest.approx(linalg.slerp_coefficients(gram, 0.5), abs=1e-6)
    gram = linalg.product_gram([(A, B), (A, 0 * B)])
    assert linalg.karcher_coefficients(gram, (1, 3)) == pytest.approx([0.25, 0])
    assert linalg.karcher_coefficients(0 * gram, (1, 1)) == [0, 0]
    opposite = linalg.product_gram([(A, B), (A, -B)])
    assert all(math.isfinite(each) for each in linalg.karcher_coefficients(opposite, (1, 1)))
    for bad in ((1, -1), (0, 0)):
        with pytest.raises(UsageError, match="weights of at least 0"):
            linalg.karcher_coefficients(gram, bad)


@settings(max_examples=20, deadline=None)
@given(st.permutations([0, 1, 2]), st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_karcher_knows_no_order(order, weights):
    gram = linalg.product_gram(factors(12, 9, (2, 3, 2)))
    straight = linalg.karcher_coefficients(gram, weights)
    turned = linalg.karcher_coefficients(gram[order][:, order], [weights[i] for i in order])
    assert turned == pytest.approx([straight[i] for i in order], rel=1e-9)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_model_stock(shape, ranks):
    products = [(A + 1.0, B + 1.0) for A, B in factors(*shape, ranks)]
    t, cosine = linalg.model_stock_ratio(linalg.product_gram(products))
    assert 0 < cosine < 1
    assert off(t * sum(dense(products)) / len(ranks), combinations.model_stock(dense(products))) < 1e-12


def test_model_stock_at_its_ends():
    (A, B), (C, D) = factors(30, 20, (4, 2))
    assert linalg.model_stock_ratio(linalg.product_gram([(A, B), (A, 5 * B)]))[0] == pytest.approx(1)
    assert linalg.model_stock_ratio(linalg.product_gram([(A, B), (C, 0 * D)])) == (1, 1)
    assert linalg.model_stock_ratio(linalg.product_gram([(A, B), (A, -B)])) == (0, pytest.approx(-1))
    apart = linalg.product_gram([(A, torch.cat([B, 0 * B])), (A, torch.cat([0 * B, B]))])
    assert linalg.model_stock_ratio(apart)[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_knots_and_core_space(shape, ranks, density):
    products = factors(*shape, ranks)
    assert off(product(linalg.knots(products, density)), combinations.knots(dense(products), density)) < 1e-10
    assert off(product(linalg.core_space(products, density)), combinations.core_space(products, density)) < 1e-10


def test_knots_and_core_space_of_one():
    products = factors(30, 20, (4,))
    for method in (linalg.knots, linalg.core_space):
        assert off(product(method(products, 1.0)), dense(products)[0]) < 1e-12
        A, B = method([(products[0][0], 0 * products[0][1])], 0.3)
        assert float((B @ A).abs().sum()) == 0


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_tsv(shape, ranks):
    products = factors(*shape, ranks)
    found = linalg.tsv(products, len(ranks))
    assert off(product(found), combinations.tsv(dense(products))) < 1e-10


def test_tsv_of_orthogonal_and_of_equal_tasks():
    A, B = factors(12, 8, (3,))[0]
    apart = [
        (torch.cat([A, 0 * A], 1), torch.cat([B, 0 * B])),
        (torch.cat([0 * A, A], 1), torch.cat([0 * B, 2 * B])),
    ]
    assert off(product(linalg.tsv(apart, 2)), sum(dense(apart))) < 1e-12
    assert off(product(linalg.tsv([(A, B), (A, B)], 2)), dense([(A, B)])[0]) < 1e-12
    assert product(linalg.tsv([(A, 0 * B)], 1)).norm() == 0


@pytest.mark.parametrize(("shape", "ranks"), SHAPES[:2])
def test_iso_c(shape, ranks):
    products = factors(*shape, ranks)
    A, B = linalg.iso_c(products)
    assert off(B @ A, combinations.iso_c(dense(products), sum(ranks))) < 1e-10
    doubled = [*products, products[0]]  # no new directions, so none to flatten
    assert linalg.iso_c(doubled)[0].shape[0] == sum(ranks)
    again = linalg.iso_c([(A.float(), B.float())])
    assert off(product(again), B @ A) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(0.001, 1), st.integers(0, 99), st.sampled_from([1.0, 1e-30, 1e30, 0.0]))
def test_threshold_is_that_of_sorting(entries, density, seed, size):
    numbers = size * torch.randn(entries, generator=torch.Generator().manual_seed(seed))
    numbers[::3] = numbers[0]  # equal ones
    count = max(1, int(density * entries))
    parts = numbers.split(37)
    found = linalg.magnitude_threshold(lambda: iter(parts), count)
    assert found == float(numbers.abs().sort(descending=True)[0][count - 1])


def test_numbers_are_those_of_splitmix():
    key = linalg.random_key(7, "model.q_proj", 1)
    assert key != linalg.random_key(7, "model.q_proj", 2) != linalg.random_key(8, "model.q_proj", 2)
    found = linalg.uniform(key, 5, 200)
    assert found.tolist() == [combinations.splitmix(key, index) for index in range(5, 205)]
    many = linalg.uniform(key, 0, 2**18)
    assert float(many.mean()) == pytest.approx(0.5, abs=5e-3)
    assert float((many < 0.1).double().mean()) == pytest.approx(0.1, abs=5e-3)
    assert abs(float(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1])) < 0.01


def gathered(rows):
    return torch.cat([tile.clone() for tile in rows.read()]).double()


def made(name, products, density, keys, tile):
    deltas = linalg.Deltas.of(products)
    pruning = {
        "dare": lambda: linalg.Dropped(density, keys),
        "della": lambda: linalg.Sampled(density, 0.2, keys),
    }.get(name, lambda: linalg.Largest(deltas, density, tile))()
    return linalg.combined_rows(deltas, pruning, elect=name in {"ties", "della"}, tile=tile)


WANTED = {
    "ties": lambda parts, density, keys: combinations.ties(parts, density),
    "magnitude": lambda parts, density, keys: sum(combinations.top(part, density) for part in parts),
    "dare": combinations.dare,
    "della": lambda parts, density, keys: combinations.della(parts, density, 0.2, keys),
}


@pytest.mark.parametrize("density", [0.15, 0.7])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
@pytest.mark.parametrize("name", WANTED)
def test_entry_by_entry(name, shape, ranks, density):
    products = factors(*shape, ranks)
    keys = [linalg.random_key(3, "module", index) for index in range(len(ranks))]
    wanted = WANTED[name]([each.float().double() for each in dense(products)], density, keys)
    found = gathered(made(name, products, density, keys, 100))
    assert off(found, wanted) < 1e-6
    assert bool(((found == 0) == (wanted == 0)).all())
    for tile in (1, 333, 2**18):
        assert torch.equal(gathered(made(name, products, density, keys, tile)), found)


def test_bits_do_not_depend_on_threads():
    products = factors(300, 170, (16, 9))
    keys = [1, 2]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([gathered(made(name, products, 0.3, keys, 2**14)) for name in WANTED])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", WANTED)
def test_recompression_is_near_the_optimum(name):
    products = factors(420, 310, (6, 3))
    rows = made(name, products, 0.4, [5, 6], 2**12)
    whole = gathered(rows)
    U, S, Vh, info = linalg.truncated_svd(rows, rank=12)
    best = float(torch.linalg.svdvals(whole)[12:].norm())
    left = float((whole - U.double() * S.double() @ Vh.double()).norm())
    assert best <= left <= 1.001 * best
    assert info.residual == pytest.approx(left, rel=1e-5)
    assert info.norm == pytest.approx(float(whole.norm()), rel=1e-6)


def test_ties_at_its_edges():
    """A sum of 0 counts as positive, as in PEFT and mergekit; something is always kept."""
    x = torch.tensor([[3.0, -2.0], [0.0, 1.0]])
    assert torch.equal(linalg.ties([x, -x], 1.0), x.abs().double())
    assert torch.equal(linalg.ties([x], 0.01), torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_entries_are_those_of_a_merge():
    (A, B), _ = factors(120, 90, (24, 3))
    deltas = linalg.Deltas.of([(A, B)])
    assert torch.equal(deltas.rows(0, slice(17, 60)), linalg.low_rank_delta(A, B, 1.0)[17:60])


def test_full_density_is_the_sum():
    products = factors(20, 31, (3, 4))
    for name in ("magnitude", "dare"):
        assert off(gathered(made(name, products, 1.0, [1, 2], 100)), sum(dense(products))) < 1e-6


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, torch.Tensor):
                self.entries = max(self.entries, each.numel())
        return made


@pytest.mark.parametrize("name", WANTED)
def test_nothing_as_large_as_the_matrix_is_made(name):
    """Neither ΔW nor what becomes of it, nor its sizes, places or random numbers."""
    products = factors(900, 700, (4, 3))
    with Largest() as seen:
        linalg.truncated_svd(made(name, products, 0.3, [1, 2], 2**14), rank=8)
    assert seen.entries <= 2**18 < 900 * 700 / 2


@pytest.mark.parametrize("name", ["knots", "core_space", "tsv", "iso_c", "product_gram"])
def test_cores_are_small(name):
    products = factors(900, 700, (4, 3))
    with Largest() as seen:
        getattr(linalg, name)(products, *([2] if name == "tsv" else []))
    assert seen.entries <= 900 * 7

"""Products and sums whose bits depend on the numbers alone: not on the order in which anything is added."""

import math
import runpy
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import linalg
from loratools.engine.operations import OPERATIONS
from loratools.errors import UnsupportedError
from loratools.linalg import LowRankSum, SquareSums, _addition, _one_piece, _underflow, square_sums
from loratools.linalg._fixed_point import LONGEST, norm_exponents, split


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spiked(m, n, rank):
    """Components that are one entry in one column, as trained tokens make them, and small flat ones beside."""
    right = normal(rank, n, seed=1)
    right[::2] = 0
    right[::2, 3] = 1.0
    left = normal(m, rank, seed=2)
    left[:, 1::2] *= 1e-3
    return left, right


def cancelling(m, n, rank):
    """Two adapters of opposite sign that are almost the same."""
    left, right = normal(m, rank // 2, seed=3), normal(rank // 2, n, seed=4)
    return torch.cat([left, -left + 1e-4 * normal(m, rank // 2, seed=5)], 1), torch.cat([right, right])


def falling(m, n, rank):
    scale = 10.0 ** -torch.arange(rank, dtype=torch.float64).div(2)
    return normal(m, rank) * scale, normal(rank, n, seed=1)


def alike(m, n, rank):
    """Every entry of a factor is the same: all of a sum's terms have one sign, and sums are as large as they can be."""
    return torch.full((m, rank), 2 / 3, dtype=torch.float64), torch.full((rank, n), 0.749999, dtype=torch.float64)


def ordinary(m, n, rank):
    return normal(m, rank), normal(rank, n, seed=1)


FACTORS = [ordinary, alike, falling, spiked, cancelling]


def exact(left, right):
    """The product to 2^-63, by 80-bit floats where numpy has them."""
    return np.asarray(left, dtype=np.longdouble) @ np.asarray(right, dtype=np.longdouble)


@pytest.mark.parametrize("rank", [2, 16, 64, 250])
@pytest.mark.parametrize("factors", FACTORS)
def test_what_one_piece_promises(factors, rank):
    """Where it is chosen, the error is below 2e-7 of ΔW; two pieces keep to their own bound, entry by entry."""
    left, right = factors(180, 140, rank)
    wanted = exact(left, right)
    size = float(np.sqrt((wanted**2).sum()))
    chosen = LowRankSum.of([(right, left, 1.0)], pieces=None)
    found = chosen.delta(torch.float64).numpy()
    assert float(np.sqrt(((found - wanted) ** 2).sum())) <= 2e-7 * size
    two = LowRankSum.of([(right, left, 1.0)]).delta(torch.float64).numpy()
    spread = norm_exponents(right, 1).double().exp2()
    balanced = np.outer((left * spread.T).norm(dim=1), (right / spread).norm(dim=0))
    assert bool((np.abs(two - wanted) <= (2**-43.4 * math.sqrt(rank) + 2**-52.8 * rank + 2**-52) * balanced).all())


@pytest.mark.parametrize("rank", [1, 8, 64, 250])
def test_one_piece_is_what_ordinary_adapters_get(rank):
    left, right = ordinary(300, 200, rank)
    assert LowRankSum.of([(right, left, 0.5)], pieces=None).left_rest is None
    assert LowRankSum.of([(right, torch.zeros_like(left), 0.5)], pieces=None).left_rest is None


def opposed(m, n, rank):
    """Components along one direction of the input that add up to almost nothing."""
    left = normal(m, rank)
    left[:, rank // 2 :] = -left[:, : rank // 2] * (1 + 1e-5)
    return left, torch.ones(rank, n, dtype=torch.float64)


@pytest.mark.parametrize("factors", [opposed, cancelling])
def test_two_pieces_where_one_is_not_enough(factors):
    """One piece would be off by more than 2e-7 of ΔW, and is not taken."""
    left, right = factors(100, 200, 16)
    wanted = exact(left, right)
    one = LowRankSum.of([(right, left, 1.0)], pieces=1).delta(torch.float64).numpy()
    assert float(np.sqrt(((one - wanted) ** 2).sum())) > 2e-7 * float(np.sqrt((wanted**2).sum()))
    assert LowRankSum.of([(right, left, 1.0)], pieces=None).left_rest is not None


@pytest.mark.parametrize("scale", [1e-3, 0.7, 1.0, -300.0])
@pytest.mark.parametrize("factors", FACTORS)
def test_the_choice_is_proven_and_the_same_in_any_order(factors, scale):
    """What the proof says is an upper bound of the true error; order and sign of the components are immaterial."""
    left, right = factors(90, 110, 16)
    one = LowRankSum.of([(right, left, scale)], pieces=1)
    chosen = LowRankSum.of([(right, left, scale)], pieces=None)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    in_two = [(right[:5], left[:, :5], scale), (right[5:], left[:, 5:], scale)]
    for other in ([(right[order], left[:, order], scale)], [(right, left, -scale)], in_two):
        again = LowRankSum.of(other, pieces=None)
        assert (again.left_rest is None) == (chosen.left_rest is None)
        assert torch.equal(again.delta(torch.float64).abs(), chosen.delta(torch.float64).abs())
    error = np.linalg.norm((one.delta(torch.float64).numpy() - exact(left * scale, right)).astype(float))
    if error > 2e-7 * np.linalg.norm(exact(left * scale, right).astype(float)):
        assert chosen.left_rest is not None


def partial_sums_fit(left, right):
    """Whether Σ |b·a| is at most 2^53 in units of which every product is a multiple, and that float64 can hold."""
    for row in left.tolist():
        for column in right.T.tolist():
            pairs = [(b, a) for b, a in zip(row, column, strict=True) if b and a]
            unit = min((lowest(b) + lowest(a) for b, a in pairs), default=0)
            if unit < -1074 or sum(abs(Fraction(b) * Fraction(a)) for b, a in pairs) > Fraction(2) ** (53 + unit):
                return False
    return True


def lowest(value):
    """The exponent of the lowest bit of a float."""
    numerator, denominator = abs(value).as_integer_ratio()
    return (numerator & -numerator).bit_length() - denominator.bit_length()


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("factors", FACTORS)
def test_no_partial_sum_passes_2_to_the_53(factors, rank):
    """Also for numbers just above a grid's edge, and whatever is added first."""
    left, right = factors(6, 5, max(rank, 2))
    for size in (1.0, 1.0 + 2**-52, 2 / 3, 2 / 3 * (1 + 2**-52), 1e-12):
        made = LowRankSum.of([(right, left * size, 1.0)])
        assert partial_sums_fit(made.left, made.right)
        assert partial_sums_fit(made.left_rest, made.right_rest)


@pytest.mark.parametrize("power", [-960, -300, 300, 960])
def test_sizes_at_the_ends_of_the_range(power):
    """Moving a power of two from one factor to the other changes nothing."""
    left, right = ordinary(20, 30, 4)
    left, right = left.float().double(), right.float().double()
    moved = LowRankSum.of([(torch.ldexp(right, torch.tensor(power)), torch.ldexp(left, torch.tensor(-power)), 1.0)])
    assert torch.equal(moved.delta(torch.float64), LowRankSum.of([(right, left, 1.0)]).delta(torch.float64))


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e-160])
def test_what_is_too_small_for_any_grid_is_left_out(size):
    """Below 2^-481 nothing is kept; what is kept is exact all the same."""
    left, right = ordinary(5, 4, 3)
    right[:, 0] *= 1e-200
    made = LowRankSum.of([(right, left * size, 1.0)])
    assert partial_sums_fit(made.left, made.right)
    off = np.abs(made.delta(torch.float64).numpy() - exact(left * size, right)).max()
    assert off <= 3 * 2.0**-480 + 1e-12 * size


def test_sums_that_are_too_long_are_refused():
    with pytest.raises(UnsupportedError):
        split(torch.ones(1, LONGEST + 1, dtype=torch.float64), 1, 1)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 4097])
def test_exponents_of_norms(length):
    """margin·norm < 2^e ≤ 4·margin·norm, and lines of zeros stay out of the way."""
    lines = torch.stack([normal(length), normal(length) * 1e-30, torch.eye(1, length, dtype=torch.float64)[0]])
    lines = torch.cat([lines, torch.full((1, length), 0.5, dtype=torch.float64), torch.zeros(1, length).double()])
    for margin in (1.0, 1.5):
        found = norm_exponents(lines, 1, margin=margin)[:, 0]
        for exponent, norm in zip(found.tolist()[:-1], (lines.norm(dim=1) * margin).tolist(), strict=False):
            assert norm < 2.0**exponent <= 4.001 * norm
        assert found[-1] == -960
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm_exponents(lines[:, order], 1), norm_exponents(lines, 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    st.data(),
)
def test_sums_of_squares(rows, data):
    """Right to 2^-50, and the same bits whatever the order and the pieces; zeros before and after change nothing."""
    x = torch.tensor(rows, dtype=torch.float64)
    found = square_sums(x)
    for row, total in zip(rows, found.tolist(), strict=True):
        truth = sum(Fraction(value) ** 2 for value in row)
        assert abs(Fraction(total) - truth) <= truth * Fraction(1, 2**48)
    order = data.draw(st.permutations(range(5)))
    cut = data.draw(st.integers(0, 5))
    sums = SquareSums(len(rows))
    sums.add(torch.zeros(len(rows), 2, dtype=torch.float64), slice(0, len(rows)))
    for columns in (order[:cut], order[cut:]):
        for first in range(len(rows)):
            sums.add(x[first : first + 1, columns], slice(first, first + 1))
    assert torch.equal(sums.totals(), found)


@pytest.mark.parametrize("sizes", [(1e-30, 1.0, 1e-9, 0.0, 1e12, 1e-9, 3.0), (1e-9, 0.0, 1e-20, 3e-9, 0.0, 1e-9, 0.0)])
def test_sums_of_squares_of_very_different_pieces(sizes):
    """Small pieces before large ones and after them: a cut below all that is kept is lost either way."""
    pieces = [normal(3, 50, seed=seed) * size for seed, size in enumerate(sizes)]
    totals = []
    for order in (pieces, pieces[::-1], pieces[3:] + pieces[:3], [torch.cat(pieces, 1)]):
        sums = SquareSums(3)
        for piece in order:
            sums.add(piece, slice(0, 3))
        totals.append(sums.totals())
    assert all(torch.equal(total, totals[0]) for total in totals)
    truth = exact(torch.cat(pieces, 1) ** 2, torch.ones(350, 1))[:, 0]
    assert np.allclose(totals[0].numpy(), truth.astype(float), rtol=1e-14, atol=0)


@pytest.fixture
def flushing():
    """A thread that takes subnormal numbers for zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot be told to")
    yield
    torch.set_flush_denormal(False)


def test_flushing_is_found_and_switched_off(flushing):
    """In this thread, and in those that it starts; outside it stays as the user had it."""
    found = []

    def look():
        found.append(linalg.flushes())
        with linalg.gradual_underflow():
            found.append(linalg.flushes())
        found.append(linalg.flushes())

    look()
    worker = threading.Thread(target=look)
    worker.start()
    worker.join()
    assert found == [True, False, True] * 2


def test_a_module_compiled_while_flushing_has_lost_no_constant(flushing):
    """Python computes constants when it compiles, which is at the first import."""
    names = runpy.run_path(_underflow.__file__)
    with names["gradual_underflow"]():
        assert not names["flushes"]()


def test_without_flushing_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: pytest.fail("touched"))
    with linalg.gradual_underflow():
        assert not linalg.flushes()


def test_a_processor_that_cannot_stop_is_refused(flushing, monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: False)
    with pytest.raises(UnsupportedError, match="below the normal range"), linalg.gradual_underflow():
        pytest.fail("computed")


@pytest.mark.parametrize("lossy", ["_lost", "_lost_on_the_way"])
def test_every_way_of_losing_a_number_counts(monkeypatch, lossy):
    monkeypatch.setattr(_underflow, lossy, lambda *_: True)
    assert linalg.flushes()


def test_every_operation_that_computes_is_guarded():
    """Those that only move bytes are not: they run without torch."""
    bare = {name for name, operation in OPERATIONS.items() if not hasattr(operation, "__wrapped__")}
    assert bare == {"hash", "copy", "same"}


def test_no_product_in_float32_is_left(monkeypatch):
    """What decides about bits is float64, so that TF32 and bfloat16 products have nothing to act on."""
    seen = []
    plain = torch.mm

    def watched(one, other, **how):
        seen.extend((one.dtype, other.dtype))
        return plain(one, other, **how)

    monkeypatch.setattr(_addition.torch, "mm", watched)
    monkeypatch.setattr(_one_piece.torch, "mm", watched)
    W = torch.zeros(40, 30, dtype=torch.bfloat16)
    linalg.add_low_rank(W, [(normal(4, 30).float(), normal(40, 4).bfloat16(), 1.0)])
    assert set(seen) == {torch.float64}


@pytest.mark.parametrize("length", [3, 1000, 70_000])
def test_every_sum_that_decides_is_one_of_integers(monkeypatch, length):
    """Norms and inner products, by which grids and the number of pieces are chosen: all sums are below 2^53."""
    sums, plain_sum, plain_mm = [], torch.Tensor.sum, torch.mm

    def summed(tensor, *axes, **how):
        sums.append((tensor, plain_sum(tensor.abs()).max()))
        return plain_sum(tensor, *axes, **how)

    def product(one, other, **how):
        sums.append((one, plain_mm(one.abs(), other.abs()).max()))
        return plain_mm(one, other, **how)

    left, right = normal(length, 3), normal(3, 40, seed=1)
    pieces = split(left, 1, 1)[0], split(right, 0, 1)[0]
    monkeypatch.setattr(torch.Tensor, "sum", summed)
    monkeypatch.setattr(torch, "mm", product)
    norm_exponents(left, 0)
    assert len(sums) == 1
    assert _one_piece.one_piece_will_do(left, right, pieces)
    assert len(sums) == 5
    for operand, largest in sums:
        assert torch.equal(operand, operand.round())
        assert float(largest) <= 2**53

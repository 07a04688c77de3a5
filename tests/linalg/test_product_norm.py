"""The norm of a product through triangular factors, against the dense product in float64."""

import math

import pytest
import torch

from loratools.linalg import product_norm


def pair(rank, m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rank, n, **draw), torch.randn(m, rank, **draw)


@pytest.mark.parametrize(("rank", "m", "n"), [(1, 5, 7), (4, 40, 9), (12, 9, 40), (30, 8, 20), (8, 1, 64), (3, 64, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_norm_of_the_product(rank, m, n, dtype):
    A, B = (each.to(dtype) for each in pair(rank, m, n))
    assert product_norm(A, B) == pytest.approx(float((B.double() @ A.double()).norm()), rel=1e-13)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_factors_of_very_different_sizes(scale):
    """What one factor lacks the other one has: nothing overflows on the way, row by row."""
    A, B = pair(4, 20, 30)
    exact = float((B @ A).norm())
    assert product_norm(A * scale, B / scale) == pytest.approx(exact, rel=1e-13)
    rows = torch.tensor([scale, 1.0, 1 / scale, 1.0], dtype=torch.float64)
    assert product_norm(A * rows[:, None], B / rows) == pytest.approx(exact, rel=1e-13)


def test_a_norm_whose_square_is_beyond_float64():
    A, B = pair(2, 6, 5)
    assert product_norm(A * 1e180, B) == pytest.approx(1e180 * float((B @ A).norm()), rel=1e-13)
    assert product_norm(A * 1e-180, B) == pytest.approx(1e-180 * float((B @ A).norm()), rel=1e-13)
    assert product_norm(A * 1e180, B * 1e180) == math.inf


def test_terms_that_cancel():
    """W − W·(1 + 1e-9): through Gram matrices half of the digits would be gone, and the difference with them."""
    A, B = pair(3, 20, 30)
    both = torch.cat([A, A]), torch.cat([B * (1 + 1e-9), -B], 1)
    exact = float((B * (1 + 1e-9) - B).matmul(A).norm())
    assert product_norm(*both) == pytest.approx(exact, abs=1e-13 * float(A.norm() * B.norm()))
    gram = ((both[1].T @ both[1]) * (both[0] @ both[0].T)).sum()
    assert abs(math.sqrt(max(float(gram), 0.0)) - exact) > 1e-3 * exact


def test_nothing():
    A, B = pair(3, 4, 5)
    assert product_norm(A * 0, B) == 0
    assert product_norm(A[:0], B[:, :0]) == 0
    A[0], B[:, 1:] = 0, 0
    assert product_norm(A, B) == 0

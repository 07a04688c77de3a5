"""Products of any matrices and inverses of I + Q: near the truth, and the same bits in any order."""

import numpy as np
import pytest
import torch

from loratools.errors import UnsupportedError
from loratools.linalg import ExactFactor, exact_product, inverse_of_positive
from tests.laws import elsewhere


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(count, size, largest):
    square = largest * normal(count, size, size)
    return square - square.transpose(1, 2)


@pytest.fixture
def shuffled(monkeypatch):
    """Every product adds backwards and in two halves."""

    def shuffle():
        monkeypatch.setattr(torch, "matmul", elsewhere.shuffled)

    return shuffle


@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 300, 33), (1, 4096, 1), (0, 4, 3), (3, 1, 2)])
def test_products(shape, shuffled):
    m, k, n = shape
    left, right = normal(2, m, k), normal(2, k, n, seed=1)
    found = exact_product(left, right)
    truth = left.numpy().astype(np.longdouble) @ right.numpy().astype(np.longdouble)
    size = (left.norm(dim=2)[:, :, None] * right.norm(dim=1)[:, None]).numpy()
    assert (np.abs(found.numpy() - truth) <= (2**-43.4 * k**0.5 + 2**-52.8 * k + 2**-52) * size).all()
    shuffled()
    assert torch.equal(exact_product(left, right), found)
    factor = ExactFactor(right)
    assert factor.to(torch.device("cpu")) is factor
    rows = [factor.times(left[:, row : row + 1]) for row in range(m)]
    assert torch.equal(torch.cat(rows, 1) if rows else found, found)
    with pytest.raises(UnsupportedError):
        exact_product(torch.ones(1, 2**17 + 1).double(), torch.ones(2**17 + 1, 1).double())


def test_one_right_factor_for_many():
    left, right = normal(4, 6, 5), normal(1, 5, 5, seed=1)
    apart = torch.stack([exact_product(each, right[0]) for each in left])
    assert torch.equal(exact_product(left, right), apart)


@pytest.mark.parametrize("largest", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("size", [1, 2, 16, 17, 70])
def test_inverses(size, largest, shuffled):
    matrix = torch.eye(size, dtype=torch.float64) + skew(3, size, largest)
    found = inverse_of_positive(matrix)
    wanted = torch.linalg.inv(matrix)
    assert float((found - wanted).abs().max()) <= 1e-12 * max(1.0, largest * size)
    shuffled()
    assert torch.equal(inverse_of_positive(matrix), found)


def test_inverses_need_no_more_than_a_positive_symmetric_part():
    """Pivots of 1 and above where I + Q is far from diagonal; a permutation of its order does not make it worse."""
    turn = torch.tensor([[[1.0, 1e6], [-1e6, 1.0]]], dtype=torch.float64)
    product = inverse_of_positive(turn) @ turn
    assert torch.allclose(product, torch.eye(2, dtype=torch.float64), atol=1e-9)

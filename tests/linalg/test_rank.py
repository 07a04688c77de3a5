import pytest
import torch

from loratools import linalg

SIGMA2 = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(("energy", "rank"), [(0.3, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.95, 4), (1.0, 4)])
def test_energy(energy, rank):
    assert linalg.rank_for_energy(SIGMA2, 10.0, energy) == rank


@pytest.mark.parametrize(("error", "rank"), [(0.9, 1), (0.6**0.5 + 1e-9, 1), (0.7, 2), (0.31, 4), (0.32, 3), (0.0, 4)])
def test_error(error, rank):
    assert linalg.rank_for_error(SIGMA2, 10.0, error) == rank


def test_what_is_not_listed_counts_as_residual():
    assert linalg.rank_for_energy(SIGMA2, 20.0, 0.5) == 4
    assert linalg.rank_for_energy(SIGMA2, 20.0, 0.6) == 4


def test_small_tails_do_not_cancel():
    sigma2 = torch.tensor([1.0, 1e-10, 1e-12], dtype=torch.float64)
    assert linalg.rank_for_error(sigma2, float(sigma2.sum()), 1.1e-6) == 2

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import linalg
from loratools.errors import MismatchError, NonFiniteError, UsageError
from tests.linalg.spectra import distance, lost_orthogonality


def factors(m, n, total_rank, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(total_rank, n, generator=generator), torch.randn(m, total_rank, generator=generator)


def check(A, B, rank):
    M = B.double() @ A.double()
    U, S, Vh, info = linalg.truncate_low_rank(A, B, rank)
    sigma = torch.linalg.svdvals(M)
    norm, best = float(sigma.norm()), float(sigma[rank:].norm())
    assert distance(M, U, S, Vh) <= best * (1 + 1e-6) + 2e-7 * norm
    assert info.residual == pytest.approx(best, rel=1e-6, abs=3e-7 * norm)
    assert lost_orthogonality(U.T) < 1e-6
    assert lost_orthogonality(Vh) < 1e-6
    return info


@pytest.mark.parametrize(
    ("m", "n", "total", "rank"), [(60, 40, 12, 4), (40, 60, 12, 12), (30, 20, 64, 8), (5, 50, 3, 2), (1, 9, 2, 1)]
)
def test_is_the_optimum(m, n, total, rank):
    check(*factors(m, n, total), rank)


def test_very_different_sizes_and_near_parallel_rows():
    A, B = factors(50, 40, 8)
    A[4:] = A[:4] + 1e-5 * A[4:]
    scale = torch.tensor([1e-4, 1e4, 1.0, 1e7, 1e7, 1.0, 1e4, 1e-4])
    check(A * scale[:, None], B / scale, 4)


def test_dependent_and_zero_parts():
    A, B = factors(50, 40, 4)
    doubled = torch.cat([A, A, torch.zeros(2, 40)]), torch.cat([B, B, torch.ones(50, 2)], 1)
    info = check(*doubled, 10)
    assert (info.rank, info.clipped) == (4, True)
    U, S, Vh, info = linalg.truncate_low_rank(torch.cat([A, A]), torch.cat([B, -B], 1), 3)
    assert info.norm < 1e-12
    assert bool(torch.isfinite(U).all())
    for empty in ((torch.zeros(3, 40), B[:, :3]), (torch.zeros(0, 40), torch.zeros(50, 0))):
        U, S, Vh, info = linalg.truncate_low_rank(*empty, 3)
        assert (U.shape, S.shape, Vh.shape, info.rank) == ((50, 0), (0,), (0, 40), 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 20), st.floats(0.05, 0.99), st.integers(0, 999))
def test_goals_are_met_by_the_least_rank(m, n, total, energy, seed):
    A, B = factors(m, n, total, seed=seed)
    info = linalg.truncate_low_rank(A, B, energy=energy)[3]
    sigma2 = torch.linalg.svdvals(B.double() @ A.double()).square()
    whole = float(sigma2.sum())
    assert info.captured >= energy - 1e-9
    assert float(sigma2[: info.rank - 1].sum()) < energy * whole * (1 + 1e-9)
    by_error = linalg.truncate_low_rank(A, B, error=math.sqrt(1 - energy))[3]
    assert by_error.residual <= math.sqrt(1 - energy) * by_error.norm * (1 + 1e-6)


def test_refusals():
    A, B = factors(5, 6, 3)
    with pytest.raises(MismatchError):
        linalg.truncate_low_rank(A, B.T, 2)
    with pytest.raises(UsageError):
        linalg.truncate_low_rank(A, B)
    A[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        linalg.truncate_low_rank(A, B, 2)

"""Cores in shared bases, and principal angles: against dense matrices and constructed subspaces."""

import math

import pytest
import torch

from loratools import linalg
from tests.tiny import normal


def product(seed, rank, m=40, n=30, scale=1.0, dtype=torch.float32):
    return normal(seed, rank, n, dtype=dtype), normal(seed + 1, m, rank, dtype=dtype, scale=scale)


@pytest.mark.parametrize("shape", [(40, 30), (6, 50), (50, 6)])
def test_cores_have_the_products_geometry(shape):
    """Inner products, sums and differences of three, of unlike ranks, sizes and dtypes; more ranks than rows too."""
    m, n = shape
    products = [
        product(1, 3, m, n),
        product(3, 8, m, n, scale=1e-9, dtype=torch.bfloat16),
        product(5, 5, m, n, scale=1e6),
    ]
    dense = [B.double() @ A.double() for A, B in products]
    cores = linalg.joint_cores(products)
    for i in range(3):
        for j in range(3):
            wanted = float((dense[i] * dense[j]).sum())
            allowed = 1e-13 * float(dense[i].norm() * dense[j].norm())
            assert float((cores[i] * cores[j]).sum()) == pytest.approx(wanted, abs=allowed)
    difference = float((dense[0] - 0.3 * dense[2]).norm())
    assert float((cores[0] - 0.3 * cores[2]).norm()) == pytest.approx(difference, rel=1e-12)
    assert max(cores[0].shape) <= 16
    assert cores[0].dtype == torch.float64


def test_what_is_equal_cancels():
    """The same ΔW in other factors: nothing is left but float64's rounding."""
    A, B = product(1, 4, dtype=torch.float64)
    turn = normal(9, 4, 4, dtype=torch.float64)
    one, two = linalg.joint_cores([(A, B), (turn @ A, B @ torch.linalg.inv(turn))])
    assert float((one - two).norm()) < 1e-12 * float(one.norm())


def test_bases_leave_out_what_float32_does_not_know():
    """A rank that is only rounding is none; zero has no dimensions."""
    A, B = product(1, 3)
    wide = torch.cat([A, 1e-9 * normal(4, 2, 30)]), torch.cat([B, normal(5, 40, 2)], 1)
    U, S, V = linalg.core_bases(linalg.joint_cores([wide])[0])
    assert S.shape == (3,)
    assert U.shape[1] == V.shape[1] == 3
    assert linalg.core_bases(torch.zeros(3, 4, dtype=torch.float64))[1].shape == (0,)
    assert linalg.core_bases(torch.zeros(0, 0, dtype=torch.float64))[1].shape == (0,)


def orthonormal(matrix):
    return torch.linalg.qr(matrix.double())[0]


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 1e-3, 0.5, math.pi / 4, 1.2, math.pi / 2])
def test_an_angle_that_was_put_there(angle):
    """Small ones to their own size, which a cosine would not tell from zero."""
    Q = orthonormal(normal(1, 20, 6))
    turned = math.cos(angle) * Q[:, 0] + math.sin(angle) * Q[:, 3]
    found = linalg.principal_angles(Q[:, :3], torch.stack([Q[:, 1], turned], 1))
    assert found[0] == pytest.approx(0, abs=1e-14)
    assert found[1] == pytest.approx(angle, rel=1e-4, abs=1e-14)


@pytest.mark.parametrize(("r", "s"), [(3, 5), (5, 3), (1, 1), (0, 3)])
def test_angles_of_random_subspaces(r, s):
    """As many as the smaller one has dimensions, ascending; against the eigenvalues of the projections' product."""
    one, two = orthonormal(normal(1, 12, 6))[:, :r], orthonormal(normal(2, 12, 6))[:, :s]
    found = linalg.principal_angles(one, two)
    assert len(found) == min(r, s)
    assert found == sorted(found)
    projected = torch.linalg.eigvals(one @ one.T @ two @ two.T).real.sort(descending=True)[0][: min(r, s)]
    assert [math.cos(each) ** 2 for each in found] == pytest.approx(projected.tolist(), abs=1e-12)
    assert found == pytest.approx(linalg.principal_angles(two, one), abs=1e-12)


def test_angles_agree_with_scipy():
    """The reference implementation of the same paper."""
    scipy = pytest.importorskip("scipy.linalg")
    one = normal(1, 15, 4, dtype=torch.float64)
    two = torch.cat([one[:, :1] + 0.1 * normal(3, 15, 1), normal(2, 15, 3, dtype=torch.float64)], 1)
    found = linalg.principal_angles(orthonormal(one), orthonormal(two))
    assert found == pytest.approx(sorted(scipy.subspace_angles(one.numpy(), two.numpy()).tolist()), rel=1e-9)

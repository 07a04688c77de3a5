"""A certificate is an upper bound on residual/optimum − 1, whatever the spectrum."""

import math

import pytest
import torch

from loratools import linalg
from loratools.linalg import _certificate
from tests.linalg.spectra import KINDS, distance, matrix, squares

SHAPES = [(420, 420), (700, 330), (310, 900)]
RANKS = (1, 5, 8, 16, 31)
WORSE = 1e-9  # what float64 itself leaves in the true gap


def slow(m, n, *, seed):
    """σ_i falls like i^-0.25: hardly at all."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left, right = (torch.randn(k, side, generator=generator) for side in (m, n))
    return (left * torch.arange(1, k + 1)[:, None] ** -0.25).T @ right


def steps(m, n, *, seed):
    """Forty singular values a little above the others."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator))[0] for side in (m, n))
    return (left * torch.where(torch.arange(k) < 40, 1.3, 1.0)) @ right.T


def scaled(M):
    """Columns of very different lengths, as activations make them."""
    return M * torch.exp(1.5 * torch.randn(M.shape[1], generator=torch.Generator().manual_seed(0)))


def cases():
    for shape in SHAPES:
        for kind in KINDS:
            yield kind, matrix(kind, *shape, seed=shape[0])
        for kind in KINDS:
            yield f"{kind}, scaled", scaled(matrix(kind, *shape, seed=shape[1]))
        yield "slow", slow(*shape, seed=1)
        yield "steps", steps(*shape, seed=2)


def gaps(preset):
    """(what, certificate, its kind, true gap) over shapes × spectra × ranks."""
    for kind, M in cases():
        sigma2 = squares(M)
        for rank in RANKS:
            U, S, Vh, info = linalg.truncated_svd(M, rank, preset=preset, seed=rank)
            best = math.sqrt(float(sigma2[rank:].sum()))
            if info.certificate is not None:
                true = distance(M, U, S, Vh) / best - 1
                yield (kind, tuple(M.shape), rank), info, true


@pytest.mark.parametrize("preset", ["default", "certified"])
def test_no_certificate_is_below_the_true_gap(preset):
    checked = list(gaps(preset))
    assert len(checked) >= 150
    assert [(what, info.certificate, true) for what, info, true in checked if info.certificate < true - WORSE] == []
    kinds = {info.certificate_kind for _, info, _ in checked}
    assert kinds == {"proven" if preset == "certified" else "heuristic"}
    assert all(info.method == "block-krylov" for _, info, _ in checked)


def test_certified_proves_a_thousandth_where_the_spectrum_falls():
    for kind in ("power", "geometric"):
        info = linalg.truncated_svd(matrix(kind, 600, 500), 8, preset="certified")[3]
        assert info.certificate_kind == "proven"
        assert info.certificate <= 1e-3


def test_a_bound_that_is_too_small_would_be_noticed(monkeypatch):
    monkeypatch.setattr(_certificate, "_SAFETY", 0.3)
    below = [what for what, info, true in gaps("default") if info.certificate < true - WORSE]
    assert below


@pytest.mark.parametrize("kind", ["gaussian", "power", "outlier"])
def test_the_norm_of_what_is_left_is_not_underestimated(kind):
    from loratools.linalg._basis import HeldBasis
    from loratools.linalg._prepare import prepare

    M = matrix(kind, 500, 400)
    basis = HeldBasis(prepare(M), 96)
    basis.start(torch.randn(32, 500, generator=torch.Generator().manual_seed(0)))
    V = basis.V.double()
    rest = M.double() - (M.double() @ V.T) @ V
    true = float(torch.linalg.matrix_norm(rest, 2) ** 2)
    found = [_certificate.deflated_norm(basis, seed) for seed in range(10)]
    assert min(found) >= true
    assert max(found) <= 1.6 * true


def test_the_estimate_that_stops_is_not_below_the_true_gap():
    """Whatever stopped it: the tolerance holds, on every spectrum."""
    missed = []
    for kind, M in cases():
        sigma2 = squares(M)
        for rank in RANKS:
            for tolerance in (1e-2, 3e-3, 1e-3):
                U, S, Vh, info = linalg.truncated_svd(M, rank, tolerance=tolerance)
                best = math.sqrt(float(sigma2[rank:].sum()))
                floor = best < 1e-3 * info.norm
                if not floor and info.products < 13 and distance(M, U, S, Vh) / best - 1 > tolerance:
                    missed.append((kind, tuple(M.shape), rank, tolerance))
    assert missed == []

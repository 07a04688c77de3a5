"""The weighted truncation against a dense float64 reference."""

import math

import pytest
import torch

from loratools import linalg
from loratools.errors import MismatchError, NonFiniteError, UnsupportedError, UsageError
from loratools.linalg._weighted import _projected
from tests.linalg.spectra import KINDS, lost_orthogonality, matrix


def rms(n, seed=1):
    """Root mean squares that spread over three decades, one of them zero."""
    found = 10 ** (3 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2)
    found[n // 2] = 0
    return found


def reference(M, weights):
    """Singular values of M·diag(weights), in float64."""
    return torch.linalg.svdvals(M.double() * weights)


def gap(M, triples):
    U, S, Vh = (each.double() for each in triples)
    return M.double() - (U * S) @ Vh


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (700, 420), (420, 700)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_optimal_in_the_weighted_norm(kind, shape, rank):
    """Within the certificate, and 0.1 %, of Eckart–Young for M·diag(w); both residuals are those of the triples."""
    M, weights = matrix(kind, *shape), linalg.input_weights(rms(shape[1]))
    kept = M.clone()
    U, S, Vh, plain, weighted = linalg.truncated_svd_weighted(M, weights, rank=rank)
    assert torch.equal(M, kept)
    left = gap(M, (U, S, Vh))
    sigma = reference(M, weights)
    norm, best = float(sigma.norm()), float(sigma[rank:].norm())
    assert float((left * weights).norm()) <= best * 1.001 + 3e-7 * norm
    assert weighted.residual == pytest.approx(float((left * weights).norm()), rel=1e-6, abs=1e-9 * norm)
    assert plain.residual == pytest.approx(float(left.norm()), rel=1e-6, abs=1e-9 * float(M.norm()))
    assert (plain.norm, weighted.norm) == pytest.approx((float(M.double().norm()), norm), rel=1e-9)
    if weighted.certificate_kind == "proven":
        assert weighted.residual <= best * (1 + weighted.certificate)
    elif kind != "lora" and best > 1e-6 * norm:
        assert weighted.certificate <= 2e-3
    assert lost_orthogonality(U.T) < 1e-6
    assert lost_orthogonality(Vh) < 1e-6
    assert torch.equal(S, S.sort(descending=True).values)


def test_weighting_beats_the_plain_truncation_in_its_norm_and_loses_in_the_plain_one():
    """On a flat spectrum, where there is something to choose."""
    M, weights = matrix("gaussian", 60, 90), linalg.input_weights(rms(90))
    U, S, Vh, info = linalg.truncated_svd(M, rank=8)
    _, _, _, plain, weighted = linalg.truncated_svd_weighted(M, weights, rank=8)
    left = gap(M, (U, S, Vh))
    assert weighted.residual < 0.8 * float((left * weights).norm())
    assert plain.residual > info.residual


def test_equal_weights_are_the_plain_truncation():
    """Whatever their size."""
    M = matrix("power", 50, 80)
    U, S, Vh, info = linalg.truncated_svd(M, rank=5)
    V, T, Wh, plain, weighted = linalg.truncated_svd_weighted(M, linalg.input_weights(torch.full((80,), 37.0)), rank=5)
    assert float((gap(M, (U, S, Vh)) - gap(M, (V, T, Wh))).norm()) < 2e-6 * float(M.norm())
    assert plain.residual == pytest.approx(info.residual, rel=1e-6)
    assert weighted.residual == pytest.approx(plain.residual, rel=1e-9)


def test_columns_that_were_never_seen_do_not_blow_up():
    """The result is a projection of M: captured and residual add up, and no column grows."""
    M = matrix("gaussian", 300, 400)
    seen = torch.zeros(400, dtype=torch.float64)
    seen[:3] = 1
    weights = linalg.input_weights(seen)
    U, S, Vh, plain, weighted = linalg.truncated_svd_weighted(M, weights, rank=3)
    found = (U.double() * S.double()) @ Vh.double()
    assert bool((found.norm(dim=0) <= M.double().norm(dim=0) * (1 + 1e-6)).all())
    assert float(found.square().sum()) + plain.residual**2 == pytest.approx(float(M.double().square().sum()), rel=1e-6)
    assert plain.captured == pytest.approx(float(found.norm() / M.double().norm()) ** 2, rel=1e-5)
    assert weighted.residual < 2e-3 * weighted.norm * math.sqrt(400)


@pytest.mark.parametrize(("goal", "bound"), [({"energy": 0.9}, 0.1**0.5), ({"error": 0.2}, 0.2)], ids=str)
def test_rank_rules_are_meant_in_the_weighted_norm(goal, bound):
    """The least rank whose weighted residual is small enough; the plain norm would have taken another."""
    M, weights = matrix("power", 120, 90), linalg.input_weights(rms(90, seed=4))
    sigma = reference(M, weights)
    tails = sigma.flip(0).square().cumsum(0).flip(0).sqrt() / sigma.norm()
    least = next(r for r in range(1, 90) if float(tails[r]) <= bound)
    U, _, _, _, weighted = linalg.truncated_svd_weighted(M, weights, **goal)
    assert U.shape[1] == least
    assert weighted.residual <= bound * weighted.norm
    assert linalg.truncated_svd(M, **goal)[0].shape[1] != least


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e25])
def test_in_place_and_at_any_size(scale):
    """`overwrite` changes M's entries by two roundings at most, and the result by as little; sizes do not matter."""
    M = matrix("power", 400, 300) * scale
    weights, kept = linalg.input_weights(rms(300)), M.clone()
    first = linalg.truncated_svd_weighted(M, weights, rank=6)
    second = linalg.truncated_svd_weighted(M, weights, rank=6, overwrite=True)
    assert bool(((M - kept).double().abs() <= 1.2e-7 * kept.double().abs() + 1e-44).all())
    assert float((gap(kept, first[:3]) - gap(kept, second[:3])).norm()) <= 1e-5 * float(kept.double().norm())
    assert second[4].residual == pytest.approx(first[4].residual, rel=1e-5)
    best = float(reference(kept, weights)[6:].norm())
    assert second[4].residual <= best * 1.001


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_views(dtype):
    """M in another dtype, or seen transposed, gives what its float32 copy gives."""
    M, weights = matrix("gaussian", 40, 60).to(dtype), linalg.input_weights(rms(60))
    wanted = linalg.truncated_svd_weighted(M.float(), weights, rank=4)
    found = linalg.truncated_svd_weighted(M, weights, rank=4)
    turned = linalg.truncated_svd_weighted(M.float().T.contiguous().T, weights, rank=4, overwrite=True)
    for triples in (found, turned):
        assert float((gap(M, triples[:3]) - gap(M, wanted[:3])).norm()) <= 1e-5 * float(M.double().norm())


def test_zero_matrices_and_full_rank():
    """Nothing of nothing; at full rank both residuals are at the float32 floor."""
    U, S, Vh, plain, weighted = linalg.truncated_svd_weighted(torch.zeros(4, 6), torch.ones(6), rank=2)
    assert (U.shape, S.shape, Vh.shape) == ((4, 0), (0,), (0, 6))
    assert (plain.captured, plain.residual, weighted.residual) == (1.0, 0.0, 0.0)
    M, weights = matrix("gaussian", 30, 20), linalg.input_weights(rms(20))
    _, _, _, plain, weighted = linalg.truncated_svd_weighted(M, weights, rank=20)
    assert plain.residual < 2e-6 * plain.norm
    assert weighted.residual < 2e-6 * weighted.norm


def test_weights():
    """Their own root mean square is one, whatever their unit; none is below a thousandth of it."""
    x = torch.tensor([0.0, 1.0, 2.0, 1e-9], dtype=torch.float64)
    found = linalg.input_weights(x)
    mean = float(x.square().mean().sqrt())
    assert found.tolist() == pytest.approx([1e-3, 1 / mean, 2 / mean, 1e-3])
    assert torch.allclose(linalg.input_weights(x * 1e-200), found)
    assert torch.allclose(linalg.input_weights((x * 1e4).float()), found)


def test_what_is_refused():
    """Weights that are none, and everything that `truncated_svd` refuses."""
    M = torch.ones(3, 4)
    for weights in (torch.ones(3), torch.ones(4, 1), torch.tensor([1, 1, 0, 1.0]), torch.tensor([1, -1, 1, 1.0])):
        with pytest.raises(MismatchError):
            linalg.truncated_svd_weighted(M, weights, rank=1)
    with pytest.raises(UsageError):
        linalg.truncated_svd_weighted(M, torch.ones(4), rank=1, energy=0.5)
    with pytest.raises(NonFiniteError):
        linalg.truncated_svd_weighted(torch.full((3, 4), math.nan), torch.ones(4), rank=1)
    with pytest.raises(UnsupportedError):
        linalg.truncated_svd_weighted(torch.ones(3, 4, dtype=torch.int32), torch.ones(4), rank=1)
    with pytest.raises(MismatchError):
        linalg.truncated_svd_weighted(torch.ones(3), torch.ones(3), rank=1)
    for bad in (torch.zeros(3), torch.tensor([1, -1.0]), torch.ones(2, 2), torch.ones(0)):
        with pytest.raises(MismatchError):
            linalg.input_weights(bad)
    with pytest.raises(NonFiniteError):
        linalg.input_weights(torch.tensor([1, math.inf]))


def test_the_projection_does_not_rest_on_how_orthonormal_the_left_vectors_are():
    """A randomised basis is orthonormal to 1e-6; what is projected on is its span."""
    M = matrix("gaussian", 60, 40)
    U = torch.linalg.qr(matrix("gaussian", 60, 5))[0]
    slanted = U + 1e-3 * U @ matrix("gaussian", 5, 5)
    triples = _projected(M, slanted)
    wanted = U.double() @ (U.double().T @ M.double())
    assert float((M.double() - gap(M, triples) - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_a_proven_certificate_holds_next_to_the_rounding_of_float32():
    """Where M·diag(w) as rounded has another optimum than M·diag(w)."""
    weights = linalg.input_weights(rms(60))
    for tail in (3e-6, 1e-5, 1e-4):
        low, noise = matrix("gaussian", 80, 5).double() @ matrix("gaussian", 5, 60).double(), matrix("gaussian", 80, 60)
        M = (low + tail * noise * low.norm() / noise.norm()).float()
        best = float(reference(M, weights)[5:].norm())
        weighted = linalg.truncated_svd_weighted(M, weights, rank=5)[4]
        assert weighted.certificate_kind == "proven"
        assert best < weighted.residual <= best * (1 + weighted.certificate)

"""The rounding noise of merges: its size, its edge, and what stands out of it."""

import math

import pytest
import torch

from loratools import linalg
from loratools.linalg._rounded_normal import _tables


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), [(400, 400), (900, 300)])
def test_the_edge_is_that_of_random_matrices(m, n):
    """Against the largest singular value of drawn noise: equal variances, and rows and columns of very unlike size."""
    assert linalg.noise_edge(torch.full((m,), 4.0 * n).double(), torch.full((n,), 4.0 * m).double()) == pytest.approx(
        2 * (math.sqrt(m) + math.sqrt(n)), rel=3e-3
    )
    p, q = torch.exp(normal(m, seed=1)), torch.exp(0.7 * normal(n, seed=2))
    drawn = p.sqrt()[:, None] * normal(m, n, seed=3) * q.sqrt()
    largest = float(torch.linalg.matrix_norm(drawn, 2))
    edge = linalg.noise_edge(p * q.sum(), q * p.sum())
    assert largest / edge == pytest.approx(1, abs=0.08)
    assert largest <= edge * linalg.noise_margin(m, n)


def test_no_noise_has_no_edge():
    assert linalg.noise_edge(torch.zeros(3).double(), torch.zeros(4).double()) == 0


@pytest.mark.parametrize("exponent", [-8, -4, 0, 4, 12])
def test_moments_of_rounded_normal_numbers(exponent):
    """The table against a sample: E round(x)², and the slope of round(x) over x."""
    t = 2.0 ** (exponent / 4)
    second, slope, _, rest = _tables()
    at = (31 + 3) * 4 + exponent
    x = t * normal(4_000_000, seed=5)
    rounded = x.round()
    assert float(second[0, at]) == pytest.approx(float(rounded.square().mean()), rel=0.02)
    assert float(slope[0, at]) == pytest.approx(float((rounded * x).mean()) / t**2, rel=0.02)
    assert float(rest[0, at]) == pytest.approx(float((rounded - slope[0, at] * x).square().mean()), rel=0.02)


def merged(dtype, relative, rank, m, n, *, held_in=None, on_grid=True):
    """W, W' = round(W + ΔW) and ΔW, of heavy-tailed W and unlike rows."""
    W = 0.05 * normal(m, n, seed=7) * torch.exp(0.3 * normal(m, 1, seed=8))
    W = W.to(dtype).double() if on_grid else W.float().double()
    change = normal(m, rank, seed=9) @ normal(rank, n, seed=10)
    change *= relative * W.norm() / change.norm()
    tuned = (W + change).to(dtype)
    return W.to(held_in or (dtype if on_grid else torch.float32)), tuned.to(held_in or dtype), change


@pytest.mark.parametrize("options", [{}, {"held_in": torch.float32}, {"on_grid": False}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "relative", "rank"),
    [(torch.bfloat16, 0.1, 16), (torch.bfloat16, 0.01, 16), (torch.bfloat16, 0.003, 4), (torch.float16, 0.001, 16)],
)
def test_the_rank_of_a_merge_is_found(dtype, relative, rank, options):
    """What exceeds the floor is ΔW's, all of it; the noise's energy is what it is, to 15 %."""
    base, tuned, change = merged(dtype, relative, rank, 500, 320, **options)
    difference = tuned.double() - base.double()
    noise = linalg.RoundingNoise.of_shape(500, 320)
    for first in range(0, 500, 130):
        rows = slice(first, first + 130)
        noise.see(first, difference[rows].float(), base[rows], tuned[rows])
    sigma = torch.linalg.svdvals(difference)
    floor = noise.floor(float(difference.norm()))
    assert float(torch.linalg.svdvals(change)[rank - 1]) > floor
    assert int((sigma > floor).sum()) == rank
    assert float(sigma[rank:].square().sum()) / noise.energy == pytest.approx(1, abs=0.15)


def test_float32_noise_is_small_and_known():
    base, tuned, _ = merged(torch.float32, 0.01, 5, 300, 200)
    noise = linalg.RoundingNoise.of_shape(300, 200)
    noise.see(0, tuned - base, base, tuned)
    *_, info = linalg.truncated_svd(tuned - base, floor=noise.floor(float((tuned - base).norm())))
    assert info.rank == 5
    assert info.residual < 1e-5 * info.norm

import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import linalg
from loratools.errors import MismatchError, NonFiniteError, UnsupportedError, UsageError
from tests.linalg.spectra import KINDS, distance, lost_orthogonality, matrix, squares

SHAPES = [
    (320, 320),
    (512, 300),
    (300, 700),
    (300, 257),
    (257, 300),
    (1, 40),
    (40, 1),
    (1, 1),
    (7, 5),
    (2000, 12),
    (9, 900),
]
GAP = {"gaussian": 1e-2, "lora_bf16": 2e-3, "outlier": 1e-3, "power": 1e-3, "geometric": 1e-3, "lora": 1e-3}


def check(M, U, S, Vh, info, rank):
    """Everything that holds for any result with an explicit rank."""
    m, n = M.shape
    sigma2 = squares(M)
    norm = math.sqrt(float(sigma2.sum()))
    assert U.shape == (m, info.rank)
    assert S.shape == (info.rank,)
    assert Vh.shape == (info.rank, n)
    assert {U.dtype, S.dtype, Vh.dtype} == {torch.float32}
    assert lost_orthogonality(U.T) < 1e-6
    assert lost_orthogonality(Vh) < 1e-6
    assert bool((S[:-1] >= S[1:]).all())
    assert info.rank <= min(rank, m, n)
    assert info.clipped == (info.rank < rank)
    true = distance(M, U, S, Vh)
    tolerance = 1e-6 if true > 1e-3 * norm else 1e-4
    assert info.residual == pytest.approx(true, rel=tolerance, abs=1e-12 * norm)
    assert info.norm == pytest.approx(norm, rel=1e-6)
    assert info.captured == pytest.approx(float(sigma2[: info.rank].sum() / sigma2.sum()), abs=1e-2)
    best = math.sqrt(float(sigma2[rank:].sum()))
    return true, best, norm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_near_the_optimum(kind, shape):
    M = matrix(kind, *shape)
    for rank in (1, 6, 24):
        U, S, Vh, info = linalg.truncated_svd(M, rank)
        true, best, norm = check(M, U, S, Vh, info, rank)
        assert true <= best * (1 + GAP[kind]) + 6e-7 * norm


@pytest.mark.parametrize("kind", KINDS)
def test_certificates_bound_the_true_gap(kind):
    M = matrix(kind, 640, 500)
    for rank in (4, 16, 48):
        for preset in ("default", "exact"):
            U, S, Vh, info = linalg.truncated_svd(M, rank, preset=preset)
            true, best, _ = check(M, U, S, Vh, info, rank)
            if info.certificate is not None:
                assert true / best - 1 <= info.certificate + 1e-9
            assert (info.certificate is None) == (info.certificate_kind is None)
            assert info.certificate_kind in (None, "proven" if preset == "exact" else "heuristic")


@pytest.mark.parametrize("rank", [100, 200, 257])
def test_large_ranks(rank):
    M = matrix("gaussian", 300, 257)
    U, S, Vh, info = linalg.truncated_svd(M, rank)
    true, best, norm = check(M, U, S, Vh, info, rank)
    assert true <= best * (1 + 1e-6) + 6e-7 * norm


def test_more_than_there_is_is_clipped():
    M = matrix("gaussian", 30, 50)
    U, _, _, info = linalg.truncated_svd(M, 64)
    assert info.clipped
    assert U.shape == (30, 30)


@pytest.mark.parametrize("shape", [(700, 600), (100, 80)])
def test_directions_at_the_float32_floor_are_left_out(shape):
    M = matrix("lora", *shape)
    info = linalg.truncated_svd(M, 32)[3]
    assert (info.rank, info.clipped) == (6, True)
    assert info.residual < 6e-7 * info.norm


@pytest.mark.parametrize("shape", [(400, 300), (20, 30)])
def test_exactly_repeated_rows(shape):
    M = torch.ones(shape)
    U, S, Vh, info = linalg.truncated_svd(M, 8)
    assert info.rank == 1
    assert float(S[0]) == pytest.approx(math.sqrt(shape[0] * shape[1]), rel=1e-6)
    assert bool(torch.isfinite(U).all() & torch.isfinite(Vh).all())


@pytest.mark.parametrize("shape", [(400, 300), (3, 5), (0, 4), (4, 0)])
def test_zero_has_rank_zero(shape):
    for goal in ({"rank": 4}, {"energy": 0.9}, {"error": 0.1}):
        U, S, Vh, info = linalg.truncated_svd(torch.zeros(shape), **goal)
        assert (U.shape, S.shape, Vh.shape) == ((shape[0], 0), (0,), (0, shape[1]))
        assert (info.rank, info.captured, info.residual, info.norm) == (0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(400, 300), (30, 40)])
def test_other_dtypes_are_their_float32(dtype, shape):
    M = matrix("power", *shape).to(dtype)
    found, wanted = linalg.truncated_svd(M, 8), linalg.truncated_svd(M.float(), 8)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))


@pytest.mark.parametrize("exponent", [-126, -100, -31, 31, 60, 100])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (20, 30)])
def test_powers_of_two_change_nothing_but_the_size(exponent, shape):
    M = torch.ldexp(matrix("geometric", *shape), torch.tensor(0))
    scaled = (M.double() * 2.0**exponent).float()
    if exponent == -126:
        scaled = scaled * 8  # keep clear of subnormals
        exponent += 3
    plain, found = linalg.truncated_svd(M, 4), linalg.truncated_svd(scaled, 4)
    assert found[3].residual == pytest.approx(plain[3].residual * 2.0**exponent, rel=1e-3)
    assert torch.allclose(found[1].double() * 2.0**-exponent, plain[1].double(), rtol=1e-5)


def test_the_smallest_and_largest_magnitudes():
    for factor in (1e-38, 1e-44, 1e30):
        M = (matrix("gaussian", 300, 280).double() * factor).float()
        U, S, Vh, info = linalg.truncated_svd(M, 4)
        assert info.residual == pytest.approx(distance(M, U, S, Vh), rel=1e-4)
    wide = matrix("gaussian", 300, 280).double() * 1e200
    kept = wide.clone()
    assert linalg.truncated_svd(wide, 4)[3].norm == pytest.approx(float((wide * 1e-200).norm()) * 1e200, rel=1e-6)
    assert torch.equal(wide, kept)


def test_overwrite_scales_in_place():
    M = matrix("gaussian", 300, 280) * 1e20
    kept = M.clone()
    wanted = linalg.truncated_svd(M, 4)
    assert torch.equal(M, kept)
    found = linalg.truncated_svd(M, 4, overwrite=True)
    assert not torch.equal(M, kept)
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_counted(bad):
    M = matrix("gaussian", 300, 280)
    M[3, 4] = M[290, 0] = bad
    with pytest.raises(NonFiniteError, match=re.escape("entries 2")):
        linalg.truncated_svd(M, 4)


def test_bad_requests():
    M = torch.ones(3, 3)
    for goal in (
        {},
        {"rank": 1, "energy": 0.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.1},
        {"error": 1.0},
        {"error": -1.0},
    ):
        with pytest.raises(UsageError):
            linalg.truncated_svd(M, **goal)
    with pytest.raises(UsageError):
        linalg.truncated_svd(M, 1, preset="best")
    with pytest.raises(UsageError):
        linalg.truncated_svd(M, energy=0.5, max_rank=0)
    with pytest.raises(MismatchError):
        linalg.truncated_svd(torch.ones(3), 1)
    with pytest.raises(UnsupportedError):
        linalg.truncated_svd(torch.ones(3, 3, dtype=torch.int32), 1)


def test_seeds_reproduce_and_matter():
    M = matrix("gaussian", 400, 300)
    first, again, other = (linalg.truncated_svd(M, 8, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[3].residual == pytest.approx(other[3].residual, rel=1e-3)


def test_global_settings_are_left_alone_and_do_not_matter():
    M = matrix("gaussian", 400, 300)
    state, before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    wanted = linalg.truncated_svd(M, 8)
    try:
        torch.set_float32_matmul_precision("medium")
        found = linalg.truncated_svd(M, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(state, torch.get_rng_state())


def test_threads_change_the_rounding_only():
    M = matrix("power", 600, 500)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linalg.truncated_svd(M, energy=0.8)
        torch.set_num_threads(2)
        two = linalg.truncated_svd(M, energy=0.8)
    finally:
        torch.set_num_threads(before)
    assert one[3].rank == two[3].rank
    assert one[3].captured == pytest.approx(two[3].captured, abs=1e-6)


@pytest.mark.parametrize("kind", ["lora", "lora_bf16", "power", "geometric", "outlier"])
@pytest.mark.parametrize("shape", [(700, 500), (120, 150)])
@pytest.mark.parametrize("goal", [{"energy": 0.5}, {"energy": 0.9}, {"error": 0.2}, {"error": 0.03}])
def test_goals_are_met_by_the_least_rank(kind, shape, goal):
    M = matrix(kind, *shape)
    sigma2 = squares(M)
    U, S, Vh, info = linalg.truncated_svd(M, **goal)
    total = float(sigma2.sum())
    tail = 1 - goal["energy"] if "energy" in goal else goal["error"] ** 2
    if not info.reached:
        assert info.rank == min(256, *shape)
        assert float(sigma2[info.rank :].sum()) > tail * total
        return
    assert distance(M, U, S, Vh) ** 2 <= tail * total * (1 + 1e-5)
    assert float(sigma2[info.rank - 1 :].sum()) > tail * total * (1 - 1e-5)


def test_tight_errors_are_measured():
    M = matrix("geometric", 700, 500)
    U, S, Vh, info = linalg.truncated_svd(M, error=1e-5)
    sigma2 = squares(M)
    wanted = linalg.rank_for_error(sigma2, float(sigma2.sum()), 1e-5)
    assert info.reached
    assert wanted <= info.rank <= wanted + 1
    assert distance(M, U, S, Vh) <= 1.001e-5 * info.norm


def test_max_rank_caps_what_goals_choose_only():
    M = matrix("gaussian", 700, 600)
    info = linalg.truncated_svd(M, energy=0.9, max_rank=20)[3]
    assert (info.rank, info.reached, info.clipped) == (20, False, False)
    assert linalg.truncated_svd(M, 40, max_rank=20)[3].rank == 40


def test_few_directions_take_few_products():
    lora = linalg.truncated_svd(matrix("lora_bf16", 900, 800), error=0.05)[3]
    assert (lora.rank, lora.method) == (6, "block-krylov")
    assert lora.products <= 5
    assert linalg.truncated_svd(matrix("gaussian", 900, 800), 8, preset="fast")[3].products == 5


def test_balanced_factors():
    U, S, Vh, _ = linalg.truncated_svd(matrix("power", 60, 40), 5)
    lora_A, lora_B = linalg.balanced_factors(U, S, Vh)
    assert (lora_A.shape, lora_B.shape) == ((5, 40), (60, 5))
    assert torch.allclose(lora_B @ lora_A, (U * S) @ Vh, atol=1e-6)
    assert float(lora_A.norm()) == pytest.approx(float(lora_B.norm()), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 25), st.integers(0, 2**16))
def test_small_products(m, n, inner, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(m, inner, generator=generator) @ torch.randn(inner, n, generator=generator)
    U, S, Vh, info = linalg.truncated_svd(M, rank)
    true, best, norm = check(M, U, S, Vh, info, rank)
    assert true <= best * (1 + 1e-6) + 6e-7 * norm


MEASURE = """
import sys, torch
from torch.profiler import ProfilerActivity, profile
from loratools import linalg
for shape in sys.argv[1:]:
    m, n, rank = map(int, shape.split("x"))
    M = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiled:
        linalg.truncated_svd(M, rank, tolerance=1e-9)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    print(peak, linalg.workspace_bytes(m, n, rank))
"""


def test_workspace_is_an_upper_bound_within_two_thirds():
    shapes = ["1408x2048x16", "1000x1000x64", "1500x500x128", "3000x512x16", "500x500x500", "700x600x300"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *shapes], capture_output=True, text=True, check=True)
    for shape, line in zip(shapes, done.stdout.split("\n"), strict=False):
        peak, bound = map(int, line.split())
        assert peak <= bound <= 1.67 * peak, shape

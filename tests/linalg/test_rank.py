import pytest
import torch

from loratools import linalg
from loratools.errors import UsageError

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


@pytest.mark.parametrize(("ratio", "rank"), [(1, 1), (1.1, 1), (2 / 3**0.5 + 1e-9, 2), (2, 4), (1.99, 3)])
def test_ratio_counts_what_is_at_least_a_share_of_the_largest(ratio, rank):
    assert linalg.rank_for_ratio(SIGMA2, ratio) == rank


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.75, 0.9, 1.0])
def test_shares_are_the_least_ranks_and_kohya_has_one_more(share):
    """By hand: the first r whose sum is enough. kohya's searchsorted + 1 is that r, to which it adds one again."""
    sigma = SIGMA2.sqrt()
    sums = [float(sigma[:r].sum() / sigma.sum()) for r in range(1, 5)]
    assert linalg.rank_for_cumulative(SIGMA2, share) == next(
        r for r, part in enumerate(sums, 1) if part >= share - 1e-12
    )
    squares = [float(SIGMA2[:r].sum() / SIGMA2.sum()) for r in range(1, 5)]
    wanted = next(r for r, part in enumerate(squares, 1) if part >= share**2 - 1e-12)
    assert linalg.rank_for_fro(SIGMA2, 10.0, share) == wanted
    if share < 1:
        kohya = int(torch.searchsorted(SIGMA2.cumsum(0) / SIGMA2.sum(), share**2)) + 1
        assert (kohya, kohya + 1) == (wanted, wanted + 1)


@pytest.mark.parametrize(
    ("sigma", "rank"),
    [
        ([5, 5, 5] + [0.1] * 30, 3),
        ([9, 7, 6, 0.2, 0.1, 0.1, 0.05, 0.01], 3),
        ([5, 4.9, 4.8, 4.7, 0.0], 4),
        ([2, 2, 2, 2], 4),
        ([2, 1], 2),
        ([0, 0, 0], 0),
    ],
)
def test_the_knee_ends_the_large_values(sigma, rank):
    assert linalg.rank_at_knee(torch.tensor(sigma, dtype=torch.float64).square()) == rank


def spectrum(sigma, m, n):
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(sigma), generator=generator, dtype=torch.float64))[0] for size in (m, n)
    )
    return (left * torch.tensor(sigma, dtype=torch.float64) @ right.T).float()


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ({"sv_ratio": 10.0}, 10),
        ({"sv_fro": 0.9}, 10),
        ({"sv_cumulative": 0.5}, 6),
        ({"knee": True}, 12),
        ({"floor": 0.5e-20}, 10),
        ({"floor": 0.95e-20}, 3),
    ],
)
@pytest.mark.parametrize("scale", [1e-20, 1.0])
def test_rules_of_truncations(rule, rank, scale):
    """A Krylov path, a dense one and the core agree with the count on paper; a floor is absolute at any scale."""
    sigma = [1.0, 0.99, 0.98] + [0.8] * 7 + [0.08] * 2 + [0.001] * 30
    if "floor" in rule:
        rule = {"floor": rule["floor"] / 1e-20 * scale}
    if "sv_fro" in rule:
        share = sum(s * s for s in sigma[:10]) / sum(s * s for s in sigma)
        rule = {"sv_fro": (share - 1e-5) ** 0.5}
    if "sv_cumulative" in rule:
        rule = {"sv_cumulative": (sum(sigma[:6]) - 0.01) / sum(sigma)}
    if "knee" in rule:
        sigma, rank = [1.0] * 12 + [0.001] * 28, 12
    for shape, sizes in (("krylov", (700, 500)), ("dense", (90, 60))):
        M = spectrum(sigma, *sizes) * scale
        _, S, _, info = linalg.truncated_svd(M, **rule)
        assert (S.numel(), info.reached) == (rank, True), shape
        if shape == "krylov" and not {"knee", "sv_cumulative"} & set(rule):
            assert info.method == "block-krylov"
    if "knee" not in rule:
        _, S, _, _ = linalg.truncate_low_rank(torch.eye(60), spectrum(sigma, 90, 60) * scale, **rule)
        assert S.numel() == rank


@pytest.mark.parametrize(
    "rule",
    [{"sv_ratio": 0.5}, {"sv_fro": 0.0}, {"sv_cumulative": 1.5}, {"floor": -1.0}, {"sv_ratio": float("nan")}, {},
     {"knee": False}, {"rank": 2, "knee": True}],
)  # fmt: skip
def test_rules_out_of_range_are_refused(rule):
    with pytest.raises(UsageError):
        linalg.truncated_svd(torch.eye(8), **rule)


def test_the_cap_is_said():
    M = spectrum([1.0] * 20, 60, 50)
    info = linalg.truncated_svd(M, sv_ratio=2.0, max_rank=5)[-1]
    assert (info.rank, info.reached) == (5, False)

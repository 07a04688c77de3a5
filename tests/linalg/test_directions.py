"""The effective rank from one pass: against singular values in float64."""

import pytest
import torch

from loratools.linalg import DirectionProbe
from tests.tiny import normal


def participation(matrix):
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float(squares.sum() ** 2 / squares.square().sum())


def probed(matrix, rows=50):
    probe = DirectionProbe(matrix.shape[1])
    for piece in matrix.split(rows):
        probe.see(piece.clone())
    return probe.effective_rank(float(matrix.double().square().sum()))


def low_rank(rank, noise, seed=1, m=300, n=220):
    falling = torch.logspace(0, -0.5, rank)
    return (normal(seed, m, rank) * falling) @ normal(seed + 1, rank, n) + noise * normal(seed + 2, m, n)


@pytest.mark.parametrize(
    "matrix",
    [low_rank(1, 0), low_rank(8, 0), low_rank(16, 0, m=40), low_rank(1, 0) * 1e-15, low_rank(1, 0) * 1e15],
    ids=["rank 1", "rank 8", "wide", "small", "large"],
)
def test_of_low_rank_it_is_exact(matrix):
    """Up to sixteen directions, of any size that float32 holds."""
    estimate, error = probed(matrix)
    assert estimate == pytest.approx(participation(matrix), rel=1e-5)
    assert error < 1e-5 * estimate


@pytest.mark.parametrize("columns", [2, 20, 32])
def test_few_columns_are_measured(columns):
    """No randomness at all."""
    matrix = normal(4, 100, columns)
    estimate, error = probed(matrix)
    assert estimate == pytest.approx(participation(matrix), rel=1e-5)
    assert error == 0


POWERS = torch.arange(1, 221).float()


@pytest.mark.parametrize(
    "matrix",
    [
        low_rank(8, 0.02), low_rank(64, 0), normal(5, 300, 220), normal(5, 300, 220) * POWERS**-0.7,
        normal(6, 300, 220) * POWERS**-0.35, normal(7, 40, 220),
    ],
    ids=["rank 8 and noise", "rank 64", "flat", "falling", "falling slowly", "wide"],
)  # fmt: skip
def test_of_others_the_error_is_what_is_said(matrix):
    """Within three standard errors, which are at most 10 %."""
    estimate, error = probed(matrix)
    assert abs(estimate - participation(matrix)) <= 3 * error + 1e-5 * estimate
    assert error <= 0.1 * estimate


def test_the_estimate_has_no_bias_and_an_honest_error():
    """Over forty matrices of one kind: the mean error is small against the spread, and the spread is as said."""
    off = []
    for seed in range(40):
        matrix = low_rank(40, 0.05, seed=100 * seed)
        estimate, error = probed(matrix)
        off.append((estimate - participation(matrix)) / error)
    off = torch.tensor(off)
    assert abs(float(off.mean())) < 0.6
    assert 0.5 < float(off.std()) < 1.7


def test_chunks_and_repetition_change_nothing():
    """The same to float32's rounding however it is cut, and the same bits twice."""
    matrix = low_rank(40, 0.05)
    assert probed(matrix) == probed(matrix)
    assert probed(matrix, 7)[0] == pytest.approx(probed(matrix, 300)[0], rel=1e-4)


def test_nothing_and_too_much():
    """A zero matrix has no directions; squares that float32 does not hold are not guessed."""
    assert probed(torch.zeros(5, 40)) is None
    probe = DirectionProbe(40)
    probe.see(torch.full((5, 40), 1e-20))
    probe.see(torch.full((5, 40), 1e18))
    assert probe.effective_rank(1e38) is None

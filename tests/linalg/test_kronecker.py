import pytest
import torch

from loratools.errors import MismatchError, NonFiniteError, UsageError
from loratools.linalg import truncate_kronecker


def product(shape, rank, seed, dtype=torch.float64):
    """Factors A, B of a matrix of this shape."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return draw(rank, shape[1]), draw(shape[0], rank)


def dense(pair):
    return pair[1].double() @ pair[0].double()


CASES = [((5, 3), 3, (4, 7), 2), ((2, 6), 1, (9, 3), 3), ((4, 4), 4, (3, 3), 3), ((1, 5), 1, (6, 1), 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("left", "r1", "right", "r2"), CASES)
def test_it_is_the_best_there_is(left, r1, right, r2, dtype):
    """Rank by rank: the residual is that of torch's SVD of the matrix itself, which is what U S Vh leaves too."""
    one, other = product(left, r1, 1, dtype), product(right, r2, 2, dtype)
    exact = torch.kron(dense(one), dense(other))
    values = torch.linalg.svdvals(exact)
    for rank in range(1, r1 * r2 + 2):
        U, S, Vh, info = truncate_kronecker(one, other, rank)
        kept = min(rank, r1 * r2)
        torch.testing.assert_close(S.double(), values[:kept], rtol=2e-7, atol=0)
        left_over = float((exact - (U.double() * S.double()) @ Vh.double()).norm())
        best = float(values[kept:].norm())
        assert left_over == pytest.approx(best, abs=1e-6 * float(values[0]))
        assert info.residual == pytest.approx(best, abs=1e-12 * float(values[0]))
        assert info.norm == pytest.approx(float(exact.norm()), rel=1e-12)
        for basis in (U, Vh.T):
            torch.testing.assert_close(basis.T @ basis, torch.eye(kept), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "value"), [("energy", 0.9), ("error", 0.2), ("sv_ratio", 3.0), ("sv_cumulative", 0.5)]
)
def test_rules_see_all_products_of_singular_values(rule, value):
    """The same rank as the rule takes on the matrix's own singular values."""
    one, other = product((6, 8), 4, 3), product((5, 7), 3, 4)
    values = torch.linalg.svdvals(torch.kron(dense(one), dense(other)))
    rank = len(truncate_kronecker(one, other, **{rule: value})[1])
    squares = values.square().cumsum(0) / values.square().sum()
    wanted = {
        "energy": int((squares < value).sum()) + 1,
        "error": int((squares < 1 - value**2).sum()) + 1,
        "sv_ratio": int((values >= values[0] / value).sum()),
        "sv_cumulative": int((values.cumsum(0) < value * values.sum()).sum()) + 1,
    }
    assert rank == wanted[rule]


def test_zero_and_deficient_factors_are_no_special_case():
    """Of a zero matrix nothing is kept; of equal columns one."""
    one, other = product((5, 3), 2, 1), product((4, 7), 2, 2)
    zero = (one[0], torch.zeros_like(one[1]))
    assert truncate_kronecker(zero, other, 3)[1].numel() == 0
    twice = (torch.cat([one[0][:1]] * 2), torch.cat([one[1][:, :1]] * 2, 1))
    assert len(truncate_kronecker(twice, other, 4)[1]) == 2


def test_what_does_not_fit_is_refused():
    """Factors, entries and rules."""
    one, other = product((5, 3), 2, 1), product((4, 7), 2, 2)
    with pytest.raises(MismatchError):
        truncate_kronecker((one[0][:1], one[1]), other, 1)
    with pytest.raises(NonFiniteError):
        truncate_kronecker((one[0] * float("nan"), one[1]), other, 1)
    with pytest.raises(UsageError):
        truncate_kronecker(one, other)

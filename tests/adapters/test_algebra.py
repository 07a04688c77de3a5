import pytest
import torch

from loratools.adapters import Adapter, Full, LowRank
from loratools.errors import InputDataError, MismatchError, UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.tensors import in_memory
from tests.tiny import factors, lora_tensors, normal, write_adapter


def adapter(tmp_path, name, rank=4, seed=1, dtype=torch.float32, modules=None, **fields):
    tensors = lora_tensors(factors(rank, seed, dtype, modules))
    return load_adapter(write_adapter(tmp_path / name, tensors, r=rank, **fields))


def dense(update):
    """ΔW in float64, from the factors by hand."""
    return sum(term.scale * (term.lora_B.load().double() @ term.lora_A.load().double()) for term in update.terms)


@pytest.fixture
def three(tmp_path):
    return (
        adapter(tmp_path, "a", 4, 1, lora_alpha=8),
        adapter(tmp_path, "b", 3, 2, torch.bfloat16, lora_alpha=5, use_rslora=True),
        adapter(tmp_path, "d", 2, 3, torch.float16, lora_alpha=-3),
    )


def test_a_weighted_sum_is_exact(three):
    """0.7 a + 0.3 b − d: ranks concatenate, and ΔW is the float64 sum to its last bits."""
    a, b, d = three
    c = 0.7 * a + 0.3 * b - d
    assert list(c) == list(a)
    for path in c:
        assert c[path].rank == 9
        expected = 0.7 * dense(a[path]) + 0.3 * dense(b[path]) - dense(d[path])
        torch.testing.assert_close(dense(c[path]), expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(c[path].delta_weight(), expected.float(), rtol=1e-6, atol=1e-7)


def test_operators_agree(three):
    """a·w = w·a, −a = −1·a, a − b = a + (−b); a zero weight is a zero update that keeps its module."""
    a, b, _ = three
    for one, other in ((a * 0.5, 0.5 * a), (-a, -1 * a), (a - b, a + -b)):
        assert all(torch.equal(one[path].delta_weight(), other[path].delta_weight()) for path in a)
    zero = 0.0 * a
    assert list(zero) == list(a)
    assert zero.norm() == 0
    assert (1.0 * a)[next(iter(a))] is a[next(iter(a))]


def test_modules_of_either_side_stay(tmp_path):
    """A sum of adapters for different modules has both."""
    a = adapter(tmp_path, "a", modules={"x": (3, 4), "y": (3, 4)})
    b = adapter(tmp_path, "b", modules={"y": (3, 4), "z": (3, 4)})
    c = a - 2 * b
    assert list(c) == ["x", "y", "z"]
    assert torch.allclose(c["z"].delta_weight(), -2 * b["z"].delta_weight())


def test_norm_inner_and_cosine_equal_the_dense_ones(three):
    """Through r × r Gram matrices, to 1e-12 of the dense float64 values."""
    a, b, d = three
    c = 0.7 * a + 0.3 * b - d

    def inner(x, y):
        return float(sum((dense(x[path]) * dense(y[path])).sum() for path in x if path in y))

    for x in (a, b, c):
        assert x.norm() == pytest.approx(inner(x, x) ** 0.5, rel=1e-12)
        for y in (a, d, c):
            assert x.inner(y) == pytest.approx(inner(x, y), rel=1e-10)
            assert x.cosine(y) == pytest.approx(inner(x, y) / (inner(x, x) * inner(y, y)) ** 0.5, rel=1e-10)
    assert a.cosine(-a) == pytest.approx(-1)
    with pytest.raises(UsageError, match="zero"):
        a.cosine(0 * a)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_the_best_there_is(three, rank):
    """‖ΔW − truncated‖ is that of torch's SVD to 1e-6, with alpha = r and float32 factors."""
    a, b, d = three
    c = 0.7 * a + 0.3 * b - d
    short = c.truncate(rank=rank)
    for path in c:
        U, S, Vh = torch.linalg.svd(dense(c[path]), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        update = short[path]
        assert isinstance(update, LowRank)
        assert (update.rank, update.alpha, update.lora_A.dtype, update.scaling) == (rank, rank, "F32", 1.0)
        assert float(torch.linalg.norm(dense(update) - best)) <= 1e-6 * float(S[0])


@pytest.mark.parametrize(("energy", "error"), [(0.9, None), (0.999, None), (None, 0.3), (None, 0.05)])
def test_truncation_by_energy_or_error_takes_the_least_rank(three, energy, error):
    """The least rank that reaches the goal, counted on torch's singular values."""
    a, b, _ = three
    c = a + b
    short = c.truncate(energy=energy, error=error)
    for path in c:
        squares = torch.linalg.svdvals(dense(c[path])) ** 2
        captured = torch.cumsum(squares, 0) / squares.sum()
        goal = energy if energy is not None else 1 - error**2
        assert short[path].rank == int((captured < goal).sum()) + 1


def test_truncation_takes_one_rule(three):
    """None or several are refused; a rank of 0 as well."""
    for options in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}):
        with pytest.raises(UsageError):
            three[0].truncate(**options)


def test_truncation_at_full_rank_changes_nothing(three):
    """To float32."""
    a = three[0]
    short = a.truncate(rank=4)
    assert (short - a).norm() <= 1e-6 * a.norm()


def test_shapes_that_differ_are_a_mismatch(tmp_path):
    """Adapters of different models are not added, nor compared; the module is named."""
    a, b = adapter(tmp_path, "a", modules={"x.y": (3, 4)}), adapter(tmp_path, "b", modules={"x.y": (3, 5)})
    for operation in (lambda: a + b, lambda: a.inner(b)):
        with pytest.raises(MismatchError, match=r"x\.y"):
            operation()


def whole(parameter="bias"):
    return Adapter({"score": Full(replaced={parameter: in_memory("w", normal(1, 3))})})


def test_replaced_parameters_are_refused_by_name():
    """Half a replacement depends on the base: the module and the parameter are named; once is fine."""
    a = whole()
    assert (1.0 * a)["score"] is a["score"]
    for operation in (lambda: 0.5 * a, lambda: a + a, lambda: a - a, lambda: -a):
        with pytest.raises(UnsupportedError, match=r"bias.*score"):
            operation()
    with pytest.raises(UnsupportedError, match="score"):
        whole("weight").norm()


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(three, weight):
    """Not carried silently into a file."""
    with pytest.raises((UsageError, InputDataError)):
        weight * three[0]


def test_a_result_does_not_pass_for_the_file_it_was_made_of(three):
    """0.5 a is not the adapter in a's file: it must not carry its place or its hash into a report."""
    a, b, _ = three
    for derived in (0.5 * a, a + b, a.truncate(rank=1)):
        assert derived.location is None
        assert derived.files == ()

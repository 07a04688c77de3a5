import dataclasses

import pytest
import torch

from loratools.adapters import Adapter, Full, LowRank, measures
from loratools.adapters.fourierft import FourierFt
from loratools.adapters.loha import LoHa
from loratools.adapters.lokr import LoKr
from loratools.errors import InputDataError, MismatchError, UnsupportedError, UsageError
from loratools.files import load_adapter, save
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


def test_a_norm_keeps_its_digits_where_terms_cancel(three):
    """‖(1 + 1e-9) a − a‖ is 1e-9 ‖a‖, of which the root of ⟨ΔW, ΔW⟩ would know nothing."""
    a, _, _ = three
    assert ((1 + 1e-9) * a - a).norm() == pytest.approx(1e-9 * a.norm(), rel=1e-5)


def loha(out, into, rank=2, **cores):
    """In memory, alpha 5."""
    sizes = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, into), "hada_w2_a": (out, rank), "hada_w2_b": (rank, into)}
    return LoHa(**{name: in_memory(name, normal(seed, *size)) for seed, (name, size) in enumerate(sizes.items())},
                alpha=5.0, **cores)  # fmt: skip


def test_a_product_that_is_computed_is_never_larger_than_the_matrix():
    """Rank r² as long as that is below both sides; then min(out, in), of factors that are ΔW and the identity."""
    for rank, wanted in ((2, 4), (3, 9), (4, 11), (7, 11)):
        for shape in ((11, 30), (30, 11)):
            update = loha(*shape, rank)
            (term,) = update.products
            assert term.rank == wanted
            assert max(term.lora_A.spec.numel, term.lora_B.spec.numel) <= 11 * 30
            torch.testing.assert_close(
                (term.scale * term.lora_B.load() @ term.lora_A.load()).float(), update.delta_weight()
            )


def test_a_computed_product_fits_what_it_is_added_to():
    """Another shape is a mismatch; a convolution's kernel is taken from the other side, an embedding's layer is not."""
    lora = LowRank(lora_A=in_memory("A", normal(1, 2, 12)), lora_B=in_memory("B", normal(2, 5, 2)), alpha=2.0)
    with pytest.raises(MismatchError, match="x"):
        Adapter({"x": loha(5, 11)}) + Adapter({"x": lora})
    kernel = dataclasses.replace(lora, of="conv", kernel=(2, 3))
    for pair in ((loha(5, 12), kernel), (kernel, loha(5, 12))):
        total = Adapter({"x": pair[0]}) + Adapter({"x": pair[1]})
        assert (total["x"].layer, total["x"].kernel) == ("conv", (2, 3))
    with pytest.raises(MismatchError, match="embedding"):
        Adapter({"x": loha(5, 12)}) + Adapter({"x": dataclasses.replace(lora, of="embedding")})


def test_a_sum_of_kinds_for_other_modules_is_saved_as_plain_lora(tmp_path):
    """No module is in both, so nothing was added; PEFT's format holds one kind, and the file has ΔW of each."""
    lora = LowRank(lora_A=in_memory("A", normal(1, 2, 12)), lora_B=in_memory("B", normal(2, 5, 2)), alpha=2.0)
    total = Adapter({"x": loha(20, 30)}) + Adapter({"y": lora})
    save(total, tmp_path / "sum")
    again = load_adapter(tmp_path / "sum")
    assert {type(update) for update in again.values()} == {LowRank}
    for path in total:
        torch.testing.assert_close(again[path].delta_weight(), total[path].delta_weight(), rtol=1e-5, atol=1e-5)
    save(Adapter({"x": loha(20, 30)}), tmp_path / "alone")
    assert type(load_adapter(tmp_path / "alone")["x"]) is LoHa


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_sizes_and_weights_of_every_sort(size):
    """Zero and negative weights, a duplicate, sides of very different sizes: the dense sum; truncated, its best."""
    a, b = loha(20, 30, 2), loha(20, 30, 3)
    b = dataclasses.replace(b, hada_w1_a=in_memory("t", size * b.hada_w1_a.load()))
    one, two = Adapter({"x": a}), Adapter({"x": b})
    total = 0.0 * one + two - 0.5 * two + one * -2.0
    exact = 0.5 * b.delta_weight().double() - 2 * a.delta_weight().double()
    scale = 0.5 * b.delta_weight().double().norm() + 2 * a.delta_weight().double().norm()
    assert (dense(total["x"]) - exact).norm() <= 1e-6 * scale
    assert total.norm() == pytest.approx(float(exact.norm()), rel=1e-6)
    values = torch.linalg.svdvals(exact)
    short = total.truncate(rank=3)
    assert (dense(short["x"]) - exact).norm() <= 1.001 * values[3:].norm() + 1e-6 * scale


def test_shapes_that_are_not_told_are_asked_for():
    """VeRA and FourierFT alone do not say how large ΔW is: the norm says so, and takes it."""
    update = FourierFt(spectrum=in_memory("s", normal(1, 20)), seed=3, factor=5.0)
    with pytest.raises(UnsupportedError, match="of_shape"):
        Adapter({"x": update}).norm()
    told = update.of_shape((13, 10))
    assert Adapter({"x": told}).norm() == pytest.approx(float(told.delta_weight().norm()), rel=1e-6)
    with pytest.raises(MismatchError, match="spectrum"):
        update.of_shape((2, 3))


def test_inner_products_by_tiles_are_those_through_factors(monkeypatch):
    """A LoKr of high rank goes by row tiles, however few rows one has."""
    sizes = {"lokr_w1": (6, 5), "lokr_w2": (7, 9)}
    one, two = (
        Adapter({"x": LoKr(**{name: in_memory(name, normal(seed, *size)) for name, size in sizes.items()},
                           alpha=3.0, r=2)}) for seed in (1, 2)
    )  # fmt: skip
    left, right = (
        torch.kron(each["x"].lokr_w1.load().double(), each["x"].lokr_w2.load().double()) for each in (one, two)
    )
    exact = 1.5**2 * float((left * right).sum())
    for entries in (1, 200, 2**18):
        monkeypatch.setattr(measures, "_TILE", entries)
        for cheaper in (True, False):
            monkeypatch.setattr(measures, "_gram_is_cheaper", lambda *_, cheaper=cheaper: cheaper)
            assert one.inner(two) == pytest.approx(exact, rel=1e-10)

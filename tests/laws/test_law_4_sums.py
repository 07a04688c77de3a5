"""Law 4: Δ(stack(a, b; w)) = Σ w_i ΔW_i; the algebra of adapters in Python says the same; truncation is near best."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapters import Adapter, LowRank
from loratools.errors import UnsupportedError
from loratools.files import load_adapter, save
from loratools.tensors import in_memory
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from tests import models
from tests.interop.extraction import stored_products
from tests.laws.dense import changes
from tests.laws.kinds import EVERY_KIND

MODULES = {"a.lin": (6, 4), "b.lin": (3, 8), "lin": (4, 4), "c.embed": (5, 9)}

weights = st.floats(-4, 4).map(lambda value: round(value, 3))


@st.composite
def updates(draw, name):
    """One module's update: any rank, alpha, scaling rule, dtype, size."""
    out, into = MODULES[name]
    rank = draw(st.integers(1, 9))
    dtype = models.DTYPES[draw(st.sampled_from(["fp32", "bf16", "fp16"]))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    return LowRank(
        lora_A=in_memory("A", (size * torch.randn(rank, into, generator=generator)).to(dtype)),
        lora_B=in_memory("B", torch.randn(out, rank, generator=generator).to(dtype)),
        alpha=draw(st.sampled_from([1.0, 7.0, 0.37, -2.0, 64.0, float(rank)])),
        use_rslora=draw(st.booleans()),
        of="embedding" if name.endswith("embed") else "linear",
    )


@st.composite
def adapters(draw):
    """An adapter of some of the modules."""
    names = draw(st.lists(st.sampled_from(sorted(MODULES)), min_size=1, unique=True))
    return Adapter({name: draw(updates(name)) for name in names}, name="drawn")


def delta(update):
    """ΔW in float64 by the formula."""
    size = update.lora_A.shape[0] ** (0.5 if update.use_rslora else 1)
    return update.alpha / size * update.lora_B.load().double() @ update.lora_A.load().double()


def weighted(members):
    """(Σ w ΔW, Σ |w| ‖ΔW‖) per module."""
    total, size = {}, {}
    for weight, adapter in members:
        for name, update in adapter.items():
            total[name] = total.get(name, 0) + weight * delta(update)
            size[name] = size.get(name, 0) + abs(weight) * float(delta(update).norm())
    return total, size


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(weights, adapters()), min_size=1, max_size=4))
def test_stack_is_the_sum_whatever_goes_in(members):
    """Any ranks, alphas, dtypes, signs, modules: on disk, by PEFT's formula, to 1e-6 of the summands' sizes."""
    total, size = weighted(members)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for index, (_, adapter) in enumerate(members):
            save(adapter, root / str(index))
        stack(
            [root / str(index) for index in range(len(members))],
            root / "sum",
            weights=[weight for weight, _ in members],
        )
        found = stored_products(root / "sum")
        assert set(found) == set(total)
        for name, exact in total.items():
            assert (found[name] - exact).norm() <= 1e-6 * size[name] + 1e-30, name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(adapters(), adapters(), adapters(), weights, weights)
def test_the_algebra_is_the_same_sum(a, b, d, left, right):
    """`left * a + right * b - d` in Python, read back from what `save` wrote too; norm, inner and cosine agree with
    the materialised ΔW."""
    c = left * a + right * b - d
    total, size = weighted([(left, a), (right, b), (-1.0, d)])
    for name, exact in total.items():
        assert (c[name].delta_weight().double() - exact).norm() <= 1e-6 * size[name] + 1e-30
    squares = sum(float(exact.square().sum()) for exact in total.values())
    scale = sum(size.values())
    assert c.norm() == pytest.approx(squares**0.5, abs=1e-6 * scale + 1e-30)
    inner = sum(float((total[name] * delta(a[name])).sum()) for name in a)
    assert c.inner(a) == pytest.approx(inner, abs=1e-6 * scale * max(a.norm(), 1e-30) + 1e-30)
    with tempfile.TemporaryDirectory() as place:
        save(c, Path(place) / "c")
        again = load_adapter(Path(place) / "c")
        for name, exact in total.items():
            assert (again[name].delta_weight().double() - exact).norm() <= 1e-6 * size[name] + 1e-30


@settings(max_examples=40, deadline=None, derandomize=True)
@given(adapters(), adapters(), st.integers(1, 5))
def test_truncation_is_near_the_best(a, b, rank):
    """The QR core's truncation of a sum is within 1.001 of Eckart–Young of the materialised ΔW."""
    total, size = weighted([(1.0, a), (-0.5, b)])
    short = (a - 0.5 * b).truncate(rank=rank)
    for name, exact in total.items():
        values = torch.linalg.svdvals(exact)
        kept = short[name].delta_weight().double() if name in short else torch.zeros_like(exact)
        assert (exact - kept).norm() <= 1.001 * values[rank:].norm() + 1e-6 * size[name]
        if name in short:
            assert short[name].rank <= rank
            assert short[name].scaling == 1


@pytest.mark.parametrize("name", EVERY_KIND)
def test_stack_is_the_sum_of_every_kind(tmp_path, name):
    """Two adapters of a kind: ΔW of the file that comes out is the weighted sum, or the kind is refused by name."""
    kind = EVERY_KIND[name]
    base = kind.write_base(tmp_path / "base", "fp32")
    adapters = [kind.write(tmp_path / str(seed), seed) for seed in (1, 2)]
    if not kind.sums:
        with pytest.raises(UnsupportedError):
            stack(adapters, tmp_path / "sum", weights=[0.7, -1.5], base=base)
        assert not (tmp_path / "sum").exists()
        return
    stack(adapters, tmp_path / "sum", weights=[0.7, -1.5], base=base)
    tensors = models.tensors_of(base)
    found, one, two = (changes(load_adapter(each), tensors) for each in (tmp_path / "sum", *adapters))
    assert found.keys() == one.keys()
    for path, delta in found.items():
        size = 0.7 * one[path].norm() + 1.5 * two[path].norm()
        assert (delta - (0.7 * one[path] - 1.5 * two[path])).norm() <= 1e-6 * size, path


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_multiple_of_every_kind(tmp_path, name):
    """`rescale --by`: ΔW of the file that comes out is that multiple, or the kind is refused by name."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", "fp32"), kind.write(tmp_path / "adapter")
    if not (kind.sums if kind.halves is None else kind.halves):
        with pytest.raises(UnsupportedError):
            rescale(adapter, tmp_path / "more", by=-0.3)
        assert not (tmp_path / "more").exists()
        return
    rescale(adapter, tmp_path / "more", by=-0.3)
    tensors = models.tensors_of(base)
    found, one = (changes(load_adapter(each), tensors) for each in (tmp_path / "more", adapter))
    assert found.keys() == one.keys()
    for path, delta in found.items():
        assert (delta + 0.3 * one[path]).norm() <= 1e-6 * one[path].norm(), path


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["loha", "lokr", "adalora", "rslora", "block-diagonal"])
def test_the_sum_with_plain_lora(tmp_path, name, dtype):
    """A kind and LoRA, some modules in one only: the file that comes out is plain LoRA with the weighted sum."""
    one, two = EVERY_KIND[name].adapter(1, dtype), EVERY_KIND["linear"].adapter(2, "fp32")
    two = two.with_updates({"a.lin": two["a.lin"]})
    save(one, tmp_path / "one")
    save(two, tmp_path / "two")
    stack([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", weights=[0.7, -1.5])
    found = stored_products(tmp_path / "sum")
    assert set(found) == {"a.lin", "b.proj"}
    for path, made in found.items():
        exact = 0.7 * one[path].delta_weight().double()
        exact -= 1.5 * two[path].delta_weight().double() if path in two else 0
        assert (made - exact).norm() <= 1e-6 * exact.norm(), path

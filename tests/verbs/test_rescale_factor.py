"""`rescale --factor`: a number in one factor, or its root in both; and what happens where both are multiplied by it."""

import pytest
import torch

from loratools.errors import NonFiniteError, UnsupportedError
from loratools.files import load_adapter
from loratools.verbs.rescale import rescale
from loratools.verbs.verify import verify
from tests.tiny import (
    PREFIX,
    SHAPES,
    K,
    Q,
    equal_bits,
    factors,
    lora_tensors,
    normal,
    tensors_of,
    write_adapter,
)

HOW = [{"by": 0.7}, {"by": -3.0}, {"by": 0.0}, {"norm": 1.0}, {"blocks": "self_attn=0.3"}]
OTHER = {"lora_A": "lora_B", "lora_B": "lora_A"}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def source(tmp_path, request):
    pairs = factors(3, 1, request.param)
    return write_adapter(tmp_path / "a", lora_tensors(pairs), r=3, lora_alpha=5, use_rslora=True)


def delta(adapter, path):
    update = adapter[path]
    return update.scaling * (update.lora_B.load().double() @ update.lora_A.load().double())


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "both"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_it_is_multiplied_once(tmp_path, source, how, factor):
    """ΔW times the number to 1e-6, alpha and the other factor as they were, and verify agrees."""
    report = rescale(source, tmp_path / "out", **how, factor=factor)
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    was, became = tensors_of(source), tensors_of(tmp_path / "out")
    rows = {row["name"]: row for row in report.modules}
    for path in SHAPES:
        number = how.get("by", rows[path].get("factor"))
        expected = delta(before, path) * number
        assert float((delta(after, path) - expected).norm()) <= 1e-6 * float(expected.norm())
        assert after[path].alpha == before[path].alpha
        if factor != "both":
            key = f"{PREFIX}{path}.{OTHER[factor]}.weight"
            assert equal_bits(was[key], became[key])
    assert verify(tmp_path / "out", [source]).answer == "holds"


def test_both_share_it_evenly(tmp_path, source):
    """√|x| each, the sign in lora_B: as kohya's max norm does it."""
    rescale(source, tmp_path / "out", by=-4, factor="both")
    was, became = tensors_of(source), tensors_of(tmp_path / "out")
    for key in was:
        assert torch.equal(became[key].double(), was[key].double() * (-2 if "lora_B" in key else 2))
        assert became[key].dtype == was[key].dtype


def test_a_factor_that_cannot_hold_the_product_becomes_float32(tmp_path, source):
    """bf16 · 0.3 is no bf16: the report names the factor; a power of two costs nothing."""
    report = rescale(source, tmp_path / "out", by=0.3, factor="lora_B")
    sixteen = load_adapter(source)[Q].lora_A.dtype != "F32"
    assert all(row["widened"] == (["lora_B"] if sixteen else []) for row in report.modules)
    assert {ref.dtype for ref in (load_adapter(tmp_path / "out")[Q].lora_B,)} == {"F32"}
    report = rescale(source, tmp_path / "half", by=0.5, factor="lora_B")
    assert all(row["widened"] == [] for row in report.modules)
    assert load_adapter(tmp_path / "half")[Q].lora_B.dtype == load_adapter(source)[Q].lora_B.dtype


def test_a_bias_is_multiplied_too(tmp_path):
    """`lora_bias` has the scaling of ΔW, so it takes the number where alpha does not."""
    tensors = lora_tensors(factors()) | {
        f"{PREFIX}{path}.lora_B.bias": normal(7, shape[0]) for path, shape in SHAPES.items()
    }
    source = write_adapter(tmp_path / "a", tensors, lora_bias=True)
    for factor in ("lora_A", "lora_B", "both"):
        rescale(source, tmp_path / factor, by=3, factor=factor)
        for path in SHAPES:
            before, after = load_adapter(source)[path], load_adapter(tmp_path / factor)[path]
            assert torch.allclose(after.bias.load(), 3 * before.bias.load())
            assert after.scaling == before.scaling


def test_kinds_without_these_factors_and_what_overflows(tmp_path):
    """Refused by name before anything is written; a product that float32 cannot hold is an error."""
    tensors = {f"{PREFIX}{Q}.hada_{name}": normal(i, *shape) for i, (name, shape) in enumerate(
        {"w1_a": (16, 2), "w1_b": (2, 16), "w2_a": (16, 2), "w2_b": (2, 16)}.items())}  # fmt: skip
    config = '{"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}'
    loha = write_adapter(tmp_path / "loha", tensors, config)
    with pytest.raises(UnsupportedError, match="lora_A and lora_B"):
        rescale(loha, tmp_path / "out", by=2, factor="lora_B")
    source = write_adapter(tmp_path / "a")
    with pytest.raises(NonFiniteError, match="lora_B"):
        rescale(source, tmp_path / "out", by=1e39, factor="lora_B")
    assert not (tmp_path / "out").exists()


def kohyas_merge(up, down, alpha, ratio):
    """The formula of sd-scripts' `merge_lora.py` for one adapter, alpha kept: both factors times the ratio."""
    return alpha / down.shape[0] * (up * ratio) @ (down * ratio)


@pytest.mark.parametrize("ratio", [0.7, 0.5, 1.5])
def test_kohyas_merge_multiplies_twice(tmp_path, source, ratio):
    """`docs/guide/rescale.md`: ratio² where every way of ours gives ratio."""
    before = load_adapter(source)
    for name, options in {"alpha": {}, "A": {"factor": "lora_A"}, "both": {"factor": "both"}}.items():
        rescale(source, tmp_path / name, by=ratio, **options)
        ours = delta(load_adapter(tmp_path / name), K)
        update = before[K]
        alpha = update.scaling * update.rank
        theirs = kohyas_merge(update.lora_B.load().double(), update.lora_A.load().double(), alpha, ratio)
        size = float(delta(before, K).norm())
        assert float(ours.norm()) / size == pytest.approx(ratio, rel=1e-6)
        assert float(theirs.norm()) / size == pytest.approx(ratio**2, rel=1e-6)


def test_kohyas_concatenation(tmp_path):
    """Two copies at rank 8, alpha 8, ratio 0.7 and `--concat`: 2 · 0.245 of the adapter instead of 2 · 0.7."""
    up, down = normal(1, 12, 8, dtype=torch.float64), normal(2, 8, 10, dtype=torch.float64)
    theirs = kohyas_merge(torch.cat([up, up], 1), torch.cat([down, down]), 8.0, 0.7)
    assert float(theirs.norm() / (2 * up @ down).norm()) == pytest.approx(0.245, rel=1e-6)

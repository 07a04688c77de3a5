import json

import pytest
import torch

from loratools.errors import NonFiniteError, UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from tests.tiny import (
    PREFIX,
    SHAPES,
    K,
    Q,
    equal_bits,
    factors,
    llama,
    lora_tensors,
    normal,
    report_of,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def source(tmp_path, request):
    pairs = factors(3, 1, request.param)
    return write_adapter(
        tmp_path / "a", lora_tensors(pairs), r=3, lora_alpha=5, use_rslora=True, alpha_pattern={"k_proj": 7}
    )


def close(one, other):
    return float((one - other).norm()) <= 1e-7 * float(other.norm())


def delta(adapter, path):
    update = adapter[path]
    return update.scaling * (update.lora_B.load().double() @ update.lora_A.load().double())


@pytest.mark.parametrize("by", [2.0, 0.3, -1.0, 0.0])
def test_by_multiplies_alpha_and_touches_no_factor(tmp_path, source, by):
    """ΔW × by exactly: the factors keep their bytes, each module its own alpha."""
    rescale(source, tmp_path / "out", by=by)
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    for path in SHAPES:
        assert after[path].alpha == pytest.approx(by * before[path].alpha, rel=1e-15)
        pairs = zip(before[path].tensors, after[path].tensors, strict=True)
        assert all(equal_bits(x.load(), y.load()) for x, y in pairs)
        assert after[path].use_rslora


def test_bake_leaves_delta_and_sets_alpha_to_rank(tmp_path, source):
    """Scaling 1 for every reader, rsLoRA gone; ΔW to 1e-6."""
    rescale(source, tmp_path / "out", bake=True)
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["alpha_pattern"], config["lora_alpha"], config["r"]) == (False, {}, 3, 3)
    for path in SHAPES:
        assert (after[path].scaling, after[path].alpha) == (1.0, 3)
        assert close(delta(after, path), delta(before, path))


@pytest.mark.parametrize("alpha", [1, 16, 0.37, -4])
def test_restating_alpha_leaves_delta(tmp_path, source, alpha):
    """The same ΔW said with another alpha: lora_A keeps its bytes, lora_B takes the quotient."""
    rescale(source, tmp_path / "out", restate_alpha=alpha)
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    for path in SHAPES:
        assert after[path].alpha == alpha
        assert equal_bits(after[path].lora_A.load(), before[path].lora_A.load())
        assert close(delta(after, path), delta(before, path))


def test_a_power_of_two_is_exact(tmp_path, source):
    """Then lora_B keeps its dtype, and ΔW its bits."""
    rescale(source, tmp_path / "x", restate_alpha=5)
    rescale(tmp_path / "x", tmp_path / "out", restate_alpha=20)
    before, after = load_adapter(tmp_path / "x"), load_adapter(tmp_path / "out")
    assert after[Q].lora_B.dtype == before[Q].lora_B.dtype == load_adapter(source)[Q].lora_B.dtype
    assert torch.equal(after[Q].lora_B.load().double() * 4, before[Q].lora_B.load().double())
    assert torch.equal(delta(after, Q), delta(before, Q))


def test_patterns_choose_what_changes_and_the_rest_stays(tmp_path, source):
    """All modules come out; only the chosen ones are stronger."""
    rescale(source, tmp_path / "out", by=3, include=["k_proj"])
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    assert list(after) == list(before)
    assert after[K].scaling == pytest.approx(3 * before[K].scaling)
    assert after[Q].scaling == pytest.approx(before[Q].scaling)


def test_refusals(tmp_path, source):
    """Exactly one way; numbers that are numbers; whole parameters have no strength of their own."""
    whole = write_adapter(tmp_path / "whole", {f"{PREFIX}score.weight": normal(1, 3, 16)}, modules_to_save=["score"])
    before = state(tmp_path)
    for adapter, options, error in (
        (source, {}, UsageError),
        (source, {"by": 2, "bake": True}, UsageError),
        (source, {"by": float("nan")}, UsageError),
        (source, {"by": float("inf")}, UsageError),
        (source, {"restate_alpha": 0}, UsageError),
        (source, {"restate_alpha": float("nan")}, UsageError),
        (source, {"by": 2, "include": ["nothing"]}, UsageError),
        (whole, {"by": 2}, UnsupportedError),
    ):
        with pytest.raises(error):
            rescale(adapter, tmp_path / "out", **options)
        assert state(tmp_path) == before


def test_a_module_of_scaling_zero_cannot_be_restated_silently(tmp_path):
    """alpha 0 has no quotient for a new alpha: ΔW stays zero, or it is refused; never NaN."""
    a = write_adapter(tmp_path / "a", lora_alpha=0)
    rescale(a, tmp_path / "out", restate_alpha=4)
    assert float(delta(load_adapter(tmp_path / "out"), Q).abs().max()) == 0


def test_nan_factors(tmp_path):
    """A damaged adapter is not passed on as a rescaled one."""
    pairs = factors()
    pairs[Q][0][0, 0] = float("nan")
    a = write_adapter(tmp_path / "a", lora_tensors(pairs))
    for options in ({"by": 2}, {"bake": True}):
        with pytest.raises(NonFiniteError, match=r"1 of 64.*q_proj\.lora_A"):
            rescale(a, tmp_path / "out", **options)


def test_an_overflow_is_an_error(tmp_path):
    """A quotient that float32 cannot hold would make infinite factors."""
    pairs = {Q: (normal(1, 4, 16), normal(2, 16, 4) * 1e30)}
    a = write_adapter(tmp_path / "a", lora_tensors(pairs), lora_alpha=1e20)
    with pytest.raises(NonFiniteError, match="q_proj"):
        rescale(a, tmp_path / "out", bake=True)
    assert not (tmp_path / "out").exists()


def test_the_report_and_unknown_fields(tmp_path, source):
    """The report equals its file; a field of a newer PEFT travels on."""
    config = json.loads((source / "adapter_config.json").read_text()) | {"a_field_of_2031": {"x": 1}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    report = rescale(source, tmp_path / "out", by=2)
    assert report_of(tmp_path / "out") == json.loads(json.dumps(report.to_json()))
    assert report.parameters["by"] == 2
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["a_field_of_2031"] == {"x": 1}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_factors_of_eight_bits(tmp_path, dtype):
    """Merged, rescaled and baked as what they stand for in float64; NaN in them is found."""
    pairs = {path: tuple(each.to(dtype) for each in pair) for path, pair in factors(3).items()}
    source = write_adapter(tmp_path / "a", lora_tensors(pairs), r=3, lora_alpha=6)
    tensors = llama(torch.float32)
    base = write_checkpoint(tmp_path / "base", tensors)
    for options in ({"by": 3.0}, {"by": -3.0}, {"bake": True}):
        rescale(source, tmp_path / "b", **options, overwrite=True)
        merge(base, [source, tmp_path / "b"], tmp_path / "merged", overwrite=True)
        found = tensors_of(tmp_path / "merged")
        for path, (A, B) in pairs.items():
            name = f"{path}.weight"
            exact = tensors[name].double() + 2.0 * (1.0 + options.get("by", 1.0)) * (B.double() @ A.double())
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)
    broken = pairs[Q][0].clone()
    broken.view(torch.uint8)[0, 0] = 0x7F
    tensors = lora_tensors({**pairs, Q: (broken, pairs[Q][1])})
    source = write_adapter(tmp_path / "c", tensors, r=3, lora_alpha=6)
    with pytest.raises(NonFiniteError, match="1 of"):
        merge(base, [source], tmp_path / "not")

"""`verify` on checkpoints that PEFT merged and transformers saved: which of its roundings, and what is wrong."""

import copy

import pytest
import torch

from loratools.verbs.verify import verify
from tests import models
from tests.interop.merging import unmerged, write_by_peft
from tests.interop.test_merge_peft import CASES

DTYPES = ("fp32", "bf16", "fp16")


def saved_by_peft(model, directory, **how):
    """PEFT's merge of a copy of `model`, saved by transformers."""
    with models.quiet():
        merged = copy.deepcopy(model).merge_and_unload(**how)
    return models.save(merged, directory)


def written(base, tmp_path, case, name="adapter", **how):
    _, config = CASES[case]
    return write_by_peft(base, tmp_path / name, **{**config, **how})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", sorted(set(CASES) - {"embedding", "embed-and-head"}))
def test_the_default_merge_is_one_rounding(bases, tmp_path, case, dtype):
    """W += ΔW with ΔW in fp32: in 16 bits mostly indistinguishable from ours, in 32 its own rounding errors show."""
    base = bases(CASES[case][0], dtype)
    adapter = written(base, tmp_path, case)
    report = verify(saved_by_peft(unmerged(base, adapter), tmp_path / "merged"), base=base, adapters=[adapter])
    assert (report.answer, report.tensors) == ("holds", ())
    assert set(report.policies) <= {"one-rounding", "float32", "whole"}
    assert dtype != "fp32" or "float32" in report.policies


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["alpha", "conv1d", "rslora"])
def test_a_safe_merge_rounds_the_update_first(bases, tmp_path, case, dtype):
    base = bases(CASES[case][0], dtype)
    adapter = written(base, tmp_path, case)
    merged = saved_by_peft(unmerged(base, adapter), tmp_path / "merged", safe_merge=True)
    report = verify(merged, base=base, adapters=[adapter])
    assert (report.answer, set(report.policies)) == ("holds", {f"delta-first {dtype}"})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["embedding", "embed-and-head"])
def test_embeddings_are_rounded_first_and_the_others_not(bases, tmp_path, case, dtype):
    base = bases(CASES[case][0], dtype)
    adapter = written(base, tmp_path, case)
    report = verify(saved_by_peft(unmerged(base, adapter), tmp_path / "merged"), base=base, adapters=[adapter])
    assert report.answer == "holds"
    policies = {row["name"]: row["policy"] for row in report.modules}
    assert {policy for name, policy in policies.items() if "embed" in name} == {f"delta-first {dtype}"}
    assert {policy for name, policy in policies.items() if "embed" not in name} <= {"one-rounding", "float32"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe", [False, True])
def test_two_adapters_are_added_one_by_one(bases, tmp_path, dtype, safe):
    """PEFT rounds after each; with weights, which multiply the scalings."""
    base = bases("llama", dtype)
    adapters = [written(base, tmp_path, case, case, seed=seed) for seed, case in enumerate(("alpha", "rslora"))]
    model = unmerged(base, *adapters, weights=[0.5, -2.0])
    merged = saved_by_peft(model, tmp_path / "merged", safe_merge=safe)
    report = verify(merged, base=base, adapters=adapters, weights=[0.5, -2.0])
    first = f"delta-first {dtype}" if safe and dtype != "fp32" else "float32"
    assert report.answer == "holds"
    assert set(report.policies) <= {f"{first}, one-by-one", *([] if dtype != "fp32" else ["float32"])}
    assert verify(merged, base=base, adapters=adapters).answer == "does not hold"
    one = verify(merged, base=base, adapters=adapters[:1], weights=0.5)
    assert {row["verdict"] for row in one.modules} == {"other"}


@pytest.mark.parametrize("scaled", [1, 0.75])
def test_sixteen_bit_factors_that_stay_so(bases, tmp_path, scaled):
    """Factors that are not cast to fp32: PEFT rounds ΔW to their dtype, whatever that of the base."""
    base = bases("llama", "fp32")
    adapter = write_by_peft(base, tmp_path / "adapter", factors="bf16", r=4, lora_alpha=4 * scaled,
                            target_modules=["q_proj", "up_proj"])  # fmt: skip
    model = unmerged(base, adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    report = verify(saved_by_peft(model, tmp_path / "merged"), base=base, adapters=[adapter])
    assert (report.answer, set(report.policies)) == ("holds", {"delta-first bf16"})


@pytest.mark.parametrize("safe", [False, True])
def test_a_base_in_32_bits_that_was_loaded_in_16(bases, tmp_path, safe):
    """The base is rounded before anything is added, the usual way to merge a checkpoint that is stored in fp32."""
    base = bases("llama", "fp32")
    adapter = written(base, tmp_path, "alpha")
    model = unmerged(base, adapter)
    with models.quiet():
        half = models.load(base).to(torch.bfloat16)
        from peft import PeftModel

        peft_model = PeftModel.from_pretrained(half, adapter)
    report = verify(saved_by_peft(peft_model, tmp_path / "first", safe_merge=safe), base=base, adapters=[adapter])
    first = "delta-first bf16" if safe else "float32"
    assert (report.answer, set(report.policies)) == ("holds", {f"{first}, recast-first"})
    with models.quiet():
        late = copy.deepcopy(model).merge_and_unload().to(torch.bfloat16)
    report = verify(models.save(late, tmp_path / "last"), base=base, adapters=[adapter])
    assert report.answer == "holds"
    assert set(report.policies) <= {"one-rounding", "float32", "float32, recast-last"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_wrong_is_named(bases, tmp_path, dtype):
    """Merged twice, at half the scale, with the sign turned, not at all in one module, from another adapter."""
    base = bases("llama", dtype)
    adapter, other = (
        written(base, tmp_path, "alpha", name, seed=seed) for seed, name in ((1, "adapter"), (2, "stranger"))
    )

    def verdicts(model, name, **how):
        report = verify(saved_by_peft(model, tmp_path / name, **how), base=base, adapters=[adapter])
        assert report.answer == "does not hold"
        return {row["name"]: (row["verdict"], row["scale"]) for row in report.modules}

    merged = saved_by_peft(unmerged(base, adapter), tmp_path / "once")
    for safe in (False, True):
        found = verdicts(unmerged(merged, adapter), f"twice-{safe}", safe_merge=safe)
        assert {verdict for verdict, _ in found.values()} == {"twice"}
        assert all(scale[0] == pytest.approx(2, abs=0.05) for _, scale in found.values())
        found = verdicts(unmerged(base, adapter, weights=[0.5]), f"half-{safe}", safe_merge=safe)
        assert {verdict for verdict, _ in found.values()} == {"scale"}
        assert all(scale[0] == pytest.approx(0.5, abs=0.02) for _, scale in found.values())
    found = verdicts(unmerged(base, adapter, weights=[-1.0]), "minus")
    assert {verdict for verdict, _ in found.values()} == {"subtracted"}
    assert {verdict for verdict, _ in verdicts(unmerged(base, other), "wrong").values()} == {"other"}
    model = unmerged(base, adapter)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.scaling[layer.active_adapters[0]] = 0.0
    found = verdicts(model, "partly")
    assert {name for name, (verdict, _) in found.items() if verdict == "missing"} == {
        "model.layers.1.mlp.up_proj.weight"
    }
    assert sum(verdict == "holds" for verdict, _ in found.values()) == len(found) - 1

"""`extract` of mixtures of experts with dense layers, routers and biases: PEFT and our merge give the tuned model."""

import pytest
import torch

import loratools as lt
from loratools.checkpoints.experts import is_moved_by_peft
from loratools.errors import UnsupportedError
from tests import models
from tests.interop import judge, moe_more

FAMILIES = ("deepseek_v3", "qwen3_moe", "ernie4_5_moe", "mixtral", "qwen2_moe")


def assert_both_are_tuned(base, adapter, tuned_path, tuned, directory):
    """PEFT loads every key and computes what the tuned model does; the merge has the tuned values."""
    loaded = judge.load_cleanly(models.load(base), adapter, expected=moe_more.said(adapter))
    assert torch.allclose(models.output_of(loaded), models.output_of(tuned), rtol=1e-3, atol=1e-4)
    lt.merge(base, [adapter], directory / "merged")
    merged, wanted = models.tensors_of(directory / "merged"), models.tensors_of(tuned_path)
    assert all(torch.allclose(merged[name], tensor, rtol=0, atol=1e-5) for name, tensor in wanted.items())


@pytest.mark.parametrize("rank", [64, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layers_beside_experts(family, rank, tmp_path):
    """Everything changes. PEFT takes `gate_proj` of a dense layer for the experts' and doubles their rank; here it
    loads all, and at full rank computes what the tuned model does."""
    base, tuned, model = moe_more.pair(family, tmp_path, lambda name: "moe_statics" not in name)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=rank)
    if rank == 64:
        assert_both_are_tuned(base, tmp_path / "adapter", tuned, model, tmp_path)
    loaded = judge.load_cleanly(models.load(base), tmp_path / "adapter", expected=moe_more.said(tmp_path / "adapter"))
    lt.merge(base, [tmp_path / "adapter"], tmp_path / "again")
    assert torch.allclose(
        models.output_of(loaded), models.output_of(models.load(tmp_path / "again")), rtol=1e-3, atol=1e-4
    )
    moved = family in {"deepseek_v3", "qwen3_moe"}
    assert any("dense layers" in note for note in report.notes) == moved


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_dense_layers_alone(family, tmp_path):
    """No expert changed: PEFT must not wrap any."""
    base, tuned, model = moe_more.pair(family, tmp_path, lambda name: "layers.0." in name)
    lt.extract(base, tuned, tmp_path / "adapter", rank=64)
    assert_both_are_tuned(base, tmp_path / "adapter", tuned, model, tmp_path)
    again = lt.load_adapter(tmp_path / "adapter")
    assert "model.layers.0.mlp.gate_proj.weight" in again
    lt.save(again, tmp_path / "saved")
    judge.load_cleanly(models.load(base), tmp_path / "saved", expected=moe_more.said(tmp_path / "saved"))


def test_the_families_are_pefts():
    """Our list of names that PEFT moves is the one of the installed PEFT."""
    from peft.utils import transformers_weight_conversion as theirs

    for family, pattern in theirs._MODEL_TO_CONVERSION_PATTERN.items():
        names = set(theirs._MOE_TARGET_MODULE_MAPPING.get(pattern, ())) - {"gate"}
        if family.islower():
            for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
                assert is_moved_by_peft(f"model.layers.0.mlp.{name}", family) == (name in names), (family, name)
    assert not is_moved_by_peft("model.layers.0.mlp.gate_proj", "llama")


@pytest.mark.parametrize("how", ["save_full", "exclude"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mixtral", "qwen3_vl_moe"])
def test_routers_are_whole(family, how, tmp_path):
    """Experts kept whole or left out: the router, no Linear in any of these classes, loads."""
    base, tuned, model = moe_more.pair(family, tmp_path, lambda name: "visual" not in name)
    if how == "exclude":
        before = models.load(base).state_dict()
        model.load_state_dict({name: before[name] if ".experts." in name else tensor
                               for name, tensor in model.state_dict().items()})  # fmt: skip
    apart = family in {"deepseek_v3", "mixtral"}
    if apart and how == "save_full":
        pytest.skip("single experts kept whole are another matter")
    pattern = {how: ["*.experts.*" if apart else "*.experts"]}
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=64, **pattern)
    assert any(name.endswith(("router.weight", "gate.weight")) for name in report.whole)
    loaded = judge.load_cleanly(models.load(base), tmp_path / "adapter", expected=moe_more.said(tmp_path / "adapter"))
    assert torch.allclose(models.output_of(loaded), models.output_of(model), rtol=1e-3, atol=1e-4)
    lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.output_of(models.load(tmp_path / "merged"))
    assert torch.allclose(merged, models.output_of(model), rtol=1e-3, atol=1e-4)


class TestBiasesOfExperts:
    """GPT-OSS has a vector for every expert, which stands below PEFT's wrappers: refused, with ways out that work."""

    def test_refused_with_what_helps(self, tmp_path):
        base, tuned, _ = moe_more.pair("gpt_oss", tmp_path)
        with pytest.raises(UnsupportedError, match=r"a vector of each.*\n?") as refused:
            lt.extract(base, tuned, tmp_path / "adapter", rank=64)
        assert "--exclude" in str(refused.value)
        assert "--save-full" in str(refused.value)
        assert not (tmp_path / "adapter").exists()

    def test_only_low_rank_names_them(self, tmp_path):
        base, tuned, _ = moe_more.pair("gpt_oss", tmp_path)
        report = lt.extract(base, tuned, tmp_path / "adapter", rank=64, only_low_rank=True)
        assert "model.layers.0.mlp.experts.down_proj_bias" in report.left_out
        judge.load_cleanly(models.load(base), tmp_path / "adapter", expected=moe_more.said(tmp_path / "adapter"))
        lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
        merged, wanted = models.tensors_of(tmp_path / "merged"), models.tensors_of(tuned)
        assert torch.allclose(merged["model.layers.0.mlp.experts.down_proj"],
                              wanted["model.layers.0.mlp.experts.down_proj"], atol=1e-5)  # fmt: skip

    def test_unchanged_ones_do_not_matter(self, tmp_path):
        base, tuned, model = moe_more.pair("gpt_oss", tmp_path, lambda name: not name.endswith("proj_bias"))
        lt.extract(base, tuned, tmp_path / "adapter", rank=64)
        assert_both_are_tuned(base, tmp_path / "adapter", tuned, model, tmp_path)


def test_a_bias_beside_a_targeted_parameter_is_the_modules(tmp_path):
    """PEFT with `target_parameters` on a Linear's weight and `bias="lora_only"`: the bias is the module's."""
    base = models.write_checkpoint(
        tmp_path / "base", {"inner.weight": torch.zeros(4, 6), "inner.bias": torch.zeros(4)}, {"model_type": "custom"}
    )
    key = "base_model.model.inner"
    factors = {f"{key}.lora_A.weight": torch.ones(2, 6), f"{key}.lora_B.weight": torch.ones(4, 2),
               f"{key}.base_layer.bias": torch.arange(4.0)}  # fmt: skip
    config = {"r": 2, "lora_alpha": 2, "target_modules": [], "target_parameters": ["inner.weight"], "bias": "lora_only"}
    adapter = models.write_adapter(tmp_path / "adapter", factors, config)
    lt.merge(base, [adapter], tmp_path / "merged")
    merged = models.tensors_of(tmp_path / "merged")
    assert torch.equal(merged["inner.bias"], torch.arange(4.0))
    assert torch.equal(merged["inner.weight"], torch.full((4, 6), 2.0))

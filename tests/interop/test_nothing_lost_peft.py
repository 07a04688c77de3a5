"""What an adapter holds beside its factors is used, kept, or refused by name: never left out without a word."""

import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import MalformedError, UnsupportedError
from tests import models
from tests.interop.kinds import Case, config, rewrite
from tests.tiny import normal

START = "base_model.model."


@pytest.mark.parametrize(("targets", "options"), [
    (["block.q"], {"use_qalora": True, "qalora_group_size": 4}),
    (["block.q"], {"use_bdlora": {"target_modules_bd_a": ["block.q"], "nblocks": 2}}),
    (["embed"], {}),
])  # fmt: skip
def test_a_bias_of_a_form_that_has_none(tmp_path, targets, options):
    """`lora_B.bias` beside QALoRA, BD-LoRA or an embedding: PEFT's forward uses it, so it is refused, not dropped."""
    case = Case(tmp_path, config(targets))
    settings = case.config | options | {"lora_bias": True}
    (case.adapter / "adapter_config.json").write_text(json.dumps(settings))
    group = 4 if "use_qalora" in options else 1
    rewrite(case, lambda tensors: {
        key: value[:, ::group].contiguous() if "lora_A" in key else value for key, value in tensors.items()
    } | {f"{START}{targets[0]}.lora_B.bias": normal(1, 18)})  # fmt: skip
    if "use_bdlora" in options:
        rewrite(
            case,
            lambda tensors: {
                key: value[:, :6].contiguous() if "lora_A" in key else value for key, value in tensors.items()
            },
        )
    with pytest.raises(UnsupportedError, match=r"lora_B\.bias"):
        lt.load_adapter(case.adapter)


@pytest.mark.parametrize("by", [2.0**18, 2.0**-16])
def test_projections_of_an_attention_that_lie_far_apart(tmp_path, by):
    """Levelled in float16 a factor would overflow, or lose bits: it becomes float32."""
    case = Case(tmp_path, config(["attn"]), dtype="fp16")
    lt.rescale(case.adapter, tmp_path / "more", by=by, include=["*.out_proj"])
    before, after = (lt.load_adapter(each)["attn.out_proj"] for each in (case.adapter, tmp_path / "more"))
    assert torch.equal(after.delta_weight(), before.delta_weight() * by)


@pytest.mark.parametrize("options", [
    {"use_qalora": True, "qalora_group_size": 4},
    {"use_bdlora": BdLoraConfig(target_modules_bd_a=["block.q"], nblocks=2)},
])  # fmt: skip
def test_half_of_what_is_given_whole(tmp_path, options):
    """Half of a bias that is given whole depends on the base, for every form."""
    case = Case(tmp_path, config(["block.q"], bias="lora_only", **{k: v for k, v in options.items() if "bd" in k}))
    if "use_qalora" in options:
        (case.adapter / "adapter_config.json").write_text(json.dumps(case.config | options))
        rewrite(
            case,
            lambda tensors: {
                key: value[:, ::4].contiguous() if "lora_A" in key else value for key, value in tensors.items()
            },
        )
    with pytest.raises(UnsupportedError, match=r"given whole|replaced whole"):
        lt.rescale(case.adapter, tmp_path / "half", by=0.5)
    with pytest.raises(UnsupportedError, match=r"given whole|replaced whole"):
        0.5 * lt.load_adapter(case.adapter)


@pytest.mark.parametrize("part", ["base_layer.bias", "base_layer.weight"])
def test_what_an_expert_gives_whole(tmp_path, part):
    """One expert's bias or weight has no place in a stacked parameter: refused, not filed under nothing."""
    stem, start = "model.layers.0.mlp.experts", f"{START}model.layers.0.mlp.experts.1.gate_proj"
    base = models.write_checkpoint(tmp_path / "base", {
        f"{stem}.gate_up_proj": normal(1, 4, 48, 32), f"{stem}.down_proj": normal(2, 4, 32, 24)},
        {"model_type": "qwen3_moe"})  # fmt: skip
    tensors = {f"{start}.lora_A.weight": normal(3, 2, 32), f"{start}.lora_B.weight": normal(4, 24, 2),
               f"{start}.{part}": normal(5, 24) if "bias" in part else normal(5, 24, 32)}  # fmt: skip
    adapter = models.write_adapter(tmp_path / "a", tensors, {"r": 2, "lora_alpha": 3, "target_modules": ["gate_proj"]})
    with pytest.raises(UnsupportedError, match=part.rpartition(".")[2]):
        lt.merge(base, [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_truncation_keeps_what_is_no_product(tmp_path):
    """ΔW of zero beside a lora_bias, and beside a parameter given whole."""
    case = Case(tmp_path, config(["block.q", "block.k"], lora_bias=False))
    (case.adapter / "adapter_config.json").write_text(json.dumps(case.config | {"lora_bias": True}))
    bias = normal(1, 18)
    rewrite(case, lambda tensors: {key: value * 0 if "lora_B" in key else value for key, value in tensors.items()} | {
        f"{START}block.q.lora_B.bias": bias, f"{START}block.k.base_layer.weight": normal(2, 12, 18)})  # fmt: skip
    small = lt.load_adapter(case.adapter).truncate(rank=2)
    assert set(small) == {"block.q", "block.k"}
    assert not small["block.q"].delta_weight().any()
    torch.testing.assert_close(small["block.q"].offsets["bias"].vector.load().float() *
                               small["block.q"].offsets["bias"].scale, bias * 7 / 4)  # fmt: skip
    assert set(small["block.k"].replaced) == {"weight"}


def test_a_stack_keeps_what_a_pruned_module_gives_whole(tmp_path):
    """AdaLoRA of rank 0 with a trained bias, and a LoRA elsewhere: the bias is in the sum."""
    one = Case(tmp_path / "one", AdaLoraConfig(init_r=4, lora_alpha=7, target_modules=["block.q"], total_step=5))
    bias = normal(4, 18)
    settings = one.config | {"rank_pattern": {"block.q.lora_E": [False] * 4}, "bias": "lora_only"}
    (one.adapter / "adapter_config.json").write_text(json.dumps(settings))
    file = one.adapter / "adapter_model.safetensors"
    empty = {key: value[:, :0] if "lora_B" in key else value[:0] for key, value in load_file(file).items()}
    save_file({key: value.contiguous() for key, value in empty.items()} | {f"{START}block.q.base_layer.bias": bias},
              file, metadata={"format": "pt"})  # fmt: skip
    two = Case(tmp_path / "two", config(["block.k"]))
    lt.stack([one.adapter, two.adapter], tmp_path / "sum")
    assert torch.equal(lt.load_adapter(tmp_path / "sum")["block.q"].replaced["bias"].load(), bias)


def test_a_multiple_of_an_adapter_of_two_kinds(tmp_path):
    """Half of a block-diagonal module beside a plain one: both keep their kinds, and their factors their bytes."""
    blocks = BdLoraConfig(target_modules_bd_a=["block.q"], nblocks=2, match_strict=False)
    case = Case(tmp_path, config(["block.q", "block.k"], use_bdlora=blocks))
    lt.rescale(case.adapter, tmp_path / "half", by=0.5)
    before, after = (load_file(each / "adapter_model.safetensors") for each in (case.adapter, tmp_path / "half"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_bases_that_differ_are_named(tmp_path):
    """A stack of adapters whose configurations name two bases says so."""
    cases = [Case(tmp_path / name, config(["block.q"])) for name in ("one", "two")]
    for case in cases:
        settings = case.config | {"base_model_name_or_path": f"somebody/{case.folder.name}"}
        (case.adapter / "adapter_config.json").write_text(json.dumps(settings))
    report = lt.stack([case.adapter for case in cases], tmp_path / "sum")
    assert any("different bases" in note for note in report.notes)
    assert not any("different bases" in note for note in lt.stack([cases[0].adapter] * 2, tmp_path / "twice").notes)


def test_more_names_than_can_be_told_apart(tmp_path):
    """Wrappers nested in an unknown order: n! assignments are not tried one by one."""
    factors = {}
    for depth in range(12):
        start = f"{START}experts{'.base_layer' * depth}"
        factors |= {f"{start}.lora_A.weight": normal(depth, 2, 4), f"{start}.lora_B.weight": normal(depth, 4, 2)}
    names = [f"experts.p{at}" for at in range(12)]
    settings = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": names}
    adapter = models.write_adapter(tmp_path / "a", factors, settings)
    with pytest.raises(MalformedError, match="too many to tell"):
        lt.load_adapter(adapter)


def test_the_size_of_trained_tokens(tmp_path):
    """It depends on the base: refused, where it once was 0."""
    case = Case(tmp_path, LoraConfig(r=2, target_modules=["block.q"], trainable_token_indices={"embed": [1, 3]}))
    with pytest.raises(UnsupportedError, match="depends on the base"):
        lt.load_adapter(case.adapter).norm()


def test_a_stack_excludes_what_each_excludes(tmp_path):
    """Each adapter keeps PEFT from wrapping a namesake of its own: their stack keeps it from both."""
    cases = [Case(tmp_path / name, config([name], exclude_modules=[other])) for name, other in (
        ("block.q", "other.q"), ("block.k", "other.k"))]  # fmt: skip
    lt.stack([case.adapter for case in cases], tmp_path / "sum")
    written = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert written["exclude_modules"] == ["other.q", "other.k"]

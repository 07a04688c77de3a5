"""Adapters that PEFT wrote, merged by us and by it: law 2 with its own numbers, then what the merged model computes."""

import json

import pytest
import torch

from loratools.errors import MalformedError, MismatchError
from loratools.files import load_adapter
from loratools.verbs.merge import merge
from tests import models
from tests.interop.extraction import assert_same_output
from tests.interop.merging import (
    assert_law_2,
    assert_one_rounding,
    layers_of,
    merged_by_peft,
    products,
    unmerged,
    write_by_peft,
)

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "output.dense", "intermediate.dense"]

CASES = {
    "alpha": ("llama", {"r": 4, "lora_alpha": 10, "target_modules": LLAMA}),
    "rslora": ("llama", {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": LLAMA}),
    "patterns": (
        "llama",
        {
            "r": 4, "lora_alpha": 8, "target_modules": LLAMA,
            "rank_pattern": {r".*layers\.1\..*": 6, "q_proj": 3, "self_attn.*": 5},
            "alpha_pattern": {"mlp.*": 3, r"layers\.0\.mlp.*": 5, "down_proj": 7, "v_proj": 2.5},
        },
    ),
    "rslora-patterns": (
        "qwen",
        {
            "r": 4, "lora_alpha": 8, "target_modules": LLAMA, "use_rslora": True,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "mlp.down_proj": 7},
            "alpha_pattern": {".*_proj": 3},
        },
    ),
    "conv1d": (
        "gpt2",
        {"r": 4, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "saved": (
        "bert",
        {"r": 4, "lora_alpha": 9, "target_modules": BERT, "modules_to_save": ["pooler", "embeddings.LayerNorm"]},
    ),
    "lora-only": ("qwen", {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "bias-all": ("bert", {"r": 4, "lora_alpha": 9, "target_modules": ["query"], "bias": "all"}),
    "embedding": (
        "bert",
        {"r": 4, "lora_alpha": 9, "target_modules": ["word_embeddings", "position_embeddings", "query"]},
    ),
    "embed-and-head": ("llama", {"r": 4, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_law_2_against_merge_and_unload(bases, tmp_path, unchanged, case, dtype):
    """Our merge is PEFT's default merge of one adapter as law 2 says; the merged checkpoint loads in transformers and
    computes what PEFT's unmerged model does; config.json keeps its bytes."""
    family, config = CASES[case]
    base = bases(family, dtype)
    adapter = write_by_peft(base, tmp_path / "adapter", **config)
    unchanged(base, adapter)
    report = merge(base, [adapter], tmp_path / "merged")
    model = unmerged(base, adapter)
    assert_law_2(tmp_path / "merged", base, model)
    assert len(report.modules) >= len(layers_of(model))
    merged = models.load(tmp_path / "merged").float()
    assert_same_output(merged, model.float(), {"fp32": 2e-5, "bf16": 4e-2, "fp16": 5e-3}[dtype])
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", ["rslora", "conv1d"])
def test_an_update_larger_than_the_weight(bases, tmp_path, case, dtype):
    """ΔW ten times W, where PEFT's fp32 product is itself some ulp off: we still are one rounding from the exact sum,
    and nowhere further from it than PEFT by more than that."""
    family, config = CASES[case]
    base = bases(family, dtype)
    adapter = write_by_peft(base, tmp_path / "adapter", size=0.05, **config)
    merge(base, [adapter], tmp_path / "merged")
    model = unmerged(base, adapter)
    assert_one_rounding(tmp_path / "merged", model)
    ours, theirs = models.tensors_of(tmp_path / "merged"), merged_by_peft(model)
    errors = {"ours": 0.0, "theirs": 0.0}
    for path, layer in layers_of(model).items():
        name = f"{path}.weight"
        exact = layer.get_base_layer().weight.detach().double() + products(layer)
        errors["ours"] += float((ours[name].double() - exact).square().sum())
        errors["theirs"] += float((theirs[name].double() - exact).square().sum())
    assert errors["ours"] <= errors["theirs"] * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", ["alpha", "conv1d", "embedding"])
def test_factors_in_16_bits(bases, tmp_path, case, dtype):
    """Factors stored in bf16 mean the same to us as to PEFT, which reads them into fp32."""
    family, config = CASES[case]
    base = bases(family, dtype)
    adapter = write_by_peft(base, tmp_path / "adapter", factors="bf16", **config)
    merge(base, [adapter], tmp_path / "merged")
    assert_law_2(tmp_path / "merged", base, unmerged(base, adapter))


def test_the_square_conv1d_is_not_turned(bases, tmp_path):
    """GPT-2's attn.c_proj is square: only the family tells that its weight lies (in, out); a flag left out by the
    adapter changes nothing, as in PEFT."""
    base = bases("gpt2")
    adapter = write_by_peft(base, tmp_path / "adapter", r=4, lora_alpha=7, target_modules=["attn.c_proj"],
                            fan_in_fan_out=True)  # fmt: skip
    config = models.config_of(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    merge(base, [adapter], tmp_path / "merged")
    model = unmerged(base, adapter)
    assert_law_2(tmp_path / "merged", base, model)
    name = "transformer.h.0.attn.c_proj"
    change = (
        models.tensors_of(tmp_path / "merged")[f"{name}.weight"] - models.tensors_of(base)[f"{name}.weight"]
    ).double()
    true = products(layers_of(model)[name])
    assert (change - true).norm() < 1e-4 * true.norm() < (change - true.T).norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_embeddings_saved_beside_their_factors(bases, tmp_path, dtype):
    """PEFT may save the base weight of targeted embeddings too (`base_layer.weight`): it replaces the base's, whatever
    that is, and the product is added to it."""
    base = bases("llama", dtype)
    config = {"r": 4, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    adapter = write_by_peft(base, tmp_path / "adapter", embeddings=True, **config)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in models.factors_of(adapter))
    other = models.save(models.build("llama", dtype, seed=9), tmp_path / "other")
    for start in (base, other):
        merge(start, [adapter], tmp_path / f"merged-{start.name}")
        assert_law_2(tmp_path / f"merged-{start.name}", start, unmerged(start, adapter))


def test_minilm_trained_by_peft(minilm, minilm_adapter, tmp_path):
    """A real BERT, an adapter trained by PEFT with rsLoRA, overlapping patterns, biases and a saved pooler: law 2 over
    five million entries in both 16-bit dtypes, and the merged model is the trained one."""
    for dtype in ("bf16", "fp16"):
        base = models.save(models.load(minilm).to(models.DTYPES[dtype]), tmp_path / dtype)
        merge(base, [minilm_adapter], tmp_path / f"merged-{dtype}")
        count = assert_law_2(tmp_path / f"merged-{dtype}", base, unmerged(base, minilm_adapter))
        assert count.entries > 5_000_000
        assert count.share <= 1e-4
    merge(minilm, [minilm_adapter], tmp_path / "merged32")
    assert_same_output(models.load(tmp_path / "merged32"), unmerged(minilm, minilm_adapter))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_several_adapters_with_weights(bases, tmp_path, family, dtype):
    """Three adapters of different ranks, scalings and modules, weights of both signs: W + Σ w ΔW in float64, rounded
    once, to one ulp of m; merged in one go the model computes what PEFT does with all three active."""
    base = bases(family, dtype)
    targets = {"llama": LLAMA, "gpt2": ["c_attn", "c_proj", "wpe"], "bert": [*BERT, "word_embeddings"]}[family]
    turned = {"fan_in_fan_out": family == "gpt2"}
    adapters = [
        write_by_peft(base, tmp_path / "a", seed=1, r=4, lora_alpha=6, target_modules=targets, **turned),
        write_by_peft(
            base, tmp_path / "b", seed=2, r=7, lora_alpha=3, use_rslora=True, target_modules=targets[:2], **turned
        ),
        write_by_peft(
            base, tmp_path / "c", seed=3, r=2, lora_alpha=2, target_modules=targets[1:], factors="bf16", **turned
        ),
    ]
    weights = [0.7, -1.3, 0.45]
    merge(base, adapters, tmp_path / "merged", weights=weights)
    model = unmerged(base, *adapters, weights=weights)
    ours, before = models.tensors_of(tmp_path / "merged"), models.tensors_of(base)
    layers = layers_of(model)
    for name, tensor in ours.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or name.endswith(".bias"):
            assert torch.equal(tensor, before[name])
            continue
        exact = before[name].double() + products(layer)
        m = torch.stack([before[name].double().abs(), tensor.double().abs(), products(layer, absolute=True)]).amax(0)
        assert bool(((tensor.double() - exact.to(tensor.dtype).double()).abs() <= models.ulp(m, tensor.dtype)).all())
    tolerance = {"fp32": 2e-5, "bf16": 4e-2, "fp16": 5e-3}[dtype]
    assert_same_output(models.load(tmp_path / "merged").float(), model.float(), tolerance)


def test_one_weight_for_all_and_none(bases, tmp_path):
    """No weight is 1 each; one is for all."""
    base = bases("qwen")
    paths = [
        write_by_peft(base, tmp_path / name, seed=seed, r=2, target_modules=["q_proj"])
        for seed, name in enumerate("ab")
    ]
    merge(base, paths, tmp_path / "none")
    merge(base, paths, tmp_path / "ones", weights=[1, 1])
    merge(base, paths, tmp_path / "half", weights=0.5)
    merge(base, paths, tmp_path / "halves", weights=[0.5, 0.5])
    assert models.tensor_hashes(tmp_path / "none") == models.tensor_hashes(tmp_path / "ones")
    assert models.tensor_hashes(tmp_path / "half") == models.tensor_hashes(tmp_path / "halves")
    assert models.tensor_hashes(tmp_path / "half") != models.tensor_hashes(tmp_path / "none")


def test_named_adapters_in_one_directory(bases, tmp_path):
    """PEFT keeps all but the default adapter in sub-directories: each can be named, and a directory that holds several
    and no default is refused with their names."""
    base = bases("llama")
    root = tmp_path / "root"
    write_by_peft(base, root, seed=1, name="one", r=4, lora_alpha=6, target_modules=["q_proj"])
    write_by_peft(base, root, seed=2, name="two", r=3, lora_alpha=5, target_modules=["v_proj"])
    with pytest.raises(MalformedError, match="one, two"):
        load_adapter(root)
    merge(base, [root / "two"], tmp_path / "merged")
    assert_law_2(tmp_path / "merged", base, unmerged(base, root / "two"))
    write_by_peft(base, root, seed=3, r=2, lora_alpha=4, target_modules=["k_proj"])
    assert {path.split(".")[-1] for path in load_adapter(root)} == {"k_proj"}
    assert {path.split(".")[-1] for path in load_adapter(root / "one")} == {"q_proj"}


def test_recast_while_merging(bases, tmp_path):
    """--dtype rounds W + ΔW once to the other dtype, recasts the rest, and says so in config.json alone."""
    base = bases("llama")
    adapter = write_by_peft(base, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=LLAMA)
    merge(base, [adapter], tmp_path / "merged", dtype="bf16")
    layers = layers_of(unmerged(base, adapter))
    for name, tensor in models.tensors_of(tmp_path / "merged").items():
        exact = models.tensors_of(base)[name].double()
        if (layer := layers.get(name.removesuffix(".weight"))) is not None:
            exact = exact + products(layer)
        assert tensor.dtype == torch.bfloat16
        assert (tensor.double() - exact).abs().max() <= (0.5001 * models.ulp(exact, torch.bfloat16)).max()
        assert int((tensor != exact.to(torch.bfloat16)).sum()) <= 1  # where ΔW, right to 2e-7, lies at a middle
    before, after = (models.config_of(path, "config.json") for path in (base, tmp_path / "merged"))
    assert {key for key in before if before[key] != after[key]} == {"dtype"}
    assert models.load(tmp_path / "merged").dtype == torch.bfloat16


def test_resharding_keeps_every_bit(bases, tmp_path):
    """Merged into other shards the tensors are the same bits, and transformers loads them."""
    base = bases("llama")
    adapter = write_by_peft(base, tmp_path / "adapter", r=4, target_modules=LLAMA)
    merge(base, [adapter], tmp_path / "like-the-base")
    merge(base, [adapter], tmp_path / "resharded", max_shard_size=40_000)
    names = [
        sorted(path.name for path in (tmp_path / each).glob("*.safetensors")) for each in ("like-the-base", "resharded")
    ]
    assert names[0] == sorted(path.name for path in base.glob("*.safetensors"))
    assert len(names[0]) < len(names[1])
    assert models.tensor_hashes(tmp_path / "like-the-base") == models.tensor_hashes(tmp_path / "resharded")
    for path in base.glob("*.safetensors"):
        assert models.header_names(path) == models.header_names(tmp_path / "like-the-base" / path.name)
    assert_same_output(models.load(tmp_path / "resharded"), unmerged(base, adapter), 2e-5)


@pytest.mark.parametrize("family", ["qwen", "bert", "gpt2"])
def test_an_adapter_of_another_architecture_is_refused(bases, tmp_path, family):
    """Modules that the base does not have: refused, and nothing written."""
    adapter = write_by_peft(bases("llama"), tmp_path / "adapter", r=2, target_modules=["q_proj", "lm_head"])
    if family == "qwen":
        adapter = write_by_peft(bases("gpt2"), tmp_path / "gpt2", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(MismatchError):
        merge(bases(family), [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

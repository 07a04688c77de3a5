import json

import pytest
import torch

from loratools.errors import MismatchError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests.tiny import (
    CONFIG,
    GPT2,
    PREFIX,
    SHAPES,
    K,
    Q,
    equal_bits,
    factors,
    gpt2,
    llama,
    lora_tensors,
    metadata_of,
    normal,
    rounded,
    sha256,
    tensors_of,
    write_adapter,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def delta(pairs, path, scale):
    lora_A, lora_B = pairs[path]
    return scale * (lora_B.double() @ lora_A.double())


def within_an_ulp(found, exact, size):
    """|found − exact| ≤ half a step of the larger of the result and the size of what was added, and a hair."""
    step = torch.finfo(found.dtype).eps * torch.maximum(exact.abs(), size.abs()).clamp_min(1e-30)
    return bool(((found.double() - exact).abs() <= 0.5 * step * (1 + 1e-3)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_changed_weight_is_rounded_once_and_every_other_is_copied(tmp_path, dtype):
    """round(W + s·B A) per changed tensor; the rest bit for bit, in the same order, under the same metadata."""
    tensors = llama(DTYPES[dtype])
    base = write_checkpoint(tmp_path / "base", tensors)
    report = merge(base, [write_adapter(tmp_path / "a")], tmp_path / "out")
    found, pairs = tensors_of(tmp_path / "out"), factors()
    assert list(open_checkpoint(tmp_path / "out")) == list(open_checkpoint(base))
    changed = {f"{path}.weight": path for path in SHAPES}
    for name, tensor in tensors.items():
        if name not in changed:
            assert equal_bits(found[name], tensor)
            continue
        added = delta(pairs, changed[name], 2.0)
        exact = tensor.double() + added
        assert not equal_bits(found[name], tensor)
        assert within_an_ulp(found[name], exact, added)
        differing = int((found[name].double() != rounded(exact, DTYPES[dtype]).double()).sum())
        assert differing <= (0 if dtype != "fp32" else exact.numel())
    assert report.tensors == {"copied": len(tensors) - 3, "merged": 3, "recast": 0, "added": 0}
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {"format": "pt"}


def test_several_adapters_with_weights_are_summed_before_the_rounding(tmp_path):
    """W + 0.5 Δa − 2 Δb rounded once; modules of one adapter only as well."""
    base = write_checkpoint(tmp_path / "base")
    one = factors(4, 1)
    two = factors(3, 2, torch.bfloat16, {Q: SHAPES[Q], "model.layers.0.self_attn.o_proj": (16, 16)})
    a = write_adapter(tmp_path / "a", lora_tensors(one))
    b = write_adapter(tmp_path / "b", lora_tensors(two), r=3, lora_alpha=6, use_rslora=True)
    report = merge(base, [a, b], tmp_path / "out", weights=[0.5, -2])
    found, scale = tensors_of(tmp_path / "out"), 6 / 3**0.5
    expected = {path: delta(one, path, 0.5 * 2) for path in SHAPES}
    expected[Q] = expected[Q] + delta(two, Q, -2 * scale)
    expected["model.layers.0.self_attn.o_proj"] = delta(two, "model.layers.0.self_attn.o_proj", -2 * scale)
    for path, added in expected.items():
        exact = llama()[f"{path}.weight"].double() + added
        assert torch.equal(found[f"{path}.weight"], rounded(exact, torch.bfloat16))
    applied = {row["name"]: [(each["adapter"], each["weight"]) for each in row["applied"]] for row in report.modules}
    assert applied[f"{Q}.weight"] == [("a", 0.5), ("b", -2.0)]
    assert applied[f"{K}.weight"] == [("a", 0.5)]


def test_one_weight_is_for_all_and_zero_changes_nothing(tmp_path):
    """A scalar, a list of one; weight 0 gives the base's bytes."""
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    b = write_adapter(tmp_path / "b", lora_tensors(factors(seed=5)))
    merge(base, [a, b], tmp_path / "x", weights=0.5)
    merge(base, [a, b], tmp_path / "y", weights=[0.5])
    merge(base, [a, b], tmp_path / "z", weights=[0.5, 0.5])
    assert sha256(tmp_path / "x" / "model.safetensors") == sha256(tmp_path / "y" / "model.safetensors")
    assert sha256(tmp_path / "x" / "model.safetensors") == sha256(tmp_path / "z" / "model.safetensors")
    report = merge(base, [a], tmp_path / "zero", weights=0)
    assert all(equal_bits(tensor, llama()[name]) for name, tensor in tensors_of(tmp_path / "zero").items())
    assert report.totals["changed"] == 0


def test_objects_are_taken_where_paths_are(tmp_path):
    """And algebra on them: merging 0.5·a − b is merging with these weights."""
    base = open_checkpoint(write_checkpoint(tmp_path / "base"))
    a = load_adapter(write_adapter(tmp_path / "a"))
    b = load_adapter(write_adapter(tmp_path / "b", lora_tensors(factors(2, 9)), r=2))
    merge(base, [0.5 * a - b], tmp_path / "x")
    merge(base, [a, b], tmp_path / "y", weights=[0.5, -1])
    assert sha256(tmp_path / "x" / "model.safetensors") == sha256(tmp_path / "y" / "model.safetensors")


def test_conv1d_and_embeddings_are_stored_the_other_way_round(tmp_path):
    """(in, out) on disk: square Conv1D by its family, embeddings by their factors."""
    base = write_checkpoint(tmp_path / "base", gpt2(), GPT2)
    square, wide = "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_attn"
    pairs = factors(modules={square: (16, 16), wide: (48, 16)})
    embedding = (normal(71, 4, 8), normal(72, 16, 4))
    tensors = lora_tensors(pairs) | {
        f"{PREFIX}transformer.wpe.lora_embedding_A": embedding[0],
        f"{PREFIX}transformer.wpe.lora_embedding_B": embedding[1],
    }
    a = write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)
    report = merge(base, [a], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    for path in (square, wide):
        name = f"{path.removeprefix('transformer.')}.weight"
        exact = gpt2()[name].double() + delta(pairs, path, 2.0).T
        torch.testing.assert_close(found[name].double(), exact, rtol=0, atol=1e-7)
    exact = gpt2()["wpe.weight"].double() + 2.0 * (embedding[1].double() @ embedding[0].double()).T
    torch.testing.assert_close(found["wpe.weight"].double(), exact, rtol=6e-8, atol=1e-9)
    assert any("transformer." in note for note in report.notes)


def test_whole_parameters_replace_biases_are_set_and_weights_scale_them(tmp_path):
    """weight 1: the given bytes; weight w: W + w (given − W), rounded once."""
    given, bias = normal(5, 16, dtype=torch.bfloat16), normal(6, 16, dtype=torch.bfloat16)
    tensors = llama() | {f"{Q}.bias": normal(7, 16, dtype=torch.bfloat16)}
    base = write_checkpoint(tmp_path / "base", tensors)
    keys = lora_tensors(factors(modules={Q: (16, 16)}))
    keys |= {f"{PREFIX}model.norm.weight": given, f"{PREFIX}{Q}.base_layer.bias": bias}
    a = write_adapter(tmp_path / "a", keys, bias="lora_only", modules_to_save=["model.norm"])
    merge(base, [a], tmp_path / "one")
    merge(base, [a], tmp_path / "quarter", weights=0.25)
    one, quarter = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "quarter")
    assert equal_bits(one["model.norm.weight"], given)
    assert equal_bits(one[f"{Q}.bias"], bias)
    old = tensors["model.norm.weight"].double()
    assert torch.equal(quarter["model.norm.weight"], rounded(old + 0.25 * (given.double() - old), torch.bfloat16))


def test_a_tied_matrix_changed_once_is_untied(tmp_path):
    """LoRA on the head alone: the embedding keeps its bytes, the head gets its own, the config says so."""
    config = CONFIG | {"tie_word_embeddings": True}
    base = write_checkpoint(tmp_path / "base", llama(head=False), config)
    pairs = factors(modules={"lm_head": (32, 16)})
    report = merge(base, [write_adapter(tmp_path / "a", lora_tensors(pairs))], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    embedding = llama(head=False)["model.embed_tokens.weight"]
    assert equal_bits(found["model.embed_tokens.weight"], embedding)
    exact = embedding.double() + delta(pairs, "lm_head", 2.0)
    assert torch.equal(found["lm_head.weight"], rounded(exact, torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("tie_word_embeddings" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_merging_into_another_dtype_rounds_once(tmp_path, dtype):
    """round(W + ΔW) straight to the new dtype, never by way of the base's."""
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    merge(base, [a], tmp_path / "out", dtype=dtype)
    found = tensors_of(tmp_path / "out")
    for path in SHAPES:
        added = delta(factors(), path, 2.0)
        assert within_an_ulp(found[f"{path}.weight"], llama()[f"{path}.weight"].double() + added, added)
    assert {tensor.dtype for tensor in found.values()} == {DTYPES[dtype]}


def test_it_takes_something_to_do(tmp_path):
    """No adapter, no dtype, no shard size: refused; so is a dtype that is not written, and weights for nothing."""
    base = write_checkpoint(tmp_path / "base")
    for options in ({}, {"dtype": "int8"}, {"dtype": "fp32", "weights": [1.0]}):
        with pytest.raises(UsageError):
            merge(base, [], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_extracted_adapter_knows_its_base(tmp_path):
    """Another base of the same shapes is refused, whatever the adapter changes; another dtype is said."""
    base = write_checkpoint(tmp_path / "base")
    tuned = llama()
    tuned[f"{Q}.weight"] = tuned[f"{Q}.weight"] + normal(3, 16, 16, dtype=torch.bfloat16)
    norms = llama() | {"model.norm.weight": normal(4, 16, dtype=torch.bfloat16)}
    extract(base, write_checkpoint(tmp_path / "tuned", tuned), tmp_path / "a")
    extract(base, write_checkpoint(tmp_path / "norms", norms), tmp_path / "b")
    wrong = write_checkpoint(tmp_path / "wrong", llama(seed=1))
    for name in "ab":
        merge(base, [tmp_path / name], tmp_path / f"right-{name}")
        with pytest.raises(MismatchError, match="not the base"):
            merge(wrong, [tmp_path / name], tmp_path / "out")
    merge(base, [], tmp_path / "cast", dtype="fp32")
    report = merge(tmp_path / "cast", [tmp_path / "a"], tmp_path / "merged")
    assert any("another dtype" in note for note in report.notes)

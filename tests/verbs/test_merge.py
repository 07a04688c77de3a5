import json

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import MismatchError, NonFiniteError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests.tiny import (
    CONFIG,
    DOWN,
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
    report_of,
    rounded,
    sha256,
    state,
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


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_recasting_rounds_each_entry_once_to_even(tmp_path, source, target):
    """Against a rounding of our own in float64; subnormals, ties and −0 among the entries."""
    if source == target:
        return
    special = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 2.98e-8, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e4])
    tensors = llama(DTYPES[source]) | {"x.weight": special.to(DTYPES[source]), "ids": torch.arange(4)}
    base = write_checkpoint(tmp_path / "base", tensors, CONFIG | {"dtype": "float8"})
    report = merge(base, [], tmp_path / "out", dtype=target)
    found = tensors_of(tmp_path / "out")
    for name, tensor in tensors.items():
        expected = rounded(tensor.double(), DTYPES[target]) if tensor.is_floating_point() else tensor
        assert equal_bits(found[name], expected), name
    assert report.tensors["recast"] == len(tensors) - 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[target]
    assert (config["dtype"], config["torch_dtype"]) == (wanted, wanted)
    assert len([note for note in report.notes if "config.json" in note]) == (1 if wanted == "bfloat16" else 2)


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


def test_a_recast_that_overflows_is_an_error(tmp_path):
    """1e6 has no float16; infinity in a model is not an answer."""
    base = write_checkpoint(tmp_path / "base", llama(torch.float32) | {"x.weight": torch.tensor([1.0, 1e6])})
    before = state(tmp_path)
    with pytest.raises(NonFiniteError, match=r"overflow.*x\.weight"):
        merge(base, [], tmp_path / "out", dtype="fp16")
    assert state(tmp_path) == before


@pytest.mark.parametrize("limit", [1, 600, 1500, 10**9])
def test_resharding(tmp_path, limit):
    """Greedy in order, never above the limit but for a tensor that is, all bytes the same, index right."""
    base = write_checkpoint(tmp_path / "base")
    merge(base, [], tmp_path / "out", max_shard_size=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = {file.name: [tensor.nbytes for tensor in load_file(file).values()] for file in files}
    assert all(sum(each) <= limit or len(each) == 1 for each in sizes.values())
    found = tensors_of(tmp_path / "out")
    assert all(equal_bits(found[name], tensor) for name, tensor in llama().items())
    assert len(found) == len(llama())
    assert list(open_checkpoint(tmp_path / "out")) == list(open_checkpoint(base))
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (limit < 10**9)
    if index.exists():
        document = json.loads(index.read_text())
        assert document["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert document["metadata"]["total_size"] == sum(tensor.nbytes for tensor in llama().values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_shards_keep_their_names(tmp_path):
    """A merge into a sharded base writes its files again, index and all."""
    base = write_checkpoint(tmp_path / "base", shards=3)
    merge(base, [write_adapter(tmp_path / "a")], tmp_path / "out")
    names = {path.name for path in base.iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    one, other = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (base, tmp_path / "out"))
    assert one == other


def test_one_file_out_of_many(tmp_path):
    """Unsharding is a large limit; without it a sharded checkpoint needs a directory."""
    base, a = write_checkpoint(tmp_path / "base", shards=2), write_adapter(tmp_path / "a")
    before = state(tmp_path)
    with pytest.raises(UsageError, match="directory"):
        merge(base, [a], tmp_path / "x.safetensors")
    assert state(tmp_path) == before
    merge(base, [a], tmp_path / "out", max_shard_size=10**9)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert len(open_checkpoint(tmp_path / "out")) == len(llama())


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_size_that_is_none_is_refused(tmp_path, size):
    """Rather than a file per tensor."""
    base = write_checkpoint(tmp_path / "base")
    with pytest.raises(UsageError):
        merge(base, [], tmp_path / "out", max_shard_size=size)


def test_a_single_file_has_its_report_beside_it(tmp_path):
    """`x.safetensors` and `x.loratools.json`, nothing else; shards of a single file make no sense."""
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    (tmp_path / "out").mkdir()
    report = merge(base, [a], tmp_path / "out" / "x.safetensors")
    merge(base / "model.safetensors", [a], tmp_path / "out" / "y.safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "x.loratools.json", "x.safetensors", "y.loratools.json", "y.safetensors",
    ]  # fmt: skip
    assert sha256(tmp_path / "out" / "x.safetensors") == sha256(tmp_path / "out" / "y.safetensors")
    assert json.loads((tmp_path / "out" / "x.loratools.json").read_text()) == report.to_json()
    assert report.files[0]["sha256"] == sha256(tmp_path / "out" / "x.safetensors")
    before = state(tmp_path)
    with pytest.raises(UsageError):
        merge(base, [a], tmp_path / "out" / "z.safetensors", max_shard_size=1000)
    assert state(tmp_path) == before


def test_config_is_edited_only_where_the_merge_makes_it_false(tmp_path):
    """Byte for byte otherwise, odd spacing and unknown keys included; edits keep the order of the keys."""
    base = write_checkpoint(tmp_path / "base")
    text = '{"torch_dtype": "bfloat16",\n\n   "zeta": [1.0, 1e-05], "vocab_size": 32, "é": "ü", "alpha":null}'
    (base / "config.json").write_text(text)
    merge(base, [write_adapter(tmp_path / "a")], tmp_path / "plain")
    merge(base, [], tmp_path / "same", dtype="bf16")
    for name in ("plain", "same"):
        assert (tmp_path / name / "config.json").read_text() == text
    report = merge(base, [], tmp_path / "cast", dtype="fp16")
    edited = (tmp_path / "cast" / "config.json").read_text()
    assert list(json.loads(edited).items()) == list((json.loads(text) | {"torch_dtype": "float16"}).items())
    assert [note for note in report.notes if "config.json" in note] == [
        "config.json: torch_dtype 'bfloat16' → 'float16'"
    ]


def test_added_vocabulary_changes_vocab_size(tmp_path):
    """Rows that an extraction found come back, and the config counts them."""
    tuned = llama(seed=0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([tuned[name], normal(9, 3, 16, dtype=torch.bfloat16)])
    base = write_checkpoint(tmp_path / "base")
    other = write_checkpoint(tmp_path / "tuned", tuned, CONFIG | {"vocab_size": 35})
    extract(base, other, tmp_path / "a", rank=2)
    merge(base, [tmp_path / "a"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG | {"vocab_size": 35}
    found = tensors_of(tmp_path / "out")
    assert all(equal_bits(found[name], tensor) for name, tensor in tuned.items())


def test_companions_travel_byte_for_byte(tmp_path):
    """Tokenizer, templates, code: as bytes; README and loratools.json are ours, weights of other kinds stay behind."""
    files = {"tokenizer.json": b'{"a":\r\n1}\xff', "modeling_evil.py": b"raise SystemExit", "merges.txt": b"\x00\xff"}
    others = {"pytorch_model.bin": b"x", "README.md": b"old card", ".gitattributes": b"x", "loratools.json": b"{}"}
    base = write_checkpoint(tmp_path / "base", companions=files | others)
    report = merge(base, [write_adapter(tmp_path / "a")], tmp_path / "out")
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in files} == files
    assert {path.name for path in out.iterdir()} == {
        *files, "README.md", "loratools.json", "config.json", "model.safetensors",
    }  # fmt: skip
    assert "old card" not in (out / "README.md").read_text()
    assert {each["name"] for each in report.files} == {path.name for path in out.iterdir()} - {"loratools.json"}


def test_the_report_says_what_was_merged(tmp_path):
    """Inputs by name and hash, weights, every changed tensor with its adapters and counts, the base's fingerprint."""
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    report = merge(base, [a], tmp_path / "out", weights=0.5)
    document = report_of(tmp_path / "out")
    assert document == json.loads(json.dumps(report.to_json()))
    assert document["schema"] == "loratools/merge/1"
    assert [(each["role"], each["name"]) for each in document["inputs"]] == [("base", "base"), ("adapter", "a")]
    for each, directory in zip(document["inputs"], (base, a), strict=True):
        assert each["sha256"] == {path.name: sha256(path) for path in directory.iterdir()}
    assert document["parameters"]["weights"] == [0.5]
    found = tensors_of(tmp_path / "out")
    assert {row["name"] for row in document["modules"]} == {f"{path}.weight" for path in (Q, K, DOWN)}
    for row in document["modules"]:
        changed = int((found[row["name"]] != llama()[row["name"]]).sum())
        assert (row["changed"], row["entries"]) == (changed, found[row["name"]].numel())
        assert row["applied"][0]["weight"] == 0.5
    assert set(document["base"]["fingerprint"]) == {f"{path}.weight" for path in SHAPES}
    assert document["totals"]["changed"] == sum(row["changed"] for row in document["modules"])


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

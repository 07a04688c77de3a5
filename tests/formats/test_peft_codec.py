import json

import pytest
import torch
from safetensors.torch import load_file

from loratools.adapters import Adapter, Full, LowRank
from loratools.errors import InputDataError, MalformedError, MismatchError, UnsupportedError, UsageError
from loratools.files import load_adapter, save
from loratools.formats import CODECS, Contents, codec_named, detect
from loratools.tensors import in_memory
from tests.tiny import PREFIX, K, Q, adapter_config, factors, lora_tensors, normal, write_adapter


def decode(tensors, **config):
    contents = Contents({key: in_memory(key, tensor) for key, tensor in tensors.items()}, adapter_config(**config))
    return CODECS[0].decode(contents)


EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(1, 4, 32),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(2, 16, 4),
}


def test_factors_scaling_and_layer():
    """Linear and Embedding, alpha by pattern, rsLoRA; the tensors' rank is the true one and a wrong claim is said."""
    tensors = lora_tensors(factors(rank=4)) | EMBEDDING
    found = decode(tensors, r=2, lora_alpha=6, alpha_pattern={"k_proj": 3}, use_rslora=True)
    q, k, embedding = found.updates[Q], found.updates[K], found.updates["model.embed_tokens"]
    assert (q.scaling, k.scaling) == (6 / 2, 3 / 2)
    assert (q.kind, embedding.kind, embedding.layer, embedding.shape) == (
        "low-rank",
        "embedding",
        "embedding",
        (16, 32),
    )
    assert len([note for note in found.notes if "rank 2" in note and "rank 4" in note]) == 4
    assert not decode(tensors, r=4).notes


def test_a_missing_alpha_is_pefts_default_and_said():
    """H56: PEFT would read 8; whoever merges hears of it."""
    config = {"peft_type": "LORA", "r": 4}
    contents = Contents({key: in_memory(key, t) for key, t in lora_tensors(factors()).items()}, config)
    found = CODECS[0].decode(contents)
    assert found.updates[Q].alpha == 8
    assert any("lora_alpha" in note and "8" in note for note in found.notes)


def test_whole_parameters():
    """Beside a low-rank update under `base_layer`, else plain; a module of `modules_to_save` is not shared."""
    tensors = lora_tensors(factors(modules={Q: (16, 16)})) | {
        f"{PREFIX}{Q}.base_layer.bias": normal(1, 16),
        f"{PREFIX}score.weight": normal(2, 3, 16),
        f"{PREFIX}model.embed_tokens.weight": normal(3, 32, 16),
    }
    found = decode(tensors, modules_to_save=["score"]).updates
    assert set(found[Q].replaced) == {"bias"}
    assert isinstance(found["score"], Full)
    assert (found["score"].shared, found["model.embed_tokens"].shared) == (False, True)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("stem", ["lora_{}.weight", "lora_embedding_{}"])
def test_half_a_product_is_malformed(side, stem):
    """H54: the module, what is there and what is missing."""
    key = f"{PREFIX}x.q.{stem.format(side)}"
    with pytest.raises(MalformedError, match=r"x\.q") as caught:
        decode({key: normal(1, 4, 4)})
    missing = stem.removesuffix(".weight").format("B" if side == "A" else "A")
    assert f"no {missing}" in str(caught.value)


def test_ranks_that_differ_are_a_mismatch():
    """H53: with both shapes and the key."""
    with pytest.raises(MismatchError, match=r"\(4, 16\).*\(16, 3\).*q_proj"):
        decode(lora_tensors({Q: (normal(1, 4, 16), normal(2, 16, 3))}))
    with pytest.raises(MismatchError):
        decode(lora_tensors({Q: (normal(1, 4, 16, 1), normal(2, 16, 4, 2))}))
    with pytest.raises(MismatchError):
        decode(lora_tensors({Q: (normal(1, 0, 16), normal(2, 16, 0))}))


@pytest.mark.parametrize("rank", [0, -4, 10**9])
def test_a_rank_that_cannot_be_is_refused(rank):
    """H55: no honest configuration says it, although the tensors would count."""
    with pytest.raises(MalformedError, match=rf"rank.*{rank}"):
        decode(lora_tensors(factors()), r=rank)


WRONG = {
    "modules_to_save": [7, "score", {"a": 1}, [7, None]],
    "use_rslora": ["false", 7, []],
    "base_model_name_or_path": [7, [], {}],
    "target_modules": [7, None, {"a": 1}],
    "fan_in_fan_out": ["yes", 7],
    "bias": [7, None, []],
    "rank_pattern": [7, [1]],
    "r": ["4"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_fields_of_wrong_types_never_crash(field, value):
    """Read as data: refused by name or ignored, never a TypeError, never misread."""
    tensors = lora_tensors(factors(modules={Q: (16, 16)})) | {f"{PREFIX}score.weight": normal(2, 3, 16)}
    try:
        found = decode(tensors, **{field: value}).updates
    except InputDataError as error:
        assert field in str(error)  # noqa: PT017
        return
    assert found[Q].scaling == 2
    assert field not in {"use_rslora", "rank_pattern", "r"} or not value


def test_the_root_of_a_refusal_is_in_every_message():
    """A key of another kind in an adapter of type LORA is refused with the key."""
    tensors = lora_tensors(factors()) | {f"{PREFIX}{Q}.hada_w1_a": normal(1, 16)}
    with pytest.raises(UnsupportedError, match=r"LoHa.*q_proj\.hada_w1_a"):
        decode(tensors)


def test_detection():
    """By the configuration or by the keys; a configuration is then needed, since alpha is in it."""
    refs = {key: in_memory(key, tensor) for key, tensor in lora_tensors(factors()).items()}
    assert detect(Contents(refs, adapter_config()), file="x").name == "peft"
    bare = Contents(refs, None)
    assert detect(bare, file="x").name == "peft"
    with pytest.raises(MalformedError, match=r"adapter_config\.json"):
        CODECS[0].decode(bare)
    with pytest.raises(MalformedError, match=r"model\.x"):
        detect(Contents({"model.x": in_memory("model.x", normal(1, 2))}, None), file="x.safetensors")
    with pytest.raises(UsageError, match="peft"):
        codec_named("klingon")


def same(one, other):
    assert list(one) == list(other)
    for path in one:
        assert type(one[path]) is type(other[path])
        assert one[path].layer == other[path].layer
        assert [(t.rank, t.scale) for t in one[path].terms] == [(t.rank, t.scale) for t in other[path].terms]
        pairs = zip(one[path].tensors, other[path].tensors, strict=True)
        assert all(a.load().dtype == b.load().dtype and torch.equal(a.load(), b.load()) for a, b in pairs)
        assert set(one[path].replaced) == set(other[path].replaced)
        assert set(one[path].added_rows) == set(other[path].added_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [
    {},
    {"use_rslora": True, "lora_alpha": 5},
    {"alpha_pattern": {"k_proj": 3, "layers.0": 9, "q_proj": 1.5}},
    {"modules_to_save": ["score"], "bias": "lora_only", "a_field_of_2031": [1]},
])  # fmt: skip
def test_decode_after_encode_is_the_adapter(tmp_path, dtype, fields):
    """Law 5, through files: factors' bytes, scaling, whole parameters, unknown fields."""
    tensors = lora_tensors(factors(dtype=dtype)) | {key: tensor.to(dtype) for key, tensor in EMBEDDING.items()}
    if "modules_to_save" in fields:
        tensors |= {f"{PREFIX}score.weight": normal(2, 3, 16), f"{PREFIX}{Q}.base_layer.bias": normal(3, 16)}
    a = load_adapter(write_adapter(tmp_path / "a", tensors, **fields))
    save(a, tmp_path / "b")
    b = load_adapter(tmp_path / "b")
    same(a, b)
    save(b, tmp_path / "c")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == [path for path in a if a[path].terms]
    assert all(
        config[key] == value for key, value in fields.items() if key in {"a_field_of_2031", "modules_to_save", "bias"}
    )


def test_a_sum_is_written_with_its_scaling_baked(tmp_path):
    """Ranks concatenate, alpha = r where scalings differ, ΔW to 1e-6; read back it is one product."""
    a = load_adapter(write_adapter(tmp_path / "a"))
    b = load_adapter(
        write_adapter(tmp_path / "b", lora_tensors(factors(3, 2, torch.bfloat16)), lora_alpha=5, use_rslora=True)
    )
    c = 0.7 * a - 0.3 * b
    save(c, tmp_path / "c")
    back = load_adapter(tmp_path / "c")
    for path in c:
        assert isinstance(back[path], LowRank)
        assert (back[path].rank, back[path].scaling) == (7, 1.0)
        torch.testing.assert_close(back[path].delta_weight(), c[path].delta_weight(), rtol=1e-6, atol=1e-7)


def test_what_peft_cannot_hold_is_refused_by_name():
    """Nothing is dropped silently."""
    factors_of = {"lora_A": in_memory("A", normal(1, 2, 4)), "lora_B": in_memory("B", normal(2, 4, 2)), "alpha": 2}
    adapter = Adapter({"x.y": LowRank(**factors_of, replaced={"scale": in_memory("s", normal(3, 4))})})
    assert len(CODECS[0].cannot_hold(adapter)) == 1
    with pytest.raises(UnsupportedError, match=r"x\.y.*scale"):
        CODECS[0].encode(adapter)


def test_written_files_say_pt(tmp_path):
    """transformers refuses weights whose metadata has no format."""
    from tests.tiny import metadata_of

    save(load_adapter(write_adapter(tmp_path / "a")), tmp_path / "b")
    assert metadata_of(tmp_path / "b" / "adapter_model.safetensors") == {"format": "pt"}
    assert set(load_file(tmp_path / "b" / "adapter_model.safetensors")) == set(lora_tensors(factors()))


def test_settings_of_what_is_gone_are_not_repeated():
    """A sum of QALoRA adapters is plain LoRA, and a selection may be without the trained tokens: the configuration that
    was read does not speak for what is written."""
    factors = {"lora_A": in_memory("A", torch.ones(2, 6)), "lora_B": in_memory("B", torch.ones(4, 2))}
    read = {"peft_type": "LORA", "use_qalora": True, "qalora_group_size": 2, "use_bdlora": {"nblocks": 2},
            "trainable_token_indices": {"wte": [1]}, "target_parameters": ["experts.w1"], "use_dora": True,
            "lora_bias": True, "unknown_to_us": 3}  # fmt: skip
    encoded = codec_named("peft").encode(Adapter({"m": LowRank(**factors, alpha=3.0)}, config=read))
    written = json.loads(encoded.texts["adapter_config.json"])
    assert written.keys() & read.keys() == {"peft_type", "unknown_to_us"}
    assert codec_named("peft").decode(Contents(encoded.tensors, written, {}, {})).updates["m"].shape == (4, 6)

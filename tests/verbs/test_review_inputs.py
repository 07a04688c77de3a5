"""Inputs that contradict each other or the base are refused by name; nothing is cut, overwritten or cast in silence."""

import pytest
import torch
from safetensors.torch import save_file

from loratools.checkpoints import Checkpoint
from loratools.errors import (
    MalformedError,
    MismatchError,
    NonFiniteError,
    StorageError,
    UndecidedError,
    UnsupportedError,
    UsageError,
)
from loratools.files import load_adapter, open_checkpoint
from loratools.tensors import in_memory
from loratools.verbs.extract import extract, plan_extract
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests.tiny import PREFIX, Q, equal_bits, factors, llama, lora_tensors, normal, tensors_of, write_adapter
from tests.tiny import write_checkpoint as write

EMBEDDING = "model.embed_tokens"


def headed(path, seed=1, **extra):
    """An adapter that brings a `score` head along."""
    tensors = lora_tensors(factors(seed=seed)) | {f"{PREFIX}score.weight": normal(seed, 3, 16)} | extra
    return write_adapter(path, tensors, modules_to_save=["score"])


def lengthened(path, rows):
    adapter = write_adapter(path)
    save_file({f"{EMBEDDING}.weight": rows}, adapter / "added_rows.safetensors")
    return adapter


@pytest.mark.parametrize("shape", [(36, 15), (30, 16), (32, 1)])
def test_a_replacement_of_another_shape_is_refused(tmp_path, shape):
    """A shorter vocabulary has no rows for the base's; one column would be spread over all."""
    tensors = lora_tensors(factors()) | {f"{PREFIX}{EMBEDDING}.weight": normal(5, *shape)}
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["embed_tokens"])
    with pytest.raises(MismatchError, match="weight"):
        merge(write(tmp_path / "b"), [adapter], tmp_path / "o", weights=0.5)


def test_appended_rows_of_another_width_are_refused(tmp_path):
    with pytest.raises(MismatchError, match="weight"):
        merge(write(tmp_path / "b"), [lengthened(tmp_path / "a", torch.ones(2, 8))], tmp_path / "o")


def test_appended_rows_that_overflow_are_refused(tmp_path):
    base = write(tmp_path / "b", llama(torch.float16))
    with pytest.raises(NonFiniteError, match="overflow"):
        merge(base, [lengthened(tmp_path / "a", torch.full((2, 16), 1e6))], tmp_path / "o")


def test_appended_rows_of_a_module_that_is_not_there_are_refused(tmp_path):
    adapter = write_adapter(tmp_path / "a", modules_to_save=["score"])
    save_file({"score.weight": torch.ones(2, 8)}, adapter / "added_rows.safetensors")
    with pytest.raises(MismatchError, match="score"):
        merge(write(tmp_path / "b"), [adapter], tmp_path / "o")


def test_one_module_that_two_adapters_bring_along_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="Two adapters"):
        merge(write(tmp_path / "b"), [headed(tmp_path / "a", 1), headed(tmp_path / "c", 2)], tmp_path / "o")


def test_an_added_module_follows_the_dtype_and_no_weight(tmp_path):
    report = merge(write(tmp_path / "b"), [headed(tmp_path / "a")], tmp_path / "o", weights=0.5, dtype="fp16")
    assert equal_bits(tensors_of(tmp_path / "o")["score.weight"], normal(1, 3, 16).half())
    assert any("added whole" in note for note in report.notes)


def test_recasting_to_double_is_exact(tmp_path):
    base = write(tmp_path / "b")
    merge(base, [], tmp_path / "o", dtype="fp64")
    found = tensors_of(tmp_path / "o")
    assert all(equal_bits(found[name], tensor.double()) for name, tensor in tensors_of(base).items())


def test_what_a_recast_leaves_as_it_is_is_named(tmp_path):
    tensors = llama() | {"model.x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    report = merge(write(tmp_path / "b", tensors), [], tmp_path / "o", dtype="fp32")
    assert any("F8_E4M3" in note for note in report.notes)


def test_a_single_file_does_not_claim_an_edited_configuration(tmp_path):
    report = merge(write(tmp_path / "b"), [], tmp_path / "o.safetensors", dtype="fp16")
    assert [note.startswith("Not written") for note in report.notes if "config.json" in note] == [True]


def test_adapters_that_disagree_about_the_orientation_are_refused(tmp_path):
    path, pairs = "h.0.attn.c_x", factors(modules={"h.0.attn.c_x": (16, 16)})
    base = write(tmp_path / "b", {f"{path}.weight": normal(1, 16, 16)}, config=None)
    turned = write_adapter(tmp_path / "a", lora_tensors(pairs), fan_in_fan_out=True)
    with pytest.raises(MismatchError, match="way round"):
        merge(base, [turned, write_adapter(tmp_path / "c", lora_tensors(pairs))], tmp_path / "o")


def test_a_prefix_that_fits_two_towers_is_not_guessed(tmp_path):
    towers = [f"{tower}.encoder.layers.{i}.q.weight" for tower in ("text_model", "vision_model") for i in range(3)]
    base = write(tmp_path / "b", {name: normal(i, 16, 16) for i, name in enumerate(towers)}, config=None)
    pairs = factors(modules={f"encoder.layers.{i}.q": (16, 16) for i in range(3)})
    with pytest.raises(MismatchError, match="cannot be told"):
        merge(base, [write_adapter(tmp_path / "a", lora_tensors(pairs))], tmp_path / "o")


def test_a_module_with_the_same_thing_under_two_keys_is_refused(tmp_path):
    pairs = lora_tensors(factors(modules={Q: (16, 16)}))
    embedding = {f"{PREFIX}{Q}.lora_embedding_A": normal(1, 4, 16), f"{PREFIX}{Q}.lora_embedding_B": normal(2, 16, 4)}
    weight = {f"{PREFIX}{Q}.weight": normal(1, 16, 16), f"{PREFIX}{Q}.base_layer.weight": normal(2, 16, 16)}
    for name, more in {"a": embedding, "c": weight}.items():
        with pytest.raises(MalformedError, match="two keys"):
            load_adapter(write_adapter(tmp_path / name, pairs | more))


def test_modules_that_any_adapter_brings_stay_so(tmp_path):
    """`modules_to_save` of the second one: without it, a base that lacks the module refuses the stack and the sum."""
    base, plain, head = write(tmp_path / "b"), write_adapter(tmp_path / "a"), headed(tmp_path / "c", 3)
    stack([plain, head], tmp_path / "s")
    for output, adapter in {"o": tmp_path / "s", "p": load_adapter(plain) + load_adapter(head)}.items():
        assert merge(base, [adapter], tmp_path / output).tensors["added"] == 1


def test_an_adapter_merged_twice_is_taken_out_with_both_weights(tmp_path):
    base, adapter = write(tmp_path / "b", llama(torch.float32)), write_adapter(tmp_path / "a")
    merge(base, [adapter, adapter], tmp_path / "m", weights=[0.7, 0.3])
    report = unmerge(tmp_path / "m", tmp_path / "o", adapters=[adapter, adapter])
    found = tensors_of(tmp_path / "o")
    for name, tensor in tensors_of(base).items():
        assert float((found[name].double() - tensor.double()).abs().max()) <= report.totals["bound"]
    with pytest.raises(UndecidedError, match=r"0\.3, 0\.7"):
        unmerge(tmp_path / "m", tmp_path / "p", adapters=[adapter])
    unmerge(tmp_path / "m", tmp_path / "q", adapters=[adapter], weights=[0.3])
    with pytest.raises(UnsupportedError, match="stay in"):
        unmerge(tmp_path / "m", tmp_path / "r", adapters=[adapter], weights=[0.3], base=base)


def test_an_adapter_whose_alpha_changed_since_is_not_subtracted(tmp_path):
    base = write(tmp_path / "b")
    merge(base, [write_adapter(tmp_path / "a")], tmp_path / "m")
    with pytest.raises(MismatchError, match="others then"):
        unmerge(tmp_path / "m", tmp_path / "o", adapters=[write_adapter(tmp_path / "c", lora_alpha=16)])


def test_a_merge_that_rounded_the_product_first_is_recognised(tmp_path):
    """W + round(ΔW) is within two units of the largest of W, W' and ΔW, not of W' alone."""
    base = write(tmp_path / "b", {"m.q.weight": normal(1, 64, 64, dtype=torch.bfloat16, scale=0.02)}, config=None)
    pairs = factors(modules={"m.q": (64, 64)}, scale=0.0005)
    merged = {
        name: tensor + (2 * (pairs["m.q"][1] @ pairs["m.q"][0])).bfloat16() for name, tensor in tensors_of(base).items()
    }
    report = unmerge(
        write(tmp_path / "m", merged, config=None),
        tmp_path / "o",
        adapters=[write_adapter(tmp_path / "a", lora_tensors(pairs))],
        base=base,
    )
    assert report.totals["checked"] == 1


def test_the_difference_of_doubles_is_taken_in_double(tmp_path):
    base = llama(torch.float64)
    change = normal(9, 16, 16, dtype=torch.float64, scale=1e-5)
    tuned = base | {f"{Q}.weight": base[f"{Q}.weight"] + change}
    extract(write(tmp_path / "b", base), write(tmp_path / "t", tuned), tmp_path / "o", rank=16)
    found = load_adapter(tmp_path / "o")[Q].delta_weight().double()
    assert float((found - change).norm() / change.norm()) < 1e-6


def test_a_bare_parameter_of_a_model_without_its_prefix(tmp_path):
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    base = {"encoder.layer.0.attention.self.query.weight": normal(1, 16, 16), "logit_scale": torch.tensor(1.0)}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    extract(write(tmp_path / "b", base, config), write(tmp_path / "t", tuned, config), tmp_path / "o", rank=1)
    assert f"{PREFIX}bert.logit_scale" in tensors_of(tmp_path / "o")


def test_a_layer_called_output_is_no_head(tmp_path):
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.output.weight"]
    config = {"architectures": ["XForCausalLM"], "tie_word_embeddings": True}
    base = write(tmp_path / "b", {name: normal(i, 16, 16) for i, name in enumerate(names)}, config)
    assert open_checkpoint(base).tied_head == ("model.embed_tokens.weight", "lm_head.weight")


def test_a_checkpoint_made_in_memory_is_written_whole(tmp_path):
    tensors = llama()
    base = Checkpoint({name: in_memory(name, tensor) for name, tensor in tensors.items()}, (), {"vocab_size": 32})
    report = merge(base, [write_adapter(tmp_path / "a")], tmp_path / "o")
    assert report.totals["tensors"] == len(tensors)
    assert open_checkpoint(tmp_path / "o").config == {"vocab_size": 32}


def test_an_unknown_preset_is_refused_by_the_plan(tmp_path):
    base = write(tmp_path / "b")
    with pytest.raises(UsageError, match="preset"):
        plan_extract(base, base, tmp_path / "o", preset="nope")


def test_opened_by_a_relative_path_and_used_elsewhere(tmp_path, monkeypatch):
    write(tmp_path / "b")
    write_adapter(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    base, adapter = open_checkpoint("b"), load_adapter("a")
    monkeypatch.chdir(tmp_path.parent)
    assert merge(base, [adapter], tmp_path / "o").tensors["merged"] == 3


def test_an_input_that_went_away_is_a_typed_error(tmp_path):
    base, adapter = open_checkpoint(write(tmp_path / "b")), write_adapter(tmp_path / "a")
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        merge(base, [adapter], tmp_path / "o")


def test_the_plan_counts_what_is_copied_beside_the_weights(tmp_path):
    base = write(tmp_path / "b", companions={"tokenizer.json": b"{" + b" " * 5000 + b"}"})
    assert plan_merge(base, [write_adapter(tmp_path / "a")], tmp_path / "o").bounds.write_bytes > 5000 + 8000


def test_subtraction_names_the_merged_checkpoint_as_such(tmp_path):
    base, adapter = write(tmp_path / "b"), write_adapter(tmp_path / "a")
    merge(base, [adapter], tmp_path / "m", receipt="none")
    report = unmerge(tmp_path / "m", tmp_path / "o", adapters=[adapter])
    assert [entry["role"] for entry in report.inputs] == ["merged", "adapter"]


def test_a_merged_tensor_of_another_shape_is_refused(tmp_path):
    base, adapter = write(tmp_path / "b"), write_adapter(tmp_path / "a")
    merged = write(tmp_path / "m", llama() | {f"{Q}.weight": normal(1, 8, 16, dtype=torch.bfloat16)})
    with pytest.raises(MismatchError, match="shape"):
        unmerge(merged, tmp_path / "o", adapters=[adapter], base=base)

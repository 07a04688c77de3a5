"""What users tripped over, each kept as a claim."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import InputMissingError, MismatchError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.verbs.extract import extract, plan_extract
from loratools.verbs.inspect import inspect
from loratools.verbs.merge import merge
from loratools.verbs.unmerge import unmerge

GENERATOR = torch.Generator().manual_seed(5)


def normal(*shape):
    return 0.1 * torch.randn(*shape, generator=GENERATOR)


def llama(layers=2):
    tensors = {"model.embed_tokens.weight": normal(30, 8), "model.norm.weight": torch.ones(8)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = normal(8, 8)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = normal(12, 8)
    return tensors


def write(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if config:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


@pytest.fixture
def merged(tmp_path):
    """base, tuned (only q_proj changed), the adapter between them, and their merge."""
    tensors = llama()
    write(tmp_path / "base", tensors, **LLAMA)
    changed = {name: value + normal(*value.shape) if "q_proj" in name else value for name, value in tensors.items()}
    write(tmp_path / "tuned", changed, **LLAMA)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    return tmp_path


def tamper(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_merged_file_that_was_changed_is_not_restored(merged):
    """A merged checkpoint whose bytes are not those of its report is refused, whichever tensor was changed."""
    tamper(merged / "merged", "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(MismatchError, match="changed after it was written"):
        unmerge(merged / "merged", merged / "again", base=merged / "base")
    assert not (merged / "again").exists()


def test_a_tensor_that_no_adapter_touched_is_held_against_the_base(merged):
    """Without a report too, an untouched tensor that is not the base's is refused by its name."""
    (merged / "merged" / "loratools.json").unlink()
    tamper(merged / "merged", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.up_proj"):
        unmerge(merged / "merged", merged / "again", adapters=[merged / "adapter"], base=merged / "base")


def test_what_was_restored_is_listed(merged):
    """With no adapter named, the report lists the tensors that came from the base, and counts the compared ones."""
    report = unmerge(merged / "merged", merged / "again", base=merged / "base")
    assert {module["name"] for module in report.modules} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    }
    assert report.totals["unchanged"] == 4


def test_gpt2_without_a_configuration_is_still_turned(tmp_path):
    """Square Conv1D matrices are told by their siblings' biases, and the missing configuration is said."""
    tensors = {}
    for name, shape, bias in (("c_attn", (8, 24), 24), ("c_proj", (8, 8), 8)):
        tensors |= {f"h.0.attn.{name}.weight": normal(*shape), f"h.0.attn.{name}.bias": normal(bias)}
    write(tmp_path / "base", tensors)
    tuned = {name: value + normal(*value.shape) for name, value in tensors.items()}
    write(tmp_path / "tuned", tuned)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=8)
    delta = load_adapter(tmp_path / "adapter")["h.0.attn.c_proj"].delta_weight()
    difference = tuned["h.0.attn.c_proj.weight"] - tensors["h.0.attn.c_proj.weight"]
    assert torch.allclose(delta, difference.T, atol=1e-6)
    assert not torch.allclose(delta, difference, atol=1e-3)
    assert any("no config.json" in note for note in report.notes)


def test_a_tuned_checkpoint_that_ties_what_the_base_does_not(tmp_path):
    """The tied head of the tuned side is its embedding, compared with the base's own head."""
    tensors = llama()
    write(tmp_path / "base", {**tensors, "lm_head.weight": normal(30, 8)}, **LLAMA)
    write(tmp_path / "tuned", tensors, **{**LLAMA, "tie_word_embeddings": True})
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=8)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    head = open_checkpoint(tmp_path / "merged")["lm_head.weight"].load()
    assert torch.allclose(head, tensors["model.embed_tokens.weight"], atol=1e-6)


def test_an_error_below_float32_is_not_called_reached(merged):
    """A goal that float32 factors cannot meet is reported as missed."""
    report = extract(merged / "base", merged / "tuned", merged / "fine", error=1e-12)
    assert not any(module["reached"] for module in report.modules)
    assert any("not reached" in note for note in report.notes)


def test_layers_that_the_base_does_not_have_are_refused(tmp_path):
    """No adapter adds a layer: another depth is another architecture."""
    write(tmp_path / "base", llama(2), **LLAMA)
    write(tmp_path / "tuned", llama(3), **LLAMA)
    with pytest.raises(MismatchError, match="not of one architecture"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")


def test_the_base_can_be_named(merged):
    """`base_model` reaches the configuration, the report and the card; a path is refused."""
    report = extract(merged / "base", merged / "tuned", merged / "named", base_model="me/base")
    config = json.loads((merged / "named" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "me/base"
    assert report.base["hub"] == "me/base"
    assert "me/base" in (merged / "named" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="owner/name"):
        plan_extract(merged / "base", merged / "tuned", merged / "other", base_model="/home/me/base")


def test_identical_tensors_are_named(merged):
    """Every tensor of the pair is low-rank, whole, left out or named as identical."""
    report = extract(merged / "base", merged / "tuned", merged / "names", rank=1)
    low_rank = {f"{module['name']}.weight" for module in report.modules}
    named = low_rank | set(report.whole) | set(report.left_out) | set(report.identical)
    assert named == set(open_checkpoint(merged / "tuned"))


def test_one_adapter_need_not_stand_in_a_list(merged):
    """A lone source is one adapter, not its characters."""
    merge(merged / "base", str(merged / "adapter"), merged / "lone")
    assert (merged / "lone" / "model.safetensors").read_bytes() == (
        merged / "merged" / "model.safetensors"
    ).read_bytes()


def test_an_empty_name_is_not_the_working_directory(merged):
    """An unset shell variable is not the current directory."""
    with pytest.raises(InputMissingError, match="empty name"):
        open_checkpoint("")


@pytest.mark.parametrize(
    "key", ["lora_unet:0:up", "unet.down.processor.to_k_lora.down.weight", "lora_te_q.lora_down.weight"]
)
def test_a_foreign_adapter_is_suspected(tmp_path, key):
    """inspect says that keys look like an adapter's, in the dialects of image models too."""
    save_file({key: normal(2, 3)}, tmp_path / "x.safetensors")
    assert any("adapter" in note for note in inspect(tmp_path / "x.safetensors").notes)
    shutil.rmtree(tmp_path)

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapters import Adapter
from loratools.errors import InputMissingError, MalformedError, UnsupportedError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.verbs.inspect import inspect
from tests.verbs.inspect_samples import MODELS, model_named, parameters_of


@pytest.fixture
def adapter(tmp_path):
    """Saves an adapter for a model; the directory."""

    peft = pytest.importorskip("peft")

    def save(name="llama", **options):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options})
        model = peft.get_peft_model(MODELS[name](), config)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return save


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_what_torch_counts(name, tmp_path):
    """Tied matrices once, buffers not, whatever the family."""
    model = model_named(name)
    model.save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert (report.kind, report.format, report.parameters) == ("checkpoint", "safetensors", parameters_of(model))
    assert report.checkpoint.family.architectures == (type(model).__name__,)
    assert report.checkpoint.family.evidence == "confirmed"


@pytest.mark.parametrize("name", ["qwen2-tied", "mixtral"])
def test_shards_change_nothing_but_the_files(name, tmp_path):
    model_named(name).save_pretrained(tmp_path / "one")
    model_named(name).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = inspect(tmp_path / "one").to_json(), inspect(tmp_path / "many").to_json()
    shards = [file for file in many["files"] if file["tensors"]]
    assert len(shards) > 2
    assert sum(file["tensors"] for file in shards) == sum(share["tensors"] for share in one["dtypes"].values())
    assert "model.safetensors.index.json" in {file["name"] for file in many["files"]}
    by_name = [{row["name"]: row for row in each["modules"]} for each in (one, many)]
    assert by_name[0] == by_name[1]
    assert {**one, "files": 0, "name": 0, "modules": 0} == {**many, "files": 0, "name": 0, "modules": 0}


def test_the_json_is_the_contract_and_names_no_path(tmp_path):
    model_named("qwen2-tied").save_pretrained(tmp_path / "model")
    document = inspect(tmp_path / "model").to_json()
    assert document["schema"] == "loratools/inspect/1"
    first = next(row for row in document["modules"] if row["name"] == "model.layers.0.self_attn.k_proj")
    assert first == {
        "name": "model.layers.0.self_attn.k_proj",
        "kind": "linear",
        "shape": [16, 32],
        "dtype": "F32",
        "parameters": 16 * 32 + 16,
        "evidence": "confirmed",
    }
    assert document["checkpoint"]["tied"] == [
        {
            "tensor": "lm_head.weight",
            "same_as": "model.embed_tokens.weight",
            "stored": False,
            "evidence": "confirmed",
        }
    ]
    assert document["adapter"] is None
    assert document["bytes"] == 4 * document["parameters"]
    assert str(tmp_path) not in json.dumps(document, allow_nan=False)


def test_a_tied_head_that_is_stored_too_is_counted_once(tmp_path):
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    matrix = torch.ones(10, 4)
    tensors = {
        "model.embed_tokens.weight": matrix,
        "lm_head.weight": matrix.clone(),
        "model.norm.weight": torch.ones(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    report = inspect(tmp_path)
    assert (report.parameters, report.bytes) == (44, 4 * 84)
    assert report.dtypes["F32"].parameters == 44
    assert report.checkpoint.tied[0].stored
    assert {row.name: row.parameters for row in report.modules}["lm_head"] == 0
    assert inspect(tmp_path, include=["lm_head"]).parameters == 40
    save_file({**tensors, "lm_head.weight": torch.ones(12, 4)}, tmp_path / "model.safetensors")
    assert (inspect(tmp_path).parameters, inspect(tmp_path).checkpoint.tied) == (92, ())


def test_buffers_are_named_and_not_counted(tmp_path):
    """The causal masks in the files of GPT-2, rotary frequencies, counters of batch norms."""
    file = tmp_path / "old.safetensors"
    save_file(
        {
            "h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "h.0.attn.c_attn.weight": torch.ones(4, 12),
            "h.0.attn.c_attn.bias": torch.ones(12),
            "h.0.mlp.c_fc.weight": torch.ones(4, 16),
            "rotary.inv_freq": torch.ones(3),
            "norm.num_batches_tracked": torch.tensor(1),
        },
        file,
    )
    report = inspect(file)
    assert report.parameters == 48 + 12 + 64
    assert report.checkpoint.buffers == 3
    assert (report.checkpoint.family.model_type, report.checkpoint.family.evidence) == ("GPT-2-like", "inferred")
    assert any("buffers" in note for note in report.notes)
    assert any("config.json" in note for note in report.notes)


def test_dtypes_and_what_is_quantised(tmp_path):
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    save_file({**tensors, "b.weight": torch.ones(8, 8, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    report = inspect(tmp_path)
    assert list(report.dtypes) == ["BF16", "F8_E4M3", "F32"]
    assert report.dtypes["BF16"].bytes == 128
    assert {row.name: (row.kind, row.dtype, row.shape) for row in report.modules} == {
        "a": ("quantised", "F8_E4M3", (4, 4)),
        "b": ("linear", "BF16", (8, 8)),
    }
    assert report.checkpoint.quantisation == "fp8"
    assert report.checkpoint.family.evidence == "unknown"
    assert any("quantised" in note for note in report.notes)


def test_selection_counts_what_it_selects(tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    report = inspect(tmp_path, include=["layers.{0-1}.*"], exclude=["mlp.*"])
    names = [row.name for row in report.modules]
    assert names
    assert all(".mlp." not in name and name.split(".")[2] in {"0", "1"} for name in names)
    assert report.selected == {"modules": len(names), "of": len(inspect(tmp_path).modules)}
    assert report.parameters == sum(row.parameters for row in report.modules)
    assert report.bytes == 4 * report.parameters
    with pytest.raises(UsageError, match="matches no module"):
        inspect(tmp_path, include=["nothing"])


def test_an_adapter_says_rank_alpha_and_scaling(adapter):
    path, model = adapter(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3})
    document = inspect(path).to_json()
    assert (document["kind"], document["format"], document["checkpoint"]) == ("adapter", "peft", None)
    assert document["parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    for row in document["modules"]:
        layer = model.get_submodule(f"base_model.model.{row['name']}")
        expected = (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"])
        assert (row["rank"], row["alpha"], row["scaling"]) == expected
        assert row["shape"] == [layer.out_features, layer.in_features]
    assert document["adapter"]["ranks"] == [{"value": 2, "modules": 1}, {"value": 4, "modules": 5}]
    assert document["adapter"]["alphas"] == [{"value": 3, "modules": 3}, {"value": 16, "modules": 3}]
    assert document["adapter"]["targets"] == {"q_proj": 3, "v_proj": 3}
    assert document["notes"] == []


def test_rslora_scales_by_the_root(adapter):
    report = inspect(adapter(use_rslora=True)[0])
    assert {row.scaling for row in report.modules} == {8.0}


def test_conv1d_and_whole_modules(adapter):
    path, _ = adapter(
        "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"], bias="lora_only"
    )
    report = inspect(path)
    rows = {row.name: row for row in report.modules}
    assert rows["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert rows["transformer.h.0.attn.c_attn"].whole == ("bias",)
    norm = rows["transformer.ln_f"]
    assert (norm.kind, norm.rank, norm.alpha, norm.scaling, norm.shape) == ("full", None, None, None, (32,))
    assert sorted(norm.whole) == ["bias", "weight"]
    assert report.adapter.whole == {"c_attn": 2, "ln_f": 1}
    assert report.adapter.targets == {"c_attn": 2}
    assert report.parameters == sum(ref.spec.numel for update in load_adapter(path).values() for ref in update.tensors)
    assert sum(file.tensors or 0 for file in report.files) == 2 * 3 + 2


def test_what_the_configuration_names_in_vain_is_told(adapter):
    path, _ = adapter(rank_pattern={"q_porj": 2})
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = ["q_proj", "v_proj", "gate"]
    file.write_text(json.dumps(config))
    assert sorted(inspect(path).notes) == [
        "rank_pattern names q_porj, and no tensor of the adapter is for it.",
        "target_modules names gate, and no tensor of the adapter is for it.",
    ]


def test_the_base_that_an_adapter_was_made_for(adapter):
    path, _ = adapter()
    assert inspect(path).adapter.base == {"name": None, "fingerprints": 0}
    base = {"name": "tiny", "fingerprint": {"model.layers.0.self_attn.q_proj": "F32:32x32:0"}}
    (path / "loratools.json").write_text(json.dumps({"schema": "loratools/extract/1", "base": base}))
    assert inspect(path).adapter.base == {"name": "tiny", "fingerprints": 1}


def test_objects_are_sources(adapter, tmp_path):
    path, _ = adapter()
    loaded = load_adapter(path)
    assert inspect(loaded).to_json() == inspect(path).to_json()
    summed = inspect(loaded + 0.5 * loaded)
    assert {(row.rank, row.alpha, row.scaling) for row in summed.modules} == {(8, None, None)}
    assert inspect(Adapter({})).parameters == 0
    model_named("llama").save_pretrained(tmp_path / "model")
    assert inspect(open_checkpoint(tmp_path / "model")) == inspect(tmp_path / "model")


def test_a_merged_checkpoint_says_who_made_it(tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    assert inspect(tmp_path).checkpoint.made_by is None
    (tmp_path / "loratools.json").write_text('{"schema": "loratools/merge/1"}')
    assert inspect(tmp_path).checkpoint.made_by == "merge"


def test_what_cannot_be_inspected(tmp_path):
    with pytest.raises(InputMissingError):
        inspect(tmp_path / "nothing")
    with pytest.raises(UnsupportedError, match="hf://"):
        inspect("hf://owner/name")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    with pytest.raises(MalformedError):
        inspect(tmp_path / "broken.safetensors")


def test_an_adapter_without_its_configuration_is_not_taken_for_a_model(tmp_path):
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 4)}, tmp_path / "loose.safetensors")
    assert any("adapter" in note for note in inspect(tmp_path / "loose.safetensors").notes)


def test_torch_is_not_imported(adapter, tmp_path):
    """Neither for a checkpoint nor for an adapter, nor to render what was found."""
    path, _ = adapter()
    model_named("llama").save_pretrained(tmp_path / "model")
    script = (
        "import sys; from loratools.verbs.inspect import inspect; from loratools.verbs.graph import graph\n"
        "from loratools import rendering\n"
        "for source in sys.argv[1:]: rendering.inspection(inspect(source), modules=True)\n"
        "graph(sys.argv[1]).text('tree')\n"
        "assert not {'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model", path], check=True)

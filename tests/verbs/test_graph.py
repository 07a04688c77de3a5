import json

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import MalformedError, UsageError
from loratools.files import open_checkpoint
from loratools.verbs.graph import MAX_DEPTH, graph
from tests.verbs.inspect_samples import MODELS, model_named, parameters_of


@pytest.mark.parametrize("name", MODELS)
def test_every_node_counts_what_torch_counts(name, tmp_path):
    """A shared matrix where torch first meets it, which is at the embedding."""
    model = model_named(name)
    model.save_pretrained(tmp_path)
    report = graph(tmp_path)
    assert report.nodes[0].parameters == parameters_of(model)
    own = {path: parameter.numel() for path, parameter in model.named_parameters()}
    if name in {"mixtral", "gpt-neox"}:  # these files have other names than the model class of transformers 5
        return
    for node in report.nodes[1:]:
        below = sum(number for path, number in own.items() if path.startswith(f"{node.name}."))
        assert node.parameters == below, node.name


@pytest.mark.parametrize("name", MODELS)
def test_the_edges_are_a_tree_over_the_nodes(name, tmp_path):
    model_named(name).save_pretrained(tmp_path)
    document = graph(tmp_path).to_json()
    assert document["schema"] == "loratools/graph/1"
    names = [node["name"] for node in document["nodes"]]
    assert len(set(names)) == len(names)
    assert names[0] == ""
    seen = {""}
    parents = {edge["to"]: edge["from"] for edge in document["edges"]}
    assert len(parents) == len(document["edges"]) == len(names) - 1
    for each in names[1:]:
        assert each == (f"{parents[each]}.{each.rpartition('.')[2]}" if parents[each] else each)
        assert parents[each] in seen
        seen.add(each)
    totals = {node["name"]: node["parameters"] for node in document["nodes"]}
    own = {
        path: total - sum(totals[below] for below, above in parents.items() if above == path)
        for path, total in totals.items()
    }
    assert min(own.values()) >= 0
    assert set(open_checkpoint(tmp_path).modules) <= set(names)


def test_a_node_is_the_contract(tmp_path):
    model_named("gpt2").save_pretrained(tmp_path)
    nodes = {node["name"]: node for node in graph(tmp_path).to_json()["nodes"]}
    assert nodes["transformer.h.1.mlp.c_fc"] == {
        "name": "transformer.h.1.mlp.c_fc",
        "kind": "conv1d",
        "shape": [32, 128],
        "parameters": 32 * 128 + 128,
        "dtype": "F32",
    }
    assert nodes["transformer.h"]["kind"] == "container"
    assert (nodes[""]["kind"], nodes[""]["shape"]) == ("model", None)


def test_numbered_siblings_are_in_the_order_of_their_numbers(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(
        {f"layers.{n}.w.weight": torch.ones(2, 2) for n in (10, 2, 0, 1, 9)} | {"layers.final.weight": torch.ones(1)},
        file,
    )
    below = [edge["to"] for edge in graph(file).to_json()["edges"] if edge["from"] == "layers"]
    assert below == ["layers.final", "layers.0", "layers.1", "layers.2", "layers.9", "layers.10"]


def test_depth_cuts_the_nodes_and_keeps_the_sums(tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    whole, cut = graph(tmp_path).to_json(), graph(tmp_path, depth=2).to_json()
    assert cut["nodes"] == [node for node in whole["nodes"] if node["name"].count(".") < 2]
    assert {edge["to"] for edge in cut["edges"]} == {node["name"] for node in cut["nodes"]} - {""}
    with pytest.raises(UsageError):
        graph(tmp_path, depth=0)


def test_selection_keeps_the_containers_of_what_it_selects(tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    report = graph(tmp_path, include=["layers.1.*.q_proj"])
    assert [node.name for node in report.nodes] == [
        "",
        "model",
        "model.layers",
        "model.layers.1",
        "model.layers.1.self_attn",
        "model.layers.1.self_attn.q_proj",
    ]
    assert {node.parameters for node in report.nodes} == {32 * 32}
    assert report.notes[0].startswith("1 of ")


def test_a_stored_tied_head_points_at_the_embedding(tmp_path):
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.ones(10, 4), "lm_head.weight": torch.ones(10, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    report = graph(tmp_path)
    head = {node.name: node for node in report.nodes}["lm_head"]
    assert (head.parameters, head.tied_to) == (0, "model.embed_tokens")
    assert report.nodes[0].parameters == 40
    assert "stored as well" in report.notes[-1]
    assert "= model.embed_tokens" in report.text()


@pytest.mark.parametrize("view", ["tree", "json", "dot", "mermaid"])
def test_every_view_is_text_of_the_same_report(view, tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    report = graph(tmp_path, view=view)
    assert report.text() == graph(tmp_path).text(view)
    assert "q_proj" in report.text()


def test_json_folds_nothing(tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    names = {node["name"] for node in json.loads(graph(tmp_path).text("json"))["nodes"]}
    assert {f"model.layers.{n}" for n in range(3)} <= names


def test_views_that_are_not_there(tmp_path):
    model_named("llama").save_pretrained(tmp_path)
    for view in ("picture", "html", ""):
        with pytest.raises(UsageError, match="no such view"):
            graph(tmp_path, view=view)


def test_odd_names_make_a_tree_and_deep_ones_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    odd = ["bare", ".lead", "a..b.weight", "a.", "..", "x"]
    save_file({name: torch.ones(2) for name in odd}, file)
    report = graph(file)
    assert report.nodes[0].parameters == 2 * len(odd)
    assert all(report.text(view) for view in ("tree", "json", "dot", "mermaid"))
    save_file({"a." * MAX_DEPTH + "weight": torch.ones(2)}, file)
    assert len(graph(file).nodes) == MAX_DEPTH + 1
    assert all(graph(file).text(view) for view in ("tree", "json", "dot", "mermaid"))
    save_file({"a." * (MAX_DEPTH + 1) + "weight": torch.ones(2)}, file)
    with pytest.raises(MalformedError, match="levels deep"):
        graph(file)


def test_an_adapter_has_no_tree(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MalformedError, match="adapter"):
        graph(tmp_path)

"""Names of llama.cpp against its own table.

`data/llama_cpp_names.json` holds, for tiny models of transformers 5, what gguf-py 0.19 (`get_tensor_name_map`) calls
the matrices of the first layer and those outside, and which modules lie there.
"""

import json
from pathlib import Path

import pytest

from loratools.formats.llama_cpp_names import module_paths

THEIRS = json.loads((Path(__file__).parent / "data" / "llama_cpp_names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", THEIRS)
def test_every_matrix_of_a_family(family):
    """The one candidate that the model has is the module that gguf-py gives the name to, in any layer."""
    modules, names = THEIRS[family]["modules"], THEIRS[family]["names"]
    assert len(names) >= 4
    for name, path in names.items():
        assert [each for each in module_paths(name) if each in modules] == [path]
        if name.startswith("blk.0."):
            deeper = module_paths(name.replace("blk.0.", "blk.31."))
            assert path.replace(".0.", ".31.", 1) in deeper


@pytest.mark.parametrize("name", [
    "", "blk", "blk.0", "blk.0.attn_q", "blk.x.attn_q.weight", "blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.bias",
    "blk.-1.attn_q.weight", "blk.1234567.attn_q.weight", "blk.٣.attn_q.weight", "token_embd.weight",
    "v.blk.0.attn_q.weight",
    "blk.0.unheard_of.weight", "CUDA0#blk.0.attn_q.weight#0", "blk.0.attn_q.weight\n",
])  # fmt: skip
def test_names_that_are_none(name):
    """Nothing is guessed."""
    assert module_paths(name) == []


def test_stacked_experts():
    """Gate and up have one input, and one stacked parameter; down has its own."""
    for short, parameter in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
        assert f"model.layers.3.mlp.experts.{parameter}" in module_paths(f"blk.3.ffn_{short}_exps.weight")

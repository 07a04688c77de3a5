import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from loratools import rendering
from loratools.adapters import Adapter, Full, LowRank
from loratools.checkpoints import Checkpoint, ShardInfo
from loratools.tensors import TensorRef, TensorSpec, in_memory
from loratools.verbs.inspect import inspect


def unread(name, shape, dtype="BF16"):
    return TensorRef(TensorSpec(name, dtype, shape), None, 0)


def checkpoint(tensors, **facts):
    refs = {name: unread(name, *rest) for name, *rest in tensors}
    return Checkpoint(tensors=refs, shards=(ShardInfo("model.safetensors", tuple(refs)),), name="tiny", **facts)


def low_rank(rank, alpha, **rest):
    lora_A, lora_B = in_memory("a", torch.zeros(rank, 6)), in_memory("b", torch.zeros(4, rank))
    return LowRank(lora_A=lora_A, lora_B=lora_B, alpha=alpha, **rest)


def test_a_checkpoint():
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    tensors = [("model.embed_tokens.weight", (32000, 2048)), ("model.norm.weight", (2048,), "F32")]
    page = rendering.inspection(inspect(checkpoint(tensors, config=config)))
    assert page.splitlines() == [
        "tiny: checkpoint, safetensors",
        "  family      qwen2 (Qwen2ForCausalLM), confirmed by config.json",
        "  tied        lm_head.weight = model.embed_tokens.weight, confirmed, not stored",
        "  parameters  65.5 M (65,538,048)",
        "  bytes       125.0 MiB",
        "  dtypes      BF16: 1 tensor, 65.5 M parameters, 125.0 MiB",
        "              F32: 1 tensor, 2.05 K parameters, 8.0 KiB",
        "  modules     2: 1 embedding, 1 norm",
    ]


def test_the_modules_of_a_checkpoint():
    report = inspect(checkpoint([("a.weight", (40, 6)), ("a.bias", (40,)), ("norm.weight", (6,), "F32")]))
    assert rendering.inspection(report, modules=True).split("\n\n")[1].splitlines() == [
        "name  kind    shape   dtype  parameters",
        "a     linear  40 × 6  BF16          280",
        "norm  norm    6       F32             6",
    ]


def test_an_adapter():
    updates = {f"layers.{n}.q": low_rank(2, 4) for n in range(3)}
    updates |= {"layers.0.up": low_rank(4, 4), "head": Full(replaced={"weight": in_memory("w", torch.zeros(8, 6))})}
    report = inspect(Adapter(updates, name="mine", base_model="me/base", notes=("odd",)))
    page, table = rendering.inspection(report, modules=True).split("\n\n")
    assert page.splitlines() == [
        "mine: adapter, peft",
        "  base        me/base, no fingerprint",
        "  rank        2 (3 modules), 4 (1 module)",
        "  alpha       4",
        "  scaling     1 (1 module), 2 (3 modules)",
        "  targets     q ×3, up ×1",
        "  whole       head ×1",
        "  parameters  148",
        "  bytes       592 B",
        "  dtypes      F32: 9 tensors, 148 parameters, 592 B",
        "  modules     5: 4 low-rank, 1 full",
        "note: odd",
    ]
    assert [line.split() for line in (table.splitlines()[0], *table.splitlines()[4:])] == [
        ["name", "kind", "shape", "dtype", "rank", "alpha", "scaling", "parameters"],
        ["layers.0.up", "low-rank", "4", "×", "6", "F32", "4", "4", "1", "40"],
        ["head", "full", "8", "×", "6", "F32", "48"],
    ]


def test_files_on_disk(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    page = rendering.inspection(inspect(tmp_path))
    assert "  files       model.safetensors, " in page
    assert "beside them tokenizer.json" in page
    assert "  family      unknown" in page


@pytest.mark.parametrize("count", [10, 25])
def test_notes_are_not_a_flood(count):
    report = dataclasses.replace(inspect(checkpoint([("a.weight", (2, 2))])), notes=tuple(map(str, range(count))))
    page = rendering.inspection(report)
    assert page.count("note: ") == min(count, 11)
    assert (f"{count - 10} more notes" in page) is (count > 10)


def test_many_values_are_not_a_flood():
    report = inspect(Adapter({f"m{n}": low_rank(1, n + 1) for n in range(20)}))
    assert ", and 12 more" in rendering.inspection(report)


def test_hostile_texts_stay_in_their_line():
    evil = "x\x1b[2J\n\u2028\u202e"
    config = {"model_type": evil, "architectures": [evil], "quantization_config": {"quant_method": evil}}
    report = inspect(checkpoint([(f"{evil}.weight", (2, 2))], config=config, report={"schema": f"loratools/{evil}/1"}))
    page = rendering.inspection(dataclasses.replace(report, name=evil, notes=(evil * 200,)), modules=True)
    assert all(line.isprintable() for line in page.split("\n"))
    adapter = Adapter({evil: low_rank(1, 1, replaced={evil: in_memory(evil, torch.zeros(1))})}, base_model=evil)
    assert all(line.isprintable() for line in rendering.inspection(inspect(adapter), modules=True).split("\n"))

"""Matrices that are read in passes instead of held: the same adapter, in a fraction of the memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import extract, plan_extract
from loratools.engine import memory, streaming
from loratools.errors import MemoryLimitError, NonFiniteError


def checkpoint(path, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def pair(tmp_path):
    """Two linear layers and an embedding, bfloat16; every matrix of rank 5 and rounding noise."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.layers.0.mlp.up_proj": (900, 300), "model.layers.0.mlp.down_proj": (300, 900)}
    base, tuned = {}, {}
    for name, (m, n) in shapes.items():
        W = torch.randn(m, n, generator=generator) * 0.05
        delta = torch.randn(m, 5, generator=generator) @ torch.randn(5, n, generator=generator) * 0.01
        base[f"{name}.weight"], tuned[f"{name}.weight"] = W.bfloat16(), (W.bfloat16().float() + delta).bfloat16()
    return checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned)


@pytest.fixture
def little(monkeypatch):
    """Plans as if 100 kB were much."""
    monkeypatch.setattr(streaming, "HELD", 100_000)
    monkeypatch.setattr(memory, "TILE_BYTES", 2**14)


def streamed(plan):
    return [unit.target for unit in plan.units if unit.parameters.get("streamed")]


def deltas(directory):
    factors = load_file(directory / "adapter_model.safetensors")
    names = sorted(name for name in factors if "lora_A" in name)
    return [factors[name.replace("lora_A", "lora_B")] @ factors[name] for name in names]


@pytest.mark.parametrize("options", [{"rank": 5}, {"energy": 0.9}, {"rank": 8, "preset": "certified"}, {"knee": True}])
def test_the_same_adapter(pair, tmp_path, request, options):
    held = extract(*pair, tmp_path / "held", **options)
    request.getfixturevalue("little")
    plan = plan_extract(*pair, tmp_path / "passes", **options)
    assert len(streamed(plan)) == 2
    found = extract(*pair, tmp_path / "passes", **options)
    for one, other in zip(held.modules, found.modules, strict=True):
        assert (one["name"], one["rank"]) == (other["name"], other["rank"])
        for figure in ("captured", "residual", "norm", "relative"):
            assert one[figure] == pytest.approx(other[figure], rel=2e-3)
    for one, other in zip(deltas(tmp_path / "held"), deltas(tmp_path / "passes"), strict=True):
        assert float((one - other).norm()) < 0.02 * float(one.norm())


@pytest.mark.usefixtures("little")
def test_threads_do_not_change_the_bytes(pair, tmp_path):
    for threads in (1, 3):
        extract(*pair, tmp_path / str(threads), rank=4, threads=threads)
    one, three = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "13")
    assert one == three


@pytest.mark.usefixtures("little")
def test_what_needs_the_matrix_holds_it(pair, tmp_path):
    assert streamed(plan_extract(*pair, tmp_path / "out", rank="auto")) == []


@pytest.mark.usefixtures("little")
def test_non_finite_entries_name_the_tensor(pair, tmp_path):
    tensors = load_file(pair[1] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7, 8] = torch.nan
    save_file(tensors, pair[1] / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"1 of 270000 entries .*up_proj"):
        extract(*pair, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def large(path, tuned):
    """One matrix of 16,384 × 2,048: 128 MiB in float32."""
    W = torch.randn(16384, 2048, generator=torch.Generator().manual_seed(0)) * 0.05
    if tuned:
        generator = torch.Generator().manual_seed(1)
        W += torch.randn(16384, 3, generator=generator) @ torch.randn(3, 2048, generator=generator) * 0.01
    return checkpoint(path, {"lm_head.weight": W.bfloat16()})


RUN = """
import sys
from loratools import extract
extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=8, threads=1, max_memory=int(sys.argv[4]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_limit_is_kept_where_the_matrix_does_not_fit(tmp_path):
    base, tuned = large(tmp_path / "base", False), large(tmp_path / "tuned", True)
    limit = memory.FIXED + 110 * 2**20
    assert streamed(plan_extract(base, tuned, tmp_path / "out", rank=8)) == []
    assert streamed(plan_extract(base, tuned, tmp_path / "out", rank=8, max_memory=limit)) == ["lm_head"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(base), str(tuned), str(tmp_path / "out"), str(limit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 1024 * int(done.stdout) <= limit
    with pytest.raises(MemoryLimitError):
        extract(base, tuned, tmp_path / "out2", rank=8, max_memory=memory.FIXED + 2**20)


def experts(path, seed):
    """Six stacked experts as transformers 5 keeps them."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}))
    name = "model.layers.0.mlp.experts"
    tensors = {
        f"{name}.gate_up_proj": torch.randn(6, 160, 48, generator=generator),
        f"{name}.down_proj": torch.randn(6, 48, 80, generator=generator),
        "model.layers.0.mlp.gate.weight": torch.ones(6, 48),
    }
    save_file(tensors, path / "model.safetensors")
    return path


def test_experts_together_are_experts_one_by_one(tmp_path, monkeypatch):
    """What a GPU does at once: the same adapter, in batches that do not divide the experts evenly."""
    from loratools import linalg
    from loratools.engine.operations import extracting_experts

    sides = experts(tmp_path / "base", 0), experts(tmp_path / "tuned", 1)
    one = extract(*sides, tmp_path / "one", rank=5, threads=1)
    calls = []
    whole = linalg.truncated_svd_batch

    def counted(matrices, **options):
        calls.append(len(matrices))
        return whole(matrices, **options)

    monkeypatch.setattr(extracting_experts, "is_batched", lambda *_: True)
    monkeypatch.setattr(linalg, "batch_size", lambda m, n: 4)
    monkeypatch.setattr(linalg, "truncated_svd_batch", counted)
    together = extract(*sides, tmp_path / "together", rank=5, threads=1)
    assert calls == [4, 2, 4, 2]
    assert [dict(row) for row in one.modules] == [dict(row) for row in together.modules]
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "together")]
    assert read[0] == read[1]

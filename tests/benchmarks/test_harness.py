"""The harness itself: what it builds is what it says, and what it measures is what ran."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks import builders, checks, giant, measure, plain_merge, render


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


@pytest.mark.parametrize("kind", builders.KINDS)
def test_the_same_seed_gives_the_same_bytes(tmp_path, kind):
    one, two = (builders.build(tmp_path / name, "tiny", kind, seed=3) for name in "ab")
    assert digest(one) == digest(two)


@pytest.mark.parametrize("kind", ["lora", "finetune"])
def test_a_tuned_checkpoint_differs_only_in_its_projections(tmp_path, kind):
    tuned = tensors(builders.build(tmp_path, "tiny", kind))
    base = tensors(tmp_path / "tiny" / "base")
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, tuned[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    name = "model.layers.0.mlp.up_proj.weight"
    size = (tuned[name].float() - base[name].float()).norm() / base[name].float().norm()
    assert 0.008 < size < 0.013


def test_bfloat16_is_rounded_as_torch_rounds_it():
    values = torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,))
    bits = builders.round_to_bf16(values.numpy())
    assert torch.equal(torch.from_numpy(builders.widen_bf16(bits)), values.bfloat16().float())


def test_the_plain_merge_adds_the_scaled_update(tmp_path):
    base, adapter = (builders.build(tmp_path, "tiny", kind) for kind in ("base", "adapter"))
    plain_merge.merge(base, adapter, tmp_path / "merged")
    factors, name = tensors(adapter), "model.layers.1.self_attn.k_proj"
    A, B = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    weight, merged = tensors(base)[f"{name}.weight"], tensors(tmp_path / "merged")[f"{name}.weight"]
    assert torch.equal(merged, (weight.float() + 2.0 * (B @ A)).bfloat16())


def test_the_giant_has_the_announced_size():
    parts = giant.parts()
    assert len(parts) == 163
    assert sum(map(len, parts)) > 90_000
    assert sum(entry.size for part in parts for entry in part) > 10**12


def test_alternation_measures_time_and_memory():
    idle = measure.Contender("idle", [sys.executable, "-c", "pass"])
    busy = measure.Contender("busy", [sys.executable, "-c", "import time; x = bytes(10**8); time.sleep(0.3)"])
    samples = measure.alternate([idle, busy], runs=2, warm_up=0)
    assert [len(runs) for runs in samples.values()] == [2, 2]
    ratios = measure.ratios(samples, "idle")["busy"]
    assert ratios["wall"]["median"] > 1.5
    assert min(sample.peak_rss for sample in samples["busy"]) > 10**8


def test_a_failing_contender_says_why():
    contender = measure.Contender("broken", [sys.executable, "-c", "raise SystemExit('no such luck')"])
    with pytest.raises(measure.BenchmarkError, match="no such luck"):
        measure.run_once(contender)


def test_the_peak_of_a_plan_is_that_of_the_process_not_of_a_unit():
    plan = {"units": [{"peak_bytes": 5}], "bounds": {"peak_bytes": 7}}
    assert checks.peak_of(plan) == 7
    with pytest.raises(measure.BenchmarkError, match="no peak"):
        checks.peak_of({"units": [{"peak_bytes": 5}]})


def test_a_stored_result_becomes_a_page(tmp_path):
    sides = {name: [measure.Sample(wall, wall, 2**20, 0.0)] for name, wall in (("loratools", 2.0), ("peft", 6.0))}
    versions = {"loratools": {"torch": "2.0"}, "peers": {"peft": "0.1"}}
    record = {
        "benchmark": "merge-155m",
        "variant": "adapter",
        "date": measure.now(),
        "commit": "0" * 40,
        "machine": measure.machine(),
        "versions": versions,
        "runs": 1,
        "warm_up": 0,
        "contenders": measure.summarise(sides),
        "ratios": measure.ratios(sides, "loratools"),
    }
    measure.append_result(tmp_path / "merge-155m.json", record)
    text = render.page(tmp_path)
    assert "| adapter | peft | 6.00 s (6.00 – 6.00) |" in text
    assert "3.00× (3.00 – 3.00)" in text

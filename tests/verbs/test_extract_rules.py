"""Rules for ranks: what each counts on files, ranks per pattern, and `auto` on real merges."""

import json

import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools.errors import UsageError
from loratools.verbs.extract import extract, plan_extract
from tests.minilm import unpack
from tests.models import load, quiet, save
from tests.tiny import DOWN, K, Q, llama, normal, write_checkpoint


def changed(change, dtype=torch.float32):
    """A tiny Llama with something added to three matrices."""
    tensors = llama(dtype)
    for index, path in enumerate((Q, K, DOWN)):
        weight = tensors[f"{path}.weight"]
        tensors[f"{path}.weight"] = (weight.double() + change(index, *weight.shape)).to(dtype)
    return tensors


def full(index, rows, columns):
    return 0.01 * normal(50 + index, rows, columns, dtype=torch.float64)


@pytest.fixture
def pair(tmp_path):
    return write_checkpoint(tmp_path / "base", llama(torch.float32)), write_checkpoint(
        tmp_path / "tuned", changed(full)
    )


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"sv_ratio": 3.0}, lambda s: int((s >= s[0] / 3).sum())),
        ({"sv_fro": 0.9}, lambda s: int((s.square().cumsum(0) < 0.81 * s.square().sum()).sum()) + 1),
        ({"sv_cumulative": 0.6}, lambda s: int((s.cumsum(0) < 0.6 * s.sum()).sum()) + 1),
    ],
)
def test_kohyas_rules_count_exactly(tmp_path, pair, options, count):
    """Against the dense float64 spectrum of every module."""
    before, after = llama(torch.float32), changed(full)
    report = extract(*pair, tmp_path / "out", **options)
    assert len(report.modules) == 3
    for module in report.modules:
        name = f"{module['name']}.weight"
        sigma = torch.linalg.svdvals(after[name].double() - before[name].double())
        assert module["rank"] == count(sigma)
        assert module["reached"]


def test_a_pattern_stands_above_the_rule(tmp_path, pair):
    """The first of the patterns that match decides; the plan says the rank of every unit."""
    options = {"energy": 0.99, "rank_pattern": {"q_proj": 3, "self_attn.*": 5}}
    report = extract(*pair, tmp_path / "out", **options)
    ranks = {module["name"]: module["rank"] for module in report.modules}
    assert (ranks[Q], ranks[K]) == (3, 5)
    assert ranks[DOWN] > 5
    plan = plan_extract(*pair, tmp_path / "other", **options)
    said = {unit.target: unit.parameters["svd"] for unit in plan.units if unit.operation == "extract"}
    assert said[Q]["rank"] == 3
    assert "energy" not in said[Q]
    assert said[DOWN]["energy"] == 0.99
    assert json.loads(json.dumps(plan.to_json()))["options"]["rank_pattern"] == {"q_proj": 3, "self_attn.*": 5}


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "knee": True},
        {"rank": "auto", "energy": 0.5},
        {"sv_ratio": 0.9},
        {"sv_fro": 1.1},
        {"rank": "some"},
        {"rank_pattern": {"no_such": 4}},
        {"rank_pattern": {"q_proj": 0}},
    ],
    ids=str,
)
def test_what_is_refused_before_anything_is_written(tmp_path, pair, options):
    with pytest.raises(UsageError):
        extract(*pair, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_too_large_a_rank_is_clipped_and_said(tmp_path, pair):
    report = extract(*pair, tmp_path / "out", rank=4, rank_pattern={"q_proj": 999})
    module = next(each for each in report.modules if each["name"] == Q)
    assert module["clipped"]
    assert module["rank"] == min(llama(torch.float32)[f"{Q}.weight"].shape)
    assert any("lower than asked for" in note for note in report.notes)


def test_auto_says_where_the_change_is_not_of_low_rank(tmp_path, pair):
    """A change of full rank, far above the rounding of float32: 0.9 of its energy, and a note with the modules."""
    report = extract(*pair, tmp_path / "out", rank="auto")
    for module in report.modules:
        assert module["rank_rule"].startswith("energy 0.9")
        assert 0.9 <= module["captured"] < 0.97
    assert any("Not of low rank" in note and "more" in note for note in report.notes)


def _adapt(model):
    """AdamW towards unlike embeddings of unlike inputs, through all factors."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(30):
        output = model(input_ids=torch.randint(1000, 20000, (4, 12), generator=generator))
        mean = torch.nn.functional.normalize(output.last_hidden_state.mean(1), dim=1)
        loss = (mean @ mean.T).square().mean() + 0.1 * output.pooler_output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """MiniLM in bf16, the same with an adapter of rank 8 that PEFT trained and merged, and the adapter's true ΔW."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("minilm")
    base = save(load(unpack(folder / "float32")).bfloat16(), folder / "base")
    torch.manual_seed(1)
    with quiet():
        model = get_peft_model(load(base).float(), LoraConfig(r=8, lora_alpha=20, target_modules="all-linear"))
        _adapt(model)
        layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
        truth = {
            name: layer.get_delta_weight("default").detach().double()
            for name, layer in layers.items()
            if hasattr(layer, "get_delta_weight")
        }
        for layer in layers.values():  # the base is bf16 again, the factors stay float32
            if hasattr(layer, "base_layer"):
                layer.base_layer.to(torch.bfloat16)
        merged = model.merge_and_unload().bfloat16()
    return base, save(merged, folder / "tuned"), truth


def test_auto_finds_the_rank_of_a_peft_merge_and_takes_the_noise_out(tmp_path, trained):
    """Rank 8 on every linear layer of MiniLM, and each nearer to the true ΔW than the difference of the files is."""
    base, tuned, truth = trained
    report = extract(base, tuned, tmp_path / "out", rank="auto")
    assert {module["name"]: module["rank"] for module in report.modules} == dict.fromkeys(truth, 8)
    adapter = lt.load_adapter(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    for name, change in truth.items():
        raw = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        cleaned = adapter[name].delta_weight().double()
        assert float((cleaned - change).norm()) < 0.5 * float((raw - change).norm())

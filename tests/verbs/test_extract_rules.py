"""Rules for ranks: what each counts on files, and ranks per pattern."""

import json

import pytest
import torch

from loratools.errors import UsageError
from loratools.verbs.extract import extract, plan_extract
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

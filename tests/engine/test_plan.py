import dataclasses
import json

import pytest
import torch

from loratools.engine.plan import SCHEMA, Plan, canonical
from loratools.errors import MalformedError
from loratools.verbs.extract import plan_extract
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.rescale import plan_rescale
from loratools.verbs.stack import plan_stack
from loratools.verbs.unmerge import plan_unmerge
from tests.tiny import CONFIG, Q, llama, normal, state, write_adapter, write_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("plans")
    base = write_checkpoint(home / "base", shards=2, companions={"tokenizer.json": b"{}"})
    tensors = llama() | {"model.norm.weight": normal(1, 16, dtype=torch.bfloat16)}
    tensors[f"{Q}.weight"] = normal(2, 16, 16, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    write_checkpoint(home / "tuned", tensors, CONFIG | {"vocab_size": 34})
    a = write_adapter(home / "a", alpha_pattern={"k_proj": 3})
    write_adapter(home / "b")
    merge(base, [a], home / "merged")
    return home


PLANS = {
    "extract": lambda home, **run: plan_extract(home / "base", home / "tuned", home / "out", energy=0.9, **run),
    "extract-low": lambda home, **run: plan_extract(
        home / "base", home / "tuned", home / "out", only_low_rank=True, exclude=["k_proj"], **run
    ),
    "extract-budget": lambda home, **run: plan_extract(
        home / "base", home / "tuned", home / "out", budget=9000, uniform_rank=True, **run
    ),
    "merge": lambda home, **run: plan_merge(
        home / "base", [home / "a", home / "b"], home / "out", weights=[1, -2], **run
    ),
    "recast": lambda home, **run: plan_merge(home / "base", [], home / "out", dtype="fp32", max_shard_size=900, **run),
    "single": lambda home, **run: plan_merge(home / "tuned", [home / "a"], home / "out.safetensors", **run),
    "unmerge": lambda home, **run: plan_unmerge(home / "merged", home / "out", adapters=[home / "a"], **run),
    "restore": lambda home, **run: plan_unmerge(home / "merged", home / "out", base=home / "base", **run),
    "stack": lambda home, **run: plan_stack([home / "a", home / "b"], home / "out", weights=0.5, **run),
    "rescale": lambda home, **run: plan_rescale(home / "a", home / "out", by=2, include=["k_proj"], **run),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_survives_json(files, name):
    """Equal after a round trip through text, for every verb; the document names its schema."""
    plan = PLANS[name](files)
    document = json.loads(json.dumps(plan.to_json()))
    assert document["schema"] == SCHEMA == "loratools/plan/1"
    again = Plan.from_json(document)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert canonical(plan.to_json()) == canonical(again.to_json())


@pytest.mark.parametrize("name", PLANS)
def test_planning_writes_nothing_and_prints(files, name):
    """Nothing but headers is read, nothing appears, and the value has a readable form."""
    before = state(files)
    plan = PLANS[name](files)
    assert state(files) == before
    assert plan.verb in repr(plan)
    assert all(unit.operation in repr(unit) for unit in plan.units)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_consistent(files, name):
    """Every input is of a source, every rule that is named is explained, bounds are sums, units are plain data."""
    plan = PLANS[name](files)
    sources = {source.id for source in plan.sources}
    assert all(address.source in sources for unit in plan.units for address in unit.inputs)
    assert plan.bounds.read_bytes == sum(unit.read_bytes for unit in plan.units)
    assert plan.bounds.peak_bytes > 0
    targets = {file.name: {spec.name for spec in file.tensors} for file in plan.files}
    written = [
        (unit.file, target)
        for unit in plan.units
        if unit.file
        for target in unit.parameters.get("names", [unit.target])
    ]
    assert len(written) == len(set(written))
    assert set(written) == {(file, tensor) for file, tensors in targets.items() for tensor in tensors}
    hashed = {(unit.parameters["source"], unit.target) for unit in plan.units if unit.operation == "hash"}
    assert hashed == {(source.id, file) for source in plan.sources for file in source.files}
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.verb = "other"
    for unit in plan.units:
        json.dumps(dict(unit.parameters), allow_nan=False)
        for rule in unit.parameters.get("rules", {}).values():
            assert rule["rule"].split(":")[0] in plan.rules
    if plan.kind == "checkpoint":
        beside = len(b"{}") if any(name == "tokenizer.json" for _, name in plan.copies) else 0
        assert plan.bounds.write_bytes == beside + sum(spec.nbytes for file in plan.files for spec in file.tensors)


def test_a_document_of_another_kind_is_malformed(files):
    """Another schema, missing fields, fields of another version: never a KeyError."""
    document = PLANS["merge"](files).to_json()
    for broken in (
        {},
        {"schema": "loratools/plan/2"},
        {"schema": SCHEMA},
        {**document, "units": [{"operation": "copy"}]},
        {**document, "bounds": {"read_bytes": 1}},
        {**document, "new_field": 1},
        {key: value for key, value in document.items() if key != "sources"},
    ):
        with pytest.raises(MalformedError):
            Plan.from_json(broken)


@pytest.mark.parametrize("name", PLANS)
def test_planning_twice_gives_the_same_plan(files, name):
    """Deterministic, and independent of the number of threads but for the memory."""
    assert PLANS[name](files, threads=2) == PLANS[name](files, threads=2)
    one, four = PLANS[name](files, threads=1), PLANS[name](files, threads=4)
    assert one.units == four.units
    assert one.bounds.peak_bytes <= four.bounds.peak_bytes

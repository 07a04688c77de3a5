"""Law 1: `merge` then `unmerge` gives the base back bit for bit."""

import pytest
import torch

from loratools.checkpoints import owner
from loratools.errors import MismatchError, UnsupportedError
from loratools.files import load_adapter
from loratools.verbs.merge import merge
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.laws.kinds import EVERY_KIND
from tests.laws.worlds import DTYPES, KINDS, llama_tensors, world, write_base

WEIGHTS = {1: None, 3: [0.7, -1.5, 2.0]}


@pytest.mark.parametrize(
    ("sharded", "adapters"),
    [
        (False, 1),
        (True, 3),
        pytest.param(True, 1, marks=pytest.mark.slow),
        pytest.param(False, 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back_bit_for_bit(tmp_path, unchanged, kind, dtype, sharded, adapters):
    """With --base, and from the receipt alone, every tensor has its sha256 again and every file its name and order,
    whether the adapters are named or not; what the merge did not touch it copied byte for byte."""
    made = world(tmp_path, kind, dtype, sharded=sharded, adapters=adapters)
    unchanged(made.base, *made.adapters)
    merge(made.base, made.adapters, tmp_path / "merged", weights=WEIGHTS[adapters])
    before, merged = models.tensor_hashes(made.base), models.tensor_hashes(tmp_path / "merged")
    differing = {name for name in before if merged[name] != before[name]}
    assert differing == made.touched
    based, named = {"base": made.base}, {"adapters": made.adapters}
    for name, options in {"named": based | named, "all": based, "receipt": {}, "receipt-named": named}.items():
        report = unmerge(tmp_path / "merged", tmp_path / name, **options)
        assert report.method == ("base" if "base" in options else "receipt")
        assert models.tensor_hashes(tmp_path / name) == before
        files = sorted(path.name for path in made.base.glob("*.safetensors"))
        assert sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) == files
        for file in files:
            assert models.header_names(tmp_path / name / file) == models.header_names(made.base / file)
        for companion in ("config.json", "tokenizer.json"):
            assert (tmp_path / name / companion).read_bytes() == (made.base / companion).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_the_base_comes_back_whatever_the_kind(tmp_path, unchanged, name, dtype):
    """Of every kind of update: the merge changes each tensor that it is for and no other, and --base brings all of them
    back, as does the receipt, whether the adapters are named or not."""
    kind = EVERY_KIND[name]
    base = kind.write_base(tmp_path / "base", dtype)
    adapters = [kind.write(tmp_path / f"adapter{seed}", seed) for seed in range(1, 3 if kind.twice else 2)]
    unchanged(base, *adapters)
    merge(base, adapters, tmp_path / "merged", weights=[0.7, -1.5] if kind.twice else None)
    before, merged = models.tensor_hashes(base), models.tensor_hashes(tmp_path / "merged")
    touched = {name for name in before if merged[name] != before[name]}
    assert {owner(name)[0] for name in touched} == {module_of(path, base) for path in kind.adapter()}
    for place, named in {"named": {"adapters": adapters}, "all": {}}.items():
        assert unmerge(tmp_path / "merged", tmp_path / place, base=base, **named).method == "base"
        assert models.tensor_hashes(tmp_path / place) == before
        assert unmerge(tmp_path / "merged", tmp_path / f"{place}-receipt", **named).method == "receipt"
        assert models.tensor_hashes(tmp_path / f"{place}-receipt") == before


def module_of(path, base):
    """The module that a path of an adapter is about; an expert's path is that of a parameter."""
    names = models.tensor_hashes(base)
    return owner(path)[0] if path in names else path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "tied-as-one"])
def test_subtraction_is_within_its_bound(tmp_path, kind, dtype):
    """Without the base ΔW is subtracted: every entry is within the reported bound of what was there, and the report
    does not call it exact."""
    made = world(tmp_path, kind, dtype, adapters=3)
    merge(made.base, made.adapters, tmp_path / "merged", weights=WEIGHTS[3], receipt="none")
    report = unmerge(tmp_path / "merged", tmp_path / "back", adapters=made.adapters)
    assert report.method == "subtraction"
    before, after = models.tensors_of(made.base), models.tensors_of(tmp_path / "back")
    bounds = {module["name"]: module["bound"] for module in report.modules}
    assert set(bounds) == made.touched
    for name, tensor in before.items():
        distance = float((after[name].double() - tensor.double()).abs().max()) if tensor.numel() else 0.0
        assert distance <= bounds.get(name, 0.0), name
    assert report.totals["bound"] == max(bounds.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_subtraction_of_every_kind(tmp_path, name, dtype):
    """Within the reported bound of what was there, or refused where the change depends on it; without a report of ours,
    kinds that are no sums of products are refused too."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", dtype), kind.write(tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "merged", weights=[0.7] if kind.twice else None, receipt="none")
    updates = load_adapter(adapter, base=base).values()
    whole = any(update.gives_whole for update in updates)
    if whole or any(update.depends_on_base for update in updates):
        with pytest.raises(UnsupportedError, match="--base"):
            unmerge(tmp_path / "merged", tmp_path / "back", adapters=[adapter])
        return
    report = unmerge(tmp_path / "merged", tmp_path / "back", adapters=[adapter])
    before, after = models.tensors_of(base), models.tensors_of(tmp_path / "back")
    bounds = {module["name"]: module["bound"] for module in report.modules}
    assert bounds
    assert report.totals["changed"] == len(bounds)
    for key, tensor in before.items():
        distance = float((after[key].double() - tensor.double()).abs().max()) if tensor.numel() else 0.0
        assert distance <= bounds.get(key, 0.0), key
    (tmp_path / "merged" / "loratools.json").unlink()
    if not all(update.terms or not update.changes_weight or update.kind == "experts" for update in updates):
        with pytest.raises(UnsupportedError, match="--base"):
            unmerge(tmp_path / "merged", tmp_path / "other", adapters=[adapter])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recast_comes_back_with_the_base(tmp_path, dtype):
    """A merge into another dtype loses bits; the base still brings them back."""
    made = world(tmp_path, "linear", dtype, sharded=True)
    other = "fp16" if dtype == "bf16" else "bf16"
    merge(made.base, made.adapters, tmp_path / "merged", dtype=other)
    unmerge(tmp_path / "merged", tmp_path / "back", base=made.base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(made.base)


def test_another_base_is_refused(tmp_path):
    """A base of the same shapes that was not merged into: refused, nothing written."""
    made = world(tmp_path, "linear", "bf16")
    write_base(tmp_path / "other", llama_tensors("bf16", seed=5), models.config_of(made.base, "config.json"))
    merge(made.base, made.adapters, tmp_path / "merged")
    (tmp_path / "merged" / "loratools.json").rename(tmp_path / "report")
    with pytest.raises(MismatchError):
        unmerge(tmp_path / "merged", tmp_path / "back", base=tmp_path / "other", adapters=made.adapters)
    (tmp_path / "report").rename(tmp_path / "merged" / "loratools.json")
    with pytest.raises(MismatchError):
        unmerge(tmp_path / "merged", tmp_path / "back", base=tmp_path / "other")
    assert not (tmp_path / "back").exists()


def test_the_bound_is_not_idle(tmp_path):
    """In bf16 subtraction does lose bits, or the law would be about nothing."""
    made = world(tmp_path, "linear", "bf16")
    merge(made.base, made.adapters, tmp_path / "merged", receipt="none")
    unmerge(tmp_path / "merged", tmp_path / "back", adapters=made.adapters)
    before, after = models.tensors_of(made.base), models.tensors_of(tmp_path / "back")
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())

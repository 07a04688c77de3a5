"""Law 6: every tensor of every input is used, copied byte for byte, or named as left out with the reason."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from loratools.checkpoints import owner
from loratools.cli.main import main
from loratools.errors import InputDataError, MismatchError, UndecidedError
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.stack import stack
from tests import models
from tests.laws.kinds import EVERY_KIND
from tests.laws.worlds import KINDS, P, low_rank, world


def changed_copy(adapter, target, key):
    """The adapter with one tensor changed."""
    tensors = {name: tensor + 0.5 if name == key else tensor for name, tensor in models.factors_of(adapter).items()}
    return models.write_adapter(target, tensors, models.config_of(adapter))


@pytest.mark.parametrize("kind", KINDS)
def test_no_adapter_tensor_is_ignored(tmp_path, kind):
    """Whatever single tensor of an adapter is changed, the merged checkpoint is another, or the merge is refused."""
    made = world(tmp_path, kind, "fp32")
    merge(made.base, made.adapters, tmp_path / "merged")
    before = models.tensor_hashes(tmp_path / "merged")
    for index, key in enumerate(models.factors_of(made.adapters[0])):
        other = changed_copy(made.adapters[0], tmp_path / f"other{index}", key)
        if kind == "tied-as-one":  # the two halves must agree
            with pytest.raises(MismatchError):
                merge(made.base, [other], tmp_path / f"merged{index}")
            continue
        merge(made.base, [other], tmp_path / f"merged{index}")
        assert models.tensor_hashes(tmp_path / f"merged{index}") != before, key


def files_of(adapter):
    """Every tensors file of an adapter with its content."""
    return {file.name: load_file(file) for file in sorted(adapter.glob("*.safetensors"))}


def rewritten(adapter, target, files):
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, target)
    for name, tensors in files.items():
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, target / name,
                  metadata={"format": "pt"})  # fmt: skip
    return target


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_no_tensor_of_any_kind_is_ignored(tmp_path, name, dtype):
    """Whatever single tensor of an adapter of any kind is changed, the merged checkpoint is another."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", dtype), kind.write(tmp_path / "adapter", dtype=dtype)
    merge(base, [adapter], tmp_path / "merged")
    before = models.tensor_hashes(tmp_path / "merged")
    files = files_of(adapter)
    assert files
    for number, (file, key) in enumerate((file, key) for file, tensors in files.items() for key in tensors):
        tensor = files[file][key]
        other = tensor + 0.5 if tensor.is_floating_point() else tensor.roll(1, -1)
        changed = rewritten(adapter, tmp_path / f"other{number}", {**files, file: {**files[file], key: other}})
        merge(base, [changed], tmp_path / f"merged{number}")
        assert models.tensor_hashes(tmp_path / f"merged{number}") != before, key


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_tensor_of_any_kind_without_a_module_is_refused(tmp_path, name):
    """The same tensors once more, for a module that the base does not have: exit 65 and its name, nothing written."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", "fp32"), kind.write(tmp_path / "adapter")
    files = files_of(adapter)
    path = next(iter(kind.adapter()))
    stem = owner(path)[0] if path in models.tensor_hashes(base) else path
    extra = {
        file: {key.replace(stem, f"elsewhere.{stem}"): tensor for key, tensor in tensors.items() if stem in key}
        for file, tensors in files.items()
    }
    assert any(extra.values())
    other = rewritten(adapter, tmp_path / "other", {file: {**files[file], **extra[file]} for file in files})
    answer = CliRunner().invoke(main, ["merge", str(base), str(other), "-o", str(tmp_path / "merged")])
    assert answer.exit_code == 65, answer.output
    assert "elsewhere" in answer.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_half_an_update_of_any_kind_is_refused_or_another(tmp_path, name):
    """Without any one of its tensors an adapter is refused as bad input, or it merges to another checkpoint: nothing
    takes the place of what is missing."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", "fp32"), kind.write(tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "merged")
    before, files = models.tensor_hashes(tmp_path / "merged"), files_of(adapter)
    for number, (file, key) in enumerate((file, key) for file, tensors in files.items() for key in tensors):
        less = {**files, file: {each: tensor for each, tensor in files[file].items() if each != key}}
        if not less[file]:
            continue
        other = rewritten(adapter, tmp_path / f"other{number}", less)
        try:
            merge(base, [other], tmp_path / f"merged{number}")
        except (InputDataError, UndecidedError):
            continue
        assert models.tensor_hashes(tmp_path / f"merged{number}") != before, key


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "whole"])
def test_no_adapter_tensor_is_ignored_by_stack(tmp_path, kind):
    """The same for stack."""
    made = world(tmp_path, kind, "fp32", adapters=2)
    stack(made.adapters, tmp_path / "sum")
    before = models.tensor_hashes(tmp_path / "sum", "adapter_model")
    for index, key in enumerate(models.factors_of(made.adapters[0])):
        other = changed_copy(made.adapters[0], tmp_path / f"other{index}", key)
        stack([other, made.adapters[1]], tmp_path / f"sum{index}")
        assert models.tensor_hashes(tmp_path / f"sum{index}", "adapter_model") != before, key


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_base_is_in_the_merge(tmp_path, kind):
    """Merged or copied, with the report's counts adding up."""
    made = world(tmp_path, kind, "bf16", sharded=True)
    report = merge(made.base, made.adapters, tmp_path / "merged")
    base, merged = models.tensor_hashes(made.base), models.tensor_hashes(tmp_path / "merged")
    assert set(base) <= set(merged)
    assert {module["base"] for module in report.modules} >= made.touched
    assert sum(report.tensors.values()) == len(merged) == report.totals["tensors"]


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        ("a module that is not there", low_rank("model.layers.7.self_attn.q_proj", (24, 24), 3, 1)),
        ("a parameter of a module that is not there", {f"{P}model.extra.bias": torch.ones(4)}),
        ("a parameter that the module does not have", {f"{P}model.layers.0.mlp.up_proj.bias": torch.ones(32)}),
        ("a shape that does not fit", low_rank("model.layers.0.mlp.up_proj", (31, 24), 3, 1)),
        ("half an update", {f"{P}model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(3, 24)}),
        ("a key of no meaning", {"something.else": torch.ones(3)}),
    ],
)
def test_an_adapter_tensor_without_a_place_is_refused(tmp_path, unchanged, extra, keys):
    """Never silently dropped: bad input data, by name, and nothing is written."""
    made = world(tmp_path, "linear", "fp32")
    other = models.write_adapter(
        tmp_path / "other", models.factors_of(made.adapters[0]) | keys, models.config_of(made.adapters[0])
    )
    unchanged(made.base, other)
    with pytest.raises(InputDataError) as error:
        merge(made.base, [other], tmp_path / "merged")
    name = next(iter(keys)).removeprefix(P)
    assert name.split(".lora_")[0].removesuffix(".bias") in str(error.value), extra
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("only_low_rank", [False, True])
@pytest.mark.parametrize("exclude", [(), ("self_attn.*",)])
def test_extract_accounts_for_both_sides(tmp_path, only_low_rank, exclude):
    """Factored, stored whole, identical, or left out: each tensor of either side is exactly one of them."""
    made = world(tmp_path, "linear", "fp32")
    before = models.tensors_of(made.base)
    tuned = {name: tensor + torch.randn_like(tensor) if tensor.is_floating_point() and "layers.0" in name else tensor
             for name, tensor in before.items() if name != "model.steps"}  # fmt: skip
    tuned["model.extra.weight"] = torch.ones(5, 3)
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(models.config_of(made.base, "config.json")))
    report = extract(
        made.base, tmp_path / "tuned", tmp_path / "out", rank=3, only_low_rank=only_low_rank, exclude=exclude
    )
    factored = {f"{module['name']}.weight" for module in report.modules}
    whole, left = set(report.whole), set(report.left_out)
    identical = {name for name in tuned if name in before and torch.equal(before[name], tuned[name])}
    assert not factored & whole
    assert not (factored | whole) & left
    assert not (factored | whole) & identical
    assert factored | whole | left | identical == set(before) | set(tuned)
    assert report.left_out["model.steps"] == "only the base has it"
    assert all(report.left_out.values())
    counts = report.totals["tensors"]
    assert counts["low-rank"] == len(factored)
    assert counts["whole"] == len(whole)
    stored = models.factors_of(tmp_path / "out")
    assert len(stored) == 2 * len(factored) + len(whole)


def test_another_architecture_is_no_pair(tmp_path):
    """Two checkpoints that share no shape are not diffed tensor by tensor into nonsense."""
    one = world(tmp_path / "one", "linear", "fp32")
    two = world(tmp_path / "two", "conv1d", "fp32")
    with pytest.raises(MismatchError):
        extract(one.base, two.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()

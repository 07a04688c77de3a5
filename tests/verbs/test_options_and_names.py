"""Options that change nothing, names that mean nothing elsewhere, refusals that name everything they are about."""

import json

import pytest
import torch

from loratools.adapters import Adapter, LowRank
from loratools.adapters.experts import Stacked
from loratools.errors import MalformedError, UnsupportedError, UsageError
from loratools.files import load_adapter, save
from loratools.tensors import in_memory
from loratools.verbs.extract import extract, plan_extract
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.rescale import plan_rescale, rescale
from loratools.verbs.stack import plan_stack, stack
from tests.tiny import (
    PREFIX,
    SHAPES,
    Q,
    factors,
    llama,
    lora_tensors,
    normal,
    report_of,
    state,
    write_adapter,
    write_checkpoint,
)

LOCAL = [
    "/home/me/base",
    "./base",
    "../base",
    "~/base",
    "C:\\models\\base",
    "a/b/c",
    "file:base",
    "models\\base",
    "a/..",
]


def base_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def everything(directory):
    return "".join(path.read_text("latin-1") for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("local", LOCAL)
def test_no_local_path_is_repeated(tmp_path, local):
    a = write_adapter(tmp_path / "a", base_model_name_or_path=local)
    for report in (rescale(a, tmp_path / "scaled", by=2), stack([a, a], tmp_path / "stacked")):
        assert sum("names its base by a path" in note for note in report.notes) >= 1
        assert not any(local in note for note in report.notes)
    save(load_adapter(a), tmp_path / "saved")
    for name in ("scaled", "stacked", "saved"):
        assert base_of(tmp_path / name) is None
        assert json.dumps(local).strip('"') not in everything(tmp_path / name)


@pytest.mark.parametrize("name", ["gpt2", "org/base", "org/base-7B_v1.0"])
def test_a_name_on_the_hub_is(tmp_path, name):
    a = write_adapter(tmp_path / "a", base_model_name_or_path=name)
    report = rescale(a, tmp_path / "out", by=2)
    assert base_of(tmp_path / "out") == name
    assert not any("path" in note for note in report.notes)


def test_the_first_name_on_the_hub_is_taken(tmp_path):
    a = write_adapter(tmp_path / "a", base_model_name_or_path="/data/base")
    b = write_adapter(tmp_path / "b", base_model_name_or_path="org/base")
    stack([a, b], tmp_path / "out")
    assert base_of(tmp_path / "out") == "org/base"


def dora(directory):
    magnitudes = {f"{PREFIX}{path}.lora_magnitude_vector": normal(9, out) for path, (out, _) in SHAPES.items()}
    return write_adapter(directory, lora_tensors(factors()) | magnitudes, use_dora=True)


@pytest.mark.parametrize("how", [{"bake": True}, {"restate_alpha": 3.0}])
def test_an_alpha_that_cannot_be_restated(tmp_path, how):
    """Before anything is written, all modules at once, with a next step that works."""
    a = dora(tmp_path / "a")
    before = state(tmp_path)
    for call in (plan_rescale, rescale):
        with pytest.raises(UnsupportedError, match="--exclude") as caught:
            call(a, tmp_path / "out", **how)
        assert all(path in str(caught.value) for path in SHAPES)
    assert state(tmp_path) == before
    experts = "model.layers.0.mlp.experts.down_proj"
    mixed = Adapter(
        {
            Q: LowRank(lora_A=made(1, 2, 16), lora_B=made(2, 16, 2), alpha=5.0),
            experts: Stacked(lora_A=made(3, 6, 24), lora_B=made(4, 16, 6), experts=3, alpha=5.0),
        }
    )
    with pytest.raises(UnsupportedError) as caught:
        rescale(mixed, tmp_path / "out", **how)
    assert caught.value.where == {"module": experts}
    rescale(mixed, tmp_path / "out", **how, exclude=["experts.down_proj"])
    after = load_adapter(tmp_path / "out")
    assert after[Q].alpha == how.get("restate_alpha", 2)
    expected = mixed[Q].delta_weight()
    assert float((after[Q].delta_weight() - expected).norm()) <= 1e-6 * float(expected.norm())
    assert after[experts].lora_B.read() == mixed[experts].lora_B.read()


def made(seed, *shape):
    return in_memory(f"t{seed}", normal(seed, *shape))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_all_modules_that_are_given_whole_are_named(tmp_path, count):
    names = [f"heads.{at}.score" for at in range(count)]
    whole = {f"{PREFIX}{name}.weight": normal(at, 3, 16) for at, name in enumerate(names)}
    a = write_adapter(tmp_path / "a", lora_tensors(factors()) | whole, modules_to_save=names)
    for call in (
        lambda: plan_rescale(a, tmp_path / "out", by=2),
        lambda: rescale(a, tmp_path / "out", by=2),
        lambda: plan_stack([a, a], tmp_path / "out"),
    ):
        with pytest.raises(UnsupportedError, match="replaced whole") as caught:
            call()
        said = str(caught.value)
        assert [name for name in names if name in said] == names[:5]
        assert ("and 3 more" in said) == (count == 8)
        assert Q not in said
    rescale(a, tmp_path / "out", by=2, exclude=["score"])


def test_the_order_of_base_and_adapter(tmp_path):
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    for call in (plan_merge, merge):
        with pytest.raises(UsageError, match="loratools merge base a"):
            call(a, [base], tmp_path / "out")
        with pytest.raises(MalformedError, match="an adapter, not a checkpoint"):
            call(a, [a], tmp_path / "out")
    merge(base, iter([a]), tmp_path / "out")


@pytest.fixture
def pair(tmp_path):
    """q_proj has changed and nothing else."""
    tensors = llama()
    write_checkpoint(tmp_path / "base", tensors)
    changed = tensors | {f"{Q}.weight": tensors[f"{Q}.weight"] + normal(3, 16, 16, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path / "tuned", changed)
    return tmp_path / "base", tmp_path / "tuned"


def test_options_without_effect_are_named(tmp_path, pair):
    """`--max-rank` never caps an explicit `--rank`; what has not changed is not stored."""
    report = extract(*pair, tmp_path / "out", rank=4, max_rank=2, save_full=["*.down_proj", "*.q_proj"])
    said = report_of(tmp_path / "out")["notes"]
    assert list(report.notes) == said
    assert len([note for note in said if "--max-rank (2)" in note]) == 1
    assert [note for note in said if "--save-full" in note and "has not changed" in note] == [
        "--save-full *.down_proj matches only what has not changed: nothing is stored for it."
    ]
    assert report.whole == (f"{Q}.weight",)


def test_options_with_an_effect_are_not(tmp_path, pair):
    for number, options in enumerate(({"rank": 4}, {"energy": 0.5, "max_rank": 2}, {"rank": 2, "max_rank": 2})):
        report = extract(*pair, tmp_path / f"out{number}", **options)
        assert not any("--max-rank" in note or "--save-full" in note for note in report.notes)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "CPU", "", "cuda:0 "])
def test_a_device_that_does_not_exist(tmp_path, pair, device):
    """Before anything is read, in a dry run too."""
    for call in (plan_extract, extract):
        with pytest.raises(UsageError, match="auto, cpu, cuda, cuda:N or mps"):
            call(*pair, tmp_path / "out", device=device)

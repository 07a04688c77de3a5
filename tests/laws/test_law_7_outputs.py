"""Law 7: inputs never change; an output is whole, or what was there before, or not there."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import LoratoolsError, NonFiniteError, OutputExistsError
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.laws.worlds import KINDS, world


def damage(file, name, value=float("nan")):
    """One entry of one tensor made unusable."""
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def made(tmp_path, request):
    """A world, its merge, and the names in the directory before a verb runs."""
    found = world(tmp_path, getattr(request, "param", "linear"), "fp32", adapters=2)
    merge(found.base, found.adapters, tmp_path / "merged")
    merge(found.base, found.adapters, tmp_path / "bare", receipt="none")
    return found


def verbs(made, root):
    """Every verb that writes, as a call that takes the output."""
    return {
        "extract": lambda out, **how: extract(made.base, root / "merged", out, rank=2, **how),
        "merge": lambda out, **how: merge(made.base, made.adapters, out, **how),
        "unmerge": lambda out, **how: unmerge(root / "merged", out, base=made.base, **how),
        "receipt": lambda out, **how: unmerge(root / "merged", out, **how),
        "subtract": lambda out, **how: unmerge(root / "bare", out, adapters=made.adapters, **how),
        "stack": lambda out, **how: stack(made.adapters, out, **how),
        "rescale": lambda out, **how: rescale(made.adapters[0], out, by=2.0, **how),
    }


VERBS = ("extract", "merge", "unmerge", "receipt", "subtract", "stack", "rescale")


@pytest.mark.parametrize("made", [kind for kind in KINDS if kind not in {"whole", "tied"}], indirect=True)
@pytest.mark.parametrize("verb", VERBS)
def test_inputs_do_not_change_and_nothing_else_appears(made, tmp_path, unchanged, verb):
    """Every input has its bytes afterwards, and the output is all that is new beside it."""
    unchanged(made.base, *made.adapters, tmp_path / "merged")
    before = {path.name for path in tmp_path.iterdir()}
    verbs(made, tmp_path)[verb](tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
    assert not [path for path in (tmp_path / "out").iterdir() if "partial" in path.name or "scratch" in path.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_leaves_nothing(made, tmp_path, unchanged, verb, value):
    """A number that is none, found half-way through: an error that says where, no output, no sibling."""
    name = "model.layers.1.mlp.down_proj.weight"
    damage(made.base / "model.safetensors", name, value)
    for merged in ("merged", "bare"):
        (tmp_path / merged / "loratools.json").unlink()  # else it knows better than to subtract these adapters
        damage(tmp_path / merged / "model.safetensors", name, -1.0 if verb == "extract" else value)
    for adapter in made.adapters:
        damage(
            adapter / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight", value
        )
    unchanged(made.base, *made.adapters, tmp_path / "merged")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(LoratoolsError) as error:
        verbs(made, tmp_path)[verb](tmp_path / "out")
    if verb not in {"unmerge", "receipt"}:  # which do not know what to take out, or see that a tensor was changed
        assert isinstance(error.value, NonFiniteError)
        assert "down_proj" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("verb", VERBS)
def test_an_existing_output_keeps_its_bytes(made, tmp_path, verb):
    """Without --overwrite an output that exists is refused before any work; with it, a run that fails leaves the old
    bytes, and one that succeeds leaves the new ones only."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    call = verbs(made, tmp_path)[verb]
    with pytest.raises(OutputExistsError):
        call(out)
    assert (out / "mine.txt").read_text() == "mine"
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_overwriting(made, tmp_path):
    """--overwrite: a failure keeps the old output whole, a success replaces it whole."""
    out = tmp_path / "out"
    merge(made.base, made.adapters[:1], out)
    old = models.file_hashes(out)
    bad = models.write_adapter(
        tmp_path / "bad", models.factors_of(made.adapters[0]), models.config_of(made.adapters[0])
    )
    damage(bad / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(NonFiniteError):
        merge(made.base, [bad], out, overwrite=True)
    assert models.file_hashes(out) == old
    merge(made.base, made.adapters, out, overwrite=True)
    assert models.tensor_hashes(out) == models.tensor_hashes(tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("verb", VERBS)
def test_the_output_may_not_be_an_input(made, tmp_path, unchanged, verb):
    """Writing over an input is refused, even with --overwrite."""
    unchanged(made.base, *made.adapters, tmp_path / "merged")
    inputs = {"extract": made.base, "merge": made.base, "subtract": tmp_path / "bare"}
    inputs |= dict.fromkeys(("unmerge", "receipt"), tmp_path / "merged")
    with pytest.raises(LoratoolsError):
        verbs(made, tmp_path)[verb](inputs.get(verb, made.adapters[0]), overwrite=True)


def test_overflow_is_an_error_not_an_infinity(tmp_path):
    """A merge whose fp16 result would overflow says so and writes nothing."""
    made = world(tmp_path, "linear", "fp16")
    with pytest.raises(NonFiniteError, match="overflow"):
        merge(made.base, made.adapters, tmp_path / "out", weights=1e7)
    assert not (tmp_path / "out").exists()
    merge(made.base, made.adapters, tmp_path / "out", weights=1e7, dtype="bf16")
    assert all(torch.isfinite(tensor.float()).all() for tensor in models.tensors_of(tmp_path / "out").values())

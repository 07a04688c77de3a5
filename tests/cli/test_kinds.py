"""What people read about an adapter of every kind: true, and without a word that belongs to another kind."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from loratools.cli.main import main
from tests.laws.kinds import EVERY_KIND


def said(*arguments):
    """Exit code and everything that is printed."""
    answer = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return answer.exit_code, answer.output


@pytest.mark.parametrize("name", EVERY_KIND)
def test_inspect(tmp_path, name):
    """Parameters are the trained numbers of the file, shared ones once; a shape is the base's, as far as the update
    tells; nothing is called idle that is not; rows and whole parameters have their own lines."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", "fp32"), kind.write(tmp_path / "adapter")
    code, text = said("inspect", adapter, "--modules")
    assert code == 0, text
    assert "no tensor of the adapter is for it" not in text
    assert not re.search(r"rank +0\b", text)
    document = json.loads(said("inspect", adapter, "--json")[1])
    stored = [tensor for file in adapter.glob("*.safetensors") for tensor in load_file(file).values()]
    assert document["parameters"] == sum(tensor.numel() for tensor in stored if tensor.is_floating_point())
    shapes = {
        key: tuple(tensor.shape) for file in base.glob("*.safetensors") for key, tensor in load_file(file).items()
    }
    drawn = kind.adapter()
    for row in document["modules"]:
        update = drawn[row["name"]]
        if row["shape"] and update.changes_weight and not hasattr(update, "hada_t1") and row["kind"] != "lokr":
            wanted = shapes.get(f"{row['name']}.weight", shapes.get(row["name"]))
            assert tuple(row["shape"]) in {wanted, wanted[::-1]}, row
    assert ("\n  rows " in text) == any(update.patches or update.added_rows for update in drawn.values())
    assert ("\n  whole " in text) == any(update.replaced for update in drawn.values())


@pytest.mark.parametrize("name", EVERY_KIND)
def test_merge_rescale_stack(tmp_path, name):
    """A merge counts; a multiple or a sum has ranks only where there are any, and where it is refused the one sentence
    names the module, the kind and the way out."""
    kind = EVERY_KIND[name]
    base, adapter = kind.write_base(tmp_path / "base", "bf16"), kind.write(tmp_path / "adapter")
    assert "Merged 1 adapter into the base." in said("merge", base, adapter, "-o", tmp_path / "merged")[1]
    halves = kind.sums if kind.halves is None else kind.halves
    code, text = said("rescale", adapter, "--by", "0.5", "-o", tmp_path / "half")
    assert code == (0 if halves else 65), text
    ways = "-w" if code else "Rescaled 1 adapter"
    assert ways in text
    other = kind.write(tmp_path / "other", 2)
    code, text = said("stack", adapter, other, "--base", base, "-o", tmp_path / "sum")
    assert code == (0 if kind.sums else 65), text
    assert ("merge into the base" in text.lower()) if code else ("Stacked 2 adapters" in text)
    for page in (tmp_path / "half", tmp_path / "sum"):
        if page.exists():
            assert "rank 0" not in (page / "README.md").read_text()
    assert "ranks    0" not in text


def test_the_kernel_is_shown(tmp_path):
    """A convolution's ΔW has its kernel in the table, as the base's module has in its own."""
    kind = EVERY_KIND["conv"]
    base, adapter = kind.write_base(tmp_path / "base", "fp32"), kind.write(tmp_path / "adapter")
    for place in (base, adapter):
        text = said("inspect", place, "--modules")[1]
        assert re.search(r"^volume +conv +5 × 2 × 1 × 2 × 3 ", text, re.MULTILINE), text
        assert re.search(r"^line +conv +8 × 5 × 3 ", text, re.MULTILINE)
    assert re.search(r"plane +conv +6 × 4 × 2 × 3 ", said("graph", base)[1])


def test_a_card_counts_what_is_whole(tmp_path):
    """The extracted adapter's card says how many tensors are not low-rank."""
    from safetensors.torch import save_file

    for name, step in (("base", 0.0), ("tuned", 0.5)):
        (tmp_path / name).mkdir()
        tensors = {"lin.weight": torch.eye(4) + step, "norm.weight": torch.ones(4) + step}
        save_file(tensors, tmp_path / name / "model.safetensors")
    code, text = said("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out", "--rank", "2")
    assert code == 0, text
    assert "1 module, rank 1. Stored whole: 1 tensor." in (tmp_path / "out" / "README.md").read_text()

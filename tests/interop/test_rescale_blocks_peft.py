"""`rescale --blocks` and `--factor` on adapters that PEFT wrote for modules with names of diffusers; PEFT is judge."""

import pytest
import torch

from loratools.verbs.rescale import rescale
from tests import models

peft = pytest.importorskip("peft")


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = torch.nn.Linear(6, 8), torch.nn.Linear(6, 4)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attentions = torch.nn.ModuleList([Attention(), Attention()])
        self.resnets = torch.nn.ModuleList([torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 5, 3)})])


class UNet(torch.nn.Module):
    """The names of a U-Net, and nothing that runs."""

    def __init__(self):
        super().__init__()
        self.down_blocks = torch.nn.ModuleList([Block(), Block()])
        self.mid_block, self.up_blocks = Block(), torch.nn.ModuleList([Block(), Block()])
        self.time_embedding = torch.nn.ModuleDict({"linear_1": torch.nn.Linear(5, 7)})


def written(root):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_k", "conv1", "linear_1"],
                             rank_pattern={"to_k": 2}, init_lora_weights=False)  # fmt: skip
    with models.quiet():
        peft.get_peft_model(UNet(), config).save_pretrained(root)
    return root


def deltas(root):
    """PEFT's own ΔW of every module of an adapter on disk."""
    with models.quiet():
        model = peft.PeftModel.from_pretrained(UNet(), root)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def expected_weight(path):
    """26 numbers 1, 2, 3, … by the rules of diffusers' conversion, written out."""
    kind, *rest = path.split(".")
    if kind == "time_embedding":
        return 1
    if kind == "mid_block":
        return 14
    i, j = int(rest[0]), int(rest[2])
    return 3 * i + j + 3 if kind == "down_blocks" else 3 * i + j + 15


@pytest.mark.parametrize("factor", [None, "lora_A", "lora_B", "both"])
def test_peft_loads_every_block_with_its_weight(tmp_path, factor):
    source = written(tmp_path / "a")
    before = deltas(source)
    assert len(before) == 5 * 5 + 1
    rescale(source, tmp_path / "out", blocks=",".join(str(n + 1) for n in range(26)), factor=factor)
    after = deltas(tmp_path / "out")
    assert after.keys() == before.keys()
    for path, delta in before.items():
        wanted = delta * expected_weight(path)
        assert float((after[path] - wanted).norm()) <= 1e-6 * float(wanted.norm()), path


@pytest.mark.parametrize("how", [{"by": -0.7}, {"norm": 0.9}], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "both"])
def test_peft_loads_one_factor_multiplied(tmp_path, how, factor):
    source = written(tmp_path / "a")
    rescale(source, tmp_path / "out", **how, factor=factor)
    after = deltas(tmp_path / "out")
    for path, delta in deltas(source).items():
        size = float(delta.norm())
        wanted = delta * how.get("by", min(1.0, 0.9 / size))
        assert float((after[path] - wanted).norm()) <= 1e-6 * float(wanted.norm()), path
        assert "norm" not in how or float(after[path].norm()) <= 0.9 * (1 + 1e-6)

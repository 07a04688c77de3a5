"""Merges that PEFT made, in float32 arithmetic of its own, are known for what they are; others are not."""

import shutil

import pytest
import torch
from peft import BOFTConfig, HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, MissConfig, OFTConfig
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.engine.operations.differences import Difference
from loratools.errors import MismatchError
from tests.interop.kinds import Case

TARGETS = ["q", "v"]
KINDS = {
    "lora": LoraConfig(r=8, lora_alpha=13, target_modules=TARGETS),
    "dora": LoraConfig(r=8, lora_alpha=13, target_modules=TARGETS, use_dora=True),
    "loha": LoHaConfig(r=4, alpha=7, target_modules=TARGETS),
    "lokr": LoKrConfig(r=4, alpha=7, target_modules=TARGETS),
    "miss": MissConfig(r=4, target_modules=TARGETS, init_weights="bat"),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["v"]),
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "coft": OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, coft=True, block_share=True, eps=6e-5),
    "boft": BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x):
        return self.v(self.q(x))


def by_peft(case):
    """PEFT's merge as a checkpoint, without a report of ours."""
    folder = case.folder / "theirs"
    shutil.copytree(case.base, folder)
    save_file(case.by_peft(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_the_base_comes_back(tmp_path, name, dtype):
    """Bit for bit, whatever PEFT lost on the way."""
    case = Case(tmp_path, KINDS[name], dtype=dtype, net=Net)
    lt.unmerge(by_peft(case), tmp_path / "back", adapters=[case.adapter], base=case.base)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(
        torch.equal(tensor.view(torch.uint8), back[key].view(torch.uint8)) for key, tensor in case.before.items()
    )


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"coft"}))  # which changes next to nothing
def test_another_weight_is_told(tmp_path, name):
    """A merge with 1.001 of it is not that with 1; the error says how far it is off."""
    case = Case(tmp_path, KINDS[name], net=Net)
    lt.merge(case.base, [case.adapter], tmp_path / "ours", weights=[1.001])
    (tmp_path / "ours" / "loratools.json").unlink()
    with pytest.raises(MismatchError, match=r"entries differ, by up to \S+ where these change it by up to \S+\."):
        lt.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[case.adapter], base=case.base)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("foreign", "acts", "differing"), [(False, True, 6), (True, False, 6), (True, True, 0)])
def test_ours_is_held_to_the_last_place(foreign, acts, differing):
    """Where a report of ours says that we made the merge, what another tool's arithmetic may lose is a difference."""
    before = torch.ones(2, 3)
    expected = before + 0.1
    difference = Difference(foreign, acts)
    difference.see(before, expected, expected + 2e-6)
    assert difference.entries == differing


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_a_receipt_afterwards_brings_the_base_back_without_it(tmp_path, name, dtype):
    """For what PEFT merged, while the base is at hand; then base and adapter go, and every bit is there again."""
    case = Case(tmp_path, KINDS[name], dtype=dtype, net=Net)
    merged = by_peft(case)
    report = lt.merge(case.base, [case.adapter], merged / "loratools.receipt", receipt_for=merged)
    assert report.tensors["recorded"] > 0
    shutil.rmtree(case.base)
    shutil.rmtree(case.adapter)
    assert lt.unmerge(merged, tmp_path / "back").method == "receipt"
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(
        torch.equal(tensor.view(torch.uint8), back[key].view(torch.uint8)) for key, tensor in case.before.items()
    )

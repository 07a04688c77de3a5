"""`verify` on PEFT's own merges of kinds that are no plain LoRA: whole ones hold, at another weight they do not."""

import copy

import pytest
import torch

from loratools.verbs.verify import verify
from tests import models

TARGETS = ["q_proj", "up_proj"]
KINDS = {
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 6}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 6}),
    "ia3": ("IA3Config", {"feedforward_modules": ["up_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "hra": ("HRAConfig", {"r": 4}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "lora_alpha": 6, "total_step": 10}),
    "vera": ("VeraConfig", {"r": 4}),
    "miss": ("MissConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50}),
}


def trained_by_peft(base, directory, kind):
    """An adapter with noise on everything that is trained, saved by PEFT; what PEFT loads of it."""
    import peft

    name, fields = KINDS[kind]
    with models.quiet():
        model = peft.get_peft_model(models.load(base), getattr(peft, name)(target_modules=TARGETS, **fields))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_((0.03 * noise).to(parameter.dtype))
        model.save_pretrained(directory)
        return peft.PeftModel.from_pretrained(models.load(base), directory)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_by_peft_holds_and_half_of_it_does_not(bases, tmp_path, kind, dtype):
    base, adapter = bases("llama", dtype), tmp_path / "adapter"
    model = trained_by_peft(base, adapter, kind)
    with models.quiet():
        merged = models.save(copy.deepcopy(model).merge_and_unload(), tmp_path / "merged")
    report = verify(merged, base=base, adapters=[adapter])
    assert (report.answer, report.tensors) == ("holds", ())
    assert set(report.policies) <= {"one-rounding", "float32"}
    half = verify(merged, base=base, adapters=[adapter], weights=0.5)
    assert {row["verdict"] for row in half.modules} <= {"scale", "twice", "other"}
    assert half.answer == "does not hold"

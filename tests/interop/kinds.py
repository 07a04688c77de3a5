"""One way to hold a kind of adapter against PEFT: PEFT writes it, we read, merge, take out and write; PEFT judges."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from tests import models
from tests.interop.judge import load_cleanly

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Net(torch.nn.Module):
    """Every layer that PEFT's tuners wrap, none of them square; it is never run."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = torch.nn.Embedding(23, 12)
        self.block = torch.nn.Module()
        self.block.q = torch.nn.Linear(12, 18)
        self.block.k = torch.nn.Linear(18, 12, bias=False)
        self.block.turned = Conv1D(15, 12)
        self.conv1 = torch.nn.Conv1d(4, 6, 3)
        self.conv2 = torch.nn.Conv2d(6, 10, (3, 2))
        self.point = torch.nn.Conv2d(10, 4, 1)
        self.conv3 = torch.nn.Conv3d(2, 4, (1, 1, 3))
        self.attn = torch.nn.MultiheadAttention(12, 3)

    def forward(self, x):
        return x


class Case:
    """A base and an adapter of one kind, both on disk, and the PeftModel that the adapter was saved from."""

    def __init__(self, folder, config, *, dtype="fp32", net=Net, size=0.3, seed=3):
        from peft import get_peft_model

        torch.manual_seed(seed)
        self.folder, self.net = Path(folder), net().to(DTYPES[dtype])
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        self.before = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.base, self.adapter = self.folder / "base", self.folder / "adapter"
        self.base.mkdir(parents=True)
        save_file(self.before, self.base / "model.safetensors", metadata={"format": "pt"})
        with models.quiet():
            self.model = get_peft_model(copy.deepcopy(self.net), copy.deepcopy(config))
            randomise(self.model, size)
            self.model.save_pretrained(self.adapter, save_embedding_layers=False)

    @property
    def loaded(self):
        """The adapter as we read it."""
        return lt.load_adapter(self.adapter)

    @property
    def config(self):
        """The configuration that PEFT saved."""
        return json.loads((self.adapter / "adapter_config.json").read_text())

    def merged(self, *more, weights=None, name="merged"):
        """What our merge makes of the base."""
        lt.merge(self.base, [self.adapter, *more], self.folder / name, weights=weights)
        return load_file(self.folder / name / "model.safetensors")

    def by_peft(self):
        """What PEFT's merge makes of it."""
        with models.quiet():
            return copy.deepcopy(self.model).merge_and_unload().state_dict()

    def require_way_back(self, name="merged"):
        """`unmerge --base` gives every byte back."""
        lt.unmerge(self.folder / name, self.folder / f"{name}-back", adapters=[self.adapter], base=self.base)
        found = load_file(self.folder / f"{name}-back" / "model.safetensors")
        assert found.keys() == self.before.keys()
        for key, tensor in self.before.items():
            assert torch.equal(tensor.view(torch.uint8), found[key].view(torch.uint8)), key

    def require_written_back(self, *, expected=()):
        """What we write of it holds the same tensors, and PEFT loads it without a word."""
        lt.save(self.loaded, self.folder / "written")
        places = self.adapter, self.folder / "written"
        before, after = (load_file(each / "adapter_model.safetensors") for each in places)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), key
        model = load_cleanly(copy.deepcopy(self.net), self.folder / "written", expected=expected)
        ours = {name: each for name, each in model.state_dict().items() if "lora_" in name or "trainable" in name}
        theirs = self.model.state_dict()
        assert ours.keys() <= theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
        return model


def randomise(model, size):
    """Every trained parameter at random, those of adapters small."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # AdaLoRA's counter of ranks is no weight
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.copy_(parameter * (1 + 0.3 * noise.to(parameter.dtype)))
                else:
                    parameter.copy_(size * noise)


def require_rounded(found, exact, base, *, ulps=1.0):
    """`found` is `exact` (float64) rounded once: within `ulps` units in the last place of the largest of all three."""
    largest = torch.maximum(torch.maximum(found.double().abs(), exact.abs()), base.double().abs())
    step = lt.linalg.ulp(largest.to(found.dtype)).double()
    off = ((found.double() - exact).abs() / step).max() if found.numel() else torch.zeros(())
    assert off <= ulps, f"{float(off)} ulp"


def config(targets, **options):
    """A configuration whose alpha is not its r."""
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": list(targets), "r": 4, "lora_alpha": 7, **options})


def rewrite(case, change):
    """Replace the stored tensors by what `change` makes of them."""
    file = case.adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def set_base(case, key, tensor):
    """Put another tensor into the base."""
    case.before[key] = tensor
    save_file(case.before, case.base / "model.safetensors", metadata={"format": "pt"})

"""Adapters written by stock PEFT, and what it makes of them: the judges of `merge`."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import models


def write_by_peft(base, directory, *, seed=1, factors="fp32", size=2e-4, embeddings=False, name="default", **config):
    """Wrap the base at `base`, set every factor and every trained parameter at random, let PEFT save it.

    With the default size ΔW is some 5 % of W, as after fine-tuning.
    """
    from peft import LoraConfig, get_peft_model

    with models.quiet():
        model = get_peft_model(models.load(base), LoraConfig(**config), adapter_name=name)
        randomise(model, seed=seed, size=size)
        model.save_pretrained(directory, save_embedding_layers=embeddings)
    directory = Path(directory) if name == "default" else Path(directory) / name
    recast(directory / "adapter_model.safetensors", factors)
    return directory


def randomise(model, *, seed, size):
    """Random factors (B too, which PEFT starts at zero), and noise on whatever else is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_" in name:
                parameter.copy_(noise * size**0.5)
            elif parameter.requires_grad:
                parameter.add_((noise * 0.05).to(parameter.dtype))


def recast(file, dtype):
    """Store the factors in another dtype, as trainers in 16 bits do."""
    if dtype != "fp32":
        tensors = {name: tensor.to(models.DTYPES[dtype]) if "lora_" in name else tensor
                   for name, tensor in load_file(file).items()}  # fmt: skip
        save_file(tensors, file, metadata={"format": "pt"})


def unmerged(base, *adapters, weights=None):
    """The base under all of these adapters, by stock PEFT; a weight multiplies the scaling of its adapter."""
    from peft import PeftModel

    weights = [1.0] * len(adapters) if weights is None else weights
    names = [f"a{index}" for index in range(len(adapters))]
    with models.quiet():
        model = PeftModel.from_pretrained(models.load(base), adapters[0], adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(adapter, adapter_name=name)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    for layer in layers_of(model).values():
        for name, weight in zip(names, weights, strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= weight
    return model.eval()


def merged_by_peft(model):
    """PEFT's default merge of a copy of `model`, as a state dict."""
    with models.quiet():
        return copy.deepcopy(model).merge_and_unload().state_dict()


def layers_of(model):
    """Module path → LoRA layer of a PeftModel."""
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix("base_model.model."): module for name, module in model.named_modules()
            if isinstance(module, LoraLayer)}  # fmt: skip


def products(layer, *, absolute=False):
    """Σ s·B·A of all active adapters in float64, the way round that the weight is stored; or Σ |s|·|B||A|."""
    total = 0
    embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
    for name in layer.active_adapters:
        if name not in layer.scaling:
            continue
        if embedding:
            down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        down, up, scale = down.detach().double(), up.detach().double(), layer.scaling[name]
        total = total + (abs(scale) * (up.abs() @ down.abs()) if absolute else scale * (up @ down))
    straight = isinstance(layer.get_base_layer(), torch.nn.Linear)
    return total if straight else total.T


def size_of(weight, ours, layer):
    """m of law 2: the largest of |W|, |W'| and |s|·(|B||A|), entry by entry, in the weight's dtype's ulps."""
    m = torch.maximum(weight.double().abs(), ours.double().abs())
    return models.ulp(torch.maximum(m, products(layer, absolute=True)), weight.dtype)


def _rank(layer):
    return sum(module.weight.shape[0] for module in layer.lora_A.values())


class Count:
    """How many entries of how many differ."""

    def __init__(self):
        self.differing = self.entries = 0

    def add(self, one, other):
        self.differing += int((one != other).sum())
        self.entries += one.numel()

    @property
    def share(self):
        return self.differing / self.entries


def assert_law_2(merged, base, model):
    """Every tensor of the checkpoint `merged` against PEFT's `model` over `base`, by law 2's own numbers.

    Linear and Conv1D: against PEFT's merge, 16 bits differ on at most 1e-4 of all entries (and what chance adds to
    so few: three standard deviations) and by at most one ulp of m, 32 bits by at most two. PEFT's own fp32 product
    of rank r may be r ulp of m off, and is beyond two in about one entry of 10^4: those are allowed it.
    Embedding, where PEFT rounds twice: against float64 rounded once, one ulp of m. All else: PEFT's bits. And
    whatever PEFT does, ours is one rounding away from the exact sum.
    """
    ours, before, theirs = models.tensors_of(merged), models.tensors_of(base), merged_by_peft(model)
    assert_one_rounding(merged, model)
    layers, count = layers_of(model), Count()
    assert set(ours) <= set(theirs)
    for name, tensor in ours.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or name.endswith(".bias"):
            assert torch.equal(tensor, theirs[name]), name
            continue
        embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
        weight = layer.get_base_layer().weight.detach()  # the adapter may have replaced it
        assert tensor.dtype == before.get(name, tensor).dtype
        exact = weight.double() + products(layer)
        step = size_of(weight, tensor, layer)
        judged = exact.to(tensor.dtype) if embedding else theirs[name]
        steps = (tensor.double() - judged.double()).abs() / step
        if tensor.dtype == torch.float32 and not embedding:
            assert int((steps > 2).sum()) <= 1e-3 * steps.numel(), name
            assert steps.max() <= max(2, _rank(layer)), name
        else:
            assert steps.max() <= 1, name
        if not embedding and tensor.dtype != torch.float32:
            count.add(tensor, theirs[name])
    expected = 1e-4 * count.entries
    assert count.differing <= expected + 3 * expected**0.5, (count.differing, count.entries)
    return count


def assert_one_rounding(merged, model):
    """Every merged matrix is `round(W + Σ w ΔW)`: half a step of the result, and 2e-7 of ΔW's size, from the exact."""
    ours = models.tensors_of(merged)
    for path, layer in layers_of(model).items():
        tensor, change = ours[f"{path}.weight"], products(layer)
        exact = layer.get_base_layer().weight.detach().double() + change
        slack = 2e-7 * products(layer, absolute=True)
        within = (tensor.double() - exact).abs() <= 0.5 * models.ulp(tensor, tensor.dtype) + slack
        assert bool(within.all()), path

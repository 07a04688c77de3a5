"""MiniLM trained on English: adapters by PEFT, which also merges them, at any size; and true full fine-tunes."""

import itertools
from pathlib import Path

import torch

from tests import activations, models

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stored(source, target, dtype):
    """A checkpoint in another dtype."""
    return models.save(models.load(source).to(dtype), target)


def train(model, directory, *, steps, rate, optimizer="AdamW", seed=0, sentences=activations.SEEN):
    """Train what requires a gradient: each sentence like itself under another dropout, and unlike the others."""
    torch.manual_seed(seed)
    trained = [each for each in model.parameters() if each.requires_grad]
    stepper = getattr(torch.optim, optimizer)(trained, lr=rate)
    model.train()
    for tokens in itertools.islice(itertools.cycle(list(activations.batches(directory, sentences))), steps):
        first, second = (activations.embedded(model, tokens) for _ in range(2))
        loss = torch.nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))
        loss = loss + 0.01 * model(**tokens).pooler_output.square().mean()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    return model.eval()


def _begun(base, seed, config):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with models.quiet():
        return get_peft_model(models.load(base).float(), LoraConfig(**config))


def adapt(base, *, steps=40, rate=2e-3, optimizer="AdamW", seed=0, sentences=activations.SEEN, **config):
    """A PEFT model with an adapter of this configuration, trained in float32."""
    model = _begun(base, seed, config)
    return train(model, base, steps=steps, rate=rate, optimizer=optimizer, seed=seed, sentences=sentences)


def drawn(base, decay, *, seed=0, **config):
    """A PEFT model whose ΔW has random directions and the singular values 1, decay, decay², …"""
    model = _begun(base, seed, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in layers_of(model).values():
            up, down = each.lora_B["default"].weight, each.lora_A["default"].weight
            left, right = (
                torch.linalg.qr(torch.randn(side, len(down), generator=generator))[0]
                for side in (len(up), down.shape[1])
            )
            up.copy_(left * decay ** torch.arange(len(down)))
            down.copy_(right.T)
    return model


def layers_of(model):
    """Module path in the base → PEFT's layer."""
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {name: module for name, module in named.items() if hasattr(module, "get_delta_weight")}


def deltas(model):
    """Module path → ΔW in float64, from the factors."""
    return {
        name: each.scaling["default"]
        * (each.lora_B["default"].weight.detach().double() @ each.lora_A["default"].weight.detach().double())
        for name, each in layers_of(model).items()
    }


def rescale(model, size):
    """Scale every lora_B by one factor, so that ‖ΔW‖/‖W‖ over all adapted layers is `size`."""
    layers = layers_of(model)
    change = sum(float(each.square().sum()) for each in deltas(model).values())
    weight = sum(float(each.base_layer.weight.double().square().sum()) for each in layers.values())
    with torch.no_grad():
        for each in layers.values():
            each.lora_B["default"].weight.mul_(size * (weight / change) ** 0.5)


def merge(base, model, target):
    """Save the adapter, load it on `base` as it is stored, and let PEFT merge; the checkpoint."""
    from peft import PeftModel

    adapter = Path(target).with_suffix(".adapter")
    with models.quiet():
        model.save_pretrained(adapter, save_embedding_layers=False)
        merged = PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload()
    return models.save(merged, target)


def tune_fully(base, target, *, only_matrices=False, **how):
    """Every parameter, or every matrix of the layers, trained in float32 from `base`; saved in the dtype of `base`."""
    model = models.load(base)
    dtype = next(model.parameters()).dtype
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not only_matrices or (parameter.dim() == 2 and "embeddings" not in name))
    return models.save(train(model.float(), base, **{"steps": 20, "rate": 5e-5, **how}).to(dtype), target)

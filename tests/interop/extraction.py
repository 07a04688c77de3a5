"""What the tests of `extract` measure, from the files alone and with other means than ours."""

import dataclasses
from pathlib import Path

import torch

from tests import models

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base and a fine-tune of it, on disk and in memory."""

    family: str
    base: Path
    tuned: Path
    model: torch.nn.Module

    def fresh(self, **options):
        """The base, loaded anew: PEFT changes what it is given."""
        return models.load(self.base, **options)


def make_pair(directory, family, dtype="fp32", tuned_dtype=None, **how):
    """Build, disturb, save both."""
    base = models.build(family, dtype)
    tuned = models.tuned_from(base, **how)
    if tuned_dtype is not None:
        tuned = tuned.to(models.DTYPES[tuned_dtype])
    models.save_family(family, base, directory / "base")
    models.save_family(family, tuned, directory / "tuned")
    return Pair(family, directory / "base", directory / "tuned", tuned)


def matrices(model):
    """Module paths of every Linear, Conv1D and Embedding of a live model, by its torch classes."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def changed_matrices(before, after):
    """Paths of the matrices whose values differ; a matrix that two modules share is not among them."""
    old, new = matrices(before), matrices(after)
    owners = [module.weight.data_ptr() for module in new.values()]
    return {path for path, module in new.items() if owners.count(module.weight.data_ptr()) == 1
            and not torch.equal(module.weight, old[path].weight)}  # fmt: skip


def stored_products(adapter):
    """Module path → float64 ΔW̑ in (out, in) orientation, from an adapter's two files by PEFT's formula."""
    import math
    import re

    config, factors = models.config_of(adapter), models.factors_of(adapter)

    def value(pattern, path, default):
        for key, found in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                return found
        return default

    found = {}
    for key, lora_A in factors.items():
        if not key.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
        lora_B = factors[key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
        rank = value("rank_pattern", path, config["r"])
        assert rank == lora_A.shape[0] == lora_B.shape[1], (path, rank)
        size = math.sqrt(rank) if config.get("use_rslora") else rank
        scaling = value("alpha_pattern", path, config["lora_alpha"]) / size
        found[path] = scaling * lora_B.double() @ lora_A.double()
    return found


def delta_of(path, before, after):
    """The true float64 ΔW of a module in (out, in) orientation, from live models."""
    old, new = matrices(before)[path], matrices(after)[path]
    delta = new.weight.detach().double() - old.weight.detach().double()
    return delta if isinstance(new, torch.nn.Linear) else delta.T


def eckart_young(delta, rank):
    """‖Δ − best of that rank‖ / ‖Δ‖."""
    values = torch.linalg.svdvals(delta)
    return float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())


def assert_same_output(one, other, tolerance=1e-5):
    """Outputs agree to a fraction of their largest entry."""
    left, right = models.output_of(one), models.output_of(other)
    assert left.shape == right.shape
    assert (left - right).abs().max() <= tolerance * right.abs().max(), (left - right).abs().max()

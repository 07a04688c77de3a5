"""A tiny network of every sort of layer, AdaLoRA, MiSS, LoHa, LoKr and VeRA on it as PEFT writes them, and formulas."""

import contextlib
import copy
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import models


class Net(nn.Module):
    """Linear, HF Conv1D, Conv1d and Conv2d with kernels of 1 and 3; no matrix of it is square."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3, padding=1)
        self.point = nn.Conv2d(10, 8, 1)
        self.wide = nn.Conv2d(8, 12, (1, 3), padding=(0, 1))
        self.line = nn.Conv1d(12, 18, 3, padding=1)
        self.dot = nn.Conv1d(18, 6, 1)
        self.block = nn.ModuleDict({"up": nn.Linear(24, 36), "down": nn.Linear(36, 12)})
        self.old = Conv1D(30, 12)  # (nf, nx): weight (12, 30)
        self.head = nn.Linear(30, 7)

    def forward(self, x):
        x = self.wide(torch.tanh(self.point(torch.tanh(self.conv(x)))))
        x = self.dot(torch.tanh(self.line(x.flatten(2)))).flatten(1)[:, :24]
        return self.head(torch.tanh(self.old(self.block["down"](torch.tanh(self.block["up"](x))))))


LINEAR = ["block.up", "block.down", "head"]
CONV2D = ["conv", "point", "wide"]
CONV1D = ["line", "dot"]


def net(dtype="fp32"):
    """The same network each time."""
    torch.manual_seed(0)
    return Net().to(models.DTYPES[dtype]).eval()


def images(dtype="fp32"):
    """An input for it."""
    return torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(5)).to(models.DTYPES[dtype])


def write_base(path, dtype):
    """The network as a checkpoint."""
    config = {"torch_dtype": str(models.DTYPES[dtype]).removeprefix("torch.")}
    return models.write_checkpoint(path, net(dtype).state_dict(), config)


def wrapped(config, dtype="fp32", *, seed=1, size=0.3):
    """The network under an adapter with every parameter of it at random."""
    from peft import get_peft_model

    with quiet():
        model = get_peft_model(net(dtype), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_by_peft(model, path):
    """As PEFT saves it."""
    with quiet():
        model.save_pretrained(path)
    return Path(path)


@contextlib.contextmanager
def quiet():
    """PEFT warns of settings that are tested here on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layers_of(model):
    """Module path → PEFT's layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name.removeprefix("base_model.model."): module for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)}  # fmt: skip


def config_of(path):
    return json.loads((Path(path) / "adapter_config.json").read_text())


def tensors_of(path):
    """Module path → role → tensor in float64; what belongs to no module is under ``""``."""
    found = {}
    for key, tensor in load_file(Path(path) / "adapter_model.safetensors").items():
        if ".base_layer." in key:
            continue
        module, _, role = key.removeprefix("base_model.model.").rpartition(".")
        found.setdefault("" if module == "base_model" else module, {})[role] = tensor.double()
    return found


def pattern(config, field, path, default):
    """A pattern that these tests use: plain paths."""
    return next((value for key, value in (config.get(field) or {}).items()
                 if path == key or path.endswith(f".{key}")), default)  # fmt: skip


def exact(path, weights):
    """ΔW of every module in float64 by the papers' formulas, in the shape of the stored weight."""
    config, tensors = config_of(path), tensors_of(path)
    shared = tensors.pop("", {})
    kind = {"ADALORA": _adalora, "MISS": _miss, "LOHA": _loha, "LOKR": _lokr, "VERA": _vera}[config["peft_type"]]
    return {module: kind(config, module, held | shared, weights[f"{module}.weight"].double())
            for module, held in tensors.items()}  # fmt: skip


def _stored(delta, weight):
    straight = delta.numel() == weight.numel() and delta.shape[0] == weight.shape[0]
    return delta.reshape(weight.shape) if straight else delta.T


def _adalora(config, module, held, weight):
    delta = held["lora_B"] @ torch.diag(held["lora_E"][:, 0]) @ held["lora_A"]
    return _stored(delta, weight) * config["lora_alpha"] / (config["init_r"] + 1e-5)


def _miss(config, module, held, weight):
    block = held["miss_block"]
    if config["init_weights"] == "bat":
        r = block.shape[-1]
        rows = []
        for i in range(weight.shape[0] // r):
            parts = [weight[i * r : (i + 1) * r, j * r : (j + 1) * r] @ block[i] + block[i]
                     for j in range(weight.shape[1] // r)]  # fmt: skip
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)
    delta = torch.empty_like(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            delta[o, i] = block[i % block.shape[0], o % block.shape[1]]
    return delta


def _scaling(config, module):
    return pattern(config, "alpha_pattern", module, config["alpha"]) / pattern(
        config, "rank_pattern", module, config["r"]
    )


def _side(held, name, core):
    if core not in held:
        return held[f"{name}_a"] @ held[f"{name}_b"]
    return torch.einsum("ijkl,ip,jq->pqkl", held[core], held[f"{name}_a"], held[f"{name}_b"])


def _loha(config, module, held, weight):
    product = _side(held, "hada_w1", "hada_t1") * _side(held, "hada_w2", "hada_t2")
    return product.reshape(weight.shape) * _scaling(config, module)


def _lokr(config, module, held, weight):
    w1 = held["lokr_w1"] if "lokr_w1" in held else _side(held, "lokr_w1", "")
    w2 = held["lokr_w2"] if "lokr_w2" in held else _side(held, "lokr_w2", "lokr_t2")
    turned = w2.dim() == 3  # PEFT's Kronecker product of a matrix and three axes
    product = torch.einsum("ijk,pq->ipjqk", w2, w1) if turned else torch.einsum("pq,ij->piqj", w1, w2.flatten(1))
    return product.reshape(weight.shape) * _scaling(config, module)


def _vera(config, module, held, weight):
    out = held["vera_lambda_b"].shape[0]
    into = weight.numel() // out
    up = torch.diag(held["vera_lambda_b"]) @ held["vera_B"][:out]
    return _stored(up @ torch.diag(held["vera_lambda_d"]) @ held["vera_A"][:, :into], weight)


def merged_by_peft(model):
    """PEFT's default merge of a copy of the model, as a state dict."""
    return copy.deepcopy(model).merge_and_unload().state_dict()

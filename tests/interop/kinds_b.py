"""A tiny network, IA3, OFT, BOFT, HRA, FourierFT, SHiRA, C3A and LN tuning on it as PEFT writes them, and formulas.

The formulas are written down again here, on dense matrices in float64; PEFT is the other judge.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import models


class Net(nn.Module):
    """Embedding, Conv2d of kernels 3 and 1, Linear with and without bias, LayerNorm, HF Conv1D; nothing is square."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 16)
        self.conv = nn.Conv2d(4, 10, 3)
        self.point = nn.Conv2d(10, 6, 1)
        self.block = nn.ModuleDict({"up": nn.Linear(24, 36), "down": nn.Linear(36, 16, bias=False)})
        self.norm = nn.LayerNorm(16)
        self.old = Conv1D(30, 16)  # (nf, nx): weight (16, 30)
        nn.init.normal_(self.old.bias)

    def forward(self, x):
        x = torch.tanh(self.point(torch.tanh(self.conv(x)))).flatten(1)
        x = self.norm(self.block["down"](torch.tanh(self.block["up"](x))))
        return self.old(x + self.emb(torch.tensor([3, 5])))


def net(dtype="fp32"):
    """The same network each time."""
    torch.manual_seed(0)
    return Net().to(models.DTYPES[dtype]).eval()


def images(dtype="fp32"):
    """An input for it."""
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5)).to(models.DTYPES[dtype])


def write_base(path, dtype="fp32"):
    """The network as a checkpoint."""
    config = {"torch_dtype": str(models.DTYPES[dtype]).removeprefix("torch.")}
    return models.write_checkpoint(path, net(dtype).state_dict(), config)


def case(name):
    """A configuration by name."""
    import peft

    linear, convs = ["up", "down"], ["conv", "point"]
    oft = {"target_modules": linear, "oft_block_size": 4}
    boft = {"target_modules": linear, "boft_block_size": 4}
    return {
        "ia3": lambda: peft.IA3Config(target_modules=[*linear, *convs, "old"], feedforward_modules=["down", "point"]),
        "oft": lambda: peft.OFTConfig(**oft),
        "oft-conv": lambda: peft.OFTConfig(target_modules=convs, r=2, oft_block_size=0),
        "oft-embedding": lambda: peft.OFTConfig(target_modules=["emb"], oft_block_size=8),
        "oft-adjusted": lambda: peft.OFTConfig(target_modules=[*linear, "conv"], oft_block_size=10),
        "oft-share": lambda: peft.OFTConfig(**oft, block_share=True),
        "oft-exact": lambda: peft.OFTConfig(**oft, use_cayley_neumann=False),
        "oft-coft": lambda: peft.OFTConfig(**oft, coft=True, eps=0.4, use_cayley_neumann=False),
        "oft-3": lambda: peft.OFTConfig(**oft, num_cayley_neumann_terms=3),
        "oft-7": lambda: peft.OFTConfig(**oft, num_cayley_neumann_terms=7),
        "boft": lambda: peft.BOFTConfig(**boft, bias="boft_only"),
        "boft-conv": lambda: peft.BOFTConfig(target_modules=convs, boft_block_size=2),
        "hra": lambda: peft.HRAConfig(target_modules=[*linear, *convs], r=5),
        "hra-gs": lambda: peft.HRAConfig(target_modules=[*linear, *convs], r=4, apply_GS=True),
        "fourierft": lambda: peft.FourierFTConfig(
            target_modules=linear, n_frequency=70, scaling=90.0, random_loc_seed=4, n_frequency_pattern={"down": 41}
        ),
        "fourierft-conv1d": lambda: peft.FourierFTConfig(
            target_modules=["old"], n_frequency=50, scaling=120.0, fan_in_fan_out=True
        ),
        "shira": lambda: peft.ShiraConfig(target_modules=linear, r=3, random_seed=6),
        "c3a": lambda: peft.C3AConfig(target_modules=linear, block_size=4, block_size_pattern={"up": 12}),
        "ln": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    }[name]()


CASES = (
    "ia3", "oft", "oft-conv", "oft-embedding", "oft-adjusted", "oft-share", "oft-exact", "oft-coft", "oft-3", "oft-7",
    "boft", "boft-conv", "hra", "hra-gs", "fourierft", "fourierft-conv1d", "shira", "c3a", "ln",
)  # fmt: skip
KINDS = {"oft-embedding": {"oft-embedding"}, "ia3": {"ia3", "ia3-feedforward"}, "ln": {"ln-tuning"}}


def kinds_of(name):
    """What reports call the updates of a case."""
    return KINDS.get(name, {name.split("-")[0]})


def wrapped(config, dtype="fp32", *, seed=1, size=0.15):
    """The network under an adapter: every parameter of it moved at random."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net(dtype), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_by_peft(model, path):
    """As PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return Path(path)


def config_of(path):
    return json.loads((Path(path) / "adapter_config.json").read_text())


def held_of(path):
    """Module path → role → tensor in float64."""
    held = {}
    for key, tensor in load_file(Path(path) / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        for infix in (".oft_R.weight", ".oft_embedding_R.weight"):
            name = name.replace(infix, infix.removesuffix(".weight"))
        module, _, role = name.rpartition(".")
        module = module.removesuffix(".base_layer").removesuffix(".ln_tuning_layers")
        held.setdefault(module, {})[role] = tensor.double()
    return held


def exact(path, base):
    """W' of every changed tensor in float64, by the papers' formulas as PEFT's layers have them, stored as W is."""
    config, found = config_of(path), {}
    kind = config["peft_type"]
    for module, tensors in held_of(path).items():
        if kind != "LN_TUNING":
            found[f"{module}.weight"] = FORMULAS[kind](config, tensors, base[f"{module}.weight"].double())
        found |= {f"{module}.{name}": tensors[name] for name in ("weight", "bias") if name in tensors}
        feedforward = module.split(".")[-1] in config.get("feedforward_modules", ())
        if kind == "IA3" and not feedforward and f"{module}.bias" in base:
            found[f"{module}.bias"] = base[f"{module}.bias"].double() * tensors["ia3_l"].flatten()
    return found


def _ia3(config, tensors, weight):
    vector = tensors["ia3_l"]
    if vector.dim() == 4:  # `conv` scales its ten outputs, `point` its ten inputs
        return weight * (vector if weight.shape[0] != 10 else vector.reshape(10, 1, 1, 1))
    return weight * (vector.T if weight.shape == (16, 30) else vector)


def _cayley(Q):
    one = torch.eye(Q.shape[0], dtype=torch.float64)
    return (one - Q) @ torch.linalg.inv(one + Q)


def _series(Q, terms):
    one = torch.eye(Q.shape[0], dtype=torch.float64)
    powers = [one, *(torch.linalg.matrix_power(Q, k) for k in range(1, max(terms, 4) + 1))]
    if terms <= 1:
        return one
    if terms == 2:
        return one + 2 * Q
    last = max(terms - 1, 3)
    return one + 2 * sum(powers[1:last]) + powers[last]


def _oft(config, tensors, weight):
    role = "oft_R" if "oft_R" in tensors else "oft_embedding_R"
    stored = tensors[role]
    b = next(b for b in range(1, 99) if b * (b - 1) // 2 == stored.shape[1])
    blocks = []
    for vector in stored:
        Q = torch.zeros(b, b, dtype=torch.float64)
        Q[tuple(torch.triu_indices(b, b, 1))] = vector
        Q = Q - Q.T
        if config["coft"]:
            Q = Q * min(1.0, config["eps"] / len(stored) ** 0.5 / float(Q.norm()))
        neumann = config["use_cayley_neumann"]
        blocks.append(_series(Q, config["num_cayley_neumann_terms"]) if neumann else _cayley(Q))
    flat = weight.flatten(1)
    R = torch.block_diag(*(blocks * (flat.shape[1] // b) if config["block_share"] else blocks))
    return (flat @ (R if role != "oft_R" else R.T)).view(weight.shape)


def _boft(config, tensors, weight):
    from peft.tuners.boft.layer import BOFTLayer

    R, flat = tensors["boft_R"], weight.flatten(1)
    N, D, b, _ = R.shape
    rotation = torch.eye(D * b, dtype=torch.float64)
    for i in range(N):
        order = BOFTLayer.block_butterfly_perm(None, D * b, D // 2**i, b // 2, N - 1)
        P = BOFTLayer.perm2mat(None, order).double()
        B = torch.block_diag(*(_cayley(0.5 * (each - each.T)) for each in R[i]))
        rotation = P @ B @ P.T @ rotation
    return ((rotation @ flat.T).T * tensors["boft_s"].reshape(-1, 1)).view(weight.shape)


def _hra(config, tensors, weight):
    u, flat = tensors["hra_u"], weight.flatten(1)
    if config["apply_GS"]:
        u = torch.linalg.qr(u).Q
    for column in u.T:
        unit = column / column.norm()
        flat = flat @ (torch.eye(len(unit), dtype=torch.float64) - 2 * torch.outer(unit, unit))
    return flat.view(weight.shape)


def _fourierft(config, tensors, weight):
    turned = config["fan_in_fan_out"]
    out, into = weight.shape[::-1] if turned else weight.shape
    spectrum = tensors["fourierft_spectrum"]
    places = torch.randperm(out * into, generator=torch.Generator().manual_seed(config["random_loc_seed"]))
    p, q = torch.arange(out).double()[:, None], torch.arange(into).double()[None]
    delta = torch.zeros(out, into, dtype=torch.float64)
    for value, place in zip(spectrum.tolist(), places.tolist(), strict=False):
        delta += value * torch.cos(2 * torch.pi * (p * (place // into) / out + q * (place % into) / into))
    delta *= config["scaling"] / (out * into)
    return weight + (delta.T if turned else delta)


def _shira(config, tensors, weight):
    weight = weight.clone()
    for (row, column), value in zip(tensors["shira_indices"].long().T.tolist(), tensors["shira_weight"], strict=True):
        weight[row, column] += value
    return weight


def _c3a(config, tensors, weight):
    kernel, weight = tensors["c3a_kernel"], weight.clone()
    b = kernel.shape[2]
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            weight[o, i] += kernel[o // b, i // b, (i - o) % b] / weight.shape[1]
    return weight


FORMULAS = {
    "IA3": _ia3, "OFT": _oft, "BOFT": _boft, "HRA": _hra, "FOURIERFT": _fourierft, "SHIRA": _shira, "C3A": _c3a,
}  # fmt: skip

"""Networks with convolutions of every sort: torch modules by hand, and small random models of transformers."""

import torch
from torch import nn

from tests import models


class Residual(nn.Module):
    """As in the UNet of diffusers: norm, convolution, time embedding, convolution, a 1 × 1 shortcut."""

    def __init__(self, into, out, time):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, into), nn.GroupNorm(4, out)
        self.conv1, self.conv2 = nn.Conv2d(into, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out)
        self.conv_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x, time):
        hidden = self.conv1(torch.nn.functional.silu(self.norm1(x))) + self.time_emb_proj(time)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(torch.nn.functional.silu(self.norm2(hidden)))


class Net(nn.Module):
    """A module with the one attribute that PEFT asks for."""

    config = {"model_type": "custom"}  # noqa: RUF012


class UNet(Net):
    """One level down and up again; not square anywhere, strides and paddings mixed."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        self.down = nn.ModuleDict({"resnet": Residual(8, 12, 6), "sampler": nn.Conv2d(12, 12, 3, stride=2, padding=1)})
        self.middle = Residual(12, 20, 6)
        self.up = nn.ModuleDict({"resnet": Residual(28, 16, 6), "conv": nn.Conv2d(20, 16, 1, bias=False)})
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        time = torch.linspace(-1, 1, 6).expand(len(x), 6)
        skip = self.down["resnet"](self.conv_in(x), time)
        middle = self.middle(self.down["sampler"](skip), time)
        wide = nn.functional.interpolate(self.up["conv"](middle), scale_factor=2)
        return self.conv_out(self.up["resnet"](torch.cat([wide, skip], 1), time))

    @staticmethod
    def example():
        return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Signals(Net):
    """One axis: mono input, a stride, kernel 1, kernel even, then what has no low-rank form: depthwise, transposed."""

    def __init__(self):
        super().__init__()
        self.mono = nn.Conv1d(1, 6, 10, stride=3, bias=False)
        self.strided, self.point = nn.Conv1d(6, 10, 4, stride=2), nn.Conv1d(10, 7, 1)
        self.depthwise = nn.Conv1d(7, 7, 4, padding=3, groups=7)
        self.deconv = nn.ConvTranspose1d(7, 5, 3)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        x = self.point(torch.relu(self.strided(self.mono(x))))
        return self.out(self.deconv(self.depthwise(x)).mean(-1))

    @staticmethod
    def example():
        return torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(2))


class Volumes(Net):
    """Three axes, kernels that PEFT's merge stumbles over (1, 1, 1) and (1, 1, k) among them."""

    def __init__(self):
        super().__init__()
        self.first, self.line = nn.Conv3d(2, 6, (3, 2, 3)), nn.Conv3d(6, 5, (1, 1, 3))
        self.point = nn.Conv3d(5, 4, 1)

    def forward(self, x):
        return self.point(torch.relu(self.line(torch.relu(self.first(x)))))

    @staticmethod
    def example():
        return torch.randn(2, 2, 5, 5, 6, generator=torch.Generator().manual_seed(3))


HAND_MADE = {"unet": UNet, "signals": Signals, "volumes": Volumes}


def hand_made(name):
    """A network with random weights, norms included."""
    torch.manual_seed(0)
    return models.disturbed(HAND_MADE[name](), 0.05).eval()


def _convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(num_channels=3, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32, num_labels=3)
    )


_SPEECH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
           "conv_dim": [8, 12], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
           "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": False}  # fmt: skip


def _wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config(**_SPEECH))


def _hubert():
    from transformers import HubertConfig, HubertModel

    return HubertModel(HubertConfig(**_SPEECH))


def _data2vec():
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    return Data2VecAudioModel(Data2VecAudioConfig(**_SPEECH, conv_pos_kernel_size=3))


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, use_mambapy=False)
    )


def _resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))


def _regnet():
    from transformers import RegNetConfig, RegNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1], "groups_width": 4}
    return RegNetForImageClassification(RegNetConfig(**sizes, num_labels=3))


def _squeezebert():
    from transformers import SqueezeBertConfig, SqueezeBertModel

    sizes = {"hidden_size": 16, "embedding_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return SqueezeBertModel(SqueezeBertConfig(vocab_size=50, num_attention_heads=4, **sizes))


OF_TRANSFORMERS = {
    "convnext": _convnext,
    "wav2vec2": _wav2vec2,
    "hubert": _hubert,
    "data2vec-audio": _data2vec,
    "vit": _vit,
    "mamba": _mamba,
    "resnet": _resnet,
    "regnet": _regnet,
    "squeezebert": _squeezebert,
}


def of_transformers(name):
    """A small random model in evaluation mode."""
    torch.manual_seed(0)
    with models.quiet():
        return models.disturbed(OF_TRANSFORMERS[name](), 0.02).eval()


def answer(model):
    """What a model of transformers says to one fixed input of its own sort."""
    generator = torch.Generator().manual_seed(5)
    wanted = model.config.model_type
    if wanted in {"wav2vec2", "hubert", "data2vec-audio"}:
        given = {"input_values": torch.randn(1, 400, generator=generator)}
    elif wanted in {"mamba", "squeezebert"}:
        given = {"input_ids": torch.arange(9)[None] * 5 % 50}
    else:
        size = 16 if wanted == "vit" else 32
        given = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    with torch.no_grad():
        said = model(**given)
    return (said.logits if "logits" in said else said.last_hidden_state).double()

"""What a file tells of a convolution, held against torch's own modules and the families of transformers."""

import pytest
import torch

from loratools.checkpoints import Module
from loratools.checkpoints.convolutions import form_of
from loratools.tensors import TensorSpec
from tests.interop.convolutions import OF_TRANSFORMERS, of_transformers


def module(layer, name="layer"):
    """A torch layer as a checkpoint shows it."""
    parameters = {key: TensorSpec(key, "F32", tuple(value.shape)) for key, value in layer.named_parameters()}
    return Module(name, "conv", parameters, "inferred")


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (torch.nn.Conv1d(4, 6, 3), "plain"),
        (torch.nn.Conv2d(6, 6, 1, bias=False), "plain"),
        (torch.nn.Conv3d(2, 6, (1, 2, 3)), "plain"),
        (torch.nn.Conv2d(6, 6, 3, groups=6), "one-channel"),
        (torch.nn.Conv1d(1, 6, 10), "one-channel"),
        (torch.nn.ConvTranspose2d(6, 4, 3), "transposed"),
        (torch.nn.ConvTranspose1d(6, 1, 3), "transposed"),
    ],
)
def test_shapes_and_biases_tell(layer, form):
    """A bias is as long as the output; one input channel is one."""
    assert form_of(module(layer), {}) == form


@pytest.mark.parametrize(
    "name", ["deconv1", "decoder.conv_t1", "convtr.convtr", "up.transposed_convolution", "upscale_conv2", "convt_pre"]
)
def test_names_tell_a_transposed_one(name):
    """Square, or without a bias, only the name gives it away."""
    assert form_of(module(torch.nn.ConvTranspose2d(6, 6, 3), name), {}) == "transposed"


@pytest.mark.parametrize("name", ["conv1", "conv", "contrast.conv_text", "convolution", "conv_in", "conv_temporal"])
def test_other_names_do_not(name):
    """What merely starts alike is plain."""
    assert form_of(module(torch.nn.Conv2d(6, 6, 3), name), {}) == "plain"


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_groups_of_the_families(name):
    """Every convolution of the live model: low-rank only where it has one group, and none with one is called grouped,
    but for SqueezeBERT, whose configuration decides layer by layer."""
    model = of_transformers(name)
    config = {"model_type": model.config.model_type}
    for path, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and "weight" in layer._parameters:
            form = form_of(module(layer, path), config)
            if layer.groups > 1:
                assert form in {"grouped", "one-channel"}, path
            elif name != "squeezebert":
                assert form == ("plain" if layer.in_channels > 1 else "one-channel"), path

"""A tiny network as a dict of tensors, and the checkpoint directory that holds it.

A network is `layers.N.weight` matrices, (out, in) as in every checkpoint, with a ReLU in between
and no biases: all of a fine-tune is then matrices, and the rank decides alone. It is always run
from such a dict, so that a network read back from files is judged by what is on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from loratools.demo.digits import Digits
from loratools.storage.safetensors import open_safetensors

WIDTHS: Final = (64, 256, 256, 10)
"""64 pixels, two hidden layers, 10 digits: matrices wide enough that the rank matters."""

WEIGHTS_NAME: Final = "model.safetensors"

Weights = Mapping[str, torch.Tensor]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: sums in one order, whatever the machine; faster at this size too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def initial_weights(generator: torch.Generator, widths: tuple[int, ...] = WIDTHS) -> dict[str, torch.Tensor]:
    """Untrained matrices, scaled for ReLU layers (He et al., 2015, https://arxiv.org/abs/1502.01852)."""
    shapes = zip(widths[1:], widths[:-1], strict=True)
    return {
        f"layers.{index}.weight": torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5
        for index, shape in enumerate(shapes)
    }


def forward(weights: Weights, images: torch.Tensor) -> torch.Tensor:
    """The scores of the ten digits, (n, 10), for images (n, 64)."""
    last = len(weights) - 1
    hidden = images
    for index in range(last):
        hidden = torch.relu(hidden @ weights[f"layers.{index}.weight"].T)
    return hidden @ weights[f"layers.{last}.weight"].T


def accuracy(weights: Weights, digits: Digits) -> float:
    """The part of `digits` that the network names rightly, 0 to 1."""
    with one_thread(), torch.no_grad():
        hits = forward(weights, digits.images).argmax(dim=1) == digits.labels
    return int(hits.sum()) / len(hits)


def save_checkpoint(weights: Weights, directory: Path) -> None:
    """Write a checkpoint directory: the weights and a minimal `config.json`."""
    directory.mkdir(parents=True)
    config = {"model_type": "loratools-demo-mlp", "widths": _widths(weights)}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS_NAME, {"format": "pt"}
    )


def load_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint directory, as they lie on the disk."""
    return {name: ref.load() for name, ref in open_safetensors(directory / WEIGHTS_NAME).tensors.items()}


def checkpoint_hashes(directory: Path) -> dict[str, str]:
    """The sha256 of every tensor's bytes in a checkpoint directory."""
    tensors = open_safetensors(directory / WEIGHTS_NAME).tensors
    return {name: hashlib.sha256(ref.read()).hexdigest() for name, ref in tensors.items()}


def _widths(weights: Weights) -> list[int]:
    matrices = [weights[f"layers.{index}.weight"] for index in range(len(weights))]
    return [matrices[0].shape[1], *(matrix.shape[0] for matrix in matrices)]

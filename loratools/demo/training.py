"""Training of the tiny networks: gradient descent with momentum, the same result every time.

Written out rather than taken from `torch.optim`, whose first step imports torch's compiler, which
takes longer than the training.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

from loratools.demo.digits import Digits
from loratools.demo.networks import Weights, forward, one_thread


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the images.
        learning_rate: size of a step.
        momentum: the part of the last step that is kept.
        batch: images per step.
    """

    epochs: int = 20
    learning_rate: float = 0.05
    momentum: float = 0.9
    batch: int = 64


FROM_SCRATCH: Final = Recipe()
FINE_TUNE: Final = Recipe(learning_rate=0.02)


def train(weights: Weights, digits: Digits, recipe: Recipe, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Train all of `weights` on `digits` and return the new ones; the old ones stay.

    The batches are drawn from `generator` alone, and sums are made in one order, so that a seed
    gives the same bits on the same machine whatever its number of threads.
    """
    trained = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    velocities = [torch.zeros_like(weight) for weight in trained.values()]
    with one_thread():
        for _ in range(recipe.epochs):
            order = torch.randperm(len(digits.labels), generator=generator)
            for batch in torch.split(order, recipe.batch):
                scores = forward(trained, digits.images[batch])
                loss = torch.nn.functional.cross_entropy(scores, digits.labels[batch])
                gradients = torch.autograd.grad(loss, list(trained.values()))
                _step(list(trained.values()), velocities, gradients, recipe)
    return {name: weight.detach() for name, weight in trained.items()}


def _step(
    weights: list[torch.Tensor],
    velocities: list[torch.Tensor],
    gradients: tuple[torch.Tensor, ...],
    recipe: Recipe,
) -> None:
    with torch.no_grad():
        for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
            velocity.mul_(recipe.momentum).add_(gradient)
            weight.sub_(velocity, alpha=recipe.learning_rate)

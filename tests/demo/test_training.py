"""Training is the same every time, and leaves what it was given alone."""

import pytest
import torch

from loratools.demo.digits import load_digits
from loratools.demo.networks import accuracy, initial_weights
from loratools.demo.training import Recipe, train

SHORT = Recipe(epochs=2)


def trained(seed):
    generator = torch.Generator().manual_seed(seed)
    return train(initial_weights(generator), load_digits(), SHORT, generator)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_same_seed_same_bits():
    assert same(trained(0), trained(0))


def test_another_seed_another_network():
    assert not same(trained(0), trained(1))


def test_same_bits_whatever_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(trained(0))
    finally:
        torch.set_num_threads(before)
    assert same(*results)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    trained(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_learns_and_leaves_the_start_alone():
    generator = torch.Generator().manual_seed(0)
    start = initial_weights(generator)
    copy = {name: weight.clone() for name, weight in start.items()}
    end = train(start, load_digits(), SHORT, generator)
    assert same(start, copy)
    assert accuracy(start, load_digits()) < 0.4
    assert accuracy(end, load_digits()) > 0.8
    assert not any(weight.requires_grad for weight in end.values())


def test_a_step_is_momentum_descent():
    """Two steps on one batch, against torch's own SGD."""
    generator = torch.Generator().manual_seed(0)
    start = initial_weights(generator)
    digits = load_digits()
    end = train(start, digits, Recipe(epochs=2, learning_rate=0.1, batch=len(digits.labels)), generator)
    theirs = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    optimiser = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimiser.zero_grad()
        hidden = digits.images
        for name in list(theirs)[:-1]:
            hidden = torch.relu(hidden @ theirs[name].T)
        torch.nn.functional.cross_entropy(hidden @ theirs["layers.2.weight"].T, digits.labels).backward()
        optimiser.step()
    for name, weight in end.items():
        torch.testing.assert_close(weight, theirs[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("field", ["epochs", "learning_rate", "momentum", "batch"])
def test_recipe_is_frozen(field):
    with pytest.raises(AttributeError):
        setattr(SHORT, field, 1)

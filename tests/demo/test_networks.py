"""The tiny network, and its checkpoint on the disk."""

import json

import pytest
import torch

from loratools.demo.digits import load_digits
from loratools.demo.networks import (
    WIDTHS,
    accuracy,
    checkpoint_hashes,
    forward,
    initial_weights,
    load_checkpoint,
    one_thread,
    save_checkpoint,
)


@pytest.fixture
def weights():
    return initial_weights(torch.Generator().manual_seed(0))


def test_shapes(weights):
    assert [tuple(weight.shape) for weight in weights.values()] == [(256, 64), (256, 256), (10, 256)]
    assert list(weights) == [f"layers.{index}.weight" for index in range(len(WIDTHS) - 1)]


def test_forward_is_relu_layers(weights):
    images = torch.rand(5, 64, generator=torch.Generator().manual_seed(1))
    W0, W1, W2 = weights.values()
    expected = W2 @ torch.relu(W1 @ torch.relu(W0 @ images.T))
    torch.testing.assert_close(forward(weights, images), expected.T)


def test_forward_does_not_depend_on_the_order_of_keys(weights):
    images = torch.rand(5, 64)
    assert torch.equal(forward(weights, images), forward(dict(reversed(weights.items())), images))


def test_accuracy_counts_hits():
    """A network that always says 3 is right as often as there are threes."""
    constant = {"layers.0.weight": torch.ones(1, 64), "layers.1.weight": torch.eye(10)[:, 3:4]}
    assert accuracy(constant, load_digits()) == 183 / 1797


def test_checkpoint_round_trip(tmp_path, weights):
    save_checkpoint(weights, tmp_path / "base")
    loaded = load_checkpoint(tmp_path / "base")
    assert {name: weight.tolist() for name, weight in loaded.items()} == {n: w.tolist() for n, w in weights.items()}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config == {"model_type": "loratools-demo-mlp", "widths": list(WIDTHS)}


def test_hashes_see_one_bit(tmp_path, weights):
    save_checkpoint(weights, tmp_path / "a")
    save_checkpoint(weights, tmp_path / "b")
    weights["layers.1.weight"][3, 4] = torch.nextafter(weights["layers.1.weight"][3, 4], torch.tensor(9.0))
    save_checkpoint(weights, tmp_path / "c")
    a, b, c = (checkpoint_hashes(tmp_path / name) for name in "abc")
    assert a == b
    assert [name for name in a if a[name] != c[name]] == ["layers.1.weight"]


def test_one_thread_is_given_back():
    """Also when what ran inside fails."""
    before, inside = torch.get_num_threads(), []

    def fail():
        with one_thread():
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == before

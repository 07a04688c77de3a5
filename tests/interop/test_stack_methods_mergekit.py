"""`stack --method` beside mergekit's own functions, which work on dense ΔW."""

import pytest
import torch

from loratools.files import load_adapter
from loratools.linalg import random_key
from loratools.verbs.stack import stack
from tests.linalg import combinations
from tests.tiny import Q, factors, lora_tensors, write_adapter

pytestmark = pytest.mark.peers
P = "model.layers.2.mlp.up_proj"
MODULES = {Q: (20, 14), P: (13, 29)}


@pytest.fixture
def three(tmp_path):
    """Changes that are alike, so that angles matter: a shared part, and one of each one's own."""
    shared = factors(4, 9, modules=MODULES)
    made = []
    for index, (rank, alpha) in enumerate(((4, 8), (4, 5), (4, 3))):
        own = factors(rank, index, modules=MODULES, scale=0.08)
        both = {path: (shared[path][0], shared[path][1] + own[path][1]) for path in MODULES}
        made.append(write_adapter(tmp_path / f"a{index}", lora_tensors(both), r=rank, lora_alpha=alpha))
    return made


def dense(adapter, path):
    return sum(t.scale * (t.lora_B.load().double() @ t.lora_A.load().double()) for t in adapter[path].terms)


def by_mergekit(adapters, path, method, *, over_zero=False, **parameters):
    from mergekit.merge_methods.api import merge_tensors

    parts = [dense(load_adapter(adapter), path).float().double() for adapter in adapters]
    tensors = [torch.zeros_like(parts[0]), *parts] if over_zero else parts
    base = 0 if over_zero or method == "slerp" else None
    return merge_tensors(tensors, method, parameters=parameters, base_index=base)


def ours(given, out, **how):
    stack(given, out, **how)
    made = load_adapter(out)
    return {path: dense(made, path) for path in MODULES}


def assert_near(found, wanted, tolerance=2e-6):
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp(tmp_path, three, t):
    found = ours(three[:2], tmp_path / "out", method="slerp", t=t)
    for path in MODULES:
        assert_near(found[path], by_mergekit(three[:2], path, "slerp", t=t))


def test_karcher(tmp_path, three):
    """The mean itself; at its own limits of 10 steps and 1e-5 mergekit is that far away."""
    found = ours(three, tmp_path / "out", method="karcher")
    for path in MODULES:
        assert_near(found[path], by_mergekit(three, path, "karcher", max_iter=100, tol=1e-9))
        assert_near(found[path], by_mergekit(three, path, "karcher"), 1e-4)


def test_model_stock(tmp_path, three):
    found = ours(three, tmp_path / "out", method="model-stock")
    for path in MODULES:
        assert_near(found[path], by_mergekit(three, path, "model_stock", over_zero=True))


def test_linear(tmp_path, three):
    found = ours(three, tmp_path / "out", method="linear", weights=[1, 2, -0.5])
    for path in MODULES:
        wanted = by_mergekit(three, path, "linear", weight=[1.0, 2.0, -0.5], normalize=True)
        assert_near(found[path], wanted)


def test_ties(tmp_path, three):
    """Equal for equal weights. Otherwise mergekit divides by the weights that agree, and ours by their number."""
    found = ours(three, tmp_path / "one", method="ties", density=0.3, rank=14)
    other = ours(three, tmp_path / "two", method="ties", density=0.3, rank=14, weights=[2, 1, 1])
    for path in MODULES:
        assert_near(found[path], by_mergekit(three, path, "ties", over_zero=True, weight=1.0, density=0.3))
        theirs = by_mergekit(three, path, "ties", over_zero=True, weight=[2.0, 1.0, 1.0], density=0.3)
        kept = torch.stack([combinations.top(dense(load_adapter(each), path).float().double(), 0.3) for each in three])
        heavy = kept * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)[:, None, None]
        agree = heavy.sign() == torch.where(heavy.sum(0) >= 0, 1, -1)
        count, weight = agree.sum(0), (agree * torch.tensor([2.0, 1.0, 1.0])[:, None, None]).sum(0)
        assert_near(other[path], theirs * weight / count.clamp_min(1))
        assert float((other[path] - theirs).norm()) > 0.1 * float(theirs.norm())


def test_magnitude(tmp_path, three):
    """mergekit has it as a way to sparsify."""
    from mergekit.sparsify import magnitude

    found = ours(three, tmp_path / "out", method="magnitude", density=0.3, rank=14)
    for path in MODULES:
        parts = [dense(load_adapter(each), path).float() for each in three]
        assert_near(found[path], sum(magnitude(part, 0.3).double() for part in parts))


class Drawn:
    """In place of torch.bernoulli: the numbers of a module, adapter after adapter."""

    def __init__(self, path):
        self.path, self.place, self.chances = path, 0, []

    def __call__(self, chances):
        key = random_key(0, self.path, self.place)
        self.place += 1
        self.chances.append(chances.double())
        return (combinations.drawn(key, tuple(chances.shape)) < chances.double()).to(chances.dtype)


def test_dare(tmp_path, three, monkeypatch):
    """The same entries; mergekit scales each ΔW to the sum of sizes it had, ours by 1/density as the paper does."""
    found = ours(three, tmp_path / "out", method="dare", density=0.3, rank=14)
    for path in MODULES:
        monkeypatch.setattr("mergekit.sparsify.torch.bernoulli", Drawn(path))
        bare = by_mergekit(three, path, "dare_linear", over_zero=True, weight=1.0, density=0.3, rescale=False)
        assert_near(found[path], bare / 0.3)
        monkeypatch.setattr("mergekit.sparsify.torch.bernoulli", Drawn(path))
        scaled = by_mergekit(three, path, "dare_linear", over_zero=True, weight=1.0, density=0.3)
        assert float((found[path] - scaled).norm()) > 0.01 * float(scaled.norm())


def test_della(tmp_path, three, monkeypatch):
    """The same probabilities, with mergekit's epsilon half of ours, and the same entries and signs."""
    found = ours(three[:1], tmp_path / "out", method="della", density=0.4, epsilon=0.3, rank=14)
    for path in MODULES:
        drawn = Drawn(path)
        monkeypatch.setattr("mergekit.sparsify.torch.bernoulli", drawn)
        bare = by_mergekit(
            three[:1], path, "della", over_zero=True, weight=1.0, density=0.4, epsilon=0.15, rescale=False
        )
        assert_near(found[path], bare / drawn.chances[0], 1e-5)

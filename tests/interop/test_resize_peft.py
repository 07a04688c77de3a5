"""`stack --rank` and `resize` beside PEFT's add_weighted_adapter: the same ΔW where PEFT's is right."""

import warnings

import pytest
from peft import PeftModel

from loratools.verbs.resize import resize
from loratools.verbs.stack import stack
from tests import models
from tests.interop.extraction import stored_products
from tests.interop.judge import load_cleanly, wrapped_modules
from tests.interop.merging import layers_of, products, write_by_peft

TARGETS = ["q_proj", "k_proj", "down_proj"]
WEIGHTS = [0.7, -1.3]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two adapters with alpha ≠ r, and one with rsLoRA."""
    root = tmp_path_factory.mktemp("world")
    base = models.save(models.build("llama"), root / "base")
    two = [
        write_by_peft(base, root / "a", seed=1, r=4, lora_alpha=6, target_modules=TARGETS),
        write_by_peft(base, root / "b", seed=2, r=5, lora_alpha=3, target_modules=TARGETS),
    ]
    stabilised = write_by_peft(base, root / "c", seed=3, r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS)
    return base, two, stabilised


def by_peft(base, adapters, weights, rank):
    """What PEFT combines, as PEFT applies it."""
    model = PeftModel.from_pretrained(models.load(base), adapters[0], adapter_name="0")
    for index, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [str(index) for index in range(len(adapters))]
        model.add_weighted_adapter(names, weights, "both", combination_type="svd", svd_rank=rank)
    return {path: layer.get_delta_weight("both").double() for path, layer in layers_of(model).items()}


def test_stack_of_a_rank_is_pefts_svd(world, tmp_path):
    """Alphas that differ from the ranks, a negative weight; PEFT loads ours and gives the same ΔW, to 1e-5."""
    base, two, _ = world
    stack(two, tmp_path / "ours", weights=WEIGHTS, rank=3)
    theirs, stored = by_peft(base, two, WEIGHTS, 3), stored_products(tmp_path / "ours")
    model = load_cleanly(models.load(base), tmp_path / "ours")
    assert wrapped_modules(model) == set(theirs) == set(stored)
    for path, layer in layers_of(model).items():
        size = theirs[path].norm()
        assert (products(layer) - theirs[path]).norm() <= 1e-5 * size
        assert (stored[path] - theirs[path]).norm() <= 1e-5 * size


def test_pefts_rslora_is_too_strong(world, tmp_path):
    """The combined adapter inherits rsLoRA with alpha = r, so that PEFT multiplies it by √r: ours is the right one."""
    base, _, stabilised = world
    resize(stabilised, tmp_path / "ours", rank=4)
    exact, ours = stored_products(stabilised), stored_products(tmp_path / "ours")
    for path, delta in exact.items():
        assert (ours[path] - delta).norm() <= 1e-6 * delta.norm()
    theirs = by_peft(base, [stabilised, stabilised], [0.5, 0.5], 4)
    ratios = [float(theirs[path].norm() / delta.norm()) for path, delta in exact.items()]
    assert ratios == pytest.approx([2.0] * len(ratios), rel=1e-4)

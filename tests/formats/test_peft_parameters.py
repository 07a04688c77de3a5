"""The codec on parameters: what is written is read, in all layouts; which wrapper is whose."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapters import Adapter, LowRank
from loratools.adapters.experts import Stacked
from loratools.errors import UndecidedError, UnsupportedError
from loratools.formats import Contents
from loratools.formats.peft.codec import PeftCodec
from loratools.formats.peft.tuners.lora_parameters import layout_of
from loratools.tensors import in_memory

CODEC = PeftCodec()
NAMES = ("gate_up_proj", "down_proj", "w1", "w2")


def factor(*shape, seed=0):
    return in_memory("f", torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def stacked(rank=2, experts=3, shape=(6, 4), alpha=5.0, seed=0, **options):
    out, into = shape
    return Stacked(lora_A=factor(experts * rank, into, seed=seed), lora_B=factor(out, rank * experts, seed=seed + 1),
                   experts=experts, alpha=alpha, **options)  # fmt: skip


@st.composite
def adapters(draw):
    """Layers, stacks and single matrices, several of them on one module; one layout for all."""
    layout = draw(st.sampled_from(["0.17", "0.19.0", "0.19.1", None]))
    rslora = draw(st.booleans())
    updates = {}
    for layer in range(draw(st.integers(1, 3))):
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)):
            seed, rank = draw(st.integers(0, 99)), draw(st.integers(1, 4))
            alpha = draw(st.sampled_from([1.0, 0.3, 16.0, -2.0]))
            shape = draw(st.integers(1, 5)), draw(st.integers(1, 5))
            if draw(st.booleans()):
                update = stacked(rank, draw(st.integers(2, 4)), shape, alpha, seed, layout=layout, use_rslora=rslora)
            else:
                update = LowRank(lora_A=factor(rank, shape[1], seed=seed), lora_B=factor(shape[0], rank, seed=seed + 1),
                                 alpha=alpha, use_rslora=rslora, parameter="")  # fmt: skip
            updates[f"model.layers.{layer}.mlp.experts.{name}"] = update
        if draw(st.booleans()):
            updates[f"model.layers.{layer}.shared.gate_up_proj"] = LowRank(
                lora_A=factor(3, 4), lora_B=factor(5, 3), alpha=2.0, use_rslora=rslora
            )
    return Adapter(updates)


def round_trip(adapter, shapes=None):
    encoded = CODEC.encode(adapter)
    config = next(json.loads(text) for text in encoded.texts.values())
    decoded = CODEC.decode(Contents(encoded.tensors, config, encoded.metadata, {}, shapes or {}))
    return decoded, config, encoded


@settings(max_examples=150, deadline=None, derandomize=True)
@given(adapters())
def test_what_is_written_is_read(adapter):
    """Kinds, factors, ranks, alphas, layouts; a layer whose name ends like a parameter's stays a layer."""
    decoded, config, _ = round_trip(adapter)
    assert set(decoded.updates) == set(adapter)
    for path, update in adapter.items():
        found = decoded.updates[path]
        assert type(found) is type(update), path
        assert (found.target, found.rank, found.use_rslora) == (update.target, update.rank, update.use_rslora)
        assert found.scaling == pytest.approx(update.scaling, rel=1e-15)
        assert bytes(found.lora_A.read()) == bytes(update.lora_A.read()), path
        assert bytes(found.lora_B.read()) == bytes(update.lora_B.read()), path
        if isinstance(update, Stacked):
            assert (found.experts, found.layout) == (update.experts, update.layout)
    parameters = {path for path, update in adapter.items() if not update.target}
    assert set(config["target_parameters"]) == parameters
    assert set(config["target_modules"]) == set(adapter) - parameters


def test_a_layer_that_ends_like_a_bare_parameter():
    """PEFT's own upgrade of old adapters writes bare names; a shared expert's Linear of such a name is no parameter."""
    adapter = Adapter({"a.experts.gate_up_proj": stacked(), "a.experts.down_proj": stacked(shape=(4, 3)),
                       "a.shared.down_proj": LowRank(lora_A=factor(2, 4), lora_B=factor(5, 2), alpha=5.0)})  # fmt: skip
    encoded = CODEC.encode(adapter)
    config = next(json.loads(text) for text in encoded.texts.values())
    config |= {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["shared.down_proj"]}
    decoded = CODEC.decode(Contents(encoded.tensors, config))
    assert {path: update.target for path, update in decoded.updates.items()} == {
        path: update.target for path, update in adapter.items()
    }


def test_layouts_are_not_mixed():
    mixed = Adapter({"m.w1": stacked(layout="0.17"), "m.w2": stacked(layout="0.19.1")})
    with pytest.raises(UnsupportedError, match="several versions"):
        CODEC.encode(mixed)


@pytest.mark.parametrize(("version", "layout"), [
    ("0.17.1", "0.17"), ("0.18.0", "0.17"), ("0.18.1", "0.17"), ("0.19.0", "0.19.0"), ("0.19.1", "0.19.1"),
    ("0.21.2", "0.19.1"), ("1.0", "0.19.1"), ("0.20.1.dev0@5d602fd", "0.19.1"), ("0.18.1.dev0@abc", None),
    ("0.18.2.dev0", None), ("0.19.0.dev0", None), ("0.19.1.dev0", None), ("0.17.2.dev0", "0.17"), ("", None),
    ("unknown", None), (None, None), (19, None),
])  # fmt: skip
def test_layout_by_version(version, layout):
    """Development versions between two eras may be of either."""
    assert layout_of({"peft_version": version}) == layout


def test_unknown_names_need_shapes():
    """Parameters of an unknown class: shapes of the base decide, in spite of a prefix; equal ones cannot."""
    adapter = Adapter({"m.zeta": stacked(shape=(6, 4)), "m.alpha": stacked(shape=(5, 7))})
    with pytest.raises(UndecidedError, match="zeta"):
        round_trip(adapter)
    decoded, _, _ = round_trip(adapter, {"model.m.zeta": (3, 6, 4), "model.m.alpha": (3, 7, 5)})
    assert {path: update.matrix for path, update in decoded.updates.items()} == {"m.zeta": (6, 4), "m.alpha": (5, 7)}
    same = Adapter({"m.zeta": stacked(), "m.alpha": stacked()})
    with pytest.raises(UndecidedError, match="shapes do not tell"):
        round_trip(same, {"m.zeta": (3, 6, 4), "m.alpha": (3, 6, 4)})

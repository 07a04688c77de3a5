"""Law 5: decode(encode(x)) = x for all that PEFT's format can hold; what it cannot is refused by name."""

import dataclasses
import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from loratools.adapters import Adapter, Full, LowRank, Sum, Term
from loratools.errors import UnsupportedError
from loratools.formats import Contents, codec_named
from loratools.tensors import TensorRef, in_memory
from tests import models
from tests.laws.kinds import EVERY_KIND

CODEC = codec_named("peft")

components = st.sampled_from(["a", "lin", "norm", "layers", "0", "1", "10", "q_proj", "x-y", "embed"])
paths = st.lists(components, min_size=1, max_size=4).map(".".join)


def tensor(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def updates(draw):
    """Anything that the format can hold of one module."""
    seed, dtype = draw(st.integers(0, 10**6)), models.DTYPES[draw(st.sampled_from(["fp32", "bf16", "fp16"]))]
    out, into, rank = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    replaced = {}
    if draw(st.booleans()):
        replaced["bias"] = in_memory("b", tensor((out,), seed + 2, dtype))
    added = {"weight": in_memory("r", tensor((2, into), seed + 3, dtype))} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        if draw(st.booleans()) or not (replaced or added):
            replaced["weight"] = in_memory("w", tensor((out, into), seed, dtype))
        if draw(st.booleans()):
            replaced["A_log"] = in_memory("p", tensor((out, 2, 3), seed, dtype))
        return Full(replaced=replaced, added_rows=added, shared=True)
    return LowRank(
        lora_A=in_memory("A", tensor((rank, into), seed, dtype)),
        lora_B=in_memory("B", tensor((out, rank), seed + 1, dtype)),
        alpha=draw(st.sampled_from([1.0, 4.0, 0.3, -2.0, float(rank), 1e-3])),
        use_rslora=draw(st.booleans()),
        of=draw(st.sampled_from(["linear", "embedding"])),
        replaced=replaced,
        added_rows=added,
    )


def round_trip(adapter, siblings=()):
    """What comes back from what is written."""
    encoded = CODEC.encode(adapter, siblings=siblings)
    config = next(json.loads(text) for text in encoded.texts.values())
    return CODEC.decode(Contents(encoded.tensors, config, encoded.metadata, encoded.side_tensors)), config


def same(one, other):
    """Equal dtype, shape and bytes, name aside."""
    return one.dtype == other.dtype and one.shape == other.shape and bytes(one.read()) == bytes(other.read())


def assert_same_update(found, given_, path):
    assert found.kind == given_.kind, path
    assert found.replaced.keys() == given_.replaced.keys(), path
    assert found.added_rows.keys() == given_.added_rows.keys(), path
    for name in given_.replaced:
        assert same(found.replaced[name], given_.replaced[name]), (path, name)
    for name in given_.added_rows:
        assert same(found.added_rows[name], given_.added_rows[name]), (path, name)
    if isinstance(given_, LowRank):
        assert same(found.lora_A, given_.lora_A), path
        assert same(found.lora_B, given_.lora_B), path
        assert found.layer == given_.layer
        assert found.scaling == pytest.approx(given_.scaling, rel=1e-15), path
        if found.use_rslora == given_.use_rslora:
            assert found.alpha == given_.alpha


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(paths, updates(), min_size=1, max_size=6), st.lists(paths, max_size=4))
def test_what_is_written_is_read(held, siblings):
    """Kinds, factors, alphas, replaced parameters and added rows come back whatever the module paths, and whatever
    order PEFT sorts the patterns into."""
    adapter = Adapter(held)
    assume(not CODEC.cannot_hold(adapter))
    decoded, config = round_trip(adapter, [*held, *siblings])
    assert set(decoded.updates) == set(held)
    in_file = [path for path, update in held.items() if update.terms or update.replaced]
    assert [path for path in decoded.updates if path in in_file] == in_file
    for path, update in held.items():
        assert_same_update(decoded.updates[path], update, path)
    low = {path for path, update in held.items() if isinstance(update, LowRank)}
    assert set(config["target_modules"] if low else []) == low


ONE = {"lora_A": in_memory("A", torch.ones(1, 1)), "lora_B": in_memory("B", torch.ones(1, 1)), "alpha": 1.0}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(paths, updates(), min_size=1, max_size=6), st.lists(paths, max_size=6))
@example({"a": LowRank(**ONE), "a.a.a": LowRank(**ONE)}, [])  # the module between them must not be wrapped
def test_peft_would_wrap_what_is_meant(held, siblings):
    """By PEFT's own matching, the written configuration targets the low-rank modules and no sibling, gives each its
    rank, and saves no module whose parameters are not all there."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
    from peft.utils.other import get_pattern_key

    adapter = Adapter(held)
    assume(not CODEC.cannot_hold(adapter))
    known = {*held, *siblings}
    known |= {path.rsplit(".", depth)[0] for path in known for depth in range(1, 4)}
    _, config = round_trip(adapter, sorted(known))
    names = {"target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "r", "lora_alpha"}
    written = LoraConfig(**{key: value for key, value in config.items() if key in names})
    low = {path for path, update in held.items() if isinstance(update, LowRank)}
    hits = {
        path
        for path in known
        if (hit := check_target_module_exists(written, path)) and not isinstance(hit, _ExcludedModule)
    }
    assert hits == low
    for path in low:
        assert written.rank_pattern.get(get_pattern_key(list(written.rank_pattern), path), written.r) == held[path].rank
    for entry in config["modules_to_save"] or []:
        assert [path for path in known if path.endswith(entry)] == [entry]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.dictionaries(paths, updates(), min_size=1, max_size=4))
def test_decoding_twice_is_decoding_once(held):
    """encode(decode(encode(x))) writes the same tensors and the same configuration again."""
    adapter = Adapter(held)
    assume(not CODEC.cannot_hold(adapter))
    decoded, config = round_trip(adapter, list(held))
    again, second = round_trip(Adapter(decoded.updates, config=config), list(held))
    assert second == config
    assert again.updates.keys() == decoded.updates.keys()


def test_what_cannot_be_held_is_named():
    """A parameter of another name under a low-rank update, and a sum that is not concatenated, are refused."""
    factors = {"lora_A": in_memory("A", torch.ones(2, 3)), "lora_B": in_memory("B", torch.ones(4, 2))}
    odd = Adapter({"m.lin": LowRank(**factors, alpha=2.0, replaced={"gamma": in_memory("g", torch.ones(4))})})
    assert any("m.lin" in lost and "gamma" in lost for lost in CODEC.cannot_hold(odd))
    with pytest.raises(UnsupportedError, match="gamma"):
        CODEC.encode(odd)
    term = Term(factors["lora_A"], factors["lora_B"], 1.0)
    with pytest.raises(UnsupportedError, match="m"):
        CODEC.encode(Adapter({"m": Sum(parts=(term, term))}))


def differences(found, given_, where=""):
    """Where two updates, or two values in them, are not the same: classes, tensors' bytes, everything else by value."""
    if type(found) is not type(given_) and not (isinstance(found, (int, float)) and isinstance(given_, (int, float))):
        return [f"{where}: {type(found).__name__} for {type(given_).__name__}"] if not hasattr(found, "keys") else []
    if isinstance(given_, TensorRef):
        return [] if same(found, given_) else [where]
    if dataclasses.is_dataclass(given_):
        names = [field.name for field in dataclasses.fields(given_)]
        pairs = {name: (getattr(found, name), getattr(given_, name)) for name in names}
    elif hasattr(given_, "keys"):
        pairs = {key: (found.get(key), given_.get(key)) for key in {**found, **given_}}
    elif isinstance(given_, float):
        return [] if found == pytest.approx(given_, rel=1e-15) else [f"{where}: {found} for {given_}"]
    else:
        return [] if found == given_ else [f"{where}: {found!r} for {given_!r}"]
    return [each for name, (one, other) in pairs.items() for each in differences(one, other, f"{where}.{name}")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_kind_comes_back(name, dtype):
    """decode(encode(x)) is x in every field, tensors to the byte and in their dtype; and encoding that again writes the
    same keys and the same configuration. What no file holds as it is is refused."""
    adapter = EVERY_KIND[name].adapter(dtype=dtype)
    if not EVERY_KIND[name].written:
        with pytest.raises(UnsupportedError):
            CODEC.encode(adapter)
        return
    decoded, config = round_trip(adapter, list(adapter))
    assert set(decoded.updates) == set(adapter)
    assert [each for path in adapter for each in differences(decoded.updates[path], adapter[path], path)] == []
    assert decoded.notes == ()
    again, second = round_trip(Adapter(decoded.updates, config=config), list(adapter))
    assert second == config
    assert [each for path in adapter for each in differences(again.updates[path], adapter[path], path)] == []

import pytest
import torch

from loratools.engine import fingerprint
from loratools.errors import MismatchError
from loratools.files import open_checkpoint
from loratools.tensors import in_memory
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests.tiny import Q, llama, normal, write_checkpoint


def test_it_says_dtype_shape_and_bytes():
    """And nothing else: not the name, nor where the tensor lies."""
    tensor = normal(1, 8, 4)
    one = fingerprint.of(in_memory("a", tensor))
    assert one.startswith("F32:8x4:")
    assert len(one.split(":")[2]) == 16
    assert fingerprint.of(in_memory("b", tensor.clone())) == one


def test_it_looks_at_the_start_the_middle_and_the_end():
    """One bit in any of the three samples changes it; small tensors are looked at whole."""
    for numel in (1, 5, 1000, 100_000):
        tensor = normal(1, numel)
        known = fingerprint.of(in_memory("x", tensor))
        places = range(numel) if numel < 10 else (0, 1000 % numel, numel // 2, numel - 1)
        for place in places:
            other = tensor.clone()
            other[place] += 1
            assert fingerprint.of(in_memory("x", other)) != known


def test_shape_and_dtype_count():
    """The same bytes seen another way are another tensor."""
    tensor = normal(1, 8, 4)
    seen = {fingerprint.of(in_memory("x", each)) for each in (tensor, tensor.reshape(4, 8), tensor.view(torch.int32))}
    assert len(seen) == 3
    assert fingerprint.of(in_memory("x", torch.zeros(0, 4))).startswith("F32:0x4:")


def test_sharding_does_not_count(tmp_path):
    """Neither file names, nor order, nor other tensors."""
    one, many = (open_checkpoint(write_checkpoint(tmp_path / str(n), shards=n)) for n in (1, 4))
    assert {name: fingerprint.of(one[name]) for name in one} == {name: fingerprint.of(many[name]) for name in many}


def test_one_wrong_weight_is_enough(tmp_path):
    """A base that differs in a single module of the adapter is refused, and the module named."""
    base, tuned = llama(), llama()
    for path in (Q, "model.layers.0.mlp.gate_proj"):
        tuned[f"{path}.weight"] = tuned[f"{path}.weight"] * 2
    extract(write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned), tmp_path / "a")
    other = dict(base)
    other[f"{Q}.weight"] = base[f"{Q}.weight"].clone()
    other[f"{Q}.weight"][0, 0] += 1
    wrong = write_checkpoint(tmp_path / "wrong", other)
    with pytest.raises(MismatchError, match=rf"1 of 2 weights differ.*{Q}"):
        merge(wrong, [tmp_path / "a"], tmp_path / "out")
    elsewhere = dict(base) | {"model.norm.weight": base["model.norm.weight"] * 3}
    merge(write_checkpoint(tmp_path / "near", elsewhere), [tmp_path / "a"], tmp_path / "fine")

"""LoHa, LoKr and SHiRA in sums, judged by PEFT: its own ΔW of what goes in, its own ΔW of what comes out."""

import pytest
import torch

from loratools.files import load_adapter
from loratools.verbs.merge import merge
from loratools.verbs.stack import stack
from loratools.verbs.verify import verify
from tests import models
from tests.interop import kinds_a as kinds
from tests.interop.judge import load_cleanly
from tests.interop.kinds_a import CONV1D, CONV2D, LINEAR

ALL = [*LINEAR, *CONV2D, *CONV1D]
MIXED = ("fan_in_fan_out",)
WEIGHTS = [0.7, -1.3]


def configs():
    from peft import LoHaConfig, LoKrConfig, LoraConfig, ShiraConfig

    patterns = {"rank_pattern": {"up": 4, "conv": 5}, "alpha_pattern": {"conv": 7, "head": 2}}
    return {
        "lora": LoraConfig(r=3, lora_alpha=5, target_modules=[*LINEAR, *CONV2D]),
        "loha": LoHaConfig(r=2, alpha=5, target_modules=ALL, **patterns),
        "loha-cores": LoHaConfig(r=2, alpha=5, target_modules=ALL, use_effective_conv2d=True),
        "lokr": LoKrConfig(r=2, alpha=5, target_modules=ALL, **patterns),
        "lokr-cores": LoKrConfig(r=2, alpha=5, target_modules=ALL, use_effective_conv2d=True, decompose_both=True,
                                 decompose_factor=4),
        "lokr-whole": LoKrConfig(r=64, alpha=5, target_modules=ALL, decompose_both=True),
        "shira": ShiraConfig(r=2, target_modules=LINEAR),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(PEFT's model, its adapter) of a kind, a seed and a dtype, made once."""
    held = {}

    def get(name, seed=1, dtype="fp32"):
        if (name, seed, dtype) not in held:
            model = kinds.wrapped(configs()[name], dtype, seed=seed)
            held[name, seed, dtype] = model, kinds.write_by_peft(model, tmp_path_factory.mktemp(name) / "adapter")
        return held[name, seed, dtype]

    return get


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return kinds.write_base(tmp_path_factory.mktemp("base") / "base", "fp32")


def deltas(model):
    """Module path → ΔW by PEFT, in the shape of the weight; no module that it leaves alone."""
    found = {path: layer.get_delta_weight("default").detach() for path, layer in kinds.layers_of(model).items()}
    return {path: delta.to_dense() if delta.is_sparse else delta for path, delta in found.items()}


@pytest.mark.parametrize("name", ["loha", "loha-cores", "lokr", "lokr-cores", "lokr-whole"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_are_pefts_delta(made, name, dtype):
    """B A of the factors that algebra takes is get_delta_weight of a float32 layer with the same numbers, to 1e-6."""
    model, adapter = made(name, dtype=dtype)
    model = model.float()
    ours = load_adapter(adapter)
    for path, wanted in deltas(model).items():
        (term,) = ours[path].products
        found = term.scale * (term.lora_B.load() @ term.lora_A.load())
        assert term.rank <= min(found.shape)
        assert (found - wanted.flatten(1)).norm() <= 2e-6 * wanted.norm(), path


@pytest.mark.parametrize(
    ("one", "other"),
    [("loha", "lora"), ("lokr", "lora"), ("lokr-whole", "lora"), ("loha", "lokr"), ("loha-cores", "lokr-cores"),
     ("lora", "loha-cores"), ("loha", "loha"), ("lokr-cores", "lora")],
)  # fmt: skip
def test_a_sum_is_what_peft_makes_of_both(tmp_path, made, base, one, other):
    """0.7 a − 1.3 b is plain LoRA that PEFT loads without a word, convolutions too, with the weighted sum of PEFT's own
    ΔW; a merge of it is the merge of both to 1e-6 of ΔW; and `verify` finds it true."""
    (left, first), (right, second) = made(one, 1), made(other, 2)
    report = stack([first, second], tmp_path / "sum", weights=WEIGHTS, base=base)
    assert any("plain LoRA" in note for note in report.notes)
    loaded = load_cleanly(kinds.net(), tmp_path / "sum")
    found, parts = deltas(loaded), (deltas(left), deltas(right))
    assert set(found) == {*parts[0], *parts[1]}
    for path, delta in found.items():
        held = [(weight, part[path].double()) for weight, part in zip(WEIGHTS, parts, strict=True) if path in part]
        size = sum(abs(weight) * float(part.norm()) for weight, part in held)
        assert (delta.double() - sum(weight * part for weight, part in held)).norm() <= 2e-6 * size, path
    merge(base, [first, second], tmp_path / "both", weights=WEIGHTS)
    merge(base, [tmp_path / "sum"], tmp_path / "one")
    before, both, alone = (models.tensors_of(each) for each in (base, tmp_path / "both", tmp_path / "one"))
    for key, tensor in both.items():
        moved = (tensor - before[key]).norm()
        assert (tensor - alone[key]).norm() <= 1e-6 * moved + 1.2e-7 * before[key].norm(), key
    assert verify(tmp_path / "sum", [first, second]).answer == "holds"


def test_sparse_entries_side_by_side(tmp_path, made):
    """Two SHiRA of other places are one with r + r, which PEFT loads and applies as the sum of both."""
    from peft import PeftModel

    (left, first), (right, second) = made("shira", 1), made("shira", 2)
    stack([first, second], tmp_path / "sum", weights=WEIGHTS)
    with kinds.quiet():
        loaded = PeftModel.from_pretrained(kinds.net(), tmp_path / "sum")
    found, parts = deltas(loaded), (deltas(left), deltas(right))
    for path, delta in found.items():
        wanted = sum(weight * part[path] for weight, part in zip(WEIGHTS, parts, strict=True))
        torch.testing.assert_close(delta, wanted, rtol=1e-6, atol=1e-7)


def test_without_the_base_a_convolution_is_not_guessed(tmp_path, made):
    """Factors without a core may be a Linear's: the output has them so, and a note says what to do; with a core whose
    kernel may be (k,) or (k, 1) the sum is refused."""
    from loratools.errors import UnsupportedError

    _, loha = made("loha")
    _, again = made("loha", 2)
    report = stack([loha, again], tmp_path / "sum", include=LINEAR)
    assert any("--base" in note for note in report.notes)
    _, cores = made("loha-cores")
    _, more = made("loha-cores", 2)
    with pytest.raises(UnsupportedError, match="kernel") as caught:
        stack([cores, more], tmp_path / "cores", include=["line"])
    assert "--base" in caught.value.fix
    assert not (tmp_path / "cores").exists()

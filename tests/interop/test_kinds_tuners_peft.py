"""AdaLoRA, MiSS, LoHa, LoKr, VeRA: PEFT writes each; its `get_delta_weight` is what we read, merge and write back."""

import copy

import peft
import pytest

from loratools.errors import UnsupportedError
from tests.interop.kinds import Case, require_rounded

LINEAR = ["block.q", "block.k"]
KERNELS = ["conv2", "point"]


def adalora():
    return peft.AdaLoraConfig(target_modules=LINEAR, init_r=6, target_r=4, lora_alpha=7, total_step=10)


def miss():
    return peft.MissConfig(target_modules=LINEAR, r=3)


def loha():
    patterns = {"rank_pattern": {"block.k": 2}, "alpha_pattern": {"block.q": 5}}
    return peft.LoHaConfig(target_modules=LINEAR, r=3, alpha=7, **patterns)


def loha_kernels(*, effective):
    return peft.LoHaConfig(target_modules=KERNELS, r=2, alpha=5, use_effective_conv2d=effective)


def lokr(**options):
    return peft.LoKrConfig(target_modules=LINEAR, r=2, alpha=5, **options)


def lokr_kernels(*, effective):
    return peft.LoKrConfig(target_modules=KERNELS, r=2, alpha=5, use_effective_conv2d=effective)


def vera():
    return peft.VeraConfig(target_modules=LINEAR, r=5, projection_prng_key=3, save_projection=True)


CASES = {
    "adalora": adalora(),
    "miss": miss(),
    "loha": loha(),
    "loha, kernels": loha_kernels(effective=False),
    "loha, kernels in CP form": loha_kernels(effective=True),
    "lokr": lokr(),
    "lokr, both decomposed": lokr(decompose_both=True, decompose_factor=3),
    "lokr, kernels": lokr_kernels(effective=False),
    "lokr, kernels in Tucker form": lokr_kernels(effective=True),
    "vera": vera(),
}


def deltas(case, name):
    """Module path → PEFT's ΔW, computed in float64."""
    model = copy.deepcopy(case.model).double()
    found = {}
    for path in case.loaded:
        layer = model.get_submodule(f"base_model.model.{path}")
        before = layer.get_base_layer().weight.detach().clone()
        if name == "miss":  # its get_delta_weight wants the weight
            layer.merge()
            found[path] = layer.get_base_layer().weight.detach() - before
        else:
            found[path] = layer.get_delta_weight("default").detach()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_kinds(tmp_path, name, dtype):
    """ΔW is PEFT's; the merge rounds once; every byte comes back; what is written again is what was read, and loads."""
    case = Case(tmp_path, CASES[name], dtype=dtype)
    merged, theirs = case.merged(), deltas(case, name)
    assert theirs
    for path, delta in theirs.items():
        before = case.before[f"{path}.weight"]
        scale = delta.abs().max()
        ours = case.loaded[path].delta_weight(before.double().flatten(1))
        assert (ours.view(delta.shape).double() - delta.double()).abs().max() <= 2e-6 * scale
        ulps = 2 if dtype == "fp32" else 0.6
        require_rounded(merged[f"{path}.weight"], before.double() + delta.double(), before, ulps=ulps)
    case.require_way_back()
    case.require_written_back()


def test_vera_without_its_projections_is_refused(tmp_path):
    """They would have to be drawn again as some version of torch draws them."""
    settings = peft.VeraConfig(target_modules=LINEAR, r=5, projection_prng_key=3, save_projection=False)
    with pytest.raises(UnsupportedError, match=r"(?i)projection"):
        _ = Case(tmp_path, settings).loaded

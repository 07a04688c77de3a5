"""AdaLoRA, MiSS, LoHa, LoKr and VeRA against PEFT: what ΔW is, what a merge writes, what PEFT loads of ours.

The judge of a merge is the formula in float64, rounded once; PEFT's float32 product has an error of its own, and what
it rounds to 16 bits may differ as law 2 says (MiSS `bat`, which multiplies the weight itself, by one ulp anywhere).
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapters.actions import Region
from loratools.engine import planning
from loratools.engine.context import Settings
from loratools.errors import LoratoolsError, MalformedError, MismatchError, NonFiniteError, UnsupportedError
from loratools.files import load_adapter, save
from loratools.verbs.inspect import inspect
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.interop import kinds_a as kinds
from tests.interop.judge import load_cleanly, recorded
from tests.interop.kinds_a import CONV1D, CONV2D, LINEAR

ALL = [*LINEAR, *CONV2D, *CONV1D]
MIXED = ("fan_in_fan_out",)  # PEFT has one flag for HF Conv1D and Linear, and corrects it aloud


def configs():
    from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, MissConfig, VeraConfig

    patterns = {"rank_pattern": {"up": 4, "conv": 5}, "alpha_pattern": {"conv": 7, "head": 2}}
    return {
        "adalora": lambda: AdaLoraConfig(
            init_r=6, lora_alpha=10, total_step=10, target_modules=[*LINEAR, *CONV2D, "old"]
        ),
        "miss": lambda: MissConfig(r=5, target_modules=LINEAR),  # divides no width: the last shard is cut
        "miss-even": lambda: MissConfig(r=6, target_modules=["block.up", "block.down"], bias="MiSS_only"),
        "miss-bat": lambda: MissConfig(r=6, target_modules=["block.up", "block.down"], init_weights="bat"),
        "miss-mini": lambda: MissConfig(r=5, mini_r=4, target_modules=["block.up", "block.down"], init_weights="mini"),
        "loha": lambda: LoHaConfig(r=3, alpha=5, target_modules=ALL, **patterns),
        "loha-cores": lambda: LoHaConfig(r=3, alpha=5, target_modules=ALL, use_effective_conv2d=True, **patterns),
        "lokr": lambda: LoKrConfig(r=2, alpha=5, target_modules=ALL, **patterns),
        "lokr-cores": lambda: LoKrConfig(
            r=2, alpha=5, target_modules=ALL, use_effective_conv2d=True, decompose_both=True, decompose_factor=4
        ),
        "lokr-whole": lambda: LoKrConfig(r=64, alpha=5, target_modules=ALL, decompose_both=True),
        "lokr-tall": lambda: LoKrConfig(r=2, alpha=5, target_modules=LINEAR, decompose_factor=6, decompose_both=True),
        "vera": lambda: VeraConfig(r=8, target_modules=[*LINEAR, "old"]),
        "vera-biases": lambda: VeraConfig(r=8, target_modules=LINEAR, bias="vera_only"),
    }


NAMES = (
    "adalora", "miss", "miss-even", "miss-bat", "miss-mini", "loha", "loha-cores", "lokr", "lokr-cores", "lokr-whole",
    "lokr-tall", "vera", "vera-biases",
)  # fmt: skip
LINEAR_ONLY = {"adalora": "block.up", "miss": "block.up", "loha": "block.up", "lokr": "block.up", "vera": "block.up"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(PEFT's model, its adapter, the base) of a kind and a dtype, made once."""
    held = {}

    def get(name, dtype="fp32", seed=1):
        if (name, dtype, seed) not in held:
            root = tmp_path_factory.mktemp(name)
            model = kinds.wrapped(configs()[name](), dtype, seed=seed)
            held[name, dtype, seed] = (
                model,
                kinds.write_by_peft(model, root / "adapter"),
                kinds.write_base(root / "base", dtype),
            )
        return held[name, dtype, seed]

    return get


def as_matrix(path, weight):
    """The (out, in) view that an update has of a stored weight."""
    return weight.T if path == "old" else weight.flatten(1)


def close(found, wanted, tolerance=1e-6):
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def delta_by_peft(name, layer):
    weight = layer.get_base_layer().weight.detach().clone()
    if name == "miss-bat":
        return layer.get_delta_weight("default", weight).detach()
    if name.startswith("miss"):
        return layer.get_delta_weight_miss("default", weight.clone()).detach() - weight
    return layer.get_delta_weight("default").detach()


@pytest.mark.parametrize("name", NAMES)
def test_delta_weight(made, name):
    """ΔW of every layer is the formula's in float64, and PEFT's own, to 1e-6."""
    model, adapter, base = made(name)
    weights, ours = models.tensors_of(base), load_adapter(adapter)
    wanted = kinds.exact(adapter, weights)
    layers = kinds.layers_of(model)
    assert set(wanted) == set(layers) == {path for path, update in ours.items() if update.changes_weight}
    for path, layer in layers.items():
        weight = as_matrix(path, weights[f"{path}.weight"])
        close(ours[path].delta_weight(weight), as_matrix(path, wanted[path]))
        close(delta_by_peft(name, layer), wanted[path])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_merge_and_the_way_back(made, tmp_path, unchanged, name, dtype):
    """W' is one rounding from W + ΔW in float64, and beside PEFT's merge as law 2 says; with the base, unmerge gives
    every byte back."""
    model, adapter, base = made(name, dtype)
    unchanged(adapter, base)
    merge(base, [adapter], tmp_path / "merged")
    ours, before = models.tensors_of(tmp_path / "merged"), models.tensors_of(base)
    with kinds.quiet():
        theirs = kinds.merged_by_peft(model)
    wanted, differing, entries = kinds.exact(adapter, before), 0, 0
    biases = {key.removeprefix("base_model.model.").replace("base_layer.", "") for key in models.factors_of(adapter)}
    for tensor, found in ours.items():
        path = tensor.removesuffix(".weight")
        if path not in wanted or tensor == path:
            assert torch.equal(found, theirs[tensor])
            assert torch.equal(found, before[tensor]) != (tensor in biases)
            continue
        weight, delta = before[tensor].double(), wanted[path]
        size = torch.maximum(torch.maximum(weight.abs(), found.double().abs()), delta.abs())
        slack = 2e-7 * delta.norm() / delta.numel() ** 0.5 * 4
        error = (found.double() - weight - delta).abs()
        assert bool((error <= 0.5 * models.ulp(found, found.dtype) + slack).all()), tensor
        apart = (found.double() - theirs[tensor].double()).abs()
        own = 1e-6 * float(delta.abs().max())  # PEFT's float32 product is itself so far off
        assert bool((apart <= models.ulp(size, found.dtype) + own).all()), tensor
        differing, entries = differing + int((apart > 0).sum()), entries + found.numel()
    if dtype == "bf16" and name != "miss-bat":
        assert differing <= 1e-4 * entries + 3
    unmerge(tmp_path / "merged", tmp_path / "back", adapters=[adapter], base=base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_peft_loads(made, tmp_path, name):
    """Every tensor with its bytes, no key missing or left over, no warning, and the same logits, bit for bit."""
    model, adapter, _ = made(name)
    save(load_adapter(adapter), tmp_path / "ours")
    before, after = models.factors_of(adapter), models.factors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = kinds.config_of(adapter), kinds.config_of(tmp_path / "ours")
    moot = {"target_modules", "auto_mapping", "rank_pattern", "alpha_pattern", "init_lora_weights", "exclude_modules",
            "use_effective_conv2d", "decompose_both"}  # fmt: skip
    moot |= {key for key in old if key.startswith(("layers_", "loftq", "eva", "corda", "lora_ga", "megatron"))}
    assert {key: old[key] for key in old.keys() - moot} == {key: new[key] for key in new.keys() - moot}
    again = load_cleanly(kinds.net(), tmp_path / "ours", expected=MIXED if "old" in kinds.layers_of(model) else ())
    assert torch.equal(again(kinds.images()), kinds.wrapped(configs()[name]())(kinds.images()))
    first, second = load_adapter(adapter), load_adapter(tmp_path / "ours")
    assert [*first] == [*second]
    for path, update in first.items():
        assert type(update) is type(second[path])
        assert (update.kind, update.rank, update.scaling, update.shape) == (
            second[path].kind, second[path].rank, second[path].scaling, second[path].shape)  # fmt: skip


FACTS = {
    "adalora": ("adalora", 6, 10, 10 / 6.00001),
    "miss": ("miss", 5, None, 1),
    "miss-bat": ("miss-bat", 6, None, 1),
    "miss-mini": ("miss-mini", 5, None, 1),
    "loha": ("loha", 4, 5, 1.25),
    "lokr": ("lokr", 4, 5, 1.25),
    "vera": ("vera", 8, None, 1),
}


@pytest.mark.parametrize("name", FACTS)
def test_inspect(made, name):
    """Kind, rank, alpha and scaling of a module; every stored number counted once."""
    _, adapter, _ = made(name)
    report = inspect(adapter)
    row = next(row for row in report.modules if row.name == "block.up")
    assert (row.kind, row.rank, row.alpha) == FACTS[name][:3]
    assert row.scaling == pytest.approx(FACTS[name][3], rel=1e-12)
    assert report.parameters == sum(tensor.numel() for tensor in models.factors_of(adapter).values())
    assert report.bytes == sum(tensor.nbytes for tensor in models.factors_of(adapter).values())


@pytest.mark.parametrize("by", [0.5, -1.7, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_rescale(made, tmp_path, name, by):
    """`--by` multiplies ΔW, whatever the kind; where alpha can say it, the factors keep their bytes; PEFT reads it."""
    _, adapter, base = made(name)
    if "biases" in name or name == "miss-even":
        with pytest.raises(UnsupportedError, match="depends on the base"):
            rescale(adapter, tmp_path / "out", by=by)
        return
    rescale(adapter, tmp_path / "out", by=by)
    weights = models.tensors_of(base)
    before, after = kinds.exact(adapter, weights), kinds.exact(tmp_path / "out", weights)
    assert all((after[path] - by * before[path]).norm() <= 2e-6 * before[path].norm() for path in before)
    kept = models.factors_of(adapter).items()
    fresh = models.factors_of(tmp_path / "out")
    changed = {key.rpartition(".")[2] for key, tensor in kept if not torch.equal(tensor, fresh[key])}
    linear = {"adalora": set() if by > 0 else {"lora_E"}, "miss": {"miss_block"}, "vera": {"vera_lambda_b"}}
    assert changed == linear.get(name.partition("-")[0], set())
    assert {tensor.dtype for tensor in fresh.values()} == {torch.float32}
    load_cleanly(kinds.net(), tmp_path / "out", expected=MIXED if "old" in before else ())


@pytest.mark.parametrize("name", ["adalora", "loha-cores", "lokr", "lokr-cores"])
@pytest.mark.parametrize("how", [{"bake": True}, {"restate_alpha": 3.0}])
def test_alpha_said_otherwise(made, tmp_path, name, how):
    """ΔW stays, the scaling is 1 or alpha the number."""
    _, adapter, base = made(name)
    report = rescale(adapter, tmp_path / "out", **how)
    weights = models.tensors_of(base)
    before, after = kinds.exact(adapter, weights), kinds.exact(tmp_path / "out", weights)
    for path in before:
        close(after[path], before[path])
    rows = {row["name"]: row for row in report.modules}
    assert all(row["alpha"] == 3 if "restate_alpha" in how else row["scaling"] == 1 for row in rows.values())
    load_cleanly(kinds.net(), tmp_path / "out", expected=MIXED if "old" in before else ())


@pytest.mark.parametrize("name", ["miss", "vera"])
def test_kinds_without_alpha(made, tmp_path, name):
    """Nothing to bake; an alpha to restate is refused."""
    _, adapter, _ = made(name)
    rescale(adapter, tmp_path / "baked", bake=True)
    before, after = models.factors_of(adapter), models.factors_of(tmp_path / "baked")
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(UnsupportedError, match="alpha of a"):
        rescale(adapter, tmp_path / "out", restate_alpha=3)


def lora(root, **changes):
    """A LoRA of some of the modules."""
    from peft import LoraConfig

    options = {"r": 2, "lora_alpha": 3, "target_modules": ["block.up", "head"], **changes}
    return kinds.write_by_peft(kinds.wrapped(LoraConfig(**options)), root / "lora")


def lora_delta(path):
    config, tensors = kinds.config_of(path), models.factors_of(path)
    found = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            r = tensors[key].shape[0]
            alpha = kinds.pattern(config, "alpha_pattern", module, config["lora_alpha"])
            up = tensors[key.replace("lora_A", "lora_B")].double()
            found[module] = alpha / r * up @ tensors[key].double()
    return found


@pytest.mark.parametrize("name", ["adalora", "miss", "vera"])
def test_stacked_they_are_plain_lora(made, tmp_path, name):
    """With a LoRA: kinds that are products become LoRA, modules of one input too, and PEFT loads the sum."""
    _, adapter, base = made(name)
    other = lora(tmp_path)
    stack([adapter, other], tmp_path / "sum", weights=[0.7, -0.3], include=LINEAR, base=base)
    weights = models.tensors_of(base)
    mine, theirs, found = kinds.exact(adapter, weights), lora_delta(other), lora_delta(tmp_path / "sum")
    assert kinds.config_of(tmp_path / "sum")["peft_type"] == "LORA"
    assert set(found) == set(LINEAR)
    for path, delta in found.items():
        close(delta, 0.7 * mine[path] - 0.3 * theirs.get(path, torch.zeros(())))
    assert {tensor.dtype for tensor in models.factors_of(tmp_path / "sum").values()} == {torch.float32}
    load_cleanly(kinds.net(), tmp_path / "sum")


def test_a_lora_tells_a_miss_how_large_the_weight_is(made, tmp_path):
    """Where every module of the MiSS has a LoRA beside it, the sum needs no base."""
    _, adapter, base = made("miss-mini")
    other = lora(tmp_path, target_modules=["block.up", "block.down"])
    stack([adapter, other], tmp_path / "sum")
    mine, theirs = kinds.exact(adapter, models.tensors_of(base)), lora_delta(other)
    for path, delta in lora_delta(tmp_path / "sum").items():
        close(delta, mine[path] + theirs[path])


@pytest.mark.parametrize("name", ["adalora", "vera"])
def test_two_of_a_kind(made, tmp_path, name):
    """Two AdaLoRAs, two VeRAs: the sum is LoRA; in Python as well."""
    (_, one, base), (_, two, _) = made(name), made(name, seed=2)
    stack([one, two], tmp_path / "sum", weights=[1, 2], include=LINEAR, base=base)
    weights, found = models.tensors_of(base), lora_delta(tmp_path / "sum")
    first, second = kinds.exact(one, weights), kinds.exact(two, weights)
    for path in LINEAR:
        close(found[path], first[path] + 2 * second[path])
    load_cleanly(kinds.net(), tmp_path / "sum")
    if name == "adalora":
        save(load_adapter(one) + load_adapter(two), tmp_path / "python")
        close(lora_delta(tmp_path / "python")["head"], first["head"] + second["head"])
    else:
        with pytest.raises(UnsupportedError, match="how large"):
            stack([one, two], tmp_path / "blind")


@pytest.mark.parametrize("name", ["miss", "miss-mini", "miss-bat"])
def test_miss_of_one_rank_stays_miss(made, tmp_path, name):
    """ΔW is linear in the block, so that no base is needed; PEFT loads it."""
    (_, one, base), (_, two, _) = made(name), made(name, seed=2)
    stack([one, two], tmp_path / "sum", weights=[1, -2])
    weights = models.tensors_of(base)
    first, second, found = (kinds.exact(path, weights) for path in (one, two, tmp_path / "sum"))
    assert kinds.config_of(tmp_path / "sum")["peft_type"] == "MISS"
    for path, delta in found.items():
        close(delta, first[path] - 2 * second[path])
    load_cleanly(kinds.net(), tmp_path / "sum")


def test_a_sum_that_is_none_of_products_is_refused(made, tmp_path):
    """MiSS `bat` with another kind: named, nothing written; merged one by one they are fine."""
    _, adapter, base = made("miss-bat")
    other = lora(tmp_path)
    with pytest.raises(UnsupportedError, match="miss-bat"):
        stack([adapter, other], tmp_path / "sum", base=base)
    assert not (tmp_path / "sum").exists()
    merge(base, [adapter, other], tmp_path / "merged", weights=[0.5, 2])
    weights, theirs = models.tensors_of(base), lora_delta(other)
    mine, found = kinds.exact(adapter, weights), models.tensors_of(tmp_path / "merged")
    close(found["block.up.weight"], weights["block.up.weight"] + 0.5 * mine["block.up"] + 2 * theirs["block.up"])


def loaded_once(path):
    """What `load_cleanly` does, without loading twice: PEFT cannot put a pruned AdaLoRA over a pruned one.

    PEFT 0.21 holds the keys of its own rank_pattern against module names, and warns that none matches.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with recorded() as lines:
        model = PeftModel.from_pretrained(kinds.net(), path)
    assert all(any(text in line for text in (*MIXED, "rank_pattern")) for line in lines), lines
    held, written = get_peft_model_state_dict(model), models.factors_of(path)
    assert held.keys() == written.keys()
    assert all(torch.equal(held[key], written[key]) for key in written)
    return model.eval()


def test_adalora_after_pruning(made, tmp_path):
    """PEFT saves what pruning left, a list of booleans per module with it; a rank of 0 as well."""
    model = kinds.wrapped(configs()["adalora"]())
    masks = {"block.up": [1, 0, 1, 1, 0, 0], "block.down": [0] * 6, "old": [1] * 6, "point": [0, 0, 0, 0, 0, 1]}
    masks = {path: [bool(each) for each in masks.get(path, [1, 1, 0, 0, 0, 0])] for path in kinds.layers_of(model)}
    with torch.no_grad():
        for path, layer in kinds.layers_of(model).items():
            layer.lora_E["default"][torch.tensor(masks[path]).logical_not()] = 0.0
    model.peft_config["default"].rank_pattern = {f"{path}.lora_E.default": mask for path, mask in masks.items()}
    wanted = model(kinds.images())
    adapter = kinds.write_by_peft(model, tmp_path / "adapter")
    assert models.factors_of(adapter)["base_model.model.block.down.lora_A"].shape == (0, 36)
    _, _, base = made("adalora")
    ours = load_adapter(adapter)
    assert {path: update.rank for path, update in ours.items()} == {path: sum(mask) for path, mask in masks.items()}
    assert {update.scaling for update in ours.values()} == {10 / 6.00001}
    merge(base, [adapter], tmp_path / "merged")
    weights, merged = models.tensors_of(base), models.tensors_of(tmp_path / "merged")
    for path, delta in kinds.exact(adapter, weights).items():
        close(merged[f"{path}.weight"], weights[f"{path}.weight"] + delta, 1e-7)
    save(ours, tmp_path / "ours")
    again = loaded_once(tmp_path / "ours")
    assert torch.allclose(again(kinds.images()), wanted, rtol=1e-5, atol=1e-6)  # sums of other lengths
    stack([ours, lora(tmp_path)], tmp_path / "sum", include=LINEAR)
    assert set(lora_delta(tmp_path / "sum")) == {"block.up", "head"}
    assert json.loads((tmp_path / "sum" / "loratools.json").read_text())["left_out"]["block.down"] == "its rank is 0"
    load_cleanly(kinds.net(), tmp_path / "sum")
    stack([ours, ours], tmp_path / "twice", weights=[1, 0.5])  # they differ in nothing: it stays what it is
    twice = kinds.exact(tmp_path / "twice", weights)
    assert kinds.config_of(tmp_path / "twice")["peft_type"] == "ADALORA"
    close(twice["block.up"], 1.5 * kinds.exact(adapter, weights)["block.up"])


@pytest.mark.parametrize("name", ["loha-cores", "lokr", "lokr-cores", "lokr-whole", "miss-bat", "miss", "vera"])
@pytest.mark.parametrize("kept", [2**18, 0])
def test_the_same_bits_in_every_piece(made, monkeypatch, name, kept):
    """Any rectangle of the change is cut out of the whole, bit for bit; a LoKr too large to be multiplied out too."""
    monkeypatch.setattr("loratools.adapters.lokr._KEPT", kept)
    _, adapter, base = made(name)
    weights = models.tensors_of(base)
    wanted = kinds.exact(adapter, weights)
    for path, update in load_adapter(adapter).items():
        weight = as_matrix(path, weights[f"{path}.weight"]).double().contiguous()
        rows, columns = weight.shape
        whole = update.action().change(weight, Region(slice(0, rows), slice(0, columns)))
        close(whole, as_matrix(path, wanted[path]), 1e-9)
        cut = (0, columns) if update.span == "rows" else (1, columns // 2)
        for first, last in ((0, 1), (rows // 3, rows), (2, 5)):
            region = Region(slice(first, last), slice(*cut))
            piece = weight[first:last, cut[0] : cut[1]]
            assert torch.equal(update.action().change(piece, region), whole[first:last, cut[0] : cut[1]]), path


def test_merged_bits_do_not_depend_on_tiles(made, tmp_path, monkeypatch):
    """Tiles of a few rows give the file that one tile gives."""
    for name in ("loha-cores", "lokr-cores", "miss-bat", "vera", "adalora"):
        _, adapter, base = made(name)
        merge(base, [adapter], tmp_path / name)
        with monkeypatch.context() as small:
            small.setattr(planning, "Settings", functools.partial(Settings, tile_bytes=300))
            merge(base, [adapter], tmp_path / f"{name}-small", threads=1)
        assert models.tensor_hashes(tmp_path / name) == models.tensor_hashes(tmp_path / f"{name}-small")


def test_vera_without_its_projections(tmp_path):
    """They would be drawn at random again."""
    from peft import VeraConfig

    with kinds.quiet():
        model = kinds.wrapped(VeraConfig(r=8, target_modules=LINEAR, save_projection=False))
    adapter = kinds.write_by_peft(model, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="save_projection"):
        load_adapter(adapter)


def edited(adapter, target, *, drop=(), change=None, config=None):
    """A copy of an adapter with something wrong about it."""
    target.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(tuple(drop) or "\0")}
    tensors = {
        key: (change or (lambda key, tensor: tensor))(key, tensor).contiguous() for key, tensor in tensors.items()
    }
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(kinds.config_of(adapter) | (config or {})))
    return target


@pytest.mark.parametrize(("name", "role"), [
    ("adalora", "up.lora_E"), ("loha", "up.hada_w2_b"), ("loha-cores", "conv.hada_t2"), ("lokr", "up.lokr_w1"),
    ("lokr-cores", "up.lokr_w2_b"), ("vera", "up.vera_lambda_d"), ("vera", "base_model.vera_B"),
])  # fmt: skip
def test_a_missing_tensor_is_named(made, tmp_path, name, role):
    """Never read as something else."""
    with pytest.raises((MalformedError, MismatchError)) as caught:
        load_adapter(edited(made(name)[1], tmp_path / "x", drop=[role]))
    assert role.rpartition(".")[2].removesuffix("_b") in str(caught.value)


@pytest.mark.parametrize("name", ["adalora", "miss", "loha-cores", "lokr-cores", "vera"])
def test_nan_is_an_error(made, tmp_path, name):
    """With the tensor's name."""
    _, adapter, base = made(name)

    def damage(key, tensor):
        return torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 1, torch.nan, tensor)

    with pytest.raises(NonFiniteError, match=r"lora_|miss_block|hada_|lokr_|vera_"):
        merge(base, [edited(adapter, tmp_path / "x", change=damage)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "config"), [
    ("miss", {"init_weights": "wide"}), ("adalora", {"layer_replication": [[0, 1]]}),
    ("adalora", {"rank_pattern": {"block.up.lora_E": 3}}), ("adalora", {"init_r": 0}), ("loha", {"alpha": "8"}),
    ("lokr", {"peft_type": "LOHA"}), ("miss", {"init_weights": "bat"}), ("miss-bat", {"init_weights": True}),
])  # fmt: skip
def test_a_configuration_that_says_otherwise_is_refused(made, tmp_path, name, config):
    """Named rather than guessed."""
    with pytest.raises(LoratoolsError) as caught:
        load_adapter(edited(made(name)[1], tmp_path / "x", config=config))
    assert isinstance(caught.value, (UnsupportedError, MalformedError, MismatchError))


@pytest.mark.parametrize("name", ["adalora", "miss", "miss-bat", "miss-mini", "loha", "lokr", "vera"])
def test_another_base_is_refused(made, tmp_path, name):
    """Shapes that do not fit, kinds that take the weight's shape included."""
    _, adapter, base = made(name)
    tensors = models.tensors_of(base)
    tensors["block.up.weight"] = torch.zeros(37, 25)
    models.write_checkpoint(tmp_path / "other", tensors)
    with pytest.raises(MismatchError, match="shape"):
        merge(tmp_path / "other", [adapter], tmp_path / "out")


def test_what_one_configuration_cannot_say_is_refused(made, tmp_path):
    """AdaLoRA's alpha and MiSS' rank are one for all modules."""
    _, adapter, _ = made("adalora")
    with pytest.raises(UnsupportedError, match="lora_alpha"):
        rescale(adapter, tmp_path / "out", by=2, include=["head"])

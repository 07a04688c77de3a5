"""IA3, OFT, BOFT, HRA, FourierFT, SHiRA, C3A, LN tuning: PEFT writes, we merge, take out, write again; PEFT judges."""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import load_adapter
from loratools.adapters.actions import Region
from loratools.engine import planning
from loratools.engine.context import Settings
from loratools.errors import LoratoolsError, MalformedError, MismatchError, NonFiniteError, UnsupportedError
from loratools.files import save
from loratools.formats.peft.tuners.oft import adjusted
from loratools.verbs.inspect import inspect
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.interop import kinds_b
from tests.interop.judge import load_cleanly
from tests.tiny import rounded

SAID_BY_PEFT = {
    "ia3-others": (),
    "ia3": ("Setting fan_in_fan_out to",),  # it has one flag, and corrects it layer by layer
    "oft-adjusted": ("Adjusted `oft_block_size`",),
    "boft": ("CUDA extension", "Setting boft_n_butterfly_factor to 1"),
    "hra": ("symmetric initialization",),
    "hra-gs": (),
    "ln": ("Unsupported layer type",),
}
"""What it says of such adapters of its own, too."""


@pytest.fixture
def made(tmp_path):
    """Base and adapter of a case: `made(name, dtype)`."""

    def make(name, dtype="fp32", **how):
        base = kinds_b.write_base(tmp_path / f"base-{dtype}", dtype) if not (tmp_path / f"base-{dtype}").exists() else (
            tmp_path / f"base-{dtype}"
        )  # fmt: skip
        model = kinds_b.wrapped(kinds_b.case(name), dtype, **how)
        return base, kinds_b.write_by_peft(model, tmp_path / f"{name}-{dtype}"), model

    return make


def assert_exact(merged, before, exact):
    """Every changed tensor is its exact W' rounded once, every other one the base's bytes."""
    for name, tensor in merged.items():
        if name not in exact:
            assert torch.equal(tensor, before[name]), name
            continue
        assert not torch.equal(tensor, before[name]), name
        once = rounded(exact[name], tensor.dtype)
        largest = (
            torch.stack([tensor.double(), before[name].double(), (exact[name] - before[name].double())]).abs().amax(0)
        )
        off = (tensor.double() - once.double()).abs()
        assert bool((off <= models.ulp(largest, tensor.dtype)).all()), name
        assert int((off > 0).sum()) <= 1e-3 * off.numel() + 1, name  # a value so near the middle of two


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", kinds_b.CASES)
def test_merge_and_way_back(made, tmp_path, name, dtype):
    """W' is the formula's in float64, rounded once; unmerge with the base gives every byte back."""
    base, adapter, _ = made(name, dtype)
    report = merge(base, [adapter], tmp_path / "merged")
    before = models.tensors_of(base)
    exact = kinds_b.exact(adapter, before)
    assert {module["name"] for module in report.modules} == set(exact)
    assert_exact(models.tensors_of(tmp_path / "merged"), before, exact)
    unmerge(tmp_path / "merged", tmp_path / "back", adapters=[adapter], base=base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", kinds_b.CASES)
def test_against_peft(made, tmp_path, name, dtype):
    """PEFT's merge_and_unload: in fp32 its own rounding errors away, in bf16 one ulp of the largest of W, W' and ΔW.

    Where PEFT rounds ΔW to bf16 first (C3A, SHiRA on a bf16 base), two.
    """
    base, adapter, model = made(name, dtype)
    merge(base, [adapter], tmp_path / "merged")
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    ours, before = models.tensors_of(tmp_path / "merged"), models.tensors_of(base)
    assert set(ours) == set(theirs)
    for tensor_name, tensor in ours.items():
        W, V = before[tensor_name].double(), theirs[tensor_name]
        assert V.dtype == tensor.dtype
        largest = torch.stack([tensor.double().abs(), W.abs(), (tensor.double() - W).abs()]).amax(0)
        if dtype == "fp32":
            scale = float(W.abs().max()) if W.numel() else 1.0
            assert (tensor - V).abs().max() <= 2e-6 * max(scale, float(largest.max())), tensor_name
        else:
            steps = (tensor.double() - V.double()).abs() / models.ulp(largest, tensor.dtype)
            assert steps.max() <= (2 if name in {"c3a", "shira"} else 1), tensor_name


@pytest.mark.parametrize("name", kinds_b.CASES)
def test_round_trip(made, tmp_path, name):
    """What we write has the tensors that we read, PEFT loads it without a word, and computes the same."""
    _, adapter, model = made(name)
    loaded = load_adapter(adapter)
    assert {update.kind for update in loaded.values()} == kinds_b.kinds_of(name)
    save(loaded, tmp_path / "written")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "written"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert dict(load_adapter(tmp_path / "written")).keys() == dict(loaded).keys()
    before, after = (kinds_b.config_of(path) for path in (adapter, tmp_path / "written"))
    assert after["peft_type"] == before["peft_type"]
    save(load_adapter(tmp_path / "written"), tmp_path / "again")
    assert kinds_b.config_of(tmp_path / "again") == after
    expected = SAID_BY_PEFT.get(name, SAID_BY_PEFT.get(name.split("-")[0], ()))
    theirs = load_cleanly(kinds_b.net(), tmp_path / "written", expected=expected)
    x = kinds_b.images()
    assert torch.equal(theirs(x), model(x))


@pytest.mark.parametrize("name", kinds_b.CASES)
def test_inspect(made, name):
    """The kind stands in the report."""
    _, adapter, _ = made(name)
    report = json.loads(json.dumps(inspect(adapter).to_json()))
    assert {row["kind"] for row in report["modules"]} == kinds_b.kinds_of(name)


@pytest.mark.parametrize("name", kinds_b.CASES)
def test_a_weight_goes_that_far_from_the_base(made, tmp_path, name):
    """-w: W + w (W' − W)."""
    base, adapter, _ = made(name)
    merge(base, [adapter], tmp_path / "merged", weights=[-0.5])
    before = models.tensors_of(base)
    exact = {key: before[key].double() - 0.5 * (W - before[key].double())
             for key, W in kinds_b.exact(adapter, before).items()}  # fmt: skip
    assert_exact(models.tensors_of(tmp_path / "merged"), before, exact)


LINEAR = ("fourierft", "fourierft-conv1d", "shira", "c3a")
"""Kinds whose ΔW is linear in one tensor."""


@pytest.mark.parametrize("name", LINEAR)
def test_multiples_and_sums_of_what_is_linear(made, tmp_path, name):
    """Rescaled, and added to itself, an adapter of these kinds is one of them, by the formula on the new file."""
    base, adapter, _ = made(name)
    before = models.tensors_of(base)
    rescale(adapter, tmp_path / "more", by=-0.3)
    stack([adapter, adapter], tmp_path / "sum", weights=[0.7, -1.5])
    multiples = {"more": -0.3, "sum": 0.7 - 1.5}
    once = kinds_b.exact(adapter, before)
    for place, factor in multiples.items():
        assert models.config_of(tmp_path / place)["peft_type"] == models.config_of(adapter)["peft_type"]
        for key, found in kinds_b.exact(tmp_path / place, before).items():
            delta = once[key] - before[key].double()
            assert (found - before[key].double() - factor * delta).norm() <= 1e-6 * delta.norm(), key


@pytest.mark.parametrize("name", sorted(set(kinds_b.CASES) - set(LINEAR)))
def test_algebra_is_refused_by_name(made, tmp_path, name):
    """A part of a rotation is no rotation: stack, rescale, norms, truncation, restated alphas; nothing is written."""
    base, adapter, _ = made(name)
    loaded = load_adapter(adapter)
    kind = min(kinds_b.kinds_of(name))
    named = "replaced whole" if name == "ln" else f"{kind}|replaced whole"
    for attempt in (
        lambda: stack([adapter, adapter], tmp_path / "out"),
        lambda: stack([adapter, adapter], tmp_path / "out", base=base),
        lambda: rescale(adapter, tmp_path / "out", by=2),
        lambda: loaded + loaded,
    ):
        with pytest.raises(UnsupportedError, match=named) as caught:
            attempt()
        assert "--base" not in str(caught.value)  # which would not help
    if name != "ln":
        for attempt in (
            lambda: rescale(adapter, tmp_path / "out", restate_alpha=3),
            loaded.norm,
            lambda: loaded.truncate(rank=2),
        ):
            with pytest.raises(UnsupportedError, match=kind):
                attempt()
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_kinds_at_once(made, tmp_path):
    """Every change is relative to the base: W + Σ w_i (W'_i − W), not one after the other."""
    names, weights = ["hra", "oft", "ia3", "shira", "fourierft", "boft-conv"], [1.0, 0.5, -0.25, 2.0, 1.5, 0.75]
    adapters = [made(name)[1] for name in names]
    base = made("hra")[0]
    merge(base, adapters, tmp_path / "merged", weights=weights)
    before = models.tensors_of(base)
    exact = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, moved in kinds_b.exact(adapter, before).items():
            W = before[key].double()
            exact[key] = exact.get(key, W) + weight * (moved - W)
    assert_exact(models.tensors_of(tmp_path / "merged"), before, exact)
    unmerge(tmp_path / "merged", tmp_path / "back", adapters=adapters, weights=weights, base=base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


@pytest.mark.parametrize("name", kinds_b.CASES)
def test_threads_and_tiles_do_not_show(made, tmp_path, monkeypatch, name):
    """Law 2: a row at a time, some rows, all of them."""
    base, adapter, _ = made(name)
    seen = set()
    for threads, tile in ((1, None), (3, 1), (2, 700)):
        if tile:
            monkeypatch.setattr(planning, "Settings", functools.partial(Settings, tile_bytes=tile))
        merge(base, [adapter], tmp_path / f"{threads}", threads=threads)
        seen.add(str(models.tensor_hashes(tmp_path / f"{threads}")))
        monkeypatch.undo()
    assert len(seen) == 1


def test_plans_know_what_needs_the_whole_weight(made, tmp_path):
    """FourierFT holds W, the sum, the spectrum, its half and ΔW in float64; a block of OFT seven of its size."""
    base, adapter, _ = made("fourierft")
    units = {unit.target: unit for unit in plan_merge(base, [adapter], tmp_path / "out").units}
    assert units["block.up.weight"].parameters["at_once"]
    assert units["block.up.weight"].peak_bytes >= 5 * 8 * 24 * 36
    n = 300
    base = models.write_checkpoint(tmp_path / "wide", {"block.up.weight": torch.zeros(2, n)})
    block = {"base_model.model.block.up.oft_R.weight": torch.zeros(1, n * (n - 1) // 2)}
    adapter = edited(made("oft")[1], tmp_path, tensors=lambda _: block)
    (unit,) = [each for each in plan_merge(base, [adapter], tmp_path / "out").units if each.operation == "merge"]
    assert not unit.parameters["at_once"]
    assert unit.peak_bytes >= 7 * 8 * n * n


@pytest.mark.parametrize("name", ["oft", "oft-share", "boft", "hra", "hra-gs"])
def test_rows_do_not_depend_on_tiles(made, name):
    """Not even before they are rounded: the same 64 bits, wherever a tile of rows begins and ends."""
    update = load_adapter(made(name)[1])["block.up"]
    base = torch.randn(36, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if name != "boft":
        base = base.repeat(9, 1) * torch.arange(1, 325, dtype=torch.float64)[:, None].sqrt()
    action, columns = update.action(), slice(0, 24)
    whole = action.change(base, Region(slice(0, len(base)), columns))
    for step in (1, 5, 17, 64, 100):
        pieces = [
            action.change(base[first : first + step], Region(slice(first, min(first + step, len(base))), columns))
            for first in range(0, len(base), step)
        ]
        assert torch.equal(torch.cat(pieces), whole), step


def test_without_the_base_nothing_is_taken_out(made, tmp_path):
    """W cannot be computed from W' by subtraction."""
    base, adapter, _ = made("oft")
    merge(base, [adapter], tmp_path / "merged", receipt="none")
    with pytest.raises(UnsupportedError, match="--base"):
        unmerge(tmp_path / "merged", tmp_path / "back", adapters=[adapter])


def test_delta_weight(made):
    """In Python: W' − W for a given W; a base is demanded where the change or its shape depends on it."""
    base, adapter, _ = made("oft")
    update = load_adapter(adapter)["block.up"]
    before = models.tensors_of(base)["block.up.weight"]
    exact = kinds_b.exact(adapter, models.tensors_of(base))["block.up.weight"] - before.double()
    assert (update.delta_weight(before) - exact).abs().max() < 1e-7
    for name in ("oft", "fourierft", "shira", "ia3"):
        update = load_adapter(made(name)[1])["block.up"]
        with pytest.raises(UnsupportedError, match=update.kind):
            update.delta_weight()


def edited(adapter, tmp_path, *, tensors=None, **fields):
    """A copy of an adapter with other fields in its configuration and other tensors; None removes a field."""
    config = kinds_b.config_of(adapter)
    config = {key: value for key, value in {**config, **fields}.items() if value is not None or key not in fields}
    directory = tmp_path / f"edited-{len(list(tmp_path.iterdir()))}"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors(stored) if tensors else stored, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("terms", range(1, 9))
def test_oft_series_of_any_length(made, tmp_path, terms):
    """PEFT's series of one to eight terms, three and four of which are the same."""
    base, adapter, _ = made("oft")
    changed = edited(adapter, tmp_path, num_cayley_neumann_terms=terms)
    model = load_cleanly(kinds_b.net(), changed)
    merge(base, [changed], tmp_path / "merged")
    ours, theirs = models.tensors_of(tmp_path / "merged"), model.merge_and_unload().state_dict()
    assert (ours["block.up.weight"] - theirs["block.up.weight"]).abs().max() < 1e-6
    if terms > 1:
        before = models.tensors_of(base)
        assert_exact(ours, before, kinds_b.exact(changed, before))


@pytest.mark.parametrize("version", [None, "0.17.1", "0.9.0", "dev"])
def test_oft_of_other_versions_is_refused(made, tmp_path, version):
    """The series was another one before 0.18; the exact transform was not. oft_r and no oft_block_size: before 0.14."""
    _, adapter, _ = made("oft")
    with pytest.raises(UnsupportedError, match=r"before PEFT 0\.18"):
        load_adapter(edited(adapter, tmp_path, peft_version=version))
    assert load_adapter(edited(adapter, tmp_path, peft_version=version, use_cayley_neumann=False))
    with pytest.raises(UnsupportedError, match=r"before 0\.14"):
        load_adapter(edited(adapter, tmp_path, oft_block_size=None))
    old = lambda stored: {key.replace("oft_R.weight", "oft_r"): tensor for key, tensor in stored.items()}
    with pytest.raises(UnsupportedError, match=r"before 0\.14"):
        load_adapter(edited(adapter, tmp_path, tensors=old))


def test_oft_block_sizes_that_peft_adjusts():
    """`adjusted` is PEFT's rule."""
    from peft.tuners.oft.layer import OFTLayer

    for columns in range(2, 40):
        for number in range(1, 45):
            assert adjusted(columns, number) == OFTLayer.adjust_oft_parameters(None, columns, number)


def butterfly(*shape):
    """Another boft_R of the matrix with 24 columns."""

    def changed(stored):
        blocks = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
        mine = {key: tensor for key, tensor in stored.items() if ".up." in key}
        return {key: blocks if key.endswith("boft_R") else tensor for key, tensor in mine.items()}

    return changed


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 2, 12, 12), (3, 12, 2, 2), (3, 4, 6, 6)])
def test_boft_with_more_than_one_factor(made, tmp_path, shape):
    """PEFT makes them where its CUDA extension compiles; the formula, with PEFT's own permutations, is the judge."""
    base, adapter, _ = made("boft")
    changed = edited(adapter, tmp_path, tensors=butterfly(*shape), boft_n_butterfly_factor=shape[0])
    before = models.tensors_of(base)
    merge(base, [changed], tmp_path / "merged")
    assert_exact(models.tensors_of(tmp_path / "merged"), before, kinds_b.exact(changed, before))
    save(load_adapter(changed), tmp_path / "written")
    assert kinds_b.config_of(tmp_path / "written")["boft_n_butterfly_factor"] == shape[0]


def test_boft_that_does_not_fit(made, tmp_path):
    """Blocks whose number or size is no butterfly's are refused; a configuration that says another number is noted."""
    _, adapter, _ = made("boft")
    for shape in ((3, 6, 4, 4), (2, 8, 3, 3)):
        with pytest.raises(MismatchError, match="butterfly"):
            load_adapter(edited(adapter, tmp_path, tensors=butterfly(*shape)))
    notes = load_adapter(edited(adapter, tmp_path, tensors=butterfly(2, 6, 4, 4))).notes
    assert any("butterfly factors" in note for note in notes)


def test_ia3_feedforward(made, tmp_path):
    """By list of any ends, by expression, or by the shape alone; a contradiction is an error."""
    base, adapter, _ = made("ia3")
    merge(base, [adapter], tmp_path / "one")
    only = lambda stored: {key: tensor for key, tensor in stored.items() if "conv" not in key and "point" not in key}
    for index, value in enumerate((["wn"], "block[.](down|none)", None)):
        changed = edited(adapter, tmp_path, tensors=only, feedforward_modules=value)
        merge(base, [changed], tmp_path / f"merged{index}")
        ours, first = models.tensors_of(tmp_path / f"merged{index}"), models.tensors_of(tmp_path / "one")
        assert all(torch.equal(ours[key], first[key]) for key in ours if "block" in key or "old" in key)
    with pytest.raises(MalformedError, match="feedforward"):
        load_adapter(edited(adapter, tmp_path, feedforward_modules=["up", "point"]))
    with pytest.raises(MalformedError, match="feedforward_modules"):
        load_adapter(edited(adapter, tmp_path, feedforward_modules=None))


class Ends(torch.nn.Module):
    """Modules whose paths end alike."""

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(3, 5)
        self.xlin = torch.nn.Linear(5, 7)
        self.block = torch.nn.ModuleDict({"lin": torch.nn.Linear(7, 4)})

    def forward(self, x):
        return self.block["lin"](torch.tanh(self.xlin(torch.tanh(self.lin(x)))))


@pytest.mark.parametrize(
    "config",
    [
        lambda peft: peft.IA3Config(target_modules=["lin", "xlin"], feedforward_modules="lin"),
        lambda peft: peft.FourierFTConfig(
            target_modules=["lin", "xlin"], n_frequency=5, n_frequency_pattern={"block.lin": 7, "xlin": 7}
        ),
    ],
)
def test_paths_that_end_alike(tmp_path, config):
    """What one name in a list or a pattern would catch too is written so that PEFT tells the modules apart."""
    import peft

    torch.manual_seed(0)
    net = Ends().eval()
    model = peft.get_peft_model(copy.deepcopy(net), config(peft)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) if parameter.requires_grad else 0)
    model.save_pretrained(tmp_path / "theirs")
    save(load_adapter(tmp_path / "theirs"), tmp_path / "ours")
    x = torch.randn(2, 3)
    assert torch.equal(load_cleanly(copy.deepcopy(net), tmp_path / "ours")(x), model(x))


def test_ia3_of_grouped_convolutions(tmp_path):
    """Scaled outputs are merged as PEFT does; scaled inputs are refused by name."""
    from peft import IA3Config, get_peft_model

    class Grouped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 6, 2, groups=2)

        def forward(self, x):
            return self.conv(x)

    def written(name, feedforward):
        torch.manual_seed(0)
        net = Grouped()
        base = models.write_checkpoint(tmp_path / f"{name}-base", net.state_dict())
        model = get_peft_model(net, IA3Config(target_modules=["conv"], feedforward_modules=feedforward))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) if parameter.requires_grad else 0)
        model.save_pretrained(tmp_path / name)
        return base, tmp_path / name, model

    base, adapter, model = written("outputs", [])
    merge(base, [adapter], tmp_path / "merged")
    ours, theirs = models.tensors_of(tmp_path / "merged"), model.merge_and_unload().state_dict()
    assert all((ours[key] - theirs[key]).abs().max() < 1e-6 for key in theirs)
    base, adapter, _ = written("inputs", ["conv"])
    with pytest.raises(UnsupportedError, match="groups"):
        merge(base, [adapter], tmp_path / "refused")


def test_what_cannot_be_is_an_error(made, tmp_path):
    """Directions of length zero, indices outside the weight, NaN, missing tensors, another base."""
    base, hra, _ = made("hra")

    def zero(stored):
        for tensor in stored.values():
            tensor[:, 2] = 0
        return stored

    with pytest.raises(NonFiniteError, match="Direction 2"):
        merge(base, [edited(hra, tmp_path, tensors=zero)], tmp_path / "merged")
    _, shira, _ = made("shira")
    for value in (-1, 36):

        def outside(stored, value=value):
            return {key: tensor.index_fill(1, torch.tensor([0]), value) if "indices" in key else tensor
                    for key, tensor in stored.items()}  # fmt: skip

        with pytest.raises(MismatchError, match="index"):
            merge(base, [edited(shira, tmp_path, tensors=outside)], tmp_path / "merged")
    with pytest.raises(MalformedError, match="shira_indices"):
        load_adapter(edited(shira, tmp_path, tensors=lambda stored: {k: v for k, v in stored.items() if "weight" in k}))
    for name in ("ia3", "oft", "boft", "fourierft", "c3a"):
        _, adapter, _ = made(name)
        nan = lambda stored: {key: torch.full_like(tensor, float("nan")) for key, tensor in stored.items()}
        with pytest.raises(NonFiniteError):
            merge(base, [edited(adapter, tmp_path, tensors=nan)], tmp_path / "merged")
    wide = {key: torch.cat([tensor, tensor], -1) for key, tensor in models.tensors_of(base).items()}
    other = models.write_checkpoint(tmp_path / "other", wide)
    for name in ("ia3", "oft", "boft", "hra", "shira", "c3a"):
        with pytest.raises(LoratoolsError):
            merge(other, [made(name)[1]], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

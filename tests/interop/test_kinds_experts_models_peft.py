"""PEFT's `target_parameters` on the experts of real models: PEFT writes, we merge on disk; PEFT and float64 judge."""

import pytest
import torch

import loratools as lt
from loratools.adapters.experts import Stacked
from loratools.errors import MalformedError, MismatchError, UndecidedError, UnsupportedError
from tests import models
from tests.interop import judge, moe

PARAMETERS = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": BOTH}
VARIANTS = {
    "plain": COMMON,
    "rslora": {**COMMON, "use_rslora": True},
    "patterns": {
        **COMMON,
        "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 5},
        "alpha_pattern": {"down_proj": 7},
    },
    "one": {**COMMON, "target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """family, variant, dtype → (base, adapter, PEFT's model), made once each."""
    made = {}

    def get(family, variant="plain", dtype="fp32", **changes):
        key = (family, variant, dtype, tuple(changes.items()))
        if key not in made:
            place = tmp_path_factory.mktemp("moe")
            base = moe.base(family, place / "base", dtype, **changes)
            wrapped = moe.write_by_peft(models.load(base), place / "adapter", **VARIANTS[variant])
            made[key] = base, place / "adapter", wrapped
        return made[key]

    return get


def targeted(variant):
    return [each for each in PARAMETERS if any(each.endswith(name) for name in VARIANTS[variant]["target_parameters"])]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", moe.FAMILIES)
def test_merge_is_one_rounding_and_near_pefts(family, variant, written, tmp_path):
    """Every expert's piece is W + ΔW in float64 rounded once; PEFT's own merge, saved by transformers, has the same
    names and the same values to its rounding of ΔW; all that is not targeted keeps its bits."""
    base, adapter, wrapped = written(family, variant)
    lt.merge(base, [adapter], tmp_path / "ours")
    ours, theirs = models.tensors_of(tmp_path / "ours"), moe.merged_on_disk(wrapped, tmp_path / "theirs")
    assert set(ours) == set(theirs) == set(models.tensors_of(base))
    moe.assert_one_rounding(ours, family, wrapped, targeted(variant))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-6), name
    if family in moe.STORED_APART:
        assert any(name.endswith(moe.STORED_APART[family]) for name in ours)


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_bf16_is_rounded_once_and_comes_back(family, written, tmp_path):
    """In bf16 too, where PEFT rounds ΔW first; the base comes back bit for bit, with it and checked."""
    base, adapter, wrapped = written(family, "patterns", "bf16")
    lt.merge(base, [adapter], tmp_path / "ours")
    moe.assert_one_rounding(models.tensors_of(tmp_path / "ours"), family, wrapped, PARAMETERS)
    lt.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[adapter], base=base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_unmerge_without_the_base_subtracts(family, written, tmp_path):
    base, adapter, _ = written(family, "plain")
    lt.merge(base, [adapter], tmp_path / "ours", weights=[-0.5])
    lt.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[adapter], weights=[-0.5])
    before, after = models.tensors_of(base), models.tensors_of(tmp_path / "back")
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", moe.FAMILIES)
def test_what_we_write_peft_loads(family, variant, written, tmp_path):
    """Read and written again: PEFT loads it without a missing or unexpected key or a word, and computes the same.

    PEFT 0.21 says of every pattern for a parameter that it matches no module, of its own files too, and applies it.
    """
    base, adapter, wrapped = written(family, variant)
    lt.save(lt.load_adapter(adapter), tmp_path / "again")
    expected = ("rank_pattern keys did not", "alpha_pattern keys did not") if variant == "patterns" else ()
    if expected:
        judge.load_cleanly(models.load(base), adapter, expected=expected)
    loaded = judge.load_cleanly(models.load(base), tmp_path / "again", expected=expected)
    assert torch.equal(models.output_of(loaded), models.output_of(wrapped))
    assert models.factors_of(tmp_path / "again").keys() == models.factors_of(adapter).keys()


def test_inspect_tells_ranks_and_experts(written):
    _, adapter, _ = written("qwen2_moe", "patterns")
    rows = {row.name: row for row in lt.inspect(adapter).modules}
    gate_up, down = rows[PARAMETERS[2]], rows[PARAMETERS[1]]
    assert (gate_up.kind, gate_up.rank, gate_up.alpha) == ("experts", 5, 5)
    assert gate_up.shape == (moe.EXPERTS, 2 * moe.INTERMEDIATE, moe.HIDDEN)
    assert (down.rank, down.alpha) == (3, 7)
    assert down.shape == (moe.EXPERTS, moe.HIDDEN, moe.INTERMEDIATE)


def test_delta_weight_is_pefts(written):
    base, adapter, wrapped = written("mixtral")
    update = lt.load_adapter(adapter)[PARAMETERS[1]]
    layer = dict(wrapped.named_modules())["base_model.model.model.layers.0.mlp.experts"]
    assert layer.parameter_name == "down_proj"
    assert torch.allclose(update.delta_weight(), layer.get_delta_weight("default"), atol=1e-7)
    del base


class TestEras:
    """The layouts of PEFT 0.17–0.18, 0.19.0 and since."""

    def prefixes(self):
        start = "base_model.model.model.layers"
        return {f"{start}.{layer}.mlp.experts{level}": moe.EXPERTS for layer in (0, 1) for level in ("", ".base_layer")}

    @pytest.mark.parametrize("version", [None, "0.17.0", "0.18.1", "0.19.0"])
    @pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
    def test_shapes_tell_the_old_layout(self, family, version, written, tmp_path):
        base, adapter, _ = written(family)
        old = moe.other_era(adapter, tmp_path / "old", self.prefixes(), version)
        lt.merge(base, [adapter], tmp_path / "new-merged")
        lt.merge(base, [old], tmp_path / "old-merged")
        assert models.tensor_hashes(tmp_path / "new-merged") == models.tensor_hashes(tmp_path / "old-merged")

    @pytest.mark.parametrize("version", ["0.17.0", "0.18.1", "0.19.0"])
    def test_the_version_tells_where_matrices_are_square(self, version, written, tmp_path):
        """hidden = 2 · intermediate makes gate_up_proj square; down_proj is not."""
        base, adapter, wrapped = written("mixtral", hidden_size=32, intermediate_size=16)
        old = moe.other_era(adapter, tmp_path / "old", self.prefixes(), version)
        lt.merge(base, [old], tmp_path / "merged")
        moe.assert_one_rounding(models.tensors_of(tmp_path / "merged"), "mixtral", wrapped, PARAMETERS)

    def test_square_without_a_version_is_undecided(self, written, tmp_path):
        base, adapter, _ = written("mixtral", hidden_size=32, intermediate_size=16)
        for version in (None, "0.19.1.dev0", "who knows"):
            odd = moe.other_era(adapter, tmp_path / str(version), self.prefixes(), version)
            with pytest.raises(UndecidedError, match="peft_version"):
                lt.merge(base, [odd], tmp_path / "merged")

    @pytest.mark.parametrize("version", ["0.18.1", "0.19.1"])
    def test_square_and_transposed(self, version, written, tmp_path):
        """GPT-OSS keeps (in, out): 0.17–0.18 and 0.19.1 agree on it, 0.19.0 has the sides exchanged."""
        base, adapter, wrapped = written("gpt_oss", hidden_size=32, intermediate_size=32)
        models.write_adapter(tmp_path / "said", models.factors_of(adapter),
                             {**models.config_of(adapter), "peft_version": version})  # fmt: skip
        lt.merge(base, [tmp_path / "said"], tmp_path / "merged")
        moe.assert_one_rounding(models.tensors_of(tmp_path / "merged"), "gpt_oss", wrapped, PARAMETERS)
        turned = moe.other_era(adapter, tmp_path / "turned", self.prefixes(), "0.19.0")
        lt.merge(base, [turned], tmp_path / "again")
        assert models.tensor_hashes(tmp_path / "again") == models.tensor_hashes(tmp_path / "merged")

    def test_square_in_an_unknown_family_is_undecided(self, written, tmp_path):
        base, adapter, _ = written("gpt_oss", hidden_size=32, intermediate_size=32)
        unknown = models.write_checkpoint(tmp_path / "base", models.tensors_of(base), {"model_type": "new"})
        with pytest.raises(UndecidedError, match="model_type"):
            lt.merge(unknown, [adapter], tmp_path / "merged")

    def test_an_old_layout_is_written_as_one(self, written, tmp_path):
        """Without a base nothing says how the module keeps its matrices: the layout stays, and the version with it."""
        _, adapter, _ = written("mixtral")
        old = moe.other_era(adapter, tmp_path / "old", self.prefixes(), "0.18.1")
        lt.save(lt.load_adapter(old), tmp_path / "again")
        again = lt.load_adapter(tmp_path / "again")
        assert {update.layout for update in again.values() if isinstance(update, Stacked)} == {"0.17"}
        before, after = models.factors_of(old), models.factors_of(tmp_path / "again")
        assert all(torch.equal(before[key], after[key]) for key in before)


class Blocks(torch.nn.Module):
    """Parameters of three and of two axes, under names that no model of transformers has."""

    def __init__(self, zeta=(3, 5, 7), alpha=(3, 9, 4), *, square=False):
        super().__init__()
        inner = torch.nn.Module()
        inner.zeta = torch.nn.Parameter(torch.randn(*zeta))
        inner.alpha = torch.nn.Parameter(torch.randn(*(zeta if square else alpha)))
        inner.flat = torch.nn.Parameter(torch.randn(6, 11))
        self.inner = inner

    def forward(self, x):
        return x


@pytest.fixture
def plain(tmp_path):
    """A plain module, its checkpoint, and what PEFT wrote for it."""

    def make(names, **shapes):
        torch.manual_seed(3)
        model = Blocks(**shapes)
        base = models.write_checkpoint(tmp_path / "base", model.state_dict())
        wrapped = moe.write_by_peft(model, tmp_path / "adapter", r=2, lora_alpha=3, target_modules=[],
                                    target_parameters=names)  # fmt: skip
        return base, tmp_path / "adapter", wrapped

    return make


def test_names_nobody_knows_are_told_by_shapes(plain, tmp_path):
    """zeta is registered first and sorts last; with the base, shapes tell which wrapper is whose."""
    base, adapter, wrapped = plain(["inner.alpha", "inner.zeta", "inner.flat"])
    with pytest.raises(UndecidedError, match="base"):
        lt.load_adapter(adapter)
    lt.merge(base, [adapter], tmp_path / "merged")
    theirs = wrapped.merge_and_unload().state_dict()
    ours = models.tensors_of(tmp_path / "merged")
    before = models.tensors_of(base)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-6), name
        assert not torch.equal(ours[name], before[name])
    loaded = lt.load_adapter(adapter, base=base)
    assert loaded["inner.flat"].kind == "low-rank"
    lt.save(loaded, tmp_path / "again")
    model = judge.load_cleanly(Blocks(), tmp_path / "again")
    written = models.factors_of(adapter)
    assert {key: tensor.shape for key, tensor in models.factors_of(tmp_path / "again").items()} == {
        key: tensor.shape for key, tensor in written.items()
    }
    del model


def test_equal_shapes_and_unknown_names_are_undecided(plain, tmp_path):
    base, adapter, _ = plain(["inner.alpha", "inner.zeta"], square=True)
    with pytest.raises(UndecidedError, match="alpha"):
        lt.merge(base, [adapter], tmp_path / "merged")


def test_a_listed_parameter_that_the_module_lacks(plain, tmp_path):
    """PEFT skips it in silence, as long as something matches; the base tells that it is not there."""
    base, adapter, wrapped = plain(["inner.zeta", "inner.missing"])
    lt.merge(base, [adapter], tmp_path / "merged")
    theirs = wrapped.merge_and_unload().state_dict()
    assert torch.allclose(models.tensors_of(tmp_path / "merged")["inner.zeta"], theirs["inner.zeta"], atol=1e-6)


class TestRefused:
    def damaged(self, adapter, directory, change, **config):
        tensors = models.factors_of(adapter)
        change(tensors)
        return models.write_adapter(directory, tensors, {**models.config_of(adapter), **config})

    def test_a_rank_that_does_not_divide(self, written, tmp_path):
        _, adapter, _ = written("mixtral")
        odd = self.damaged(adapter, tmp_path / "odd", lambda tensors: None, r=7)
        with pytest.raises(MalformedError, match="experts"):
            lt.load_adapter(odd)

    def test_another_number_of_experts(self, written, tmp_path):
        """A wrong r that divides gives another number of experts, which the base does not have."""
        base, adapter, _ = written("mixtral", "one")
        odd = self.damaged(adapter, tmp_path / "odd", lambda tensors: None, r=6)
        with pytest.raises(MismatchError, match="experts"):
            lt.merge(base, [odd], tmp_path / "merged")

    def test_a_wrapper_that_is_missing(self, written, tmp_path):
        _, adapter, _ = written("mixtral")

        def drop(tensors):
            for key in [key for key in tensors if "layers.0.mlp.experts.lora_" in key]:
                del tensors[key]

        with pytest.raises(MalformedError, match="wrapper"):
            lt.load_adapter(self.damaged(adapter, tmp_path / "odd", drop))

    def test_a_magnitude_on_a_parameter(self, written, tmp_path):
        _, adapter, _ = written("mixtral")

        def add(tensors):
            tensors["base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector"] = torch.ones(3)

        with pytest.raises(UnsupportedError, match="magnitude"):
            lt.load_adapter(self.damaged(adapter, tmp_path / "odd", add))

    def test_one_expert_is_another_checkpoints(self, written, tmp_path):
        """The factors of another number of experts, or a base whose experts are not all there."""
        base, adapter, _ = written("qwen2_moe")
        tensors = models.tensors_of(base)
        fewer = {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name}
        small = models.write_checkpoint(tmp_path / "small", fewer, models.config_of(base, "config.json"))
        with pytest.raises(MismatchError, match="experts"):
            lt.merge(small, [adapter], tmp_path / "merged")

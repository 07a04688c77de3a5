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


SHAPES = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}


class TestOneByOne:
    """Adapters from before transformers 5, a LoRA layer for every expert's matrix, on a base that stacks them."""

    def made(self, directory, names=("gate_proj", "up_proj", "down_proj"), experts=(0, 2), **changes):
        generator = torch.Generator().manual_seed(5)
        base = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 48, 32, generator=generator).bfloat16(),
                "model.layers.0.mlp.experts.down_proj": torch.randn(4, 32, 24, generator=generator).bfloat16(),
                "model.norm.weight": torch.ones(32)}  # fmt: skip
        factors = {}
        for expert in experts:
            for name in names:
                out, into = SHAPES.get(name, (24, 32))
                key = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
                factors[f"{key}.lora_A.weight"] = torch.randn(3, into, generator=generator)
                factors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 3, generator=generator)
        config = {"r": 3, "lora_alpha": 5, "target_modules": list(names)}
        stored = models.write_checkpoint(directory / "base", base, {"model_type": "qwen2_moe", **changes})
        return stored, models.write_adapter(directory / "adapter", factors, config), base, factors

    def test_each_falls_on_its_rows(self, tmp_path):
        """gate above up; the others' bits stay; the base comes back."""
        base, adapter, before, factors = self.made(tmp_path)
        lt.merge(base, [adapter], tmp_path / "merged", weights=[0.5])
        after = models.tensors_of(tmp_path / "merged")
        start = "model.layers.0.mlp.experts"
        wanted = {name: tensor.double() for name, tensor in before.items()}
        for expert in (0, 2):
            for name, (parameter, rows) in {"gate_proj": ("gate_up_proj", slice(0, 24)), "up_proj": (
                "gate_up_proj", slice(24, 48)), "down_proj": ("down_proj", slice(0, 32))}.items():  # fmt: skip
                key = f"base_model.model.{start}.{expert}.{name}"
                product = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
                wanted[f"{start}.{parameter}"][expert, rows] += 0.5 * 5 / 3 * product
        for name, judged in wanted.items():
            off = (after[name].double() - judged).abs()
            assert bool((off <= 0.5 * models.ulp(after[name], after[name].dtype) + 1e-7).all()), name
        for parameter in ("gate_up_proj", "down_proj"):
            for expert in (1, 3):
                assert torch.equal(after[f"{start}.{parameter}"][expert], before[f"{start}.{parameter}"][expert])
        lt.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[adapter], weights=[0.5], base=base)
        assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)

    @pytest.mark.parametrize(("changes", "error"), [
        ({"experts": (0, 4)}, MismatchError),
        ({"names": ("w9",)}, MismatchError),
        ({"model_type": "gpt_oss"}, UnsupportedError),
    ])  # fmt: skip
    def test_what_does_not_fit(self, tmp_path, changes, error):
        """An expert too many, a name that no family has, a family that interleaves and transposes."""
        base, adapter, _, _ = self.made(tmp_path, **changes)
        with pytest.raises(error, match="expert"):
            lt.merge(base, [adapter], tmp_path / "merged")


class TestExtracted:
    """What `extract` makes of changed experts, judged by PEFT on transformers' classes and by the SVD in float64."""

    def pair(self, family, directory, change, **changes):
        base = moe.base(family, directory / "base", **changes)
        tuned = models.load(base)
        change(tuned)
        return base, models.save(tuned, directory / "tuned"), tuned

    @pytest.mark.parametrize(("form", "width"), [("as-saved", 24), ("as-saved", 16), ("as-released", 24)])
    def test_stacks_that_files_may_hold_turned(self, form, width, tmp_path):
        """Qwen3-VL-MoE was released with (experts, in, out); transformers 5 saves (experts, out, in), and takes either
        by its shape, square ones as they are. An extraction, and an adapter of PEFT's, on both forms."""
        base, tuned, model = self.pair(
            "qwen3_vl_moe", tmp_path, lambda live: models.disturbed(live, 0.05, only=lambda name: ".experts." in name),
            moe_intermediate_size=width)  # fmt: skip
        if form == "as-released":
            for directory in (base, tuned):
                turned = {name: tensor.transpose(1, 2) if ".experts." in name else tensor
                          for name, tensor in models.tensors_of(directory).items()}  # fmt: skip
                (directory / "model.safetensors").unlink()
                models.write_checkpoint(directory, turned, models.config_of(directory, "config.json"))
        lt.extract(base, tuned, tmp_path / "extracted", rank=64)
        said = self.said(tmp_path / "extracted")
        loaded = judge.load_cleanly(models.load(base), tmp_path / "extracted", expected=said)
        lt.merge(base, [tmp_path / "extracted"], tmp_path / "merged")
        for each in (loaded, models.load(tmp_path / "merged")):
            assert torch.allclose(models.output_of(each), models.output_of(model), rtol=1e-3, atol=1e-5)
        wrapped = moe.write_by_peft(models.load(base), tmp_path / "adapter", **{**COMMON, "target_modules": []})
        lt.merge(base, [tmp_path / "adapter"], tmp_path / "ours")
        found = models.output_of(models.load(tmp_path / "ours"))
        assert torch.allclose(found, models.output_of(wrapped), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(found, models.output_of(models.load(base)), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("family", moe.FAMILIES)
    @pytest.mark.parametrize("square", [False, True])
    def test_full_rank_is_the_tuned_model(self, family, square, tmp_path):
        """In PEFT and by our merge; where gate_up_proj, or GPT-OSS's down_proj, is square too."""
        shapes = {"hidden_size": 32}
        if square:
            name = "moe_intermediate_size" if family == "qwen2_moe" else "intermediate_size"
            shapes[name] = 32 if family == "gpt_oss" else 16
        base, tuned, model = self.pair(
            family, tmp_path, lambda live: models.disturbed(live, 0.05, only=lambda name: ".experts." in name
                                                            and "bias" not in name), **shapes)  # fmt: skip
        report = lt.extract(base, tuned, tmp_path / "adapter", rank=64)
        assert {module["name"] for module in report.modules} == set(PARAMETERS)
        loaded = judge.load_cleanly(models.load(base), tmp_path / "adapter", expected=self.said(tmp_path / "adapter"))
        assert torch.allclose(models.output_of(loaded), models.output_of(model), rtol=1e-3, atol=1e-3)
        lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
        merged, wanted = models.tensors_of(tmp_path / "merged"), models.tensors_of(tuned)
        assert all(torch.allclose(merged[name], tensor, rtol=0, atol=1e-5) for name, tensor in wanted.items())

    def said(self, adapter):
        """PEFT's warning that patterns for parameters match no module, where there are patterns."""
        config = models.config_of(adapter)
        return tuple(f"{name} keys did not" for name in ("rank_pattern", "alpha_pattern") if config[name])

    def test_the_joint_svd_of_gate_and_up_and_zeros_where_a_rank_is_less(self, tmp_path):
        """One expert of rank 1 and one of rank 3 in a change that gate and up share: rank 3 for all, not 6; unchanged
        experts are zero, and the captured share is that of all together."""
        generator = torch.Generator().manual_seed(2)

        def change(live):
            with torch.no_grad():
                stack = live.model.layers[0].mlp.experts.gate_up_proj
                for expert, rank in ((1, 1), (2, 3)):
                    left = torch.randn(stack.shape[1], rank, generator=generator)
                    stack[expert] += 0.1 * left @ torch.randn(rank, stack.shape[2], generator=generator)

        base, tuned, _ = self.pair("mixtral", tmp_path, change)
        report = lt.extract(base, tuned, tmp_path / "adapter", energy=0.9999)
        (module,) = report.modules
        assert (module["name"], module["rank"], module["experts"]) == (PARAMETERS[0], 3, 4)
        update = lt.load_adapter(tmp_path / "adapter")[PARAMETERS[0]]
        delta = update.delta_weight()
        assert not delta[0].any()
        assert not delta[3].any()
        assert torch.linalg.matrix_rank(delta[1].double(), rtol=1e-5) == 1
        assert module["captured"] > 0.9999
        assert models.config_of(tmp_path / "adapter")["peft_version"] == "0.19.1"

    def test_some_experts_alone_are_layers_of_the_file(self, tmp_path):
        """A pattern that names some: no stacked parameter can leave the others out of the comparison."""
        base, tuned, _ = self.pair("mixtral", tmp_path, lambda live: models.disturbed(live, 0.05))
        lt.extract(base, tuned, tmp_path / "adapter", rank=2, include=["experts.1.w2"])
        names = {f"model.layers.{layer}.block_sparse_moe.experts.1.w2" for layer in (0, 1)}
        assert set(lt.load_adapter(tmp_path / "adapter")) == names
        lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")

    def test_another_base_of_the_same_shapes_is_caught(self, tmp_path):
        """By the first matrix of each stack; the same base with stacked experts cannot be compared."""

        def experts(live):
            return models.disturbed(live, 0.05, only=lambda name: ".experts." in name)

        base, tuned, _ = self.pair("mixtral", tmp_path, experts)
        lt.extract(base, tuned, tmp_path / "adapter", rank=64)
        with pytest.raises(MismatchError, match="not the base"):
            lt.merge(tuned, [tmp_path / "adapter"], tmp_path / "merged")
        live = models.load(base)
        stacked = models.write_checkpoint(tmp_path / "stacked", live.state_dict(), {"model_type": "mixtral"})
        report = lt.merge(stacked, [tmp_path / "adapter"], tmp_path / "merged")
        assert any("another dtype or form" in note for note in report.notes)
        wanted = models.load(tuned).state_dict()
        merged = models.tensors_of(tmp_path / "merged")
        assert all(torch.allclose(merged[name], tensor, rtol=0, atol=1e-5) for name, tensor in wanted.items())


def test_inspect_names_parameters_that_no_tensor_is_for(written, tmp_path):
    _, adapter, _ = written("mixtral")
    config = models.config_of(adapter)
    config["target_parameters"] = [*config["target_parameters"], "router.missing"]
    odd = models.write_adapter(tmp_path / "odd", models.factors_of(adapter), config)
    assert any("router.missing" in note for note in lt.inspect(odd).notes)


def test_a_thread_needs_no_more_than_planned_for_hundreds_of_experts():
    """The bound of a matrix is one expert's factors and what is kept, not all experts' in float64."""
    from loratools.engine.tensor_change import factor_elements
    from loratools.tensors import in_memory

    count, rank = 256, 16
    lora_A = in_memory("A", torch.zeros(count * rank, 48))
    lora_B = in_memory("B", torch.zeros(64, rank * count))
    update = Stacked(lora_A=lora_A, lora_B=lora_B, experts=count, alpha=1.0)
    everything = lora_A.spec.numel + lora_B.spec.numel
    kept = 4 * lora_B.nbytes
    assert kept <= 48 * factor_elements(update) <= kept + 48 * (rank * (48 + 64) + 1)
    assert factor_elements(update) < everything / 3

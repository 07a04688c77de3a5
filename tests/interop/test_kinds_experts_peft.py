"""`target_parameters`: experts as PEFT adapts them, on stacked parameters and on files with a matrix an expert."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import MalformedError, MismatchError, UndecidedError, UnsupportedError
from tests import models
from tests.interop.judge import load_cleanly
from tests.interop.kinds import Case, randomise, require_rounded

E, H, WIDE = 3, 10, 14


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(E, WIDE, H))
        self.down_proj = torch.nn.Parameter(torch.zeros(E, H, WIDE // 2))


class Net(torch.nn.Module):
    """Stacked experts, a single matrix that is no layer's weight, and a layer beside them."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = Experts()
        self.mlp.router = torch.nn.Module()
        self.mlp.router.table = torch.nn.Parameter(torch.zeros(5, H))
        self.q = torch.nn.Linear(H, 6)

    def forward(self, x):
        return x


def config(**options):
    """Both parameters of the experts, of different rank and alpha, a matrix and a layer."""
    return LoraConfig(
        **{
            "target_modules": ["q"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "router.table"],
            "r": 2,
            "lora_alpha": 5,
            "lora_dropout": 0.0,
            "rank_pattern": {"mlp.experts.down_proj": 3},
            "alpha_pattern": {"mlp.experts.gate_up_proj": 7},
            **options,
        }
    )


def products(A, B, scale, experts=E):
    """ΔW_e = s · B_e A_e in float64, (experts, out, in): rows of A by expert, columns of B in turn."""
    rank = A.shape[0] // experts
    a, b = A.double().reshape(experts, rank, -1), B.double().reshape(B.shape[0], rank, experts)
    return scale * torch.einsum("ore,eri->eoi", b, a)


def exact(case, settings):
    """Name of the stacked parameter → ΔW, from the file that PEFT wrote."""
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    prefix = "base_model.model.mlp.experts"
    pairs = {"down_proj": prefix, "gate_up_proj": f"{prefix}.base_layer"}
    return {
        name: products(tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"], settings[name])
        for name, key in pairs.items()
    }


PATTERNS = ("rank_pattern keys did not match", "alpha_pattern keys did not match")
"""What PEFT 0.21 says of patterns for parameters although it heeds them: it looks at modules only."""
SCALES = {"down_proj": 5 / 3, "gate_up_proj": 7 / 2}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stacked_parameters(tmp_path, dtype):
    """Read as PEFT nests them, merged expert by expert in one rounding, taken out, written back."""
    case = Case(tmp_path, config(), dtype=dtype, net=Net)
    kinds = {path: update.kind for path, update in case.loaded.items()}
    assert kinds == {"q": "low-rank", "mlp.router.table": "low-rank",
                     "mlp.experts.down_proj": "experts", "mlp.experts.gate_up_proj": "experts"}  # fmt: skip
    merged, theirs = case.merged(), case.by_peft()
    for name, change in exact(case, SCALES).items():
        before = case.before[f"mlp.experts.{name}"]
        require_rounded(merged[f"mlp.experts.{name}"], before.double() + change, before, ulps=0.501)
    if dtype == "fp32":
        for key, tensor in theirs.items():
            torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-5)
    case.require_way_back()
    case.require_written_back(expected=PATTERNS)
    written = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert set(written["target_parameters"]) == set(kinds) - {"q"}


def test_a_stack_of_two(tmp_path):
    """Of other ranks and alphas: every expert's ranks concatenate, PEFT loads it, and its merge is the sum's."""
    options = {"r": 4, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": True}
    cases = [Case(tmp_path / "one", config(), net=Net), Case(tmp_path / "two", config(**options), net=Net)]
    lt.stack([case.adapter for case in cases], tmp_path / "sum", weights=[0.7, -1.5])
    model = load_cleanly(copy.deepcopy(cases[0].net), tmp_path / "sum", expected=PATTERNS)
    theirs = model.merge_and_unload().state_dict()
    one, two = exact(cases[0], SCALES), exact(cases[1], dict.fromkeys(SCALES, 3 / 2))
    for name, change in one.items():
        total = 0.7 * change - 1.5 * two[name]
        found = theirs[f"mlp.experts.{name}"].double() - cases[0].before[f"mlp.experts.{name}"].double()
        assert (found - total).norm() <= 1e-6 * total.norm(), name


def test_a_stack_of_equal_scales(tmp_path):
    """The factors keep their bytes, and alpha says the scale."""
    case = Case(tmp_path, config(), net=Net, dtype="bf16")
    lt.stack([case.adapter, case.adapter], tmp_path / "sum", weights=[0.7, 0.7])
    tensors, twice = (load_file(each / "adapter_model.safetensors") for each in (case.adapter, tmp_path / "sum"))
    for key, tensor in twice.items():
        assert tensor.dtype == tensors[key].dtype, key
        assert set(tensor.flatten().tolist()) == set(tensors[key].flatten().tolist()), key


def test_a_stack_of_nothing(tmp_path):
    """Weights of zero: an update of size zero."""
    case = Case(tmp_path, config(), net=Net)
    lt.stack([case.adapter, case.adapter], tmp_path / "sum", weights=[0, 0])
    assert not lt.load_adapter(tmp_path / "sum")["mlp.experts.down_proj"].delta_weight().any()


def test_a_stack_of_two_layouts(tmp_path):
    """One of them as PEFT 0.18 laid it out: refused by name."""
    both = ["experts.down_proj", "experts.gate_up_proj"]
    case = Case(tmp_path, config(target_modules=[], target_parameters=both), net=Net)
    with pytest.raises(UnsupportedError, match="kind experts"):
        lt.stack([case.adapter, turned(case, tmp_path / "old")], tmp_path / "sum")


def turned(case, target):
    """The same ΔW in the layout of PEFT 0.17 and 0.18: `in` is the second axis of the parameter."""
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    for key in ("mlp.experts", "mlp.experts.base_layer"):
        names = [f"base_model.model.{key}.lora_{side}.weight" for side in "AB"]
        A, B = (tensors[name] for name in names)
        rank = A.shape[0] // E
        a, b = A.reshape(E, rank, -1), B.reshape(B.shape[0], rank, E)
        tensors[names[0]] = b.permute(2, 1, 0).reshape(E * rank, -1).contiguous()
        tensors[names[1]] = a.permute(2, 1, 0).reshape(a.shape[2], rank * E).contiguous()
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(case.config | {"peft_version": "0.18.0"}))
    return target


def test_layout_of_older_versions(tmp_path):
    """Told by the shapes: the same merge."""
    both = ["experts.down_proj", "experts.gate_up_proj"]
    case = Case(tmp_path, config(target_modules=[], target_parameters=both), net=Net)
    lt.merge(case.base, [turned(case, tmp_path / "old")], tmp_path / "merged-old")
    old, new = load_file(tmp_path / "merged-old" / "model.safetensors"), case.merged()
    for name in ("gate_up_proj", "down_proj"):
        torch.testing.assert_close(old[f"mlp.experts.{name}"], new[f"mlp.experts.{name}"], rtol=1e-6, atol=1e-6)


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.w = torch.nn.Parameter(torch.zeros(E, H, H))

    def forward(self, x):
        return x


@pytest.mark.parametrize(("version", "family", "straight"), [
    ("0.17.1", "mixtral", False), ("0.18.0", "gpt_oss", False), ("0.19.0", "mixtral", False),
    ("0.19.0", "gpt_oss", True), ("0.19.1", "mixtral", True), ("0.21.2", "mixtral", True), ("0.21.2", "gpt_oss", False),
    ("0.20.1.dev0@5d6", "mixtral", True),
])  # fmt: skip
def test_square_experts_by_version(tmp_path, version, family, straight):
    """PEFT loads the other layout silently wrong; here the version that wrote it decides."""
    case = Case(tmp_path, LoraConfig(target_modules=[], target_parameters=["experts.w"], r=2, lora_alpha=3), net=Square)
    (case.adapter / "adapter_config.json").write_text(json.dumps(case.config | {"peft_version": version}))
    (case.base / "config.json").write_text(json.dumps({"model_type": family}))
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.experts.lora_{side}.weight"] for side in "AB")
    change = products(A, B, 1.5)
    before = case.before["experts.w"]
    wanted = before.double() + (change if straight else change.transpose(1, 2))
    require_rounded(case.merged()["experts.w"], wanted, before, ulps=0.501)


@pytest.mark.parametrize("missing", ["version", "family"])
def test_square_experts_that_cannot_be_told(tmp_path, missing):
    """Asked, not guessed."""
    case = Case(tmp_path, LoraConfig(target_modules=[], target_parameters=["experts.w"], r=2, lora_alpha=3), net=Square)
    if missing == "version":
        kept = {key: value for key, value in case.config.items() if key != "peft_version"}
        (case.adapter / "adapter_config.json").write_text(json.dumps(kept))
        (case.base / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(UndecidedError, match="peft_version" if missing == "version" else "model_type"):
        case.merged()
    assert not (tmp_path / "merged").exists()


def mixture(family):
    """A tiny mixture of experts of transformers 5, whose files have a matrix an expert."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    torch.manual_seed(0)
    if family == "mixtral":
        experts = {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**sizes, **experts))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, intermediate_size=20, moe_intermediate_size=12, num_experts=4,
                                              num_experts_per_tok=2, decoder_sparse_step=1, head_dim=8))  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_matrix_an_expert(tmp_path, family):
    """gate above up, by the names of the family: what PEFT merges in memory and transformers saves."""
    from peft import get_peft_model

    with models.quiet():
        model = mixture(family)
        model.save_pretrained(tmp_path / "base")
        both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        settings = LoraConfig(target_modules=["q_proj"], target_parameters=both, r=2, lora_alpha=5)
        adapted = get_peft_model(copy.deepcopy(model), settings)
        randomise(adapted, 0.2)
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert sum(".experts." in name for name in names) == 2 * 4 * 3
    lt.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=2e-5, atol=2e-6, msg=key)
    lt.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[tmp_path / "adapter"], base=tmp_path / "base")
    before, back = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "back"))
    assert all(torch.equal(before[key], back[key]) for key in before)


def test_experts_that_do_not_fit(tmp_path):
    """Another number of experts, a rank that does not divide the rows, wrappers without a name: nothing is guessed."""
    case = Case(tmp_path, config(), net=Net)
    file = case.adapter / "adapter_config.json"
    for changes, error in (
        ({"rank_pattern": {"mlp.experts.down_proj": 9}}, MismatchError),
        ({"rank_pattern": {"mlp.experts.down_proj": 2}}, MalformedError),
        ({"target_parameters": ["mlp.experts.down_proj"]}, MalformedError),
        ({"target_parameters": ["mlp.experts.down_proj", "mlp.experts.other", "router.table"]}, MismatchError),
        ({"target_parameters": None}, (UnsupportedError, MismatchError)),
    ):
        file.write_text(json.dumps(case.config | changes))
        with pytest.raises(error):
            case.merged()
        assert not (tmp_path / "merged").exists()
        file.write_text(json.dumps(case.config | {key: json.loads(config_text(case))[key] for key in changes}))


def config_text(case):
    """The configuration as PEFT would write it again."""
    settings = copy.deepcopy(case.model.peft_config["default"])
    return json.dumps({"rank_pattern": settings.rank_pattern, "target_parameters": list(settings.target_parameters)})


def test_experts_are_scaled(tmp_path):
    """`rescale --by` is another alpha."""
    case = Case(tmp_path, config(), net=Net)
    lt.rescale(case.adapter, tmp_path / "half", by=0.5)
    lt.merge(case.base, [tmp_path / "half"], tmp_path / "halved")
    halved = load_file(tmp_path / "halved" / "model.safetensors")
    for name, change in exact(case, SCALES).items():
        before = case.before[f"mlp.experts.{name}"]
        require_rounded(halved[f"mlp.experts.{name}"], before.double() + 0.5 * change, before, ulps=0.501)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_extracted_from_a_matrix_an_expert(tmp_path, family):
    """mergekit's failure b: experts become updates of the stacked parameters, which PEFT loads on transformers 5."""
    from transformers import AutoModelForCausalLM

    with models.quiet():
        model = mixture(family)
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "tuned")
    report = lt.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64)
    stacked = [module for module in report.modules if ".experts." in module["name"]]
    assert len(stacked) == 4
    assert all(module["captured"] > 1 - 1e-6 for module in stacked)
    tokens = torch.arange(12).view(1, -1)
    with models.quiet():
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = load_cleanly(fresh, tmp_path / "adapter", expected=PATTERNS)
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    lt.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged, tuned = (load_file(tmp_path / each / "model.safetensors") for each in ("merged", "tuned"))
    for key, tensor in tuned.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_extracted_from_stacked_parameters(tmp_path, dtype):
    """A truncated SVD for every expert: each is within 0.1 % of Eckart and Young's bound, at one rank for all."""
    case = Case(tmp_path, config(), dtype=dtype, net=Net)
    change = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in case.before.items() if ".experts." in name}
    tuned = {name: (tensor.float() + change.get(name, 0)).to(tensor.dtype) for name, tensor in case.before.items()}
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    report = lt.extract(case.base, tmp_path / "tuned", tmp_path / "extracted", rank=3)
    assert {module["name"] for module in report.modules} == set(change)
    adapter = lt.load_adapter(tmp_path / "extracted")
    for name, update in adapter.items():
        delta = tuned[name].double() - case.before[name].double()
        for expert in range(E):
            part = update.part(expert)
            rest = (delta[expert] - part.delta_weight().double()).norm()
            assert rest <= 1.001 * torch.linalg.svdvals(delta[expert])[3:].norm()
    load_cleanly_on(case, tmp_path / "extracted")


def load_cleanly_on(case, adapter):
    """PEFT loads it on the base."""
    from tests.interop.judge import load_cleanly

    return load_cleanly(copy.deepcopy(case.net), adapter)


def test_unchanged_experts_are_identical(tmp_path):
    """Named, and not stored."""
    case = Case(tmp_path, config(), net=Net)
    report = lt.extract(case.base, case.base, tmp_path / "none")
    assert set(case.before) == set(report.identical)


@pytest.mark.parametrize(
    ("version", "straight"), [("0.18.0", False), ("0.19.0", False), ("0.19.1", True), (None, None)]
)
def test_square_experts_one_by_one_are_not_guessed(tmp_path, version, straight):
    """Where gate above up is square, shapes do not tell an older layout: its version does, and is asked for."""
    names = [f"mlp.experts.{expert}.{name}.weight" for expert in range(E) for name in ("gate_proj", "up_proj")]
    before = {name: torch.randn(5, H) for name in names}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    A, B = torch.randn(2 * E, H), torch.randn(H, 2 * E)
    keys = [f"base_model.model.mlp.experts.lora_{side}.weight" for side in "AB"]
    save_file(dict(zip(keys, (A, B), strict=True)), adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said | ({"peft_version": version} if version else {})))
    if straight is None:
        with pytest.raises(UndecidedError, match="peft_version"):
            lt.merge(base, [adapter], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    lt.merge(base, [adapter], tmp_path / "out")
    merged, change = load_file(tmp_path / "out" / "model.safetensors"), products(A, B, 1.5)
    change = change if straight else change.transpose(1, 2)
    for at, name in enumerate(names):
        mine = change[at // 2, 5 * (at % 2) : 5 * (at % 2) + 5]
        require_rounded(merged[name], before[name].double() + mine, before[name], ulps=0.501)


def test_a_magnitude_of_a_parameter_is_refused(tmp_path):
    """Not ignored: PEFT's wrapper of parameters has none."""
    case = Case(tmp_path, config(), net=Net)
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.mlp.experts.lora_magnitude_vector"] = torch.ones(H)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="lora_magnitude_vector"):
        _ = case.loaded

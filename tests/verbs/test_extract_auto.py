"""`extract --rank auto`: adapters that PEFT trained and merged, true full fine-tunes, and where there is little."""

import json

import pytest
import torch

import loratools as lt
from loratools.verbs.extract import extract, plan_extract
from tests import minilm, models, trained
from tests.tiny import DOWN, K, Q, llama, normal, write_checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    trained.stored(minilm.unpack(folder / "float32"), folder / "base", torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def adapted(home):
    """An adapter of rank 8 on every linear layer, trained by PEFT; alpha is not 8."""
    return trained.adapt(home / "base", r=8, lora_alpha=20, target_modules="all-linear", steps=16, seed=11)


@pytest.fixture(scope="module")
def merges(home, adapted):
    """‖ΔW‖/‖W‖ → the merge in bf16 by PEFT, and the true ΔW."""
    found = {}
    for size in (0.02, 0.003, 0.0015):
        trained.rescale(adapted, size)
        found[size] = (trained.merge(home / "base", adapted, home / f"merged-{size}"), trained.deltas(adapted))
    return found


@pytest.fixture(scope="module")
def tuned_fully(home):
    return trained.tune_fully(home / "base", home / "tuned", steps=6)


def ranks_of(report):
    return {module["name"]: module["rank"] for module in report.modules}


def test_the_rank_of_a_peft_merge_is_found_and_the_noise_taken_out(tmp_path, home, merges):
    """Rank 8 on every linear layer of MiniLM, and each nearer to the true ΔW than the difference of the files is."""
    tuned, truth = merges[0.02]
    report = extract(home / "base", tuned, tmp_path / "out", rank="auto")
    assert ranks_of(report) == dict.fromkeys(truth, 8)
    assert report.totals["recognised"]["said"] == f"a merge of rank 8 in {len(truth)} of {len(truth)} modules"
    assert {module["rank_rule"] for module in report.modules} == {"common rank 8"}
    assert not any("ot of low rank" in note or "no rank" in note for note in report.notes)
    adapter = lt.load_adapter(tmp_path / "out")
    before, after = models.tensors_of(home / "base"), models.tensors_of(tuned)
    for name, change in truth.items():
        raw = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        cleaned = adapter[name].delta_weight().double()
        assert float((cleaned - change).norm()) < 0.5 * float((raw - change).norm())


@pytest.mark.parametrize(("size", "odd"), [(0.003, 9), (0.0015, 5)])
def test_modules_alone_do_not_know_the_rank_but_together_they_do(tmp_path, home, merges, size, odd):
    """Small enough that some modules show one more than 8, or fewer: all get 8, with figures that hold."""
    tuned, truth = merges[size]
    report = extract(home / "base", tuned, tmp_path / "out", rank="auto")
    alone = {module["name"]: module["above_noise"] for module in report.modules}
    assert {8, odd} <= set(alone.values())
    assert ranks_of(report) == dict.fromkeys(truth, 8)
    adapter = lt.load_adapter(tmp_path / "out")
    before, after = models.tensors_of(home / "base"), models.tensors_of(tuned)
    for module in report.modules:
        name = f"{module['name']}.weight"
        raw = after[name].double() - before[name].double()
        left = raw - adapter[module["name"]].delta_weight().double()
        assert module["residual"] == pytest.approx(float(left.norm() / raw.norm()), rel=1e-5)
        assert module["captured"] == pytest.approx(1 - module["residual"] ** 2, abs=1e-6)


def test_the_result_is_the_same_on_any_number_of_threads(tmp_path, home, merges):
    options = {"rank": "auto", "include": ("layer.{0-1}.*",)}
    one, two = (
        extract(home / "base", merges[0.0015][0], tmp_path / str(threads), threads=threads, **options)
        for threads in (1, 2)
    )
    assert one.modules == two.modules
    assert (
        models.file_hashes(tmp_path / "1/adapter_model.safetensors")["adapter_model.safetensors"]
        == (models.file_hashes(tmp_path / "2/adapter_model.safetensors")["adapter_model.safetensors"])
    )


def test_a_full_fine_tune_is_called_one_and_keeps_its_energy(tmp_path, home, tuned_fully):
    """AdamW on every parameter, stored in bf16: 0.9 of every matrix, or the cap, and the report says so."""
    report = extract(home / "base", tuned_fully, tmp_path / "out", rank="auto", max_rank=96)
    assert report.totals["recognised"]["said"] == "a full fine-tune"
    layers = [module for module in report.modules if module["name"].startswith("encoder.")]
    assert len(layers) == 36
    assert all(module["rank_rule"].startswith("energy 0.9: ") for module in report.modules)
    assert any("a full fine-tune" in module["rank_rule"] for module in layers)
    assert all(module["captured"] >= 0.9 or module["rank"] == 96 for module in report.modules)
    assert any("a full fine-tune" in note for note in report.notes)


def write_changed(folder, home, change, others=lambda name: False):
    """MiniLM with something added to its query and key weights, and to the vectors that `others` names: base, tuned."""
    base = models.tensors_of(home / "base")
    tuned = {name: tensor + 0.01 if others(name) else tensor for name, tensor in base.items()}
    for at, name in enumerate(name for name in base if name.endswith(("query.weight", "key.weight"))):
        tuned[name] = (base[name].double() + base[name].double().norm() * change(at)).bfloat16()
    return write_checkpoint(folder / "base", base), write_checkpoint(folder / "tuned", tuned)


def hardly(at):
    """A ΔW of rank 16 of which all but a few directions are below the noise."""
    decay = 0.5 ** torch.arange(16, dtype=torch.float64)
    change = (normal(at, 384, 16, dtype=torch.float64) * decay) @ normal(40 + at, 16, 384, dtype=torch.float64)
    return change / change.norm() * 1e-3


@pytest.mark.parametrize(
    ("others", "include", "what"),
    [
        (lambda name: False, (), "unknown"),
        (lambda name: name.endswith(("query.bias", "key.bias")), ("query", "key"), "unknown"),
        (lambda name: "LayerNorm" in name, (), "full fine-tune"),
    ],
    ids=["none", "biases of the same modules", "norms"],
)
def test_vectors_decide_where_matrices_do_not(tmp_path, home, others, include, what):
    """Norms that changed tell a fine-tune; biases beside a changed matrix may be an adapter's."""
    pair = write_changed(tmp_path, home, hardly, others)
    report = extract(*pair, tmp_path / "out", rank="auto", include=include)
    assert report.totals["recognised"]["what"] == what
    assert any("share" in note for note in report.notes) == (what == "unknown")


def test_what_is_left_over_decides_where_little_stands_out(tmp_path, home):
    """Changes of full rank as small as the noise, of matrices alone: little stands out, but too much is left."""
    pair = write_changed(tmp_path, home, lambda at: 1e-3 * normal(at, 384, 384, dtype=torch.float64) / 384)
    report = extract(*pair, tmp_path / "out", rank="auto")
    assert max(module["above_noise"] for module in report.modules) < 20
    assert report.totals["recognised"]["what"] == "full fine-tune"


# --- by hand, tiny -------------------------------------------------------------------------------------------------

MATRICES = (Q, K, DOWN)


def changed(tmp_path, change, dtype=torch.bfloat16, paths=MATRICES, layers=1):
    """A tiny Llama, and the same with something added to matrices: base, tuned."""
    before = llama(dtype)
    after = dict(before)
    for at, path in enumerate(paths):
        name = f"{path}.weight"
        after[name] = (before[name].double() + change(at, *before[name].shape)).to(dtype)
    return write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "tuned", after)


def low_rank(at, m, n, rank=4, size=0.5, decay=1.0):
    scales = decay ** torch.arange(rank)
    change = (normal(70 + at, m, rank, dtype=torch.float64) * scales) @ normal(90 + at, rank, n, dtype=torch.float64)
    return size * change / change.norm() * (m * n) ** 0.5 * 0.05


def test_a_change_of_full_rank_is_said(tmp_path):
    """Far above the rounding of float32: 0.9 of its energy, and a note with the modules."""
    pair = changed(tmp_path, lambda at, m, n: 0.01 * normal(50 + at, m, n, dtype=torch.float64), torch.float32)
    report = extract(*pair, tmp_path / "out", rank="auto")
    for module in report.modules:
        assert module["rank_rule"].startswith("energy 0.9")
        assert 0.9 <= module["captured"] < 0.97
    assert report.totals["recognised"]["what"] == "full fine-tune"
    assert any("Not of low rank" in note and "more" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("paths", [MATRICES, (Q,)], ids=["three", "one"])
def test_few_modules_are_judged_one_by_one(tmp_path, dtype, paths):
    """Float32 has rounding noise too, and the kernel's own resolution is a floor; one module alone is enough."""
    report = extract(*changed(tmp_path, low_rank, dtype, paths), tmp_path / "out", rank="auto")
    assert ranks_of(report) == dict.fromkeys(paths, 4)
    assert report.totals["recognised"]["what"] in {"merge", "unknown"}


def test_nothing_changed_is_nothing_found(tmp_path):
    report = extract(*changed(tmp_path, lambda at, m, n: torch.zeros(m, n)), tmp_path / "out", rank="auto")
    assert report.modules == ()
    assert report.totals["recognised"] == {
        "what": "unknown", "said": "no changed matrix", "shared": 0, "of": 0
    }  # fmt: skip


def test_ranks_by_pattern_are_no_evidence(tmp_path):
    """Modules whose rank was given are not asked, and not changed."""
    report = extract(*changed(tmp_path, low_rank), tmp_path / "out", rank="auto", rank_pattern={"q_proj": 7})
    assert ranks_of(report) == {Q: 7, K: 4, DOWN: 4}
    assert report.totals["recognised"]["of"] == 2


def test_the_plan_names_the_decision_and_what_a_second_round_takes(tmp_path):
    pair = changed(tmp_path, low_rank)
    plan = plan_extract(*pair, tmp_path / "out", rank="auto", max_rank=8)
    assert [unit.operation for unit in plan.closing] == ["recognise"]
    assert "common-rank" in plan.rules
    assert plan.bounds.scratch_bytes == 2 * plan.bounds.write_bytes
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan_extract(*pair, tmp_path / "out", rank=8).closing == ()


def test_experts_share_the_rank_of_their_stack(tmp_path):
    """Two layers of eight stacked experts: ΔW of rank 4 in each, in one of them as weak as the noise."""
    base, tuned, true, weak = {}, {}, {}, {"size": 0.01, "decay": 0.3}
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        base[name] = normal(layer, 8, 96, 64, dtype=torch.bfloat16, scale=0.05)
        true[name] = torch.stack(
            [low_rank(20 * layer + expert, 96, 64, **weak if layer == 2 else {}) for expert in range(8)]
        )
        tuned[name] = (base[name].double() + true[name]).bfloat16()
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    pair = (write_checkpoint(tmp_path / side, data, config) for side, data in (("base", base), ("tuned", tuned)))
    report = extract(*pair, tmp_path / "out", rank="auto")
    assert {module["rank"] for module in report.modules} == {4}
    assert {module["rank_rule"] for module in report.modules} == {"common rank 4"}
    assert min(module["above_noise"] for module in report.modules) < 4
    adapter = lt.load_adapter(tmp_path / "out")
    for module in report.modules:
        raw = tuned[module["name"]].double() - base[module["name"]].double()
        left = raw - adapter[module["name"]].delta_weight().double().reshape(raw.shape)
        assert module["residual"] == pytest.approx(float(left.norm() / raw.norm()), rel=1e-4)


def test_wide_matrices_go_the_randomised_way(tmp_path):
    """Rank 6 under 640 and more dimensions; in one of four layers as weak as the noise, decomposed a second time."""
    base = {f"model.layers.{at}.self_attn.q_proj.weight": normal(at, 704, 640, scale=0.05) for at in range(4)}
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    weak = {"size": 0.01, "decay": 0.3}
    tuned = {
        name: (tensor.double() + low_rank(at, 704, 640, rank=6, **weak if at == 3 else {})).bfloat16()
        for at, (name, tensor) in enumerate(base.items())
    }
    pair = (write_checkpoint(tmp_path / side, data) for side, data in (("base", base), ("tuned", tuned)))
    report = extract(*pair, tmp_path / "out", rank="auto")
    assert {module["method"] for module in report.modules} == {"block-krylov"}
    assert [module["rank"] for module in report.modules] == [6] * 4
    assert [module["above_noise"] < 6 for module in report.modules] == [False, False, False, True]

"""`extract --budget`: never over it, near it, better than one rank for all, and independent of how it was found."""

import json

import pytest
import torch
from safetensors.torch import load_file

from loratools.engine import budgets
from loratools.errors import UsageError
from loratools.files import load_adapter
from loratools.verbs.extract import extract, plan_extract
from loratools.verbs.merge import merge
from tests import models
from tests.interop import moe_more
from tests.interop.extraction import assert_same_output, delta_of, eckart_young, make_pair, stored_products
from tests.interop.judge import load_cleanly
from tests.tiny import equal_bits, normal, state, tensors_of, write_checkpoint

LAYER = "model.layers.0."
MODULES = {  # path → shape, decay of the singular values, size of the first
    f"{LAYER}self_attn.q_proj": ((96, 96), 0.0, 1.0),
    f"{LAYER}self_attn.k_proj": ((48, 96), 0.3, 0.01),
    f"{LAYER}mlp.up_proj": ((160, 96), 1.0, 1.0),
    f"{LAYER}mlp.down_proj": ((96, 160), 0.05, 1.0),
    f"{LAYER}self_attn.o_proj": ((96, 64), 0.8, 3.0),
}
Q, K = f"{LAYER}self_attn.q_proj", f"{LAYER}self_attn.k_proj"
WEIGHTS = "adapter_model.safetensors"


def _tensors():
    base, tuned = {f"{LAYER}input_layernorm.weight": torch.ones(96)}, {}
    tuned |= {f"{LAYER}input_layernorm.weight": torch.full((96,), 1.1)}
    for seed, (path, ((m, n), decay, size)) in enumerate(MODULES.items()):
        U, _, Vh = torch.linalg.svd(normal(50 + seed, m, n, dtype=torch.float64), full_matrices=False)
        S = size * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -decay
        dtype = torch.bfloat16 if path.endswith("up_proj") else torch.float32
        weight = normal(seed, m, n, dtype=dtype)
        base[f"{path}.weight"], tuned[f"{path}.weight"] = weight, (weight.double() + (U * S) @ Vh).to(dtype)
        base[f"{path}.bias"] = tuned[f"{path}.bias"] = torch.zeros(m)
    tuned[f"{K}.bias"] = torch.full((48,), 0.5)
    return base, tuned


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Five matrices of unlike shapes and spectra, one of them hardly changed but for its bias; and a norm."""
    home = tmp_path_factory.mktemp("budget")
    base, tuned = _tensors()
    return write_checkpoint(home / "base", base), write_checkpoint(home / "tuned", tuned)


def cost(path):
    return 4 * sum(MODULES[path][0])


def difference(path):
    base, tuned = _tensors()
    return tuned[f"{path}.weight"].double() - base[f"{path}.weight"].double()


def left_over(output):
    """‖ΔW − Δ̂‖² over all modules, from the files."""
    found = stored_products(output)
    return sum(float((difference(path) - found.get(path, 0)).square().sum()) for path in MODULES)


@pytest.mark.parametrize("budget", [9_000, 30_000, 60_000, 100_003, 150_000, 240_000])
def test_the_file_is_within_the_budget_and_near_it(tmp_path, pair, budget):
    """Header, norm and bias included; what is left holds no further rank of any module that has more to say."""
    report = extract(*pair, tmp_path / "out", budget=budget)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    ranks = {row["name"]: row["rank"] for row in report.modules}
    wanting = [cost(path) for path, rank in ranks.items() if rank < min(MODULES[path][0])]
    assert size == report.totals["budget"]["bytes"] <= budget
    assert budget - size < min(wanting) + 64, "offsets of fewer digits"
    assert "model.layers.0.input_layernorm.weight" in report.whole


@pytest.mark.parametrize("budget", [30_000, 100_003])
def test_figures_are_those_of_the_factors_as_written(tmp_path, pair, budget):
    """Per module and over all: against float64 differences and Eckart and Young; captured is within its bound."""
    report = extract(*pair, tmp_path / "out", budget=budget)
    found = stored_products(tmp_path / "out")
    assert set(found) == {row["name"] for row in report.modules}
    for row in report.modules:
        exact = difference(row["name"])
        true = float((exact - found[row["name"]]).norm() / exact.norm())
        assert row["residual"] == pytest.approx(true, rel=1e-4, abs=1e-6)
        assert row["residual"] == pytest.approx(eckart_young(exact, row["rank"]), rel=1e-4, abs=1e-6)
        assert row["captured"] == pytest.approx(1 - true**2, abs=1e-5)
        assert row["certificate"] is None or row["certificate"] <= 1e-4
    everything = sum(float(difference(path).square().sum()) for path in MODULES)
    assert report.totals["residual"] ** 2 == pytest.approx(left_over(tmp_path / "out") / everything, rel=1e-4)
    told = report.totals["budget"]
    assert told["captured"] == pytest.approx(1 - left_over(tmp_path / "out") / everything, abs=1e-5)
    assert told["captured"] <= told["bound"] <= told["captured"] + 0.02


@pytest.mark.parametrize("rank", [2, 8, 20, 40])
def test_better_than_one_rank_for_all_at_the_same_size(tmp_path, pair, rank):
    """The size of a file by --rank as the budget: no larger, and a fifth more is captured."""
    extract(*pair, tmp_path / "level", rank=rank)
    size = (tmp_path / "level" / WEIGHTS).stat().st_size
    extract(*pair, tmp_path / "out", budget=size)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= size
    everything = sum(float(difference(path).square().sum()) for path in MODULES)
    captured = [everything - left_over(tmp_path / name) for name in ("level", "out")]
    assert captured[1] > 1.2 * captured[0]


def test_a_module_without_a_rank_is_named_and_keeps_the_rest(tmp_path, pair):
    """Law 6: the weight is left out with its size, its changed bias is stored, and merging gives that back."""
    report = extract(*pair, tmp_path / "out", budget=60_000)
    assert "rank 0" in report.left_out[f"{K}.weight"]
    assert f"{difference(K).norm():.4g}" in report.left_out[f"{K}.weight"]
    assert f"{K}.bias" in report.whole
    assert f"{K}.weight" not in report.identical
    merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    base, tuned = _tensors()
    merged = tensors_of(tmp_path / "merged")
    assert equal_bits(merged[f"{K}.bias"], tuned[f"{K}.bias"])
    assert equal_bits(merged[f"{K}.weight"], base[f"{K}.weight"])


def test_new_rows_of_a_vocabulary_stay_where_the_common_ones_get_no_rank(tmp_path):
    """They lie in a file of their own, which the budget is not about; merging puts them back."""
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
    base = {names[0]: normal(1, 300, 16), names[1]: normal(2, 16, 24)}
    grown = torch.cat([base[names[0]] + 1e-4 * normal(3, 300, 16), normal(4, 2, 16)])
    tuned = {names[0]: grown, names[1]: base[names[1]] + normal(5, 16, 24)}
    one, other = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned)
    report = extract(one, other, tmp_path / "out", budget=1_000)
    assert [row["name"] for row in report.modules] == [names[1].removesuffix(".weight")]
    assert "rank 0" in report.left_out[names[0]]
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= 1_000
    rows = load_file(tmp_path / "out" / "added_rows.safetensors")
    assert equal_bits(next(iter(rows.values())), grown[300:])
    merge(one, [tmp_path / "out"], tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")[names[0]]
    assert equal_bits(merged, torch.cat([base[names[0]], grown[300:]]))


def test_decomposing_again_gives_what_one_high_cap_gives(tmp_path, pair, monkeypatch):
    """Same ranks, same products, same bound as when everything is known at once; the report says what was done."""
    low = extract(*pair, tmp_path / "low", budget=60_000)
    assert low.totals["budget"]["decomposed_again"] == [Q]
    monkeypatch.setattr(budgets, "LEAST_START", 512)
    high = extract(*pair, tmp_path / "high", budget=60_000)
    assert high.totals["budget"]["decomposed_again"] == []
    ranks = [{row["name"]: row["rank"] for row in report.modules} for report in (low, high)]
    assert ranks[0] == ranks[1]
    assert ranks[0][Q] > 2 * 32
    one, other = stored_products(tmp_path / "low"), stored_products(tmp_path / "high")
    for path, product in one.items():
        if path != Q:  # whose singular values are all the same: the leading ones are any
            assert (product - other[path]).norm() <= 1e-5 * product.norm()
    for key in ("captured", "bound", "density", "bytes"):
        assert low.totals["budget"][key] == pytest.approx(high.totals["budget"][key], rel=1e-6)


def test_a_cap_holds(tmp_path, pair, monkeypatch):
    """--max-rank caps a chosen rank, also one that was decomposed again, and the report says that it did."""
    monkeypatch.setattr(budgets, "starting_rank", lambda *_: 16)
    report = extract(*pair, tmp_path / "out", budget=60_000, max_rank=40)
    assert max(row["rank"] for row in report.modules) == 40
    assert report.totals["budget"]["at_max_rank"] == [Q]
    assert any("--max-rank" in note for note in report.notes)
    whole = extract(*pair, tmp_path / "whole", budget=900_000, max_rank=96)
    assert not whole.totals["budget"]["at_max_rank"], "there is no higher rank"


def test_the_same_bytes_whatever_the_threads(tmp_path, pair):
    """Decompositions, those done again included, may run in any order."""
    files = []
    for threads in (1, 3):
        extract(*pair, tmp_path / f"{threads}", budget=60_000, threads=threads)
        files.append({each.name: each.read_bytes() for each in (tmp_path / f"{threads}").iterdir()})
    assert files[0] == files[1]


def test_its_own_size_is_a_budget(tmp_path, pair):
    """The size that came out, asked for, gives the same ranks."""
    first = extract(*pair, tmp_path / "a", budget=100_000)
    again = extract(*pair, tmp_path / "b", budget=first.totals["budget"]["bytes"])
    assert [row["rank"] for row in first.modules] == [row["rank"] for row in again.modules]


@pytest.mark.parametrize("budget", [20_000, 100_000, 200_000])
def test_one_rank_for_all(tmp_path, pair, budget):
    """--uniform-rank: every module has the same, one more would not fit; zeros where a module has less."""
    report = extract(*pair, tmp_path / "out", budget=budget, uniform_rank=True)
    config = models.config_of(tmp_path / "out")
    rank = config["r"]
    assert not config["rank_pattern"]
    assert {row["name"] for row in report.modules} == set(MODULES)
    assert {row["rank"] for row in report.modules} == {rank}
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert size <= budget < size + sum(cost(path) for path in MODULES) + 64
    factors = load_file(tmp_path / "out" / WEIGHTS)
    lora_A = factors[f"base_model.model.{K}.lora_A.weight"]
    assert lora_A.shape == (rank, 96)
    assert not lora_A[48:].any()
    products = stored_products(tmp_path / "out")
    for row in report.modules:
        exact = difference(row["name"])
        true = float((exact - products[row["name"]]).norm() / exact.norm())
        assert row["residual"] == pytest.approx(true, rel=1e-4, abs=1e-6)
        assert true == pytest.approx(eckart_young(exact, rank), rel=1e-4, abs=1e-6)
    if budget == 200_000:
        assert rank > 48


@pytest.mark.parametrize("uniform", [False, True])
def test_too_small_is_refused_with_what_would_do(tmp_path, pair, uniform):
    """Nothing appears; the size that the message names is enough, to the byte."""
    before = state(tmp_path)
    with pytest.raises(UsageError, match="beside the") as refused:
        extract(*pair, tmp_path / "out", budget=1_200, uniform_rank=uniform)
    assert state(tmp_path) == before
    least = next(int(word) for word in str(refused.value).split() if word.isdigit() and int(word) > 1_200)
    report = extract(*pair, tmp_path / "out", budget=least, uniform_rank=uniform)
    assert {row["rank"] for row in report.modules} == {1}
    assert len(report.modules) == (len(MODULES) if uniform else 1)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == least
    with pytest.raises(UsageError, match=f"Give {least} bytes"):
        extract(*pair, tmp_path / "less", budget=least - 1, uniform_rank=uniform)


def test_headers_alone_refuse(tmp_path, pair):
    """The plan already does, where no rank of any matrix fits."""
    with pytest.raises(UsageError, match="at least"):
        plan_extract(*pair, tmp_path / "out", budget=200)


def test_the_plan_names_the_rule_and_bounds_the_work(tmp_path, pair):
    """The rule is in the plan as a closing unit; scratch and output are bounded by the budget, not by --max-rank."""
    plan = plan_extract(*pair, tmp_path / "out", budget=30_000)
    (closing,) = plan.closing
    assert closing.parameters["rules"] == {"ranks": {"rule": "budget"}}
    assert plan.rules["budget"]
    assert plan.bounds.write_bytes == 30_000
    assert plan.bounds.scratch_bytes <= sum(min(256, *shape) * cost(path) for path, (shape, _, _) in MODULES.items())


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A Llama of transformers, and a fine-tune of which the second layer changed ten times as much."""
    home = tmp_path_factory.mktemp("llamas")
    made = make_pair(home, "llama", size=0.002)
    models.save_family("llama", models.disturbed(made.model, 0.03, only=lambda name: "layers.1" in name), made.tuned)
    return made


def test_peft_loads_it(tmp_path, llamas):
    """Cleanly, by rank_pattern; its ΔW of every module is the truncation at the reported rank."""
    report = extract(llamas.base, llamas.tuned, tmp_path / "out", budget=90_000)
    assert models.config_of(tmp_path / "out")["rank_pattern"]
    loaded = load_cleanly(llamas.fresh(), tmp_path / "out")
    layers = dict(loaded.base_model.model.named_modules())
    ranks = {row["name"]: row["rank"] for row in report.modules}
    assert len(set(ranks.values())) > 3
    for path, rank in ranks.items():
        exact = delta_of(path, llamas.fresh(), llamas.model)
        delta = layers[path].get_delta_weight("default").double()
        assert float((exact - delta).norm() / exact.norm()) == pytest.approx(eckart_young(exact, rank), rel=1e-3)


def test_a_budget_for_everything_gives_the_fine_tune(tmp_path, llamas):
    """More than enough: the output of the tuned model, and a note that the budget did not decide."""
    report = extract(llamas.base, llamas.tuned, tmp_path / "out", budget=10_000_000)
    assert_same_output(load_cleanly(llamas.fresh(), tmp_path / "out"), llamas.model)
    assert any("does not decide" in note for note in report.notes)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_share_a_rank(tmp_path, family, uniform):
    """One rank costs what it costs all experts; the stacked products are the truncations, expert by expert."""
    turned = family == "gpt_oss"
    base, tuned, model = moe_more.pair(family, tmp_path, lambda name: not (turned and name.endswith("_bias")))
    report = extract(base, tuned, tmp_path / "out", budget=150_000, uniform_rank=uniform)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    factors = load_file(tmp_path / "out" / WEIGHTS)
    whole = sum(tensor.nbytes for name, tensor in factors.items() if "lora_" not in name)
    one = sum(tensor.nbytes for tensor in factors.values()) - whole
    assert size <= 150_000 < size + (one / report.modules[0]["rank"] if uniform else 4 * 4 * (96 + 64)) + 64
    assert not uniform or len({row["rank"] for row in report.modules}) == 1
    before, after = dict(models.load(base).named_parameters()), dict(model.named_parameters())
    adapter = load_adapter(tmp_path / "out")
    stacked = [row for row in report.modules if ".experts." in row["name"]]
    assert stacked
    for row in stacked:
        exact = (after[row["name"]] - before[row["name"]]).detach().double()
        found = adapter[row["name"]].delta_weight().double()
        exact = exact.transpose(1, 2) if turned else exact
        assert row["residual"] == pytest.approx(float((exact - found).norm() / exact.norm()), rel=1e-3, abs=1e-6)
        left = sum(torch.linalg.svdvals(each)[row["rank"] :].square().sum() for each in exact)
        assert row["residual"] == pytest.approx(float((left / exact.square().sum()).sqrt()), rel=1e-3, abs=1e-6)
    load_cleanly(models.load(base), tmp_path / "out", expected=moe_more.said(tmp_path / "out"))


def test_matrices_stored_the_other_way_round(tmp_path):
    """GPT-2's Conv1D and embeddings: the factors PEFT loads are cut on the right sides."""
    pair = make_pair(tmp_path, "gpt2", size=0.02)
    report = extract(pair.base, pair.tuned, tmp_path / "out", budget=200_000)
    load_cleanly(pair.fresh(), tmp_path / "out", expected=())
    products = stored_products(tmp_path / "out")
    turned = [row for row in report.modules if "c_" in row["name"]]
    assert turned
    for row in turned:
        exact = delta_of(row["name"], pair.fresh(), pair.model)
        left = float((exact - products[row["name"]]).norm() / exact.norm())
        assert left == pytest.approx(eckart_young(exact, row["rank"]), rel=1e-3)


@pytest.fixture(scope="module")
def minilm_level(minilm, minilm_tuned, tmp_path_factory):
    """Rank 8 for all modules of a real fine-tune: its report and the size of its file."""
    output = tmp_path_factory.mktemp("level") / "out"
    report = extract(minilm, minilm_tuned, output, rank=8, only_low_rank=True)
    return report, (output / WEIGHTS).stat().st_size


def test_a_real_fine_tune(tmp_path, minilm, minilm_tuned, minilm_level):
    """MiniLM, whose matrices are iterated on: a quarter less is left at the same size, near the bound, and truly."""
    level, size = minilm_level
    report = extract(minilm, minilm_tuned, tmp_path / "out", budget=size, only_low_rank=True)
    assert report.totals["residual"] ** 2 < 0.8 * level.totals["residual"] ** 2
    assert report.totals["budget"]["captured"] > 0.999 * report.totals["budget"]["bound"]
    assert "block-krylov" in {row["method"] for row in report.modules}
    before, after = load_file(minilm / "model.safetensors"), load_file(minilm_tuned / "model.safetensors")
    products = stored_products(tmp_path / "out")
    for row in report.modules:
        if "embeddings" not in row["name"]:
            exact = after[f"{row['name']}.weight"].double() - before[f"{row['name']}.weight"].double()
            true = float((exact - products[row["name"]]).norm() / exact.norm())
            assert row["residual"] == pytest.approx(true, rel=1e-5)
            assert true <= eckart_young(exact, row["rank"]) * (1 + row["certificate"] + 1e-6)


def test_certificates_at_a_lower_rank(tmp_path, minilm, minilm_tuned):
    """Cut from rank 24 of an iteration: not the optimum everywhere, and nowhere further from it than certified."""
    options = {"max_rank": 24, "only_low_rank": True, "exclude": ["word_embeddings"]}
    report = extract(minilm, minilm_tuned, tmp_path / "out", budget=2_500_000, **options)
    before, after = load_file(minilm / "model.safetensors"), load_file(minilm_tuned / "model.safetensors")
    gaps = {}
    for row in report.modules:
        if row["rank"] < 24 and "embeddings" not in row["name"]:
            exact = after[f"{row['name']}.weight"].double() - before[f"{row['name']}.weight"].double()
            gaps[row["name"]] = row["residual"] / eckart_young(exact, row["rank"]) - 1
            assert gaps[row["name"]] <= row["certificate"]
    assert len(gaps) > 5
    assert max(gaps.values()) > 5e-7, "or this shows nothing"


def test_decomposing_again_on_a_real_fine_tune(tmp_path, minilm, minilm_tuned, minilm_level, monkeypatch):
    """From rank 2 upwards it ends where it does from 36: an iteration is no exact decomposition, so within that."""
    size = minilm_level[1]
    wide = extract(minilm, minilm_tuned, tmp_path / "wide", budget=size, only_low_rank=True)
    monkeypatch.setattr(budgets, "starting_rank", lambda *_: 2)
    narrow = extract(minilm, minilm_tuned, tmp_path / "narrow", budget=size, only_low_rank=True)
    assert len(narrow.totals["budget"]["decomposed_again"]) > len(narrow.modules) / 2
    assert narrow.totals["budget"]["captured"] == pytest.approx(wide.totals["budget"]["captured"], rel=2e-5)
    ranks = [{row["name"]: row["rank"] for row in report.modules} for report in (wide, narrow)]
    assert sum(abs(ranks[0].get(path, 0) - ranks[1].get(path, 0)) for path in {*ranks[0], *ranks[1]}) <= 4


def test_the_command(tmp_path, pair, capsys):
    """Sizes as people write them; the plan shows the rule; a budget too small is exit 2."""
    from loratools.cli.main import main

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["extract", str(pair[0]), str(pair[1]), "-o", str(tmp_path / "out"), *arguments])
        return ended.value.code or 0, capsys.readouterr()

    code, shown = run("--budget", "60KB", "--dry-run")
    assert code == 0
    assert "budget: the weights file" in shown.out
    assert "uniform-rank" not in shown.out
    code, shown = run("--budget", "1KB")
    assert code == 2
    assert not (tmp_path / "out").exists()
    code, shown = run("--budget", "60KB", "--json")
    assert code == 0
    assert json.loads(shown.out)["totals"]["budget"]["bytes"] <= 60_000
    assert json.loads(shown.out)["parameters"]["budget"] == 60_000


def test_the_configuration_is_not_mixed_with_other_rules(tmp_path, pair):
    """One rank for all without a budget, or a budget beside another rule."""
    for options in ({"uniform_rank": True}, {"budget": 60_000, "error": 0.1}, {"budget": -5}):
        with pytest.raises(UsageError):
            extract(*pair, tmp_path / "out", **options)

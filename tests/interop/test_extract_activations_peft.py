"""`extract --activations` on a real model that reads English, and on experts: PEFT loads what comes out."""

import statistics

import pytest
import torch
from safetensors.torch import save_file

import loratools as lt
from tests import activations, models
from tests.imatrix_files import gguf, legacy
from tests.interop import judge, moe, moe_more


@pytest.fixture(scope="module")
def text(minilm, tmp_path_factory):
    """The activations file, E[x xᵀ] over the text that was gathered, and over text that was not."""
    model = models.load(minilm)
    file = activations.gather(model, minilm, tmp_path_factory.mktemp("rms") / "activations.safetensors")
    seen, held_out = (activations.moments(model, minilm, each) for each in (activations.SEEN, activations.HELD_OUT))
    return file, seen, held_out


@pytest.mark.parametrize("rank", [2, 8])
def test_most_layers_are_nearer_on_text_that_nobody_saw(minilm, minilm_tuned, text, rank, tmp_path):
    """‖(ΔW − Δ̂)X‖ on held-out sentences is smaller with activations on at least three layers of four, and by 5 % in the
    median; on the diagonal of what was gathered it is smaller on all of them."""
    file, seen, held_out = text
    plain, weighted = {}, {}
    for found, each in ((plain, None), (weighted, file)):
        out = tmp_path / str(each is None)
        report = lt.extract(minilm, minilm_tuned, out, rank=rank, activations=each)
        found["held out"] = activations.output_errors(out, minilm, minilm_tuned, held_out)
        diagonal = {name: each.diagonal().diag() for name, each in seen.items()}
        found["diagonal"] = activations.output_errors(out, minilm, minilm_tuned, diagonal)
    assert len(plain["held out"]) == 37
    ratios = {name: weighted["held out"][name] / error for name, error in plain["held out"].items()}
    assert sum(ratio < 1 for ratio in ratios.values()) >= 0.75 * len(ratios)
    assert statistics.median(ratios.values()) < 0.95
    assert all(weighted["diagonal"][name] < error * (1 + 1e-6) for name, error in plain["diagonal"].items())
    rows = {row["name"]: row for row in report.modules}
    for name, error in weighted["diagonal"].items():
        assert rows[name]["weighted_residual"] == pytest.approx(error, rel=2e-3)
    embeddings = {name for name, row in rows.items() if "weighted_residual" not in row}
    assert embeddings
    assert all("embeddings" in name for name in embeddings)


def test_peft_loads_it_and_computes_what_the_merge_does(minilm, minilm_tuned, text, tmp_path):
    """No missing key, no warning; the outputs of PEFT's model are those of our merge."""
    lt.extract(minilm, minilm_tuned, tmp_path / "adapter", rank=4, activations=text[0])
    loaded = judge.load_cleanly(models.load(minilm), tmp_path / "adapter")
    lt.merge(minilm, [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    for tokens in activations.batches(minilm, activations.HELD_OUT):
        with torch.no_grad():
            one, other = loaded(**tokens).last_hidden_state, merged(**tokens).last_hidden_state
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def rms(*shape):
    return 10 ** torch.rand(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def changed(path, base, tuned, expert):
    """ΔW of one expert, (out, in), under the names of the model class."""
    live = [models.load(each).state_dict()[path][expert].double() for each in (tuned, base)]
    return live[0] - live[1]


@pytest.mark.parametrize("form", ["gguf", "dat", "safetensors"])
@pytest.mark.parametrize("family", moe.FAMILIES)
def test_every_expert_has_its_own_inputs(family, form, tmp_path):
    """Stored apart, stacked, or stacked and turned: each expert's Δ̂ is optimal for its inputs, or for those of all
    where the file has one vector; PEFT loads the result."""
    base, tuned, _ = moe_more.pair(family, tmp_path, lambda name: "experts" in name and "bias" not in name)
    inputs = {"gate_up_proj": rms(moe.EXPERTS, moe.HIDDEN), "down_proj": rms(moe.EXPERTS, moe.INTERMEDIATE)}
    inputs["down_proj"][2] = 1.0  # of an expert that was never chosen: ones in the older form, nothing in the newer
    stacks = {f"model.layers.{layer}.mlp.experts.{name}": x for layer in (0, 1) for name, x in inputs.items()}
    file = tmp_path / f"act.{form}"
    if form == "safetensors":
        save_file({path: x[1].float().contiguous() for path, x in stacks.items()}, file)
        stacks = {path: x[1].expand_as(x) for path, x in stacks.items()}
    else:
        sums = {}
        for layer in (0, 1):
            for short, name in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
                counts = [3.0, 5.0, 0.0 if name == "down_proj" else 2.0, 7.0]
                squares = inputs[name].square() * torch.tensor(counts, dtype=torch.float64)[:, None]
                sums[f"blk.{layer}.ffn_{short}_exps.weight"] = (squares.float().numpy(), counts)
        file.write_bytes(gguf(sums) if form == "gguf" else legacy(sums))
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=2, activations=file)
    rows = {row["name"]: row for row in report.modules}
    assert set(rows) == set(stacks)
    adapter = lt.load_adapter(tmp_path / "adapter")
    for path, x in stacks.items():
        left = whole = best = 0.0
        for expert in range(moe.EXPERTS):
            moved = changed(path, base, tuned, expert)
            moved = moved.T if family == "gpt_oss" else moved
            A = adapter[path].lora_A.load().double().reshape(moe.EXPERTS, 2, -1)[expert]
            B = adapter[path].lora_B.load().double().reshape(-1, 2, moe.EXPERTS)[:, :, expert]
            weights = x[expert] / x[expert].square().mean().sqrt()
            sigma = torch.linalg.svdvals(moved * weights)
            left += float(((moved - B @ A) * weights).square().sum())
            whole, best = whole + float(sigma.square().sum()), best + float(sigma[2:].square().sum())
        assert left == pytest.approx(best, rel=1e-4)
        assert rows[path]["weighted_residual"] ** 2 == pytest.approx(best / whole, rel=1e-4)
    judge.load_cleanly(models.load(base), tmp_path / "adapter", expected=moe_more.said(tmp_path / "adapter"))

"""`extract --activations`: which modules are weighted, by what, and what the report says; hostile files are refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from loratools import linalg
from loratools.errors import InputMissingError, LoratoolsError, MalformedError, MismatchError, NonFiniteError
from loratools.files import load_adapter
from loratools.verbs.extract import extract, plan_extract
from tests.imatrix_files import STRING, gguf, legacy, line, pair, text
from tests.tiny import DOWN, GPT2, K, Q, gpt2, llama, normal, report_of, state, write_checkpoint

INPUTS = {Q: 16, K: 16, DOWN: 24}
NAMES = {Q: "blk.0.attn_q.weight", K: "blk.1.attn_k.weight", DOWN: "blk.1.ffn_down.weight"}


def rms(n, seed=3):
    return 10 ** (2 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


def noisy(tensors, names, dtype=torch.float32):
    """`tensors` with full-rank noise on some: at low rank there is something to choose."""
    changed = dict(tensors)
    for index, name in enumerate(names):
        noise = 0.1 * normal(60 + index, *tensors[name].shape, dtype=torch.float64)
        changed[name] = (tensors[name].double() + noise).to(dtype)
    return changed


@pytest.fixture
def pair_of(tmp_path):
    base = llama(torch.float32)
    tuned = noisy(base, [f"{path}.weight" for path in INPUTS])
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned)


def weights_of(path):
    """What the three forms of file say of a module's inputs: RMS values, of a unit of their own."""
    return rms(INPUTS[path], seed=len(path))


def write(path, form, only=INPUTS):
    """The same activations in one of the forms."""
    if form == "safetensors":
        named = {f"{each}.weight" if each == K else each: weights_of(each).float() for each in only}
        save_file(named, path)
        return path
    sums = {NAMES[each]: ((weights_of(each).square() * 64).float().numpy().reshape(1, -1), [64.0]) for each in only}
    path.write_bytes(gguf(sums) if form == "gguf" else legacy(sums))
    return path


def change(pair_of, path, base=None, tuned=None):
    from tests.tiny import tensors_of

    before, after = (tensors_of(each) for each in pair_of)
    return after[f"{path}.weight"].double() - before[f"{path}.weight"].double()


def written(output, path):
    update = load_adapter(output)[path]
    return update.lora_B.load().double() @ update.lora_A.load().double()


@pytest.mark.parametrize("form", ["safetensors", "gguf", "dat"])
def test_every_form_of_file_gives_the_weighted_optimum(tmp_path, pair_of, form):
    """At rank 3, against a float64 SVD of ΔW·diag(x); both residuals are those of the factors as written."""
    file = write(tmp_path / f"act.{form}", form)
    report = extract(*pair_of, tmp_path / "out", rank=3, activations=file)
    assert {row["name"] for row in report.modules} == set(INPUTS)
    for row in report.modules:
        exact, x = change(pair_of, row["name"]), weights_of(row["name"])
        left = exact - written(tmp_path / "out", row["name"])
        sigma = torch.linalg.svdvals(exact * x)
        best = float(sigma[3:].norm() / sigma.norm())
        assert row["weighted_residual"] == pytest.approx(best, rel=1e-5)
        assert float((left * x).norm() / sigma.norm()) == pytest.approx(best, rel=1e-5)
        assert row["residual"] == pytest.approx(float(left.norm() / exact.norm()), rel=1e-5)
        assert row["captured"] == pytest.approx(1 - row["residual"] ** 2, abs=1e-6)
        assert row["weighted_captured"] == pytest.approx(1 - best**2, abs=1e-6)
        assert best * row["weighted_residual"] < row["residual"] ** 2


def test_factors_are_balanced_and_the_three_forms_agree(tmp_path, pair_of):
    """B and A are those of the SVD of Δ̂ itself; the same activations in other clothes give the same Δ̂."""
    outputs = {}
    for form in ("safetensors", "gguf", "dat"):
        outputs[form] = tmp_path / f"out-{form}"
        extract(*pair_of, outputs[form], rank=3, activations=write(tmp_path / f"a.{form}", form))
    for path in INPUTS:
        update = load_adapter(outputs["gguf"])[path]
        A, B = update.lora_A.load().double(), update.lora_B.load().double()
        assert torch.allclose(A @ A.T, B.T @ B, atol=1e-6)
        assert (update.alpha, update.rank) == (3.0, 3)
        for other in ("safetensors", "dat"):
            assert torch.allclose(written(outputs[other], path), written(outputs["gguf"], path), atol=1e-6)


def test_the_file_is_an_input_of_plan_and_report(tmp_path, pair_of):
    """Name and hash, never a path; the same run twice gives the same bytes; without the option nothing is different."""
    import hashlib

    file = write(tmp_path / "act.gguf", "gguf")
    plan = plan_extract(*pair_of, tmp_path / "out", rank=2, activations=file)
    assert [(each.role, each.kind, each.name) for each in plan.sources][-1] == ("activations",) * 2 + ("act.gguf",)
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan
    extract(*pair_of, tmp_path / "out", rank=2, activations=file)
    report = report_of(tmp_path / "out")
    assert report["parameters"]["activations"] == "act.gguf"
    (entry,) = [each for each in report["inputs"] if each["role"] == "activations"]
    assert entry["sha256"] == {"act.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert str(tmp_path) not in json.dumps(report)
    extract(*pair_of, tmp_path / "again", rank=2, activations=file, threads=1)
    assert state(tmp_path / "again") == state(tmp_path / "out")
    plain = extract(*pair_of, tmp_path / "plain", rank=2)
    assert not any("weighted_residual" in row for row in plain.modules)
    assert plain.parameters["activations"] is None


def test_modules_that_the_file_does_not_hold_are_extracted_as_ever_and_named(tmp_path, pair_of):
    """Byte for byte; and entries that are of no module of this model are named."""
    file = tmp_path / "act.gguf"
    sums = {NAMES[Q]: (weights_of(Q).float().numpy().reshape(1, -1), [1.0])}
    sums |= {"blk.7.attn_q.weight": sums[NAMES[Q]], "v.patch_embd.weight": sums[NAMES[Q]]}
    file.write_bytes(gguf(sums))
    report = extract(*pair_of, tmp_path / "out", rank=2, activations=file)
    extract(*pair_of, tmp_path / "plain", rank=2)
    notes = " ".join(report.notes)
    assert "name no module of this model, and are not used: blk.7.attn_q.weight, v.patch_embd.weight" in notes
    assert f"1 of 3 modules are weighted by the activations of act.gguf; not: {DOWN}, {K}." in notes
    assert [row["name"] for row in report.modules if "weighted_residual" in row] == [Q]
    for path in (K, DOWN):
        one, other = (load_adapter(tmp_path / each)[path] for each in ("out", "plain"))
        assert torch.equal(one.lora_A.load(), other.lora_A.load())
    assert not torch.allclose(written(tmp_path / "out", Q), written(tmp_path / "plain", Q), atol=1e-3)


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"error": 0.3}], ids=str)
def test_rank_rules_are_meant_in_the_weighted_norm(tmp_path, pair_of, rule):
    """The least rank by the singular values of ΔW·diag(x)."""
    report = extract(*pair_of, tmp_path / "out", activations=write(tmp_path / "a.dat", "dat"), **rule)
    for row in report.modules:
        sigma = torch.linalg.svdvals(change(pair_of, row["name"]) * weights_of(row["name"]))
        tails = [float(sigma[r:].norm() / sigma.norm()) for r in range(len(sigma) + 1)]
        bound = rule["error"] if "error" in rule else (1 - rule["energy"]) ** 0.5
        assert row["rank"] == next(r for r, tail in enumerate(tails) if tail <= bound)
        assert row["weighted_residual"] <= bound
        assert row["reached"]


def test_inputs_never_seen_and_entries_that_say_nothing(tmp_path, pair_of):
    """Zeros weigh a little; zeros alone, or no token, weigh nothing, and that is said; nothing blows up."""
    file = tmp_path / "act.gguf"
    seen = weights_of(Q).float().numpy().reshape(1, -1).copy()
    seen[0, :9] = 0
    nothing = torch.zeros(1, 16).numpy()
    file.write_bytes(gguf({NAMES[Q]: (seen, [9.0]), NAMES[K]: (nothing, [0.0])}))
    report = extract(*pair_of, tmp_path / "out", rank=2, activations=file)
    assert any("say nothing" in note and K in note for note in report.notes)
    assert [row["name"] for row in report.modules if "weighted_residual" in row] == [Q]
    exact, found = change(pair_of, Q), written(tmp_path / "out", Q)
    assert bool((found.norm(dim=0) <= exact.norm(dim=0) * (1 + 1e-5)).all())
    x = linalg.input_weights(torch.from_numpy(seen[0]).sqrt())
    sigma = torch.linalg.svdvals(exact * x)
    (row,) = [row for row in report.modules if row["name"] == Q]
    assert row["weighted_residual"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-5)


def test_conv1d_convolutions_and_embeddings(tmp_path):
    """A Conv1D's inputs are the rows of what is stored; a convolution's channels are repeated over its kernel."""
    base = gpt2() | {"conv.weight": normal(9, 6, 5, 3), "conv.bias": normal(8, 6)}
    names = ("h.0.attn.c_attn.weight", "conv.weight", "wpe.weight")
    tuned = noisy(base, names)
    sides = [write_checkpoint(tmp_path / name, each, GPT2) for name, each in (("b", base), ("t", tuned))]
    x, channels = rms(16), rms(5)
    file = tmp_path / "act.safetensors"
    save_file({"h.0.attn.c_attn": x.float(), "conv": channels.float(), "wpe.weight": rms(8).float()}, file)
    report = extract(*sides, tmp_path / "out", rank=2, activations=file)
    rows = {row["name"].removeprefix("transformer."): row for row in report.modules}
    moved = tuned[names[0]].double() - base[names[0]].double()
    sigma = torch.linalg.svdvals(moved * x[:, None])
    row = rows["h.0.attn.c_attn"]
    assert row["weighted_residual"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-5)
    adapter = load_adapter(tmp_path / "out")
    update = adapter[row["name"]]
    left = moved.T - update.lora_B.load().double() @ update.lora_A.load().double()
    assert float((left * x).norm() / sigma.norm()) == pytest.approx(row["weighted_residual"], rel=1e-5)
    kernel = (tuned["conv.weight"].double() - base["conv.weight"].double()).reshape(6, 15)
    sigma = torch.linalg.svdvals(kernel * channels.repeat_interleave(3))
    assert rows["conv"]["weighted_residual"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-5)
    assert "weighted_residual" not in rows["wpe"]
    assert any("embeddings" in note and "wpe" in note for note in report.notes)


REFUSED = {
    "another model's length": (lambda: gguf({NAMES[Q]: (torch.ones(1, 12).numpy(), [1.0])}), MismatchError,
                               "12 values for 16 inputs"),
    "a length in the older form": (lambda: legacy(lines=[line(NAMES[Q], [1] * 32)]), MismatchError, "another model"),
    "experts where there are none": (lambda: gguf({NAMES[Q]: (torch.ones(2, 16).numpy(), [1.0, 1.0])}), MismatchError,
                                     "another model"),
    "no module of this model": (lambda: gguf({"blk.9.attn_q.weight": (torch.ones(1, 16).numpy(), [1.0])}),
                                MismatchError, "names a module"),
    "NaN": (lambda: gguf({NAMES[Q]: (torch.full((1, 16), torch.nan).numpy(), [1.0])}), NonFiniteError, "NaN"),
    "infinity": (lambda: legacy(lines=[line(NAMES[Q], [1] * 15 + [float("inf")])]), NonFiniteError, "NaN or infinity"),
    "a negative value": (lambda: legacy(lines=[line(NAMES[Q], [1] * 15 + [-1])]), MalformedError, "negative"),
    "a negative count": (lambda: gguf({NAMES[Q]: (torch.ones(1, 16).numpy(), [-1.0])}), MalformedError, "negative"),
    "an infinite count": (lambda: gguf({NAMES[Q]: (torch.ones(1, 16).numpy(), [float("inf")])}), NonFiniteError, "NaN"),
    "sums of no token": (lambda: gguf({NAMES[Q]: (torch.ones(1, 16).numpy(), [0.0])}), MalformedError, "no token"),
    "sums without counts": (lambda: gguf(tensors={"a.in_sum2": torch.ones(1, 16).numpy()}), MalformedError, "counts"),
    "counts without sums": (lambda: gguf(tensors={"a.counts": torch.ones(1, 1).numpy()}), MalformedError, "counts"),
    "counts of another number": (lambda: gguf({NAMES[Q]: (torch.ones(1, 16).numpy(), [1.0, 1.0])}), MalformedError,
                                 "counts"),
    "a model": (lambda: gguf(pairs=[pair("general.type", STRING, text("model"))]), MalformedError, "no importance"),
    "no entry": (lambda: gguf(tensors={"other": torch.ones(1, 4).numpy()}), MalformedError, "no activations"),
    "an empty file": (lambda: b"", MalformedError, "no importance"),
    "a cut file": (lambda: gguf()[:-100], MalformedError, "cut short"),
    "a safetensors header of nothing": (lambda: struct.pack("<Q", 2) + b"{}", MalformedError, "no activations"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, pair_of, name):
    """Before anything is computed; nothing is written; a dry run says the same."""
    make, kind, words = REFUSED[name]
    file = tmp_path / "act"
    file.write_bytes(make())
    before = state(tmp_path)
    for verb in (plan_extract, extract):
        with pytest.raises(kind, match=words):
            verb(*pair_of, tmp_path / "out", rank=2, activations=file)
    assert state(tmp_path) == before


@pytest.mark.parametrize("tensors", [
    {Q: torch.ones(2, 8)}, {Q: torch.ones(16, dtype=torch.int32)}, {Q: torch.ones(0)}, {Q: torch.tensor(1.0)},
    {Q: torch.ones(16), f"{Q}.weight": torch.ones(16)}, {Q: torch.ones(15)}, {Q: -torch.ones(16)},
    {Q: torch.full((16,), torch.inf, dtype=torch.bfloat16)}, {"model.embed_token": torch.ones(16)},
], ids=str)  # fmt: skip
def test_safetensors_that_are_refused(tmp_path, pair_of, tensors):
    """Not a vector per module, of floats, of the right number, once."""
    save_file(tensors, tmp_path / "act.safetensors")
    with pytest.raises(LoratoolsError, match=r"act\.safetensors") as caught:
        plan_extract(*pair_of, tmp_path / "out", rank=2, activations=tmp_path / "act.safetensors")
    assert caught.value.code in {"malformed", "mismatch", "non-finite"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(tmp_path, pair_of, dtype):
    """Powers of two are the same in all of them."""
    x = 2.0 ** torch.arange(-8, 8)
    for name, kind in (("one", torch.float32), ("two", dtype)):
        save_file({Q: x.to(kind)}, tmp_path / f"{name}.safetensors")
        extract(*pair_of, tmp_path / name, rank=2, activations=tmp_path / f"{name}.safetensors")
    assert torch.equal(written(tmp_path / "one", Q), written(tmp_path / "two", Q))


def test_missing_and_odd_paths(tmp_path, pair_of):
    """A file that is not there is exit 66; a directory is none; the output may not replace it."""
    with pytest.raises(InputMissingError):
        extract(*pair_of, tmp_path / "out", activations=tmp_path / "nothing")
    with pytest.raises(MalformedError):
        extract(*pair_of, tmp_path / "out", activations=tmp_path)
    inside = tmp_path / "folder"
    inside.mkdir()
    file = write(inside / "act.gguf", "gguf")
    with pytest.raises(LoratoolsError):
        extract(*pair_of, inside, activations=file, overwrite=True)
    assert file.exists()


def test_a_prefix_that_the_file_lacks(tmp_path, pair_of):
    """Names of the stored file are as good as those of the model class."""
    base = {name.removeprefix("model."): tensor for name, tensor in llama(torch.float32).items()}
    base = {name: tensor for name, tensor in base.items() if not name.startswith("lm_head")}
    short = Q.removeprefix("model.")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    sides = [
        write_checkpoint(tmp_path / name, each, config)
        for name, each in (("b", base), ("t", noisy(base, [f"{short}.weight"])))
    ]
    save_file({short: rms(16).float()}, tmp_path / "act.safetensors")
    report = extract(*sides, tmp_path / "out", rank=2, activations=tmp_path / "act.safetensors")
    assert [row["name"] for row in report.modules if "weighted_residual" in row] == [Q]
    save_file({short: rms(16).float(), Q: rms(16, seed=9).float()}, tmp_path / "twice.safetensors")
    with pytest.raises(MalformedError, match="twice"):
        extract(*sides, tmp_path / "two", rank=2, activations=tmp_path / "twice.safetensors")


def test_memory_bound_grows_with_what_weighting_takes(tmp_path, pair_of):
    """The plan of a weighted run has a higher bound, and a limit below it is refused."""
    file = write(tmp_path / "act.gguf", "gguf")
    plain = plan_extract(*pair_of, tmp_path / "out", rank=2)
    weighted = plan_extract(*pair_of, tmp_path / "out", rank=2, activations=file)
    largest = plan_extract(*pair_of, tmp_path / "out", rank=16, activations=file)
    assert plain.bounds.peak_bytes < weighted.bounds.peak_bytes < largest.bounds.peak_bytes
    fixed = plan_extract(*pair_of, tmp_path / "out", rank=16).bounds.peak_bytes - plain.bounds.peak_bytes
    assert largest.bounds.peak_bytes - weighted.bounds.peak_bytes > fixed
    assert sum("activations" in unit.parameters for unit in weighted.units) == 3

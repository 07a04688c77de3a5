import json

import pytest
import torch

from loratools.errors import MismatchError, UndecidedError, UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.unmerge import unmerge
from tests.tiny import (
    CONFIG,
    PREFIX,
    SHAPES,
    Q,
    equal_bits,
    factors,
    llama,
    lora_tensors,
    normal,
    sha256,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def adapters(tmp_path, count=2):
    made = []
    for index in range(count):
        pairs = factors(3 + index, 10 + index, [torch.float32, torch.bfloat16][index % 2])
        made.append(write_adapter(tmp_path / f"a{index}", lora_tensors(pairs), r=3 + index, lora_alpha=5))
    return made


def same_weights(one, other):
    found, expected = tensors_of(one), tensors_of(other)
    return list(found) == list(expected) and all(equal_bits(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_with_the_base_every_bit_comes_back(tmp_path, dtype, named, shards):
    """Law 1: the base's files, weights and companions, with the adapters named or known from the report."""
    base = write_checkpoint(
        tmp_path / "base", llama(DTYPES[dtype]), shards=shards, companions={"tokenizer.json": b"{}"}
    )
    made = adapters(tmp_path)
    merge(base, made, tmp_path / "merged", weights=[0.5, -1])
    report = unmerge(tmp_path / "merged", tmp_path / "out", adapters=made if named else (), base=base)
    assert (report.method, report.totals["bound"]) == ("base", 0.0)
    assert same_weights(tmp_path / "out", base)
    for path in base.glob("*.safetensors"):
        assert path.name in {each.name for each in (tmp_path / "out").iterdir()}
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_the_base_comes_back_from_a_recast_and_resharded_merge(tmp_path):
    """`--dtype` loses bits; with the base they are there again."""
    base, made = write_checkpoint(tmp_path / "base", llama(torch.float32)), adapters(tmp_path, 1)
    merge(base, made, tmp_path / "merged", dtype="bf16", max_shard_size=1000)
    unmerge(tmp_path / "merged", tmp_path / "out", adapters=made, base=base)
    assert same_weights(tmp_path / "out", base)


def test_replaced_lengthened_and_added_parameters_come_back_with_the_base(tmp_path):
    """What subtraction cannot do; without the base it is refused, and the first tensor named."""
    base, tuned = write_checkpoint(tmp_path / "base"), llama()
    tuned[f"{Q}.weight"] = tuned[f"{Q}.weight"] + normal(3, 16, 16, dtype=torch.bfloat16)
    tuned["model.norm.weight"] = normal(4, 16, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([tuned[name], normal(9, 3, 16, dtype=torch.bfloat16)])
    other = write_checkpoint(tmp_path / "tuned", tuned, CONFIG | {"vocab_size": 35})
    extract(base, other, tmp_path / "a")
    merge(base, [tmp_path / "a"], tmp_path / "merged", receipt="none")
    before = state(tmp_path)
    with pytest.raises(UnsupportedError, match=r"--base.*|model\.norm\.weight"):
        unmerge(tmp_path / "merged", tmp_path / "out", adapters=[tmp_path / "a"])
    assert state(tmp_path) == before
    unmerge(tmp_path / "merged", tmp_path / "out", adapters=[tmp_path / "a"], base=base)
    assert same_weights(tmp_path / "out", base)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_an_untied_head_is_tied_again(tmp_path):
    """The tensor that only the merge brought is left out, and said."""
    base = write_checkpoint(tmp_path / "base", llama(head=False), CONFIG | {"tie_word_embeddings": True})
    a = write_adapter(tmp_path / "a", lora_tensors(factors(modules={"lm_head": (32, 16)})))
    merge(base, [a], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", tmp_path / "out", adapters=[a], base=base)
    assert same_weights(tmp_path / "out", base)
    assert any("lm_head.weight" in note for note in report.notes)


def largest_error(out, base, bounds):
    """Per subtracted tensor: the largest error over its reported bound."""
    found, expected = tensors_of(out), tensors_of(base)
    assert all(equal_bits(found[name], tensor) for name, tensor in expected.items() if name not in bounds)
    return max(
        float((found[name].double() - expected[name].double()).abs().max()) / bound for name, bound in bounds.items()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_subtraction_is_within_its_bound(tmp_path, dtype, scale):
    """Entry by entry, for small and large ΔW, several adapters and weights; the weights come from the report."""
    base = write_checkpoint(tmp_path / "base", llama(DTYPES[dtype]))
    a = write_adapter(tmp_path / "a", lora_tensors(factors(4, 1, scale=scale)))
    b = write_adapter(tmp_path / "b", lora_tensors(factors(2, 2, scale=scale)), r=2)
    merge(base, [a, b], tmp_path / "merged", weights=[0.7, -1.3], receipt="none")
    report = unmerge(tmp_path / "merged", tmp_path / "out", adapters=[a, b])
    assert report.method == "subtraction"
    assert report.to_json()["parameters"]["weights"] == [0.7, -1.3]
    bounds = {row["name"]: row["bound"] for row in report.modules}
    assert set(bounds) == {f"{path}.weight" for path in SHAPES}
    assert largest_error(tmp_path / "out", base, bounds) <= 1
    assert report.totals["bound"] == max(bounds.values())
    assert any("bound" in note for note in report.notes)
    worst = max(bounds.values())
    assert worst <= 4 * torch.finfo(DTYPES[dtype]).eps * max(
        float(t.abs().max()) for t in tensors_of(tmp_path / "merged").values()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_subtraction_of_what_peft_merged_is_within_its_bound(tmp_path, dtype):
    """PEFT adds one adapter after the other in float32 and rounds each time; no report says so."""
    tensors = llama(DTYPES[dtype])
    pairs = [factors(4, seed) for seed in (1, 2, 3)]
    merged = dict(tensors)
    for each in pairs:
        for path, (lora_A, lora_B) in each.items():
            name = f"{path}.weight"
            merged[name] = (merged[name].float() + 2.0 * (lora_B @ lora_A)).to(DTYPES[dtype])
    base, other = write_checkpoint(tmp_path / "base", tensors), write_checkpoint(tmp_path / "merged", merged)
    made = [write_adapter(tmp_path / f"a{index}", lora_tensors(each)) for index, each in enumerate(pairs)]
    report = unmerge(other, tmp_path / "out", adapters=made)
    assert largest_error(tmp_path / "out", base, {row["name"]: row["bound"] for row in report.modules}) <= 1


def test_one_of_several_is_taken_out(tmp_path):
    """The other stays in, to within the bound; with the base that is refused by name."""
    base, made = write_checkpoint(tmp_path / "base"), adapters(tmp_path)
    merge(base, made, tmp_path / "merged", receipt="none")
    merge(base, made[1:], tmp_path / "wanted")
    report = unmerge(tmp_path / "merged", tmp_path / "out", adapters=made[:1])
    bounds = {row["name"]: 2 * row["bound"] for row in report.modules}
    assert largest_error(tmp_path / "out", tmp_path / "wanted", bounds) <= 1
    with pytest.raises(UnsupportedError, match="a1"):
        unmerge(tmp_path / "merged", tmp_path / "no", adapters=made[:1], base=base)


def refuses(tmp_path, error, match, merged, **options):
    before = state(tmp_path)
    with pytest.raises(error, match=match) as caught:
        unmerge(merged, tmp_path / "out", **options)
    assert state(tmp_path) == before
    return str(caught.value)


def test_what_does_not_fit_is_refused(tmp_path):
    """Another adapter, another base, other weights, neither of them: by name, nothing written."""
    base, made = write_checkpoint(tmp_path / "base"), adapters(tmp_path)
    wrong = write_checkpoint(tmp_path / "wrong", llama(seed=1))
    merge(base, made[:1], tmp_path / "merged", weights=0.5, receipt="none")
    merged = tmp_path / "merged"
    assert "a0" in refuses(tmp_path, MismatchError, "a1", merged, adapters=made[1:])
    assert "a0" in refuses(tmp_path, MismatchError, "a1", merged, adapters=made[1:], base=base)
    refuses(tmp_path, MismatchError, r"weight 0\.5", merged, adapters=made[:1], weights=0.25)
    refuses(tmp_path, MismatchError, "wrong", merged, base=wrong)
    refuses(tmp_path, MismatchError, "wrong", merged, adapters=made[:1], base=wrong)
    refuses(tmp_path, UndecidedError, "merged", merged)
    refuses(tmp_path, UsageError, "2 weights", merged, adapters=made[:1], weights=[0.5, 1])
    refuses(tmp_path, UsageError, "finite", merged, adapters=made[:1], weights=float("nan"))


def test_without_a_report_the_base_tells_what_does_not_fit(tmp_path):
    """The merge is computed again: a wrong adapter, weight or base is found by its entries, the tensor named."""
    base, made = write_checkpoint(tmp_path / "base"), adapters(tmp_path)
    merge(base, made[:1], tmp_path / "merged", weights=0.5)
    (tmp_path / "merged" / "loratools.json").unlink()
    merged = tmp_path / "merged"
    wrong = write_checkpoint(tmp_path / "wrong", llama(seed=1))
    for options in (
        {"adapters": made[:1], "base": base},
        {"adapters": made[1:], "base": base, "weights": 0.5},
        {"adapters": made[:1], "base": wrong, "weights": 0.5},
    ):
        refuses(tmp_path, MismatchError, r"(entries differ|is not the base).*\.weight", merged, **options)
    refuses(tmp_path, UndecidedError, "no report", merged, base=base)
    unmerge(merged, tmp_path / "out", adapters=made[:1], base=base, weights=0.5)
    assert same_weights(tmp_path / "out", base)


def test_an_adapter_made_in_memory_is_not_taken_for_its_file(tmp_path):
    """Merging 0.5·a and unmerging a would leave half of it in: refused, and so is what cannot be recognised."""
    base, a = write_checkpoint(tmp_path / "base"), load_adapter(adapters(tmp_path, 1)[0])
    merge(base, [0.5 * a], tmp_path / "merged")
    refuses(tmp_path, MismatchError, "a0", tmp_path / "merged", adapters=[a])
    refuses(tmp_path, MismatchError, "in memory.*--base", tmp_path / "merged", adapters=[0.5 * a])
    unmerge(tmp_path / "merged", tmp_path / "out", base=base)
    assert same_weights(tmp_path / "out", base)


def test_a_tampered_merge_is_found(tmp_path):
    """An entry of a merged tensor that is not base plus adapter: the tensor and the count are named."""
    base, made = write_checkpoint(tmp_path / "base"), adapters(tmp_path, 1)
    merge(base, made, tmp_path / "merged")
    tensors = tensors_of(tmp_path / "merged")
    tensors[f"{Q}.weight"][3, 5] += 1
    report = (tmp_path / "merged" / "loratools.json").read_bytes()
    other = write_checkpoint(tmp_path / "tampered", tensors, companions={"loratools.json": report})
    refuses(tmp_path, MismatchError, "changed after it was written", other, adapters=made, base=base)
    bare = write_checkpoint(tmp_path / "bare", tensors)
    refuses(tmp_path, MismatchError, rf"1 of 256 entries differ.*{Q}", bare, adapters=made, base=base)


def test_single_files(tmp_path):
    """File in, file out; the report beside the merged file is found."""
    base, made = write_checkpoint(tmp_path / "base"), adapters(tmp_path, 1)
    merge(base, made, tmp_path / "m.safetensors", weights=0.5, receipt="none")
    unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors", base=base)
    assert same_weights(tmp_path / "b.safetensors", base)
    assert json.loads((tmp_path / "b.loratools.json").read_text())["schema"] == "loratools/unmerge/1"
    report = unmerge(tmp_path / "m.safetensors", tmp_path / "s.safetensors", adapters=made)
    assert report.parameters["weights"] == [0.5]


def test_the_report_of_an_unmerge(tmp_path):
    """Inputs with hashes, the method, every tensor that was checked."""
    base, made = write_checkpoint(tmp_path / "base"), adapters(tmp_path, 1)
    merge(base, made, tmp_path / "merged")
    report = unmerge(tmp_path / "merged", tmp_path / "out", adapters=made, base=base)
    document = json.loads((tmp_path / "out" / "loratools.json").read_text())
    assert document == json.loads(json.dumps(report.to_json()))
    assert {each["role"] for each in document["inputs"]} == {"merged", "base", "adapter"}
    assert {row["name"] for row in document["modules"]} == {f"{path}.weight" for path in SHAPES}
    assert document["totals"]["checked"] == 3
    hashes = {each["role"]: each["sha256"] for each in document["inputs"]}
    assert hashes["base"]["model.safetensors"] == sha256(base / "model.safetensors")


def test_a_replaced_parameter_named_by_a_plain_adapter_needs_the_base(tmp_path):
    """PEFT's `modules_to_save`: subtraction is refused with the tensor's name."""
    base = write_checkpoint(tmp_path / "base")
    keys = lora_tensors(factors()) | {f"{PREFIX}model.norm.weight": normal(4, 16)}
    a = write_adapter(tmp_path / "a", keys, modules_to_save=["norm"])
    merge(base, [a], tmp_path / "merged", receipt="none")
    refuses(tmp_path, UnsupportedError, r"model\.norm\.weight", tmp_path / "merged", adapters=[a])

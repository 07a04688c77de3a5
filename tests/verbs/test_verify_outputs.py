"""`verify` on outputs of ours: their files against their report, and the whole derived anew from the inputs."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import LoratoolsError, MalformedError, MismatchError, UndecidedError, UnsupportedError, UsageError
from loratools.verbs.verify import verify
from tests.laws.kinds import EVERY_KIND
from tests.laws.test_law_3_round_trip import pair as tuned_pair
from tests.tiny import (
    CONFIG,
    DOWN,
    Q,
    factors,
    llama,
    lora_tensors,
    report_of,
    sha256,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)


def world(tmp_path, dtype=torch.bfloat16):
    """A base and two adapters, of which one has factors in 16 bits."""
    base = write_checkpoint(tmp_path / "base", llama(dtype), companions={"tokenizer.json": b"{}"}, shards=2)
    made = [write_adapter(tmp_path / f"a{index}", lora_tensors(factors(3 + index, 10 + index, kept)), r=3 + index,
                          lora_alpha=5) for index, kept in enumerate((torch.float32, torch.bfloat16))]  # fmt: skip
    return base, made


def outputs(tmp_path):
    """One output of every sort, by name, with its inputs."""
    base, made = world(tmp_path)
    tuned = llama()
    tuned |= {f"{Q}.weight": tuned[f"{Q}.weight"] + 1, "model.norm.weight": tuned["model.norm.weight"] + 1}
    other = write_checkpoint(tmp_path / "tuned", tuned)
    lt.merge(base, made, tmp_path / "merge", weights=[0.5, -1])
    lt.unmerge(tmp_path / "merge", tmp_path / "unmerge", base=base)
    lt.merge(base, made, tmp_path / "bare", weights=[0.5, -1], receipt="none")
    lt.unmerge(tmp_path / "bare", tmp_path / "subtracted", adapters=made[:1])
    lt.unmerge(tmp_path / "merge", tmp_path / "reverted")
    lt.extract(base, other, tmp_path / "extract", rank=2)
    lt.stack(made, tmp_path / "stack", weights=[0.3, -2])
    lt.rescale(made[0], tmp_path / "rescale", restate_alpha=3)
    inputs = {
        "merge": [base, *made],
        "unmerge": [tmp_path / "merge", base],
        "subtracted": [made[0], tmp_path / "bare"],
        "reverted": [tmp_path / "merge"],
        "extract": [other, base],
        "stack": made,
        "rescale": made[:1],
    }
    return {tmp_path / name: each for name, each in inputs.items()}


def test_every_output_holds(tmp_path):
    """By its files alone, and derived anew from its inputs in any order; nothing is written."""
    made = outputs(tmp_path)
    before = state(tmp_path)
    for output, inputs in made.items():
        alone = verify(output)
        assert (alone.answer, alone.claim, alone.parameters["derived"]) == ("holds", "report", False)
        assert {file["verdict"] for file in alone.files} == {"holds"}
        assert any("was not asked" in note for note in alone.notes)
        report = verify(output, inputs)
        assert (report.answer, report.parameters["derived"]) == ("holds", True), output.name
        assert report.modules or output.name in {"unmerge", "reverted"}
        assert verify(output, inputs[::-1]).answer == "holds"
    assert state(tmp_path) == before


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    """Promise P10: every region of every file of every output, but the report, which has no hash of its own."""
    tried = 0
    for output in outputs(tmp_path):
        for file in sorted(output.iterdir()):
            data = file.read_bytes()
            if file.name == "loratools.json":
                continue
            for at in sorted({0, 7, 8, len(data) // 3, len(data) // 2, 2 * len(data) // 3, len(data) - 1}):
                if at >= len(data):
                    continue
                file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
                report = verify(output)
                assert report.answer == "does not hold"
                changed = [each["name"] for each in report.files if each["verdict"] == "changed"]
                assert changed == [file.name]
                tried += 1
            file.write_bytes(data)
    assert tried > 150


def rewritten(output, file, tensors):
    """Put other tensors into a file, and its new hash into the report: only deriving anew can tell."""
    path = output / file
    save_file(tensors, path, {"format": "pt"})
    document = json.loads((output / "loratools.json").read_text())
    for each in document["files"]:
        if each["name"] == file:
            each["sha256"] = sha256(path)
    (output / "loratools.json").write_text(json.dumps(document))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.norm.weight"])
def test_a_step_in_one_entry_of_a_merge_of_ours(tmp_path, dtype, name):
    """Ours has one policy, so that a unit in the last place is too much in 32 bits as well; a norm keeps its bytes."""
    base, made = world(tmp_path, dtype)
    lt.merge(base, made, tmp_path / "m")
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
            tensors[name].view(bits).view(-1)[3] += 1
            rewritten(tmp_path / "m", file.name, tensors)
    assert verify(tmp_path / "m").answer == "holds"
    report = verify(tmp_path / "m", [base, *made])
    assert report.answer == "does not hold"
    (row,) = [row for row in (*report.modules, *report.tensors) if row["verdict"] != "holds"]
    assert (row["name"], row["deviating"]) == (name, 1)


def test_an_update_below_the_dtypes_steps_is_no_question_of_ours(tmp_path):
    """Whether anything was added cannot be told; that this is what its inputs make can."""
    base = write_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", lora_tensors(factors(4, scale=1e-9)))
    lt.merge(base, [adapter], tmp_path / "m")
    assert verify(tmp_path / "m", [base, adapter]).answer == "holds"
    assert verify(tmp_path / "m", base=base, adapters=[adapter]).answer == "cannot tell"


def test_zeros_of_another_sign_are_other_bytes_in_ours(tmp_path):
    """What nothing touches keeps its bytes."""
    tensors = llama()
    tensors["model.norm.weight"][0] = 0.0
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "a")
    lt.merge(base, [adapter], tmp_path / "m")
    made = tensors_of(tmp_path / "m")
    made["model.norm.weight"][0] = -0.0
    rewritten(tmp_path / "m", "model.safetensors", made)
    assert verify(tmp_path / "m", [base, adapter]).answer == "does not hold"
    assert verify(tmp_path / "m", base=base, adapters=[adapter]).answer == "holds"


def test_a_merge_in_another_dtype_than_was_asked_for(tmp_path):
    base, made = world(tmp_path, torch.float32)
    lt.merge(base, made, tmp_path / "m", dtype="bf16", max_shard_size=10**6)
    assert verify(tmp_path / "m", [base, *made]).answer == "holds"
    tensors = {name: each.float() if "norm" in name else each for name, each in tensors_of(tmp_path / "m").items()}
    (file,) = (tmp_path / "m").glob("*.safetensors")
    rewritten(tmp_path / "m", file.name, tensors)
    report = verify(tmp_path / "m", [base, *made])
    assert {row["verdict"] for row in report.tensors} == {"reshaped"}
    assert all("F32, expected BF16" in row["detail"] for row in report.tensors)


def test_an_unmerge_that_is_not_the_base(tmp_path):
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    lt.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    file = next(path for path in (tmp_path / "u").glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(file)
    tensors["model.norm.weight"][1] += 1
    rewritten(tmp_path / "u", file.name, tensors)
    report = verify(tmp_path / "u", [base, tmp_path / "m"])
    assert [(row["name"], row["verdict"]) for row in report.tensors] == [("model.norm.weight", "changed")]


def test_what_a_receipt_brought_back(tmp_path):
    """Held to the hashes of the base in the receipt; with an adapter that stayed it is a question of its own."""
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    lt.unmerge(tmp_path / "m", tmp_path / "u")
    file = next(path for path in (tmp_path / "u").glob("*.safetensors") if f"{Q}.weight" in load_file(path))
    tensors = load_file(file)
    tensors[f"{Q}.weight"][1, 2] += 1
    rewritten(tmp_path / "u", file.name, tensors)
    report = verify(tmp_path / "u", [tmp_path / "m"])
    assert [(row["name"], row["verdict"]) for row in report.tensors] == [(f"{Q}.weight", "changed")]
    lt.unmerge(tmp_path / "m", tmp_path / "v", adapters=made[:1])
    assert verify(tmp_path / "v").answer == "holds"
    with pytest.raises(UndecidedError, match="adapter a1"):
        verify(tmp_path / "v", [tmp_path / "m"])
    with pytest.raises(UnsupportedError, match="--base"):
        verify(tmp_path / "v", [tmp_path / "m", made[1]])
    assert verify(tmp_path / "v", base=base, adapters=made[1:]).answer == "holds"
    (tmp_path / "m" / "loratools.receipt").unlink()
    with pytest.raises(MismatchError, match=r"loratools\.receipt is missing"):
        verify(tmp_path / "u", [tmp_path / "m"])


def test_a_receipt_of_another_base(tmp_path):
    """The hashes in a merge's receipt are those of the base that is given."""
    base, made = world(tmp_path)
    other = write_checkpoint(tmp_path / "other", llama() | {"model.norm.weight": llama()["model.norm.weight"] + 1})
    lt.merge(base, made, tmp_path / "m")
    lt.merge(other, made, tmp_path / "n")
    shutil.copy(tmp_path / "n" / "loratools.receipt", tmp_path / "m" / "loratools.receipt")
    document = report_of(tmp_path / "m")
    for each in document["files"]:
        each["sha256"] = sha256(tmp_path / "m" / each["name"])
    (tmp_path / "m" / "loratools.json").write_text(json.dumps(document))
    assert verify(tmp_path / "m").answer == "holds"
    report = verify(tmp_path / "m", [base, *made])
    assert [(row["name"], row["verdict"]) for row in report.tensors] == [
        ("model.norm.weight, in the receipt", "changed")
    ]
    assert counted(report) == COUNTED


COUNTED = {"tensors": 17, "same": 14, "changed": 0}
"""Of the tensors of `llama`, three are merged into."""


def counted(report):
    assert len(llama()) == COUNTED["tensors"]
    return {key: report.totals[key] for key in COUNTED}


def test_every_tensor_is_counted_once(tmp_path):
    """With a receipt, whose hashes are of the base, as without; and what is not as it was is not among the same."""
    base, made = world(tmp_path)
    for receipt in ("full", "lean", "none"):
        out = tmp_path / receipt
        lt.merge(base, made, out, receipt=receipt)
        assert counted(verify(out, [base, *made])) == COUNTED, receipt
        assert counted(verify(out, base=base, adapters=made)) == COUNTED
        file = next(path for path in out.glob("*.safetensors") if "model.norm.weight" in load_file(path))
        tensors = load_file(file)
        tensors["model.norm.weight"] += 1
        rewritten(out, file.name, tensors)
        assert counted(verify(out, [base, *made])) == COUNTED | {"same": 13, "changed": 1}, receipt
    lt.merge(base, made, tmp_path / "m")
    lt.unmerge(tmp_path / "m", tmp_path / "u")
    assert counted(verify(tmp_path / "u", [tmp_path / "m"])) == {"tensors": 17, "same": 17, "changed": 0}


def test_a_receipt_that_speaks_of_more_tensors(tmp_path):
    """One that the base does not have is no receipt of this merge."""
    base, made = world(tmp_path)
    larger = write_checkpoint(tmp_path / "larger", llama() | {"more.weight": torch.ones(2, dtype=torch.bfloat16)})
    lt.merge(base, made, tmp_path / "m")
    lt.merge(larger, made, tmp_path / "n")
    shutil.copy(tmp_path / "n" / "loratools.receipt", tmp_path / "m" / "loratools.receipt")
    document = report_of(tmp_path / "m")
    for each in document["files"]:
        each["sha256"] = sha256(tmp_path / "m" / each["name"])
    (tmp_path / "m" / "loratools.json").write_text(json.dumps(document))
    report = verify(tmp_path / "m", [base, *made])
    assert [(row["name"], row["verdict"]) for row in report.tensors] == [("more.weight, in the receipt", "changed")]
    assert counted(report) == COUNTED


def test_a_module_that_a_stack_lost_or_found(tmp_path):
    _, made = world(tmp_path)
    lt.stack(made, tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "adapter_model.safetensors")
    lost = {key: each for key, each in tensors.items() if Q not in key}
    rewritten(tmp_path / "s", "adapter_model.safetensors", lost)
    assert [(row["name"], row["verdict"]) for row in verify(tmp_path / "s", made).tensors] == [(Q, "absent")]
    found = tensors | {key.replace(Q, f"{Q}2"): each.clone() for key, each in tensors.items() if Q in key}
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], f"{Q}2"]
    (tmp_path / "s" / "adapter_config.json").write_text(json.dumps(config))
    rewritten(tmp_path / "s", "adapter_model.safetensors", found)
    document = report_of(tmp_path / "s")
    for each in document["files"]:
        each["sha256"] = sha256(tmp_path / "s" / each["name"])
    (tmp_path / "s" / "loratools.json").write_text(json.dumps(document))
    assert [(row["name"], row["verdict"]) for row in verify(tmp_path / "s", made).tensors] == [(f"{Q}2", "extra")]


@pytest.mark.parametrize("output", ["extract", "stack", "rescale"])
def test_a_factor_that_was_changed(tmp_path, output):
    """By a thousandth: the residual is another one, the sum is another one."""
    made = outputs(tmp_path)
    path = tmp_path / output
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(key for key in tensors if f"{Q}.lora_B" in key)
    tensors[key] = tensors[key] * 1.001
    rewritten(path, "adapter_model.safetensors", tensors)
    report = verify(path, made[path])
    assert report.answer == "does not hold"
    assert [row["name"] for row in report.modules if row["verdict"] != "holds"] == [Q]
    if output != "extract":
        (row,) = [row for row in report.modules if row["name"] == Q]
        assert row["scale"] == pytest.approx((1.001,), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "key", "said"),
    [("lora-bias", "lora_B.bias", "added to the bias"), ("whole", "norm.weight", "weight is none of those given"),
     ("tokens", "trainable_tokens_delta", "none of those given")],
)  # fmt: skip
def test_what_lies_beside_the_update_counts_too(tmp_path, kind, key, said):
    """Biases, parameters and rows given whole of an adapter that was restated."""
    adapter = EVERY_KIND[kind].write(tmp_path / "a")
    lt.rescale(adapter, tmp_path / "r", bake=True)
    assert verify(tmp_path / "r", [adapter]).answer == "holds"
    tensors = load_file(tmp_path / "r" / "adapter_model.safetensors")
    (name,) = [each for each in tensors if each.endswith(key)]
    rewritten(tmp_path / "r", "adapter_model.safetensors", tensors | {name: tensors[name] * 1.01})
    report = verify(tmp_path / "r", [adapter])
    assert report.answer == "does not hold"
    assert any(said in row["detail"] for row in report.modules)


def test_what_an_extraction_stored_whole_left_out_or_said(tmp_path):
    """A norm that is not the tuned one's; a change that is nowhere; a residual that is another one."""
    made = outputs(tmp_path)
    path = tmp_path / "extract"
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(key for key in tensors if "model.norm.weight" in key)
    rewritten(path, "adapter_model.safetensors", tensors | {key: tensors[key] + 1})
    assert {row["name"] for row in verify(path, made[path]).modules if row["verdict"] != "holds"} == {
        "model.norm.weight"
    }
    document = report_of(path)
    del tensors[key]
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    document["files"] = [
        {**each, "sha256": sha256(path / each["name"])} if each["name"] == "adapter_config.json" else each
        for each in document["files"]
    ]
    (path / "loratools.json").write_text(json.dumps(document))
    rewritten(path, "adapter_model.safetensors", tensors)
    report = verify(path, made[path])
    assert [(row["name"], row["verdict"]) for row in report.tensors] == [("model.norm.weight", "changed")]
    document = report_of(path)
    document["left_out"] = {"model.norm.weight": "only low-rank updates were asked for"}
    (path / "loratools.json").write_text(json.dumps(document))
    assert verify(path, made[path]).answer == "holds"
    document["modules"][0]["residual"] += 1e-3
    (path / "loratools.json").write_text(json.dumps(document))
    report = verify(path, made[path])
    assert [row["verdict"] for row in report.modules] == ["other"]
    assert "the report says" in report.modules[0]["detail"]
    document["modules"][0]["residual"] -= 1e-3
    document["modules"].append({**document["modules"][0], "name": "model.layers.9"})
    (path / "loratools.json").write_text(json.dumps(document))
    assert [row["verdict"] for row in verify(path, made[path]).modules] == ["holds", "absent"]


HOWS = ({"rank": 3}, {"rank": 3, "only_low_rank": True}, {"rank": "auto"}, {"budget": 20000}, {"error": 0.5},
        {"rank": 3, "save_full": ["*mlp*"]})  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_extractions_by_every_rule(tmp_path, family):
    """The residual that the report gives is the one of the factors as written, in float64."""
    base, tuned = tuned_pair(tmp_path, family, "bf16", 0.1)
    chosen = {"rank": 4, "include": ["*h.1.*" if family == "gpt2" else "*layers.1.*"]}
    for index, how in enumerate([*HOWS, chosen]):
        try:
            lt.extract(base, tuned, tmp_path / f"x{index}", **how)
        except UsageError:
            assert family == "gpt2"
            continue
        report = verify(tmp_path / f"x{index}", [base, tuned])
        assert (report.answer, report.tensors) == ("holds", ()), how
        assert report.modules


@pytest.mark.parametrize("kind", ["stacked", "conv", "embedding"])
def test_extractions_of_other_layers(tmp_path, kind):
    made = EVERY_KIND[kind]
    base = made.write_base(tmp_path / "base", "fp32")
    lt.merge(base, [made.adapter()], tmp_path / "tuned")
    lt.extract(base, tmp_path / "tuned", tmp_path / "x", rank=2)
    report = verify(tmp_path / "x", [base, tmp_path / "tuned"])
    assert report.answer == "holds"
    assert {row["policy"] for row in report.modules} == {"residual"}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_update_and_what_is_made_of_it(tmp_path, kind):
    """All that our verbs make of it holds; only sums whose shape no tensor says cannot be told."""
    made = EVERY_KIND[kind]
    base, one, two = made.write_base(tmp_path / "base", "bf16"), *(made.write(tmp_path / f"a{i}", i) for i in (1, 2))
    runs = {
        "merge": (lambda out: lt.merge(base, [one], out, weights=[0.75]), [base, one]),
        "unmerge": (lambda out: lt.unmerge(tmp_path / "merge", out, base=base, adapters=[one]),
                    [tmp_path / "merge", base, one]),
        "bare": (lambda out: lt.merge(base, [one], out, receipt="none"), [base, one]),
        "subtract": (lambda out: lt.unmerge(tmp_path / "bare", out, adapters=[one]), [tmp_path / "bare", one]),
        "by": (lambda out: lt.rescale(one, out, by=0.3), [one]),
        "bake": (lambda out: lt.rescale(one, out, bake=True), [one]),
        "restate": (lambda out: lt.rescale(one, out, restate_alpha=3.0), [one]),
        "stack": (lambda out: lt.stack([one, two], out, weights=[0.3, -2], base=base), [two, one]),
    }  # fmt: skip
    for name, (run, inputs) in runs.items():
        try:
            run(tmp_path / name)
        except UnsupportedError:
            continue
        report = verify(tmp_path / name, inputs)
        open_ = name == "stack" and made.adapter()[next(iter(made.adapter()))].takes_shape and kind != "vera"
        assert report.answer == ("cannot tell" if open_ else "holds"), name


def test_inputs_have_to_be_those_of_the_report(tmp_path):
    """Another base, another alpha, a file that is missing or too many: refused, and what differs is said."""
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    other = write_checkpoint(tmp_path / "other", llama(seed=3), shards=2)
    with pytest.raises(MismatchError, match=r"not the base .*model-00001-of-00002\.safetensors has another SHA-256"):
        verify(tmp_path / "m", [other, *made])
    edited = tmp_path / "edited"
    shutil.copytree(made[0], edited)
    (edited / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    with pytest.raises(MismatchError, match=r"not the adapter .*: adapter_config\.json has another SHA-256\."):
        verify(tmp_path / "m", [base, edited, made[1]])
    single = write_checkpoint(tmp_path / "single", llama())
    with pytest.raises(MismatchError, match=r"model\.safetensors is not one of its files"):
        verify(tmp_path / "m", [single, *made])
    with pytest.raises(UndecidedError, match="adapter, name a1"):
        verify(tmp_path / "m", [base, made[0]])
    lt.stack(made, tmp_path / "s")
    with pytest.raises(MismatchError, match="no input of this sort"):
        verify(tmp_path / "s", [*made, base])
    renamed = tmp_path / "another-name"
    base.rename(renamed)
    assert verify(tmp_path / "m", [renamed, *made]).answer == "holds"


def test_an_adapter_that_went_in_twice_is_named_once_or_twice(tmp_path):
    base, made = world(tmp_path)
    lt.merge(base, [made[0], made[0]], tmp_path / "m", weights=[1, 0.5])
    assert verify(tmp_path / "m", [base, made[0]]).answer == "holds"
    assert verify(tmp_path / "m", [made[0], base, made[0]]).answer == "holds"


def test_an_adapter_made_in_memory_cannot_be_named(tmp_path):
    base, made = world(tmp_path)
    lt.merge(base, [0.5 * lt.load_adapter(made[0])], tmp_path / "m")
    assert verify(tmp_path / "m").answer == "holds"
    with pytest.raises(UndecidedError, match="made in memory"):
        verify(tmp_path / "m", [base])


def test_an_output_of_one_file(tmp_path):
    """Its report lies beside it."""
    base = write_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a")
    lt.merge(base, [adapter], tmp_path / "m.safetensors")
    assert verify(tmp_path / "m.safetensors", [base / "model.safetensors", adapter]).answer == "holds"


def test_files_that_are_missing_or_too_many(tmp_path):
    """Weights that no report lists would be loaded too; other files are nobody's business."""
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    assert verify(tmp_path / "m").answer == "holds"
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "model.safetensors").write_bytes((tmp_path / "a0" / "adapter_model.safetensors").read_bytes())
    report = verify(tmp_path / "m", [base, *made])
    assert report.answer == "does not hold"
    assert {file["name"]: file["verdict"] for file in report.files if file["verdict"] != "holds"} == {
        "tokenizer.json": "absent", "model.safetensors": "extra"
    }  # fmt: skip
    assert report.modules == ()
    assert any("not held against its inputs" in note for note in report.notes)


def test_no_report_no_verb_of_ours(tmp_path):
    """Nothing to hold it against is `cannot tell` (3); a schema of another verb or version is refused (65)."""
    base, made = world(tmp_path)
    with pytest.raises(UndecidedError, match="--base"):
        verify(base)
    lt.merge(base, made, tmp_path / "m")
    for schema in ("loratools/merge/2", "loratools/demo/1", "loratools/merge/1 ", None, 7):
        document = report_of(tmp_path / "m") | {"schema": schema}
        (tmp_path / "m" / "loratools.json").write_text(json.dumps(document))
        with pytest.raises(UnsupportedError):
            verify(tmp_path / "m")
    with pytest.raises(UsageError, match="has a report"):
        verify(lt.open_checkpoint(base))


@pytest.mark.parametrize(
    "broken",
    [
        {"inputs": None}, {"inputs": [{"role": "base"}]}, {"inputs": []}, {"files": [{"name": "x"}]}, {"files": 3},
        {"parameters": {}}, {"parameters": {"weights": "1", "dtype": None}}, {"modules": [3]},
        {"parameters": {"weights": [1, 2, 3], "dtype": None}}, {"parameters": {"weights": [None, {}], "dtype": None}},
    ],
)  # fmt: skip
def test_a_report_that_is_not_ours(tmp_path, broken):
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    (tmp_path / "m" / "loratools.json").write_text(json.dumps(report_of(tmp_path / "m") | broken))
    with pytest.raises(MalformedError, match="not as we write it"):
        verify(tmp_path / "m", [base, *made])


def test_no_name_of_a_report_becomes_a_path(tmp_path):
    """A file outside with the very hash that the report gives is not found."""
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    (tmp_path / "secret").write_bytes(b"secret")
    document = report_of(tmp_path / "m")
    for name in ("../secret", str(tmp_path / "secret"), "sub/../../secret"):
        digest = hashlib.sha256(b"secret").hexdigest()
        changed = document | {"files": [*document["files"], {"name": name, "bytes": 6, "sha256": digest}]}
        (tmp_path / "m" / "loratools.json").write_text(json.dumps(changed))
        report = verify(tmp_path / "m")
        assert {each["name"]: each["verdict"] for each in report.files}[name] == "absent"


def test_what_contradicts_itself_is_usage(tmp_path):
    base, made = world(tmp_path)
    with pytest.raises(UsageError):
        verify(base, made, base=base)
    with pytest.raises(UsageError):
        verify(base, adapters=made)
    with pytest.raises(UsageError):
        verify(base, weights=[1])


def test_a_rescale_of_some_modules(tmp_path):
    """Those that the patterns leave alone are as they were."""
    _, made = world(tmp_path)
    lt.rescale(made[0], tmp_path / "r", by=0.5, include=["*q_proj"])
    assert verify(tmp_path / "r", made[:1]).answer == "holds"
    document = report_of(tmp_path / "r")
    document["parameters"]["include"] = []
    (tmp_path / "r" / "loratools.json").write_text(json.dumps(document))
    report = verify(tmp_path / "r", made[:1])
    assert {row["name"]: row["scale"] for row in report.modules if row["verdict"] != "holds"}.keys() == {
        row["name"] for row in report.modules
    } - {Q}
    lt.stack(made, tmp_path / "s", exclude=["*q_proj"])
    report = verify(tmp_path / "s", made)
    assert report.answer == "holds"
    assert any("1 modules of the inputs are not in it" in note for note in report.notes)


def test_damage_to_an_output_is_an_answer_and_never_a_traceback(tmp_path):
    """Truncated, emptied, a directory in place of a file: no, or an error of ours."""
    base, made = world(tmp_path)
    lt.merge(base, made, tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    data = file.read_bytes()
    for broken in (b"", data[:100], data[:-1], data + b"x"):
        file.write_bytes(broken)
        assert verify(tmp_path / "m", [base, *made]).answer == "does not hold"
    file.unlink()
    file.mkdir()
    with pytest.raises(LoratoolsError):
        verify(tmp_path / "m")
    assert CONFIG


def test_a_stack_by_another_method(tmp_path):
    """linear is a sum with other weights; what is not a sum of the inputs cannot be told."""
    one, two = (write_adapter(tmp_path / name, lora_tensors(factors(4, seed)), lora_alpha=8)
                for name, seed in (("one", 1), ("two", 2)))  # fmt: skip
    lt.stack([one, two], tmp_path / "linear", method="linear", weights=[3, 1])
    assert verify(tmp_path / "linear", [one, two]).answer == "holds"
    lt.stack([one, two], tmp_path / "tsv", method="tsv")
    with pytest.raises(UndecidedError, match="tsv makes"):
        verify(tmp_path / "tsv", [one, two])
    lt.stack([one, two], tmp_path / "few", rank=3)
    assert verify(tmp_path / "few", [one, two]).answer == "holds"

"""The receipt of a merge: the base comes back from it alone, or it is refused with a reason; never a wrong base."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.engine import memory
from loratools.engine.operations import sections
from loratools.errors import LoratoolsError, MalformedError, MismatchError, UndecidedError, UnsupportedError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.unmerge import plan_unmerge, unmerge
from tests import models
from tests.laws.kinds import EVERY_KIND
from tests.laws.worlds import world
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
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAME = "loratools.receipt"


def three(tmp_path):
    """Three adapters of mixed ranks, alphas and dtypes."""
    kinds = [(3, torch.float32, 5), (4, torch.bfloat16, 2), (1, torch.float16, 7)]
    return [
        write_adapter(tmp_path / f"a{index}", lora_tensors(factors(rank, 10 + index, dtype)), r=rank, lora_alpha=alpha)
        for index, (rank, dtype, alpha) in enumerate(kinds)
    ]


def made(tmp_path, dtype="bf16", **options):
    """A base in three shards, three adapters merged into it."""
    base = write_checkpoint(tmp_path / "base", llama(DTYPES[dtype]), shards=3, companions={"tokenizer.json": b"{}"})
    adapters = three(tmp_path)
    merge(base, adapters, tmp_path / "merged", weights=[0.5, -1, 2], **options)
    return base, adapters, tmp_path / "merged"


def manifest_of(receipt):
    with safe_open(receipt, "np") as file:
        return json.loads(file.get_tensor("manifest").tobytes())


def rewritten(receipt, change):
    """The receipt with its manifest and tensors changed by `change(document, tensors)`, its hash made good again."""
    tensors = load_file(receipt)
    document = json.loads(tensors["manifest"].numpy().tobytes())
    change(document, tensors)
    text = json.dumps(document).encode()
    tensors["manifest"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, receipt, {"schema": "loratools/receipt/1", "manifest": hashlib.sha256(text).hexdigest()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_receipt_suffices(tmp_path, dtype):
    """Base and adapters are gone; files, order, configuration and every bit are there again."""
    base, adapters, merged = made(tmp_path, dtype)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    hashes, headers = (
        models.tensor_hashes(base),
        {path.name: models.header_names(path) for path in base.glob("*.safetensors")},
    )
    shutil.rmtree(base)
    for adapter in adapters:
        shutil.rmtree(adapter)
    report = unmerge(merged, tmp_path / "back")
    assert (report.method, report.totals["bound"], report.totals["changed"]) == ("receipt", 0.0, len(SHAPES))
    assert models.tensor_hashes(tmp_path / "back") == hashes
    assert {path.name: models.header_names(path) for path in (tmp_path / "back").glob("*.safetensors")} == headers
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == before[name]
    assert not (tmp_path / "back" / NAME).exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_are_taken_out_and_the_others_are_merged_again(tmp_path, dtype):
    """Byte for byte the merge without it; its new receipt leads on, one by one, to the base."""
    base, adapters, merged = made(tmp_path, dtype)
    merge(base, [adapters[0], adapters[2]], tmp_path / "wanted", weights=[0.5, 2])
    report = unmerge(merged, tmp_path / "out", adapters=[adapters[1]])
    assert models.tensor_hashes(tmp_path / "out") == models.tensor_hashes(tmp_path / "wanted")
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "wanted" / NAME).read_bytes()
    assert any("a0 (weight 0.5), a2 (weight 2.0)" in note for note in report.notes)
    assert "Taken out: a1 (weight -1.0)." in report.notes
    assert [each["role"] for each in report.inputs] == ["merged", "adapter", "adapter"]
    assert all(each["sha256"] for each in report.inputs)
    unmerge(tmp_path / "out", tmp_path / "further", adapters=[adapters[2]])
    merge(base, adapters[:1], tmp_path / "one", weights=0.5)
    assert models.tensor_hashes(tmp_path / "further") == models.tensor_hashes(tmp_path / "one")
    unmerge(tmp_path / "further", tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


@pytest.mark.parametrize("name", ["dora", "dora-conv1d", "oft", "linear", "stacked", "trained-tokens", "ia3", "hra"])
def test_of_two_of_any_kind_one_is_taken_out(tmp_path, name):
    """Kinds that depend on the base are computed anew from the base that comes back."""
    kind = EVERY_KIND[name]
    base = kind.write_base(tmp_path / "base", "bf16")
    one, two = (kind.write(tmp_path / f"adapter{seed}", seed) for seed in (1, 2))
    merge(base, [one, two], tmp_path / "merged", weights=[0.7, -1.5])
    merge(base, [two], tmp_path / "wanted", weights=-1.5)
    unmerge(tmp_path / "merged", tmp_path / "out", adapters=[one])
    assert models.tensor_hashes(tmp_path / "out") == models.tensor_hashes(tmp_path / "wanted")
    unmerge(tmp_path / "out", tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


def test_single_files_have_a_receipt_beside_them(tmp_path):
    base, adapters = write_checkpoint(tmp_path / "base"), three(tmp_path)
    merge(base, adapters[:1], tmp_path / "m.safetensors")
    assert (tmp_path / "m.receipt").exists()
    assert unmerge(tmp_path / "m.safetensors", tmp_path / "b.safetensors").method == "receipt"
    assert tensors_of(tmp_path / "b.safetensors").keys() == tensors_of(base).keys()
    found, wanted = tensors_of(tmp_path / "b.safetensors"), tensors_of(base)
    assert all(equal_bits(found[name], tensor) for name, tensor in wanted.items())
    merge(base, adapters[:1], tmp_path / "m.safetensors", overwrite=True, receipt="none")
    assert not (tmp_path / "m.receipt").exists()  # it was that of the old weights


def test_resharded_files_lead_back_too(tmp_path):
    """Somebody saves the merged model anew, in another file and order: names, not places, are what counts."""
    base, _, merged = made(tmp_path)
    tensors = dict(reversed(tensors_of(merged).items()))
    other = write_checkpoint(tmp_path / "resaved", tensors, companions={NAME: (merged / NAME).read_bytes()})
    unmerge(other, tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 3
    merge(base, three(tmp_path / "again"), tmp_path / "small", weights=[0.5, -1, 2], max_shard_size=2000)
    unmerge(tmp_path / "small", tmp_path / "back2")
    assert models.tensor_hashes(tmp_path / "back2") == models.tensor_hashes(base)


def test_whole_lengthened_added_and_untied_parameters_come_back(tmp_path):
    """What the merge replaced is kept, what it appended or brought is left out, and the configuration is the base's."""
    base = write_checkpoint(tmp_path / "base", llama(head=False), CONFIG | {"tie_word_embeddings": True})
    tensors = lora_tensors(factors(modules={"lm_head": (32, 16), Q: (16, 16)}))
    tensors |= {f"{PREFIX}model.norm.weight": normal(4, 16)}
    a = write_adapter(tmp_path / "a", tensors, modules_to_save=["norm"])
    merge(base, [a], tmp_path / "merged")
    document = manifest_of(tmp_path / "merged" / NAME)
    assert document["added"] == ["lm_head.weight"]
    assert {row["name"]: row["how"] for row in document["tensors"] if row["how"] != "same"} == {
        "model.norm.weight": "kept", f"{Q}.weight": "corrected",
    }  # fmt: skip
    unmerge(tmp_path / "merged", tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)
    assert (tmp_path / "back" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lean_receipt_needs_the_adapters(tmp_path, dtype):
    """Smaller by the factors; without them, with others, or with some of them only, it is refused by name."""
    base, adapters, merged = made(tmp_path, dtype)
    merge(base, adapters, tmp_path / "lean", weights=[0.5, -1, 2], receipt="lean")
    assert not [name for name in load_file(tmp_path / "lean" / NAME) if name.startswith("adapters/")]
    stored = sum(
        tensor.nbytes for adapter in adapters for tensor in load_file(adapter / "adapter_model.safetensors").values()
    )
    assert (merged / NAME).stat().st_size > (tmp_path / "lean" / NAME).stat().st_size + stored
    unmerge(tmp_path / "lean", tmp_path / "back", adapters=adapters[::-1])
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)
    refuses(tmp_path, UndecidedError, "a0, a1, a2", tmp_path / "lean")
    refuses(tmp_path, UnsupportedError, "a0, a1, a2", tmp_path / "lean", adapters=adapters[:2])
    other = write_adapter(tmp_path / "other", lora_tensors(factors(3, 99)), r=3, lora_alpha=5)
    refuses(tmp_path, MismatchError, "not merged", tmp_path / "lean", adapters=[other, *adapters[1:]])


def refuses(tmp_path, error, match, merged, **options):
    before = state(tmp_path)
    with pytest.raises(error, match=match):
        unmerge(merged, tmp_path / "out", **options)
    assert state(tmp_path) == before


def test_wrong_adapters_and_weights_are_refused(tmp_path):
    """The receipt knows what was merged, and how."""
    _, adapters, merged = made(tmp_path)
    (merged / "loratools.json").unlink()
    other = write_adapter(tmp_path / "other", lora_tensors(factors(3, 99)), r=3, lora_alpha=5)
    refuses(tmp_path, MismatchError, "not merged", merged, adapters=[other])
    refuses(tmp_path, MismatchError, r"weight 0\.5, not 0\.25", merged, adapters=adapters[:1], weights=0.25)
    config = adapters[0] / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    refuses(tmp_path, MismatchError, "others then", merged, adapters=adapters[:1])


def test_another_merges_receipt_is_refused(tmp_path):
    """Of another base of the same shapes, of other adapters, of another model: with what differs."""
    base, adapters, merged = made(tmp_path)
    other = write_checkpoint(tmp_path / "other", llama(seed=5), shards=3)
    merge(other, adapters, tmp_path / "second", weights=[0.5, -1, 2])
    merge(base, adapters[:1], tmp_path / "third")
    small = write_checkpoint(tmp_path / "small", {name: t for name, t in llama().items() if "layers.1" not in name})
    merge(small, [write_adapter(tmp_path / "q", lora_tensors(factors(modules={Q: (16, 16)})))], tmp_path / "fourth")
    mine = (merged / NAME).read_bytes()
    for place, match in {
        "second": r"\.weight",
        "third": r"\.weight",
        "fourth": "tensors are in one of them only",
    }.items():
        (merged / NAME).write_bytes((tmp_path / place / NAME).read_bytes())
        refuses(tmp_path, MismatchError, match, merged)
    (merged / NAME).write_bytes(mine)
    unmerge(merged, tmp_path / "out")


def flips(path, count, seed=0):
    """Positions all over a file, the first 400 bytes among them, and a bit each."""
    size = path.stat().st_size
    generator = torch.Generator().manual_seed(seed)
    places = {*range(0, min(400, size), 7), *torch.randint(0, size, (count,), generator=generator).tolist(), size - 1}
    return [(place, 1 << (index % 8)) for index, place in enumerate(sorted(places))]


def flipped(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def test_one_flipped_bit_anywhere_in_the_receipt(tmp_path):
    """Refused with a reason; or, where it makes no difference to what is said, the base and nothing else comes out."""
    base, _, merged = made(tmp_path)
    receipt, hashes = merged / NAME, models.tensor_hashes(base)
    whole, refused, places = receipt.read_bytes(), 0, flips(receipt, 90)
    for place, bit in places:
        flipped(receipt, place, bit)
        try:
            unmerge(merged, tmp_path / "out")
        except LoratoolsError as error:
            refused += bool(str(error))
        else:
            assert models.tensor_hashes(tmp_path / "out") == hashes
            shutil.rmtree(tmp_path / "out")
        receipt.write_bytes(whole)
    assert refused == len(places)


def test_one_flipped_bit_anywhere_in_the_weights(tmp_path):
    """Touched or not: the tensor's hash tells, before anything is published."""
    _, _, merged = made(tmp_path)
    for path in sorted(merged.glob("*.safetensors")):
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        whole = path.read_bytes()
        for place, bit in [each for each in flips(path, 12) if each[0] >= start]:
            flipped(path, place, bit)
            refuses(tmp_path, MismatchError, "changed after it was merged", merged)
            path.write_bytes(whole)


def test_sections_cut_short_and_receipts_of_other_versions(tmp_path):
    _, _, merged = made(tmp_path)
    receipt = merged / NAME
    whole = receipt.read_bytes()
    receipt.write_bytes(whole[:-9])
    refuses(tmp_path, MalformedError, "cut short", merged)
    receipt.write_bytes(b"")
    refuses(tmp_path, MalformedError, "8 at the least", merged)
    receipt.write_bytes((merged / "model-00001-of-00003.safetensors").read_bytes())
    refuses(tmp_path, MalformedError, "not a receipt", merged)
    receipt.write_bytes(whole)
    rewritten(receipt, lambda document, _: document.update(schema="loratools/receipt/2", loratools="9.9"))
    refuses(tmp_path, UnsupportedError, r"version.*receipt/2.*9\.9", merged)


FORGERIES = {
    "path": lambda document, _: document["base"]["shards"][0].update(name="../../evil.safetensors"),
    "hidden": lambda document, _: document["base"]["shards"][0].update(name=".evil.safetensors"),
    "index": lambda document, _: document["base"].update(index="/etc/x.safetensors.index.json"),
    "twice": lambda document, _: document["tensors"].append(document["tensors"][0]),
    "missing": lambda document, _: document["tensors"].pop(),
    "hash": lambda document, _: document["tensors"][0].update(sha256="0" * 63),
    "wrong-hash": lambda document, _: document["tensors"][0].update(sha256="0" * 64),
    "shape": lambda document, _: document["tensors"][0].update(shape=[-1, 2]),
    "dtype": lambda document, _: document["tensors"][0].update(dtype="F9"),
    "how": lambda document, _: document["tensors"][0].update(how="guessed"),
    "corrected": lambda document, _: document["tensors"][0].update(how="corrected"),
    "kept": lambda document, _: document["tensors"][0].update(how="kept"),
    "weight": lambda document, _: document["adapters"][0].update(weight="much"),
    "other-weight": lambda document, _: document["adapters"][0].update(weight=0.25),
    "no-adapters": lambda document, _: document.update(adapters=[]),
    "format": lambda document, _: document["adapters"][0].update(format="pickle"),
    "config": lambda document, _: document["adapters"][0].update(config={"peft_type": "EVIL"}),
    "not-json": lambda document, _: document["base"].update(config="{"),
    "list": lambda document, _: document.update(tensors={}),
    "extra": lambda _, tensors: tensors.update({"sections/extra": torch.zeros(3, dtype=torch.uint8)}),
    "factor": lambda _, tensors: next(t for name, t in tensors.items() if name.startswith("adapters/")).add_(1),
    "lost-factor": lambda _, tensors: tensors.pop(next(name for name in tensors if name.startswith("adapters/"))),
    "added": lambda document, _: document["added"].append("model.extra.weight"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_receipts_are_refused(tmp_path, forgery):
    """Hashes made good again: paths that lead out, lists that contradict each other, values of other kinds."""
    _, _, merged = made(tmp_path)
    rewritten(merged / NAME, FORGERIES[forgery])
    refuses(tmp_path, LoratoolsError, ".", merged)


SECTIONS = {
    "bomb": lambda: __import__("zlib").compress(bytes(10**7)),
    "no-zlib": lambda: b"not compressed",
    "rounds": lambda: __import__("zlib").compress(b"\x63\x00"),
    "places": lambda: __import__("zlib").compress(b"\x01\x01\xff\xff\x7f\x01"),
    "many": lambda: __import__("zlib").compress(b"\x01\xff\xff\xff\xff\x7f"),
    "rest": lambda: __import__("zlib").compress(b"\x01\x00" + b"\x01" * 5000),
    "open": lambda: __import__("zlib").compress(b"\x01\x00\xff"),
    "tail": lambda: __import__("zlib").compress(b"\x01\x00") + b"more",
    "empty": lambda: b"",
}


@pytest.mark.parametrize("forgery", SECTIONS)
def test_forged_sections_are_refused(tmp_path, forgery):
    """A stranger's chunk is bounded, and ends where it says; whatever it decodes to has to have the base's hash."""
    _, _, merged = made(tmp_path)
    data = SECTIONS[forgery]()

    def change(document, tensors):
        entry = next(row for row in document["tensors"] if row["how"] == "corrected")
        tensors[f"sections/{entry['name']}"] = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        )
        matrices = [{"chunks": [len(data)], "remembered": []}]
        entry["section"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "matrices": matrices}

    rewritten(merged / NAME, change)
    refuses(tmp_path, LoratoolsError, ".", merged)


def test_when_there_is_no_receipt_it_is_said(tmp_path):
    """Recast, made in memory, not wanted; asked for all the same it is refused."""
    base, adapters = write_checkpoint(tmp_path / "base"), three(tmp_path)
    report = merge(base, adapters, tmp_path / "fp32", dtype="fp32")
    assert report.parameters["receipt"] == "none"
    assert any("No receipt was written: --dtype" in note for note in report.notes)
    assert not (tmp_path / "fp32" / NAME).exists()
    memory_note = merge(base, [0.5 * load_adapter(adapters[0])], tmp_path / "half").notes
    assert any("in memory" in note for note in memory_note)
    assert not merge(base, adapters, tmp_path / "none", receipt="none").notes
    assert merge(base, adapters, tmp_path / "same", dtype="bf16").parameters["receipt"] == "full"
    with pytest.raises(UsageError, match="--dtype"):
        plan_merge(base, adapters, tmp_path / "x", dtype="fp32", receipt="full")
    with pytest.raises(UsageError, match="no adapter"):
        plan_merge(base, [], tmp_path / "x", max_shard_size=1000, receipt="lean")
    with pytest.raises(UnsupportedError, match="in memory"):
        plan_merge(base, [0.5 * load_adapter(adapters[0])], tmp_path / "x", receipt="full")
    with pytest.raises(UsageError, match="full, lean or none"):
        plan_merge(base, adapters, tmp_path / "x", receipt="half")


def test_the_receipt_has_the_same_bytes_however_it_was_made(tmp_path, monkeypatch):
    """Threads and tiles leave no trace, in the receipt or the weights."""
    base = write_checkpoint(tmp_path / "base", {f"{Q}.weight": normal(1, 900, 700, dtype=torch.bfloat16)})
    a = write_adapter(tmp_path / "a", lora_tensors(factors(modules={Q: (900, 700)})))
    monkeypatch.setattr(sections, "CHUNK_ENTRIES", 2**16)
    merge(base, [a], tmp_path / "one", threads=1)
    merge(base, [a], tmp_path / "two", threads=4)
    monkeypatch.setattr(memory, "TILE_BYTES", 300_000)
    from loratools.engine.context import Settings

    monkeypatch.setattr(Settings, "__init__", _with_small_tiles(Settings.__init__))
    merge(base, [a], tmp_path / "three")
    assert len(manifest_of(tmp_path / "one" / NAME)["tensors"][0]["section"]["matrices"][0]["chunks"]) == 15
    for place in ("two", "three"):
        for name in (NAME, "model.safetensors"):
            assert (tmp_path / place / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    unmerge(tmp_path / "one", tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


def _with_small_tiles(original):
    def init(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "tile_bytes": 300_000})

    return init


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("ratio", "most"), [(1e-3, 0.05), (1e-2, 0.2), (0.1, 0.8), (1.0, 3.0)])
def test_corrections_are_small(tmp_path, dtype, ratio, most):
    """Bits a weight, beside the factors, at ‖ΔW‖ / ‖W‖ from 1e-3 to 1: at most 0.2 up to a hundredth."""
    W = normal(1, 768, 512, scale=0.02).to(DTYPES[dtype])
    base = write_checkpoint(tmp_path / "base", {f"{Q}.weight": W})
    A, B = normal(2, 8, 512), normal(3, 768, 8)
    B *= ratio * float(W.double().norm() / (B @ A).norm())
    a = write_adapter(tmp_path / "a", lora_tensors({Q: (A, B)}), r=8, lora_alpha=8)
    merge(base, [a], tmp_path / "merged")
    (row,) = manifest_of(tmp_path / "merged" / NAME)["tensors"]
    assert 0 < 8 * row["section"]["bytes"] / W.numel() <= most


def test_what_cannot_be_predicted_is_kept(tmp_path):
    """A section never outgrows its tensor: a change that W' tells nothing about leaves the tensor in the receipt."""
    base = write_checkpoint(tmp_path / "base")
    a = write_adapter(tmp_path / "a", {f"{PREFIX}model.norm.weight": normal(4, 16)}, modules_to_save=["norm"])
    merge(base, [a], tmp_path / "merged", weights=1 - 1e-6)
    row = next(row for row in manifest_of(tmp_path / "merged" / NAME)["tensors"] if row["name"] == "model.norm.weight")
    assert row["how"] == "kept"
    unmerge(tmp_path / "merged", tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_receipt_for_what_somebody_else_merged(tmp_path, dtype):
    """Float32 sums, rounded one adapter after the other, as PEFT does it: the receipt alone gives the base back."""
    tensors, adapters = llama(DTYPES[dtype]), three(tmp_path)
    other = dict(tensors)
    for adapter, weight in zip(adapters, [0.5, -1, 2], strict=True):
        for path, update in load_adapter(adapter).items():
            name = f"{path}.weight"
            other[name] = (other[name].float() + weight * update.delta_weight()).to(DTYPES[dtype])
    base = write_checkpoint(tmp_path / "base", tensors, shards=3)
    merged = write_checkpoint(tmp_path / "elsewhere", other)
    report = merge(base, adapters, merged / NAME, weights=[0.5, -1, 2], receipt_for=merged)
    assert report.tensors["recorded"] == len(SHAPES)
    assert report.tensors["unchanged"] == len(tensors) - len(SHAPES)
    assert sorted(path.name for path in merged.iterdir()) == ["config.json", NAME, "model.safetensors"]
    unmerge(merged, tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


def test_a_receipt_for_the_wrong_checkpoint_is_refused(tmp_path):
    """Another adapter, weight or base, a tensor that nobody was to touch, one that is missing: by its tensor's name."""
    base, adapters = write_checkpoint(tmp_path / "base"), three(tmp_path)
    merge(base, adapters[:1], tmp_path / "merged", weights=0.5, receipt="none")
    receipt, other = tmp_path / "x.receipt", write_checkpoint(tmp_path / "other", llama(seed=5))
    stray = tensors_of(tmp_path / "merged")
    stray["model.norm.weight"] = stray["model.norm.weight"] + 1
    strange = write_checkpoint(tmp_path / "strange", stray)
    less = write_checkpoint(tmp_path / "less", {name: t for name, t in stray.items() if "norm" not in name})
    before = state(tmp_path)
    for arguments, match in (
        ((base, adapters[1:2], receipt, 0.5, tmp_path / "merged"), "entries differ"),
        ((base, adapters[:1], receipt, 0.75, tmp_path / "merged"), "entries differ"),
        ((other, adapters[:1], receipt, 0.5, tmp_path / "merged"), "differ|not the base"),
        ((base, adapters[:1], receipt, 0.5, strange), "none of the adapters touches"),
        ((base, adapters[:1], receipt, 0.5, less), "nothing where"),
    ):
        *positional, weight, merged = arguments
        with pytest.raises(MismatchError, match=match):
            merge(*positional, weights=weight, receipt_for=merged)
    for options, match in (
        ({"output": tmp_path / "x"}, "ends in .receipt"),
        ({"dtype": "fp32"}, "--dtype"),
        ({"receipt": "none"}, "--receipt none"),
        ({"adapters": []}, "no adapter"),
    ):
        given = {"adapters": adapters[:1], "output": receipt, **options}
        with pytest.raises(UsageError, match=match):
            merge(base, weights=0.5 if given["adapters"] else None, receipt_for=tmp_path / "merged", **given)
    assert state(tmp_path) == before


def test_plans_say_what_a_receipt_takes(tmp_path):
    """The disk must hold it, memory is counted, and nothing is written by a plan."""
    base, adapters, merged = made(tmp_path)
    with_one, without = (plan_merge(base, adapters, tmp_path / "x", receipt=kind) for kind in ("full", "none"))
    peaks = [max(unit.peak_bytes for unit in plan.units) for plan in (with_one, without)]
    assert peaks[0] > peaks[1]
    assert plan_unmerge(merged, tmp_path / "y").options["method"] == "receipt"
    assert {unit.operation for unit in plan_unmerge(merged, tmp_path / "y").units} == {"hash", "copy", "revert"}
    assert not (tmp_path / "x").exists()


def test_a_merge_of_a_merge_has_a_receipt_of_its_own(tmp_path):
    """The first receipt is not carried along; each leads one step back."""
    base, adapters, merged = made(tmp_path)
    merge(merged, adapters[:1], tmp_path / "twice")
    unmerge(tmp_path / "twice", tmp_path / "once")
    assert models.tensor_hashes(tmp_path / "once") == models.tensor_hashes(merged)
    assert not (tmp_path / "once" / NAME).exists()
    assert models.tensor_hashes(base) != models.tensor_hashes(merged)


@pytest.mark.parametrize("kind", ["conv1d", "embedding", "tied"])
def test_a_receipt_for_every_orientation(tmp_path, kind):
    """Stored (in, out), embeddings, tied heads: recorded afterwards, too."""
    w = world(tmp_path, kind, "bf16", sharded=True)
    merge(w.base, w.adapters, tmp_path / "merged", receipt="none")
    merge(w.base, w.adapters, tmp_path / "merged" / NAME, receipt_for=tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").name == "merged"
    unmerge(tmp_path / "merged", tmp_path / "back")
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(w.base)

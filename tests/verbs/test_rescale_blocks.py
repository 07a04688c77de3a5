"""`rescale --blocks` on files: what is multiplied, kept, said, refused and verified."""

import json

import pytest
import torch

from loratools.errors import UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.verbs.rescale import plan_rescale, rescale
from loratools.verbs.verify import verify
from tests.tiny import PREFIX, equal_bits, factors, lora_tensors, normal, report_of, state, tensors_of, write_adapter

ATTN = "transformer_blocks.0.attn1.to_q"
IN04, OUT03 = f"unet.down_blocks.1.attentions.0.{ATTN}", f"unet.up_blocks.1.attentions.0.{ATTN}"
TEXT, TIME = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "unet.time_embedding.linear_1"
MODULES = {TEXT: (6, 6), IN04: (8, 6), OUT03: (6, 8), TIME: (5, 7)}
VECTOR = "0.5,1,1,-2,1,1,1,1,0,1,1,1,1,1,1,1,1"
WEIGHTS = {TEXT: 0.5, IN04: -2.0, OUT03: 0.0, TIME: 1.0}


@pytest.fixture
def source(tmp_path):
    pairs = factors(3, 1, torch.bfloat16, MODULES)
    return write_adapter(tmp_path / "a", lora_tensors(pairs), r=3, lora_alpha=5, target_modules=list(MODULES))


def delta(adapter, path):
    update = adapter[path]
    return update.scaling * (update.lora_B.load().double() @ update.lora_A.load().double())


def test_every_block_gets_its_weight(tmp_path, source):
    """ΔW times the number of its block, factors byte for byte; the report says weight and block, and names the rest."""
    report = rescale(source, tmp_path / "out", blocks=VECTOR)
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    was, became = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(equal_bits(was[key], became[key]) for key in was)
    for path, weight in WEIGHTS.items():
        assert after[path].alpha == weight * before[path].alpha
        assert torch.equal(delta(after, path), delta(before, path) * weight)
    said = {row["name"]: (row["factor"], row["block"]) for row in report.modules}
    assert said == {TEXT: (0.5, "BASE"), IN04: (-2.0, "IN04"), OUT03: (0.0, "OUT03"), TIME: (1.0, None)}
    assert any(TIME in note for note in report.notes)
    assert report_of(tmp_path / "out")["parameters"]["blocks"] == [VECTOR]


def test_patterns_rules_and_presets_in_order(tmp_path, source):
    """The report holds presets written out, and no path of their file."""
    file = tmp_path / "mine.txt"
    file.write_text(f"# presets\nMINE:{VECTOR}\n")
    rescale(source, tmp_path / "out", blocks=["MINE", "OUT:attn1:3", "re:time_emb=4"], presets=file)
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    found = {path: after[path].alpha / before[path].alpha for path in after}
    assert found == {TEXT: 0.5, IN04: -2.0, OUT03: 3.0, TIME: 4.0}
    document = (tmp_path / "out" / "loratools.json").read_text()
    assert json.loads(document)["parameters"]["blocks"] == [f"MINE:{VECTOR}", "OUT:attn1:3", "re:time_emb=4"]
    assert str(tmp_path) not in document
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        rescale(source, tmp_path / "b", blocks="MINE", presets=tmp_path / "x.txt")


def test_include_narrows_it(tmp_path, source):
    """Blocks of modules that the patterns leave out are not touched."""
    rescale(source, tmp_path / "out", blocks=VECTOR, include=["text_encoder.*"])
    before, after = load_adapter(source), load_adapter(tmp_path / "out")
    assert [path for path in after if after[path].alpha != before[path].alpha] == [TEXT]


def test_it_is_verified(tmp_path, source):
    """From the report's specification and the input, and not from the weights that the report lists."""
    rescale(source, tmp_path / "out", blocks=VECTOR)
    assert verify(tmp_path / "out", [source]).answer == "holds"
    path = tmp_path / "out" / "loratools.json"
    path.write_text(path.read_text().replace(VECTOR, VECTOR.replace("-2", "-3")))
    answer = verify(tmp_path / "out", [source])
    assert [row["name"] for row in answer.modules if row["verdict"] != "holds"] == [IN04]


def test_what_is_whole_can_only_be_left_alone(tmp_path):
    """A weight of 1 leaves DoRA and saved modules as they are; another is refused by name, and nothing is written."""
    pairs = factors(3, 1, modules={IN04: (8, 6)})
    tensors = lora_tensors(pairs) | {f"{PREFIX}{IN04}.lora_magnitude_vector": normal(4, 8)}
    tensors |= {f"{PREFIX}unet.conv_out.weight": normal(5, 3, 4)}
    options = {"r": 3, "use_dora": True, "target_modules": [IN04], "modules_to_save": ["conv_out"]}
    source = write_adapter(tmp_path / "a", tensors, **options)
    rescale(source, tmp_path / "same", blocks="IN04::1")
    before = state(tmp_path)
    for spec, said in (("IN04::0.5", "dora"), ("conv_out=0.5", "conv_out")):
        with pytest.raises(UnsupportedError, match=said):
            rescale(source, tmp_path / "out", blocks=spec)
        assert state(tmp_path) == before


def test_refusals(tmp_path, source):
    before = state(tmp_path)
    for options in (
        {"blocks": VECTOR, "by": 2},
        {"blocks": []},
        {"blocks": VECTOR, "absent": 0.5},
        {"by": 2, "absent": 1},
        {"by": 2, "presets": source},
        {"blocks": "nothing=2"},
        {"blocks": "1,1,1,1,1,1,1,1,1,1,1,R"},
        {"blocks": VECTOR, "factor": "lora_C"},
        {"bake": True, "factor": "lora_B"},
        {"restate_alpha": 2, "factor": "lora_B"},
    ):
        with pytest.raises(UsageError):
            plan_rescale(source, tmp_path / "out", **options)
    assert state(tmp_path) == before

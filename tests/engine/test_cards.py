import json
import re

import pytest

from loratools.engine.cards import card, front_matter, is_generated, is_hub_id

SHA = "ab" * 32
REPORT = {
    "schema": "loratools/extract/1",
    "loratools": "0.1.0",
    "inputs": [
        {"role": "base", "name": "base", "sha256": {"model.safetensors": SHA}, "hub": "org/base@" + "c" * 40},
        {"role": "tuned", "name": "tuned", "sha256": {"model.safetensors": SHA[::-1]}, "hub": None},
    ],
    "parameters": {"rank": 16, "preset": "default", "output": "/home/alice/out"},
    "modules": [
        {"name": f"model.layers.{i}.q_proj", "rank": 16 if i else 8, "captured": 0.9, "residual": i / 100}
        for i in range(12)
    ],
    "totals": {"parameters": 1234, "captured": 0.97654321},
    "files": [],
    "base_fingerprint": "f",
    "notes": ["lm_head was left out"],
}


def front(text):
    return pytest.importorskip("yaml").safe_load(text.split("---\n")[1])


def test_an_adapters_card_says_what_it_is():
    """What it is, of what, how, how well, how to load it; the Hub's fields among it."""
    text = card(REPORT, base_model="org/base", license_id="apache-2.0", pipeline_tag="text-generation")
    assert front(text) == {
        "base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft", "license": "apache-2.0",
        "pipeline_tag": "text-generation", "tags": ["loratools", "lora"],
    }  # fmt: skip
    for part in (
        "An adapter for [org/base]", "extracted from the difference",
        f"`model.safetensors@{SHA}`", f"`org/base@{'c' * 40}`",
        "`tuned`", '"rank": 16', "12 modules, rank 8 to 16", "captured 0.9765", "lm\\_head was left out",
        'AutoModelForCausalLM.from_pretrained("org/base")', "PeftModel.from_pretrained(model, ",
    ):  # fmt: skip
        assert part in text, part


def test_the_ten_largest_residuals_are_listed_in_order():
    shown = re.findall(r"\| `model\.layers\.(\d+)\.q_proj` \|", card(REPORT, base_model=None))
    assert [int(number) for number in shown] == list(range(11, 1, -1))


def test_residuals_that_are_no_number_come_first():
    rows = [
        {"name": "a", "rank": 1, "captured": 1.0, "residual": 0.5},
        {"name": "b", "rank": 1, "residual": float("nan")},
    ]
    text = card({**REPORT, "modules": rows}, base_model=None)
    assert text.index("| `b` | 1 | — | nan |") < text.index("| `a` | 1 | 1 | 0.5 |")


def test_a_merged_checkpoints_card_says_that_it_is_a_finetune():
    text = card({**REPORT, "schema": "loratools/merge/1", "modules": []}, base_model="org/base")
    assert front(text)["base_model_relation"] == "finetune"
    assert front(text)["library_name"] == "transformers"
    assert "peft" not in text
    assert 'AutoModelForCausalLM.from_pretrained("owner/name")' in text


@pytest.mark.parametrize(
    "path", ["/home/alice/base", "./base", "../b/c", "C:\\Users\\a", "~/base", "a/b/c", "mybase", "a/..b"]
)
def test_a_local_path_never_becomes_the_base(path):
    text = card({**REPORT, "inputs": []}, base_model=path)
    assert "base_model" not in front(text)
    assert "base_model_relation" not in front(text)
    assert path not in text
    assert not is_hub_id(path)


def test_the_base_is_taken_from_the_inputs_if_the_caller_knows_none():
    assert front(card(REPORT, base_model=None))["base_model"] == "org/base"


def test_the_bases_commit_is_not_part_of_its_name():
    text = card({**REPORT, "inputs": []}, base_model="org/base@" + "c" * 40)
    assert front(text)["base_model"] == "org/base"


def test_no_local_path_gets_in_through_parameters_or_names():
    inputs = [{"role": "base", "name": "/home/alice/secret/base/", "sha256": {}, "hub": None}]
    text = card({**REPORT, "inputs": inputs}, base_model=None)
    assert "alice" not in text
    assert '"output": "out"' in text
    assert "| `base` | `base` |" in text


HOSTILE = [
    'x"\n---\nlicense: mit', "no", "a: b # c", "'", "\\", "\u2028---", "\x85", "\x00\x1b[31m", "ü😀",
    "!!python/object:os.system", "&a *a",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_front_matter_is_read_back_as_it_was_meant(value):
    text = front_matter({"license": value, "tags": [value, "x"], "left": None})
    assert text.count("\n---\n") == 1
    assert front(text) == {"license": value, "tags": [value, "x"]}


@pytest.mark.parametrize(
    "value", ["a`b|c\n<script>alert(1)</script>", "![x](http://evil)", "| x |", "\u202etxt", "```\n# x"]
)
def test_names_from_files_stay_text(value):
    """In every place where a stranger's string can stand, it can neither end its span or cell nor make a line."""
    hostile = {
        **REPORT,
        "modules": [{"name": value, "rank": 1, "captured": 0.5, "residual": 0.5}],
        "inputs": [{"role": value, "name": value, "sha256": {value: value}, "hub": value}],
        "parameters": {value: value},
        "notes": [value],
        "totals": {value: 1},
    }
    plain = card(
        {**REPORT, "modules": REPORT["modules"][:1], "inputs": REPORT["inputs"][:1], "parameters": {"a": 1}},
        base_model=None,
    )
    text = card(hostile, base_model=None)
    body = text.split("```json")[0] + text.split("```\n", 1)[1]
    outside = re.sub(r"`[^`\n]*`", "", body)
    assert "<script" not in outside.replace("\\<", "")
    assert not re.search(r"(?<!\\)!?\[x(?<!\\)\]", outside)
    assert "\u202e" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line.replace(" for [org/base](https://huggingface.co/org/base)", "")
        for line in plain.splitlines()
        if line.startswith("#")
    ]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in {4, 5}
    assert json.loads(text.split("```json\n")[1].split("\n```")[0])


def test_the_same_report_gives_the_same_bytes():
    assert card(REPORT, base_model=None) == card(json.loads(json.dumps(REPORT)), base_model=None)


def test_a_card_knows_whether_it_was_edited():
    text = card(REPORT, base_model=None)
    assert is_generated(text)
    assert not is_generated(text.replace("An adapter", "My adapter"))
    assert not is_generated(text + "\nMore.\n")
    assert not is_generated("# Mine\n")
    assert not is_generated("")


@pytest.mark.parametrize(
    "report", [{}, {"modules": "x", "inputs": 3, "notes": None, "totals": []}, {"modules": [{}], "inputs": [{}]}]
)
def test_a_report_that_says_little_still_makes_a_card(report):
    assert is_generated(card(report, base_model=None))


def test_a_library_that_we_do_not_know_gets_no_snippet():
    text = card(REPORT, base_model=None, library_name="diffusers")
    assert front(text)["library_name"] == "diffusers"
    assert "## Loading" not in text

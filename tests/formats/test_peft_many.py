"""Names by the ten thousand, one for each module: looked up, not tried one after the other."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapters import Adapter
from loratools.errors import MalformedError
from loratools.formats import Contents
from loratools.formats.peft.codec import PeftCodec
from loratools.formats.peft.names import Anywhere, Endings
from loratools.formats.peft.tuners.lora_parameters import Known
from loratools.formats.peft.tuners.lora_targets import Layers, Parameters
from loratools.formats.peft.tuners.tokens import Listed
from loratools.tensors import in_memory
from tests.tiny import PREFIX, normal

CODEC = PeftCodec()
MANY = 20_000
SECONDS = 6.0
"""Of this thread, for reading and writing together: about four times what it takes; one by one it took 10 to 28."""
PATHS = [f"model.layers.{at // 8}.mlp.experts.{at % 8}.gate_proj" for at in range(MANY)]
STACKS = [f"model.layers.{at}.mlp.fused.down_proj" for at in range(2000)]
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
WIDE, SLIM, TALL = (2, 2), (4, 1), (4, 2)


def products(paths, sides=(TALL,)):
    return {
        f"{path}.lora_{side}.weight": shape
        for at, path in enumerate(paths)
        for side, shape in (("A", WIDE), ("B", sides[at % len(sides)]))
    }


CASES = {
    "whole modules": (
        products(["q"]) | {f"{path}.weight": WIDE for path in PATHS},
        {**LORA, "target_modules": ["q"], "modules_to_save": PATHS},
    ),
    "block-diagonal": (
        products(PATHS, (SLIM, TALL)),
        {**LORA, "target_modules": PATHS, "use_bdlora": {
            "target_modules_bd_a": PATHS[1::2], "target_modules_bd_b": PATHS[::2], "nblocks": 2}},
    ),
    "ia3": (
        {f"{path}.ia3_l": ((1, 3) if at % 2 else (3, 1)) for at, path in enumerate(PATHS)},
        {"peft_type": "IA3", "target_modules": PATHS, "feedforward_modules": PATHS[1::2]},
    ),
    "parameters beside layers": (
        products([*PATHS, *(path.rpartition(".")[0] for path in STACKS)]),
        {**LORA, "target_modules": PATHS, "target_parameters": STACKS},
    ),
    "trained tokens beside lora": (
        products(["q"]) | {f"{path}.token_adapter.trainable_tokens_delta": WIDE for path in PATHS},
        {**LORA, "target_modules": ["q"], "trainable_token_indices": {path: [1, 3] for path in PATHS}},
    ),
    "trained tokens alone": (
        {f"{path}.trainable_tokens_delta": WIDE for path in PATHS},
        {"peft_type": "TRAINABLE_TOKENS", "target_modules": PATHS, "token_indices": [1, 3]},
    ),
    "parameters of a known base": (
        products([path.rpartition(".")[0] for path in STACKS]),
        {**LORA, "target_modules": [], "target_parameters": STACKS},
    ),
}  # fmt: skip
SHAPES = {"parameters of a known base": {f"base.{path}": (4, 2) for path in (*PATHS, *STACKS)}}
"""Of the base's parameters, under names that differ by a prefix."""


@pytest.mark.parametrize("name", CASES)
def test_many_modules_are_read_and_written_in_little_time(name):
    shapes, config = CASES[name]
    kinds = {shape: normal(1, *shape) for shape in set(shapes.values())}
    tensors = {PREFIX + key: in_memory(PREFIX + key, kinds[shape]) for key, shape in shapes.items()}
    start = time.thread_time()
    decoded = CODEC.decode(Contents(tensors, config, shapes=SHAPES.get(name, {})))
    encoded = CODEC.encode(Adapter(decoded.updates, config=config))
    assert time.thread_time() - start < SECONDS
    assert encoded.tensors.keys() == tensors.keys()
    written = next(json.loads(text) for text in encoded.texts.values())
    for field in ("modules_to_save", "feedforward_modules", "target_parameters", "trainable_token_indices"):
        assert written.get(field) == config.get(field)


TEXTS = st.text("ab.", max_size=6)


@given(st.lists(TEXTS, max_size=40), TEXTS)
def test_the_end_of_a_path(names, path):
    assert Endings(names).end(path) == path.endswith(tuple(names))


@given(st.lists(TEXTS, max_size=40), TEXTS | st.text("ab.", min_size=600, max_size=700))
def test_a_name_anywhere_in_a_path(names, path):
    found = Anywhere(names).find(path)
    assert (found is not None) == any(name in path for name in names)
    assert found is None or (found in names and found in path)


@given(st.lists(TEXTS, max_size=8), TEXTS)
def test_the_parameters_of_a_module(names, module):
    """By whole path or by last components, in the order of the list."""
    pairs = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in names]
    expected = list(dict.fromkeys(last for head, last in pairs if not head or f".{module}".endswith(f".{head}")))
    made = Parameters({"target_parameters": names})
    assert made.of(module) == expected
    assert made.name(module) == bool(expected)


@given(st.lists(TEXTS, max_size=8), TEXTS)
def test_the_modules_that_are_layers(names, module):
    expected = any(module == name or module.endswith(f".{name}") for name in names)
    assert Layers({"target_modules": names}).hold(module) == expected


@given(st.dictionaries(TEXTS, st.integers(0, 1), max_size=8), TEXTS)
def test_the_tokens_that_are_listed_of_a_module(lists, path):
    values = [value for name, value in lists.items() if path.endswith(name)]
    if len(set(values)) > 1:
        with pytest.raises(MalformedError, match="which list other tokens"):
            Listed(lists).of(path)
    else:
        assert Listed(lists).of(path) == next(iter(values), None)


@given(st.lists(TEXTS, max_size=8), TEXTS)
def test_the_shape_of_a_parameter(names, path):
    """Its own name's; else that of the only name that is longer or shorter by a prefix."""
    shapes = {name: (at,) for at, name in enumerate(names)}
    others = [name for name in shapes if name.endswith(f".{path}") or path.endswith(f".{name}")]
    expected = shapes.get(path, shapes[others[0]] if len(others) == 1 else None)
    assert Known(shapes).of(path) == expected


@pytest.mark.parametrize("value", [True, 1, 1.5, {"q": 1}])
def test_targets_that_are_no_names_are_malformed(value):
    tensors = {PREFIX + key: in_memory(key, normal(1, *shape)) for key, shape in products(["m"]).items()}
    with pytest.raises(MalformedError, match="target_modules"):
        CODEC.decode(Contents(tensors, {**LORA, "target_modules": value, "target_parameters": ["m.w"]}))

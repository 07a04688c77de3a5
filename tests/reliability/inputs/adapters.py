"""H53 to H63: adapters that contradict themselves or the base, and configurations made to hang or to run something."""

import json
from functools import partial

from tests.reliability.inputs.cases import (
    Accepted,
    Case,
    Refused,
    all_of,
    as_adapter,
    merge,
    rescale,
    stack,
    unmerge,
)
from tests.reliability.inputs.world import (
    ADAPTER,
    CONFIG_FILE,
    PREFIX,
    Q,
    factors,
    normal,
    sparse,
    write_adapter,
)

TITLES = {
    53: "factors of different ranks",
    54: "one factor without the other",
    55: "a rank or an alpha that cannot be",
    56: "no alpha",
    57: "a rank or alpha pattern that takes for ever to match",
    58: "target modules given by such an expression",
    59: "targets that the base does not have",
    60: "an adapter for a base of other shapes",
    61: "an alpha pattern of a million entries",
    62: "a configuration that names modules to import",
    63: "a configuration of 1 GB, or one that is too deep",
}
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
EMBEDDED = f"{PREFIX}model.embed_tokens.lora_embedding_"


def holding(directory, changes):
    """The usual adapter with some tensors changed, or without those that are None."""
    tensors = factors() | changes
    write_adapter(directory / "bad-adapter", {key: value for key, value in tensors.items() if value is not None})


def saying(directory, **fields):
    """The usual adapter with another configuration."""
    write_adapter(directory / "bad-adapter", **fields)


def text(directory, config):
    """The usual adapter with a configuration that no JSON writer writes."""
    write_adapter(directory / "bad-adapter", config=config)


def spelled(value, field="lora_alpha"):
    """A configuration in which a number is written like this."""
    return json.dumps(ADAPTER | {field: "here"}).replace('"here"', value)


def silent(directory, *fields):
    """Without these fields."""
    config = {key: value for key, value in ADAPTER.items() if key not in fields}
    write_adapter(directory / "bad-adapter", config=json.dumps(config))


def foreign(directory):
    """For a model of more layers."""
    more = {key.replace("layers.1", "layers.7"): value for key, value in factors(seed=8).items()}
    write_adapter(directory / "bad-adapter", factors() | more)


def wider(directory):
    """For a model of the same names and twice the width."""
    tensors = {key: normal([7, at], value.shape[0], 2 * value.shape[1]) if ".lora_A" in key else value
               for at, (key, value) in enumerate(factors().items())}  # fmt: skip
    write_adapter(directory / "bad-adapter", tensors)


def million(directory, field):
    """A pattern that nobody can have needed."""
    pattern = ", ".join(f'"q{at}": 4' for at in range(1_000_000))
    config = json.dumps(ADAPTER | {field: "here"}).replace('"here"', "{" + pattern + "}")
    write_adapter(directory / "bad-adapter", config=config)


def gigabyte(directory):
    """A configuration of 1 GB that takes no room on the disk."""
    write_adapter(directory / "bad-adapter")
    sparse(directory / "bad-adapter" / CONFIG_FILE, b'{"peft_type": "LORA", "x": "', 1_000_000_000)


def just_below(directory):
    """A configuration below every limit on its size, and far above what fits into memory once it is read."""
    write_adapter(directory / "bad-adapter")
    with (directory / "bad-adapter" / CONFIG_FILE).open("wb") as file:
        file.write(b'{"peft_type": "LORA", "x": [')
        file.write(b"[]," * 5_000_000)
        file.write(b"[]]}")


MALFORMED = as_adapter(Refused(65, "malformed"))
IN_CONFIG = as_adapter(Refused(65, "malformed", r"adapter_config\.json"))
MISMATCH = as_adapter(Refused(65, "mismatch", "q_proj|embed_tokens"))
UNSUPPORTED = as_adapter(Refused(65, "unsupported", r"adapter_config\.json"))
IGNORED = all_of([("inspect", "bad-adapter"), merge("base", "bad-adapter"), stack("adapter", "bad-adapter"),
                  rescale("bad-adapter")], Accepted())  # fmt: skip
ON_THE_BASE = (merge("base", "bad-adapter"), merge("base", "adapter", "bad-adapter"))
SLOW = {
    "(a+)+$": "(a+)+$",
    "(.*a){20}": "(.*a){20}",
    r"(\w+\s?)*$": r"(\w+\s?)*$",
    "(a|aa)+$": "(a|aa)+$",
    "3,000 characters": "x" * 3000,
}
SLOW_HERE = {
    r"(.|\w)+(?<![a-z])": r"(.|\w)+(?<![a-z])",
    "2,001 characters": "q?" * 1000 + "x",
}
"""On any name that ends in a letter, an engine that goes back tries two ways for every character of it."""
NUMBERS = {"0": 0, "-4": -4, "10^9": 10**9, "a text": "4", "4.5": 4.5, "true": True, "a list": [4]}
ALPHAS = {"NaN": "NaN", "Infinity": "Infinity", "1e400": "1e400", "a text": '"16"', "5,000 digits": "9" * 5000,
          "an object": "{}", "true": "true"}  # fmt: skip
DEEP = {
    "lists": b'{"peft_type": "LORA", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "objects": b'{"peft_type": "LORA", "x": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001,
}
IMPORTS = {
    "os": {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    "antigravity": {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
    "a part of it": {"auto_mapping": {"base_model_class": "x", "parent_library": "lib2to3.pgen2.driver"}},
    "megatron_core": {"megatron_core": "antigravity", "megatron_config": {"hidden_size": 1}},
    "megatron_core, a path": {"megatron_core": "../evil", "megatron_config": {}},
    "auto_mapping, a text": {"auto_mapping": "antigravity"},
    "parent_library, a list": {"auto_mapping": {"parent_library": ["antigravity"]}},
}

CASES = (
    Case(53, "2 and 3", partial(holding, changes={B: normal(1, 16, 3)}), MISMATCH),
    Case(53, "of an embedding",
         partial(holding, changes={f"{EMBEDDED}A": normal(1, 2, 32), f"{EMBEDDED}B": normal(2, 16, 5)}), MISMATCH),
    Case(53, "one axis", partial(holding, changes={A: normal(1, 16)}), MISMATCH),
    Case(53, "no axis", partial(holding, changes={A: normal(1), B: normal(2)}), MISMATCH),
    Case(54, "A", partial(holding, changes={B: None}), MALFORMED),
    Case(54, "B", partial(holding, changes={A: None}), MALFORMED),
    Case(54, "A of an embedding", partial(holding, changes={f"{EMBEDDED}A": normal(1, 2, 32)}), MALFORMED),
    Case(55, "factors of rank 0", partial(holding, changes={A: normal(1, 0, 16), B: normal(2, 16, 0)}), MISMATCH),
    *(Case(55, f"r: {name}", partial(saying, r=value), IN_CONFIG) for name, value in NUMBERS.items()),
    *(Case(55, f"rank_pattern: {name}", partial(saying, rank_pattern={"q_proj": value}), IN_CONFIG)
      for name, value in NUMBERS.items()),
    *(Case(55, f"alpha: {name}", partial(text, config=spelled(value)), IN_CONFIG) for name, value in ALPHAS.items()),
    Case(55, "alpha_pattern: a text", partial(saying, alpha_pattern={"q_proj": "16"}), IN_CONFIG),
    Case(56, "lora_alpha", lambda directory: silent(directory, "lora_alpha"),
         all_of([("inspect", "bad-adapter"), merge("base", "bad-adapter"), stack("adapter", "bad-adapter"),
                 rescale("bad-adapter")], Accepted("no lora_alpha; PEFT's default of 8"))),
    *(Case(57, f"{field}: {name}", partial(saying, **{field: {key: 4}}), IGNORED)
      for field in ("rank_pattern", "alpha_pattern") for name, key in SLOW.items()),
    *(Case(57, f"{field}: {name}, on these names", partial(saying, **{field: {key: 4}}), UNSUPPORTED)
      for field in ("rank_pattern", "alpha_pattern") for name, key in SLOW_HERE.items()),
    *(Case(58, f"{field}: {name}", partial(saying, **{field: key}), IGNORED)
      for field in ("target_modules", "exclude_modules")
      for name, key in (SLOW | {"1 MB": "|".join(["q_proj"] * 150_000)}).items()),
    Case(59, "a layer", foreign, all_of([*ON_THE_BASE, unmerge("base", "bad-adapter")],
                                        Refused(65, "mismatch", r"layers\.7"))),
    Case(59, "all of them", partial(holding, changes=dict.fromkeys(factors()) | {
        f"{PREFIX}x.lora_A.weight": normal(1, 2, 4), f"{PREFIX}x.lora_B.weight": normal(2, 4, 2)}),
         all_of([*ON_THE_BASE, unmerge("base", "bad-adapter")], Refused(65, "mismatch", "not in the base"))),
    Case(60, "twice as wide", wider, all_of([*ON_THE_BASE, unmerge("base", "bad-adapter")],
                                            Refused(65, "mismatch", "shape"))),
    Case(60, "a norm of 8", partial(holding, changes={f"{PREFIX}model.norm.weight": normal(1, 8)}),
         all_of(ON_THE_BASE, Refused(65, "mismatch", r"\(8,\)"))),
    *(Case(61, field, partial(million, field=field), IN_CONFIG, heavy=True)
      for field in ("alpha_pattern", "rank_pattern")),
    *(Case(62, name, partial(saying, **fields), IN_CONFIG, never=("antigravity", "lib2to3"))
      for name, fields in IMPORTS.items()),
    Case(63, "1 GB, sparse", gigabyte, IN_CONFIG),
    Case(63, "15 MB of empty lists", just_below, IN_CONFIG),
    *(Case(63, f"200,000 deep, {name}", partial(text, config=config), IN_CONFIG) for name, config in DEEP.items()),
)  # fmt: skip

"""What a specification of block weights gives every module; what is none is refused."""

import itertools

import pytest

from loratools.engine.block_maps import LAYOUTS
from loratools.engine.block_weights import block_weights, read_presets, resolved
from loratools.errors import UsageError

ATTN = "transformer_blocks.0.attn1.to_q"
SD1 = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "BASE",
    **{f"unet.down_blocks.{i}.attentions.{j}.{ATTN}": f"IN{3 * i + j + 1:02}" for i in range(3) for j in range(2)},
    "unet.mid_block.attentions.0.proj_in": "MID",
    **{f"unet.up_blocks.{i}.attentions.{j}.transformer_blocks.0.ff.net.2": f"OUT{3 * i + j:02}"
       for i in range(1, 4) for j in range(3)},
}  # fmt: skip
FLUX = {
    **{f"transformer.transformer_blocks.{n}.attn.to_q": f"D{n:02}" for n in range(19)},
    **{f"transformer.single_transformer_blocks.{n}.proj_mlp": f"S{n:02}" for n in range(38)},
}


def weights(paths, *specs, absent=None):
    return {path: each.weight for path, each in block_weights(list(paths), list(specs), absent).modules.items()}


def by_block(modules, *specs, absent=None):
    found = weights(modules, *specs, absent=absent)
    return {modules[path]: weight for path, weight in found.items()}


def numbers(vector):
    return ",".join(map(str, vector))


def test_a_vector_of_17():
    vector = [round(0.1 * n, 1) for n in range(17)]
    assert by_block(SD1, numbers(vector)) == dict(zip(LAYOUTS[17], vector, strict=True))
    assert by_block(SD1, str(vector)) == dict(zip(LAYOUTS[17], vector, strict=True))
    assert by_block(SD1, f"MINE:{numbers(vector)}") == dict(zip(LAYOUTS[17], vector, strict=True))


def test_a_vector_of_26_and_of_61():
    vector = list(range(26))
    known = dict(zip(LAYOUTS[26], vector, strict=True))
    assert by_block(SD1, numbers(vector)) == {block: known[block] for block in SD1.values()}
    vector = [-n / 7 for n in range(61)]
    known = dict(zip(LAYOUTS[61], vector, strict=True))
    assert by_block(FLUX, numbers(vector)) == {block: known[block] for block in FLUX.values()}


@pytest.mark.parametrize("absent", [0.0, 1.0])
def test_blocks_that_a_short_vector_leaves_out(absent):
    """0 as hako-mikan's extension, 1 as sd-scripts; by default an error that names them."""
    with pytest.raises(UsageError, match=r"IN01, IN02, OUT06, .*OUT11.*--absent 0"):
        weights(SD1, numbers([2] * 12))
    found = by_block(SD1, numbers([2] * 12), absent=absent)
    assert {block for block, weight in found.items() if weight == absent} == set(SD1.values()) - set(LAYOUTS[12])
    assert all(found[block] == 2 for block in LAYOUTS[12] if block in found)


def test_modules_in_no_block_are_named_and_stay():
    paths = [*SD1, "unet.time_embedding.linear_1", "unet.conv_out"]
    found = block_weights(paths, [numbers([0.5] * 17)], None)
    assert found.notes == ("In no block, and left as they are: unet.time_embedding.linear_1, unet.conv_out.",)
    assert found.modules["unet.conv_out"].weight == 1
    assert found.modules["unet.conv_out"].block is None


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ("IN04:attn1:0", {"IN04"}),
        ("IN04 OUT03::0", {"IN04", "OUT03"}),
        ("IN07-OUT04::0", {"IN07", "IN08", "MID", "OUT03", "OUT04"}),
        ("OUT04-IN07::0", {"IN07", "IN08", "MID", "OUT03", "OUT04"}),
        ("IN07-M00::0", {"IN07", "IN08", "MID"}),
        ("IN:attn:0", {"IN01", "IN02", "IN04", "IN05", "IN07", "IN08"}),
        ("NOT IN01-OUT11::0", {"BASE"}),
        ("NOT BASE IN:ff:0", {f"OUT{n:02}" for n in range(3, 12)}),
        ("OUT:NOT ff:0", None),
        (":attn1_to_q:0", {"IN01", "IN02", "IN04", "IN05", "IN07", "IN08"}),
        (":attn1.to_q ff:0", {b for b in SD1.values() if b not in {"BASE", "MID"}}),
        (":NOT attn ff:0", {"MID"}),
    ],
)
def test_rules(rule, chosen):
    """Blocks by name, part and range; elements by any part of a path; NOT; nothing stands for all."""
    if chosen is None:
        with pytest.raises(UsageError, match="no module"):
            weights(SD1, rule)
        return
    found = by_block(SD1, rule)
    assert {block for block, weight in found.items() if weight == 0} == chosen
    assert {weight for block, weight in found.items() if block not in chosen} <= {1.0}


def test_the_last_one_decides():
    """Rules after a vector replace what it says; several rules in one text; a named one."""
    found = by_block(SD1, numbers([0.5] * 17), "IN:attn:2,IN04:attn:3", "ATTN:OUT11::-1")
    assert found["BASE"] == 0.5
    assert found["IN01"] == 2
    assert found["IN04"] == 3
    assert found["OUT11"] == -1
    assert by_block(SD1, "IN:attn:2", numbers([0.5] * 17))["IN01"] == 0.5


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        ("layers.{0-2}=0.5", range(3)),
        ("re:layers\\.[02]\\.=0.5", (0, 2)),
        ("layers.3.*=0.5", (3,)),
        ("model.layers.{1,3}=0.5", (1, 3)),
    ],
)
def test_patterns_for_any_model(spec, chosen):
    """Ranges of layers and expressions; a glob is about all that lies below what it matches."""
    paths = [f"model.layers.{n}.self_attn.{name}_proj" for n, name in itertools.product(range(5), "qk")]
    found = weights(paths, spec)
    assert {path for path, weight in found.items() if weight == 0.5} == {
        path for path in paths if int(path.split(".")[2]) in chosen
    }
    assert all(each.block is None for each in block_weights(paths, [spec], None).modules.values())


def test_presets(tmp_path):
    """A file's names and the built-in ones are written out; comments and empty lines are passed over."""
    mine = read_presets(f"# mine\n\nHALF:{numbers([0.5] * 17)}\n IND:1,0\nNOATTN:IN:attn:0\n", "x.txt")
    assert resolved(["HALF", "INS", "layers.3=2", "NOATTN"], mine) == [
        f"HALF:{numbers([0.5] * 17)}", "INS:1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0", "layers.3=2", "NOATTN:IN:attn:0",
    ]  # fmt: skip
    assert resolved(["IND"], mine) == ["IND:1,0"]
    assert by_block(SD1, *resolved(["NOATTN"], mine))["IN04"] == 0
    for text, said in (("nothing", "no preset"), ("A:1\nA:2", "twice"), (":1,2", "no preset"), ("A:", "no preset")):
        with pytest.raises(UsageError, match=said):
            read_presets(text, "x.txt")


@pytest.mark.parametrize("letter", ["R", "U", "X", "X+0.2", "X-1"])
def test_random_numbers_are_refused_by_name(letter):
    for spec in (numbers(["1"] * 16 + [letter]), f"IN04:attn:{letter}"):
        with pytest.raises(UsageError, match=r"stands for a random number"):
            weights(SD1, spec)


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([], "at most one"),
        ([numbers([1] * 17), numbers([1] * 17)], "at most one"),
        ([numbers([1] * 16)], "12, 17, 20, 26, 61 numbers, not 16"),
        ([numbers([1] * 61)], "those of a U-Net"),
        (["IN99::0"], "none of the blocks"),
        (["IN04-X::0"], "none of the blocks"),
        (["IN03::0"], "no module"),
        (["IN04:nothing:0"], "no module"),
        (["nothing=0.5"], "no module"),
        (["mid_block=a"], "finite number"),
        (["mid_block=1e999"], "finite number"),
        (["IN04:attn:nan"], "finite number"),
        (["IN04:attn"], "no block weights"),
        (["1,2,x"], "no block weights"),
        ([""], "no block weights"),
        ([":::1,2"], "no block weights"),
        (["[1, [2]]"], "no block weights"),
    ],
)
def test_what_is_refused(specs, said):
    with pytest.raises(UsageError, match=said):
        weights(SD1, *specs)


def test_a_vector_for_another_model():
    """A language model has no such blocks; Flux has others; an adapter of a text encoder alone has BASE."""
    with pytest.raises(UsageError, match=r"no block that is known.*by pattern"):
        weights(["model.layers.0.self_attn.q_proj"], numbers([1] * 17))
    with pytest.raises(UsageError, match="those of Flux"):
        weights(FLUX, numbers([1] * 26))
    path = "text_model.encoder.layers.0.mlp.fc1"
    assert weights([path], numbers([0.25] + [1] * 16)) == {path: 0.25}
    with pytest.raises(UsageError, match="no vector"):
        weights(SD1, "IN04::0", absent=1.0)
    with pytest.raises(UsageError, match="no such preset"):
        resolved(["UNHEARD"], {})

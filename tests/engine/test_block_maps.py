"""Block names and the modules that they are, against the rules of diffusers' conversion scripts, written out here."""

import pytest

from loratools.engine.block_maps import FLUX, LAYOUTS, MAPS, PRESETS, UNET, block_of, family_of
from loratools.engine.block_weights import block_weights


def sd1_pairs():
    """(original's, diffusers') name of a module of every part of SD 1's U-Net, after diffusers' conversion script."""
    for i in range(4):
        for j in range(2):
            yield f"input_blocks.{3 * i + j + 1}.0.in_layers.2", f"down_blocks.{i}.resnets.{j}.conv1"
            if i < 3:
                yield f"input_blocks.{3 * i + j + 1}.1.proj_in", f"down_blocks.{i}.attentions.{j}.proj_in"
        for j in range(3):
            yield f"output_blocks.{3 * i + j}.0.in_layers.2", f"up_blocks.{i}.resnets.{j}.conv1"
            if i > 0:
                yield f"output_blocks.{3 * i + j}.1.proj_in", f"up_blocks.{i}.attentions.{j}.proj_in"
        if i < 3:
            yield f"input_blocks.{3 * (i + 1)}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            yield f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.conv", f"up_blocks.{i}.upsamplers.0.conv"
    yield "middle_block.1.proj_in", "mid_block.attentions.0.proj_in"
    for j in range(2):
        yield f"middle_block.{2 * j}.in_layers.2", f"mid_block.resnets.{j}.conv1"
    yield "input_blocks.0.0", "conv_in"


@pytest.mark.parametrize(("original", "diffusers"), list(sd1_pairs()))
@pytest.mark.parametrize("prefix", ["", "unet.", "diffusion_model."])
def test_both_names_of_a_module_are_one_block(original, diffusers, prefix):
    """What the scripts call the same module is in the same block, which is the number of the original's block."""
    kind, number, *_ = original.split(".")
    block = "MID" if kind == "middle_block" else f"{'IN' if kind == 'input_blocks' else 'OUT'}{int(number):02}"
    assert block_of(prefix + original, UNET) == block
    assert block_of(prefix + diffusers, UNET) == block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.9.attn1.to_q", "IN04"),
        ("unet.down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj", "IN08"),
        ("unet.up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k", "OUT02"),
        ("unet.up_blocks.1.attentions.0.proj_out", "OUT03"),
        ("text_encoder.text_model.encoder.layers.11.self_attn.q_proj", "BASE"),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "BASE"),
        ("text_model.encoder.layers.0.mlp.fc2", "BASE"),
        ("unet.time_embedding.linear_1", None),
        ("unet.conv_out", None),
        ("unet.add_embedding.linear_1", None),
    ],
)
def test_modules_of_a_unet(path, block):
    assert block_of(path, UNET) == block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer.transformer_blocks.3.attn.to_q", "D03"),
        ("transformer.transformer_blocks.18.ff_context.net.0.proj", "D18"),
        ("transformer.single_transformer_blocks.37.proj_out", "S37"),
        ("transformer.single_transformer_blocks.3.attn.to_k", "S03"),
        ("double_blocks.12.img_attn.qkv", "D12"),
        ("diffusion_model.single_blocks.0.linear1", "S00"),
        ("transformer.proj_out", "OUT"),
        ("final_layer.linear", "OUT"),
        ("transformer.x_embedder", "IN"),
        ("transformer.time_text_embed.guidance_embedder.linear_1", "IN"),
        ("img_in", "IN"),
        ("guidance_in.in_layer", "IN"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "CLIP"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "T5"),
        ("transformer.transformer_blocks.19.attn.to_q", None),
    ],
)
def test_modules_of_flux(path, block):
    assert block_of(path, FLUX) == block


def test_layouts():
    """The lengths that people write, and what each number of a short one is for."""
    assert {length: len(blocks) for length, blocks in LAYOUTS.items()} == {n: n for n in (12, 17, 20, 26, 61)}
    assert ",".join(LAYOUTS[12]) == "BASE,IN04,IN05,IN07,IN08,MID,OUT00,OUT01,OUT02,OUT03,OUT04,OUT05"
    assert ",".join(LAYOUTS[17]) == (
        "BASE,IN01,IN02,IN04,IN05,IN07,IN08,MID,OUT03,OUT04,OUT05,OUT06,OUT07,OUT08,OUT09,OUT10,OUT11"
    )
    assert LAYOUTS[20] == (*LAYOUTS[26][:10], "MID", *[f"OUT{n:02}" for n in range(9)])
    assert LAYOUTS[61][:4] == ("CLIP", "T5", "IN", "D00")
    assert LAYOUTS[61][-2:] == ("S37", "OUT")
    for family, blocks in MAPS.items():
        assert set(family) == set(blocks)


def test_families():
    """A U-Net's transformer_blocks are not Flux's; a model of neither has no blocks."""
    assert family_of(["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]) == UNET
    assert family_of(["transformer.transformer_blocks.0.attn.to_q"]) == FLUX
    assert family_of(["model.layers.0.self_attn.q_proj"]) is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_block_weights(name):
    """Every built-in preset can be applied."""
    path = (
        "transformer.single_transformer_blocks.0.x" if name == "FLUXALL" else "unet.up_blocks.1.attentions.0.attn1.proj"
    )
    found = block_weights([path], [f"{name}:{PRESETS[name]}"], None)
    assert found.modules[path].block in {"S00", "OUT03"}

"""Which modules the blocks of LBW vectors are, as data: the block's name → globs of module paths.

A U-Net's blocks are those of the original implementation (`input_blocks.0` to `11`, `middle_block`, `output_blocks.0`
to `11`); diffusers names the same modules `down_blocks.i…`, `mid_block…`, `up_blocks.i…` (its
`scripts/convert_diffusers_to_original_stable_diffusion.py` and `…_sdxl.py`, https://github.com/huggingface/diffusers).
Layouts of vectors after https://github.com/hako-mikan/sd-webui-lora-block-weight, which sd-scripts (`--lbws`) shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from loratools.adapters.selection import matches_any

_IN, _OUT = [f"IN{n:02}" for n in range(12)], [f"OUT{n:02}" for n in range(12)]
_DOUBLE, _SINGLE = [f"D{n:02}" for n in range(19)], [f"S{n:02}" for n in range(38)]
_SD: Final = ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *_OUT[3:])
_SDXL: Final = ("IN04", "IN05", "IN07", "IN08", "MID", *_OUT[:6])

UNET: Final = ("BASE", *_IN, "MID", *_OUT)
FLUX: Final = ("CLIP", "T5", "IN", *_DOUBLE, *_SINGLE, "OUT")
LAYOUTS: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        12: ("BASE", *_SDXL),
        17: ("BASE", *_SD),
        20: ("BASE", *_IN[:9], "MID", *_OUT[:9]),
        26: UNET,
        61: FLUX,
    }
)
"""Length of a vector → the blocks that its numbers are for: SDXL, SD 1 and 2, SDXL with convolutions, all, Flux."""
ALIASES: Final[Mapping[str, str]] = MappingProxyType({"M00": "MID"})


def _unet() -> dict[str, list[str]]:
    found = {"BASE": ["text_encoder.*", "text_encoder_2.*", "text_model.*", "conditioner.*", "cond_stage_model.*"]}
    found |= {name: [f"input_blocks.{n}.*"] for n, name in enumerate(_IN)}
    found |= {"MID": ["mid_block.*", "middle_block.*"]}
    found |= {name: [f"output_blocks.{n}.*"] for n, name in enumerate(_OUT)}
    found["IN00"].append("conv_in")
    for i in range(4):
        for j in range(2):
            found[_IN[3 * i + j + 1]] += [f"down_blocks.{i}.resnets.{j}.*", f"down_blocks.{i}.attentions.{j}.*"]
        if i < 3:  # noqa: PLR2004  (the last one of each does not change the size)
            found[_IN[3 * i + 3]].append(f"down_blocks.{i}.downsamplers.0.*")
            found[_OUT[3 * i + 2]].append(f"up_blocks.{i}.upsamplers.0.*")
        for j in range(3):
            found[_OUT[3 * i + j]] += [f"up_blocks.{i}.resnets.{j}.*", f"up_blocks.{i}.attentions.{j}.*"]
    return found


def _flux() -> dict[str, list[str]]:
    found = {name: [f"transformer_blocks.{n}.*", f"double_blocks.{n}.*"] for n, name in enumerate(_DOUBLE)}
    found |= {name: [f"single_transformer_blocks.{n}.*", f"single_blocks.{n}.*"] for n, name in enumerate(_SINGLE)}
    found["CLIP"] = ["text_encoder.*", "text_model.*", "clip_l.*"]
    found["T5"] = ["text_encoder_2.*", "t5xxl.*", "encoder.block.*"]
    found["IN"] = ["x_embedder", "context_embedder", "time_text_embed.*", "{img,txt}_in", "{time,vector,guidance}_in.*"]
    found["OUT"] = ["norm_out.linear", "proj_out", "final_layer.*"]
    return found


MAPS: Final[Mapping[tuple[str, ...], Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        blocks: MappingProxyType({name: tuple(globs) for name, globs in made.items()})
        for blocks, made in ((UNET, _unet()), (FLUX, _flux()))
    }
)
"""The blocks of a family in order → globs of each one's modules; the first block that matches a path has it."""
_TEXT: Final = frozenset({"BASE", "CLIP", "T5"})

NAMES: Final[Mapping[tuple[str, ...], str]] = MappingProxyType({UNET: "a U-Net", FLUX: "Flux"})

PRESETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NONE": ",".join(17 * "0"),
        "ALL": ",".join(17 * "1"),
        "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
        "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
        "ALL0.5": ",".join(17 * ["0.5"]),
        "FLUXALL": ",".join(61 * "1"),
        "ATTNDEEPON": "IN05-OUT05:attn:1",
        "ATTNDEEPOFF": "IN05-OUT05:attn:0",
        "PROJDEEPOFF": "IN05-OUT05:proj:0",
    }
)
"""hako-mikan's own presets: a name → its vector, or its rules for elements."""


def block_of(path: str, family: tuple[str, ...]) -> str | None:
    """The block of a family that a module belongs to; None where it belongs to none."""
    return next((name for name, globs in MAPS[family].items() if matches_any(globs, path)), None)


def family_of(paths: list[str]) -> tuple[str, ...] | None:
    """Whose blocks the modules of an adapter are, by those that are not a text encoder's; None for another model."""
    for family in (UNET, FLUX):  # a U-Net's blocks have transformer_blocks of their own, so it is asked first
        if any(found not in _TEXT for path in paths if (found := block_of(path, family))):
            return family
    return UNET if any(block_of(path, UNET) for path in paths) else None

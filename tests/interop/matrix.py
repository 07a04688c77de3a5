"""What is done with each kind of PEFT adapter, and which test shows it; `python -m tests.interop.matrix` writes it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "formats" / "peft-kinds.md"
LORA = "tests/interop/test_kinds_lora_peft.py::"
EXPERTS = "tests/interop/test_kinds_experts_peft.py::"
EDGES = "tests/interop/test_kinds_lora_edges_peft.py::"
TOKENS = "tests/interop/test_kinds_tokens_peft.py::"
TUNERS = "tests/interop/test_kinds_tuners_a_peft.py::"
OTHERS = "tests/interop/test_kinds_tuners_b_peft.py::"
CONV = "tests/interop/test_extract_conv_peft.py::"
EXTRACT = "tests/interop/test_extract_peft.py::"
CONFIG = "tests/formats/test_peft_config.py::"
NO_MATRIX = "an extraction finds matrices"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row: PEFT writes the adapter; `all_ways` reads, merges, takes out with --base, writes; PEFT is the judge."""

    name: str
    all_ways: str
    extract: str = NO_MATRIX


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kind that is refused, by which name, and the test of that."""

    name: str
    why: str
    test: str


KINDS = (
    Kind("LoRA, Linear", f"{LORA}test_layers", f"{EXTRACT}test_full_rank_is_the_tuned_model_in_peft"),
    Kind("LoRA, HF Conv1D", f"{LORA}test_layers", f"{EXTRACT}test_full_rank_is_the_tuned_model_in_peft"),
    Kind("LoRA, Embedding", f"{LORA}test_layers", f"{EXTRACT}test_full_rank_is_the_tuned_model_in_peft"),
    Kind("LoRA, Conv1d, Conv2d, Conv3d", f"{LORA}test_layers", f"{CONV}test_models_of_transformers"),
    Kind("rsLoRA, rank and alpha patterns", f"{LORA}test_layers", "written with alpha = r"),
    Kind("DoRA", f"{LORA}test_dora", "ΔW is written as LoRA"),
    Kind("lora_bias", f"{LORA}test_lora_bias", "biases are stored whole"),
    Kind("bias=all, bias=lora_only", f"{LORA}test_trained_biases", "biases are stored whole"),
    Kind("trained tokens (trainable_token_indices)", f"{LORA}test_trained_tokens_beside_lora"),
    Kind("TRAINABLE_TOKENS", f"{LORA}test_trained_tokens_alone"),
    Kind("a vocabulary resized after the base", f"{TOKENS}test_a_resized_vocabulary",
         "new rows are a file of their own"),
    Kind("nn.MultiheadAttention", f"{LORA}test_attention", "in_proj_weight is stored whole"),
    Kind("target_parameters, stacked experts", f"{EXPERTS}test_stacked_parameters",
         f"{EXPERTS}test_extracted_from_stacked_parameters"),
    Kind("target_parameters, a matrix an expert in the file", f"{EXPERTS}test_a_matrix_an_expert",
         f"{EXPERTS}test_extracted_from_a_matrix_an_expert"),
    Kind("target_parameters as PEFT 0.17 to 0.19.0 laid them out", f"{EXPERTS}test_square_experts_by_version"),
    Kind("QALoRA", f"{LORA}test_grouped_inputs", "ΔW is written as LoRA"),
    Kind("BD-LoRA (block-diagonal)", f"{LORA}test_blocks", "ΔW is written as LoRA"),
    *(Kind(name, f"{TUNERS}test_merge_and_the_way_back", "ΔW is written as LoRA")
      for name in ("AdaLoRA", "MiSS", "LoHa, its CP form", "LoKr, its Tucker form", "VeRA")),
    *(Kind(name, f"{OTHERS}test_merge_and_way_back", "ΔW is written as LoRA")
      for name in ("IA3", "OFT", "BOFT", "HRA", "FourierFT", "SHiRA", "C3A", "LN tuning")),
)  # fmt: skip

REFUSED = (
    Refusal("LoRA on a convolution in groups", "lora_A mixes the groups",
            f"{LORA}test_grouped_convolutions_are_refused"),
    Refusal("PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ", "belongs to a base with other weights",
            f"{CONFIG}test_initialisations_that_change_the_base_are_refused_by_name"),
    Refusal("layer replication, KaSA, Arrow, activated LoRA", "not ΔW on this base alone",
            f"{CONFIG}test_variants_are_refused_by_name"),
    Refusal("VeLoRA, MonteCLoRA", "tensors beside the factors", f"{EDGES}test_variants_with_tensors_of_their_own"),
    Refusal("an attention and its out_proj, both targeted", "two updates of one weight",
            f"{EDGES}test_an_attention_and_its_projection_targeted_apart"),
    Refusal("lora_bias on an attention", "PEFT stores it and uses it nowhere",
            f"{EDGES}test_lora_bias_of_an_attention"),
    Refusal("TRAINABLE_TOKENS on both of two tied modules", "PEFT cannot run it",
            f"{TOKENS}test_tied_modules_that_were_targeted_both"),
    Refusal("VeRA without its projections", "they would have to be drawn again",
            f"{TUNERS}test_vera_without_its_projections"),
    Refusal("every other peft_type", "not read yet", f"{CONFIG}test_other_types_are_refused_by_name"),
)  # fmt: skip


def tests_named() -> set[str]:
    """Every test that the page names."""
    cells = [cell for kind in KINDS for cell in (kind.all_ways, kind.extract)] + [each.test for each in REFUSED]
    return {cell for cell in cells if "::" in cell}


def missing(test: str) -> bool:
    """Whether a test that is named does not exist."""
    file, name = test.split("::")
    source = ROOT / file
    return not source.is_file() or not re.search(rf"^def {name}\(", source.read_text(encoding="utf-8"), re.MULTILINE)


def short(cell: str) -> str:
    """A test without its folder; anything else as it is."""
    return f"`{cell.rpartition('/')[2].replace('.py::', ' ')}`" if "::" in cell else cell


def page() -> str:
    """The page."""
    lines = [
        "# Kinds of PEFT adapters", "",
        "This page is generated by `python -m tests.interop.matrix`. PEFT itself writes an adapter of each kind and is",
        "the judge: of ΔW or, where it errs, the formula in float64; of the merge, in float32 and bfloat16; and of",
        "what is written, which it loads without a missing key, an unexpected key or a warning. *Taken out* is",
        "`unmerge --base`, byte for byte.", "",
        "| kind | read, merged, taken out, written | extracted |", "| :--- | :--- | :--- |",
        *(f"| {kind.name} | {short(kind.all_ways)} | {short(kind.extract)} |" for kind in KINDS), "",
        "Refused, by name and with exit code 65:", "",
        "| kind | why | test |", "| :--- | :--- | :--- |",
        *(f"| {each.name} | {each.why} | {short(each.test)} |" for each in REFUSED), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

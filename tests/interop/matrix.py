"""What is done with each kind of PEFT adapter, and which test shows it; `python -m tests.interop.matrix` writes it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.laws.kinds import EVERY_KIND, REFUSED_BY

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
SHAPES = "tests/interop/test_extract_shapes_peft.py::"
COLUMNS = ("kind", "read", "merged", "taken out", "written", "extracted")
LAWS = [
    "tests/laws/test_law_1_way_back.py::test_the_base_comes_back_whatever_the_kind",
    "tests/laws/test_law_2_same_bits.py::test_threads_and_tiles_do_not_show_in_any_kind",
    "tests/laws/test_law_4_sums.py::test_stack_is_the_sum_of_every_kind",
    "tests/laws/test_law_4_sums.py::test_a_multiple_of_every_kind",
    *(f"tests/laws/test_law_4_kinds.py::test_{what}"
      for what in ("multiples", "sums", "norm_inner_cosine", "truncation", "principal_angles")),
    "tests/laws/test_law_5_codecs.py::test_every_kind_comes_back",
    "tests/laws/test_law_6_accounting.py::test_no_tensor_of_any_kind_is_ignored",
]  # fmt: skip
OPERATIONS = ("multiples", "sums", "with LoRA", "norms", "truncated", "angles")
CONFIG = "tests/formats/test_peft_config.py::"
NO_MATRIX = "an extraction finds matrices"
AS_LORA = "ΔW is written as LoRA"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row: for each thing that is done with the kind a test, or the reason why there is none.

    Attributes:
        name: as the page has it.
        read: PEFT wrote the adapter, and ΔW is the formula's.
        merged: against PEFT's merge, or the formula in float64.
        taken_out: `unmerge --base` gives every byte back.
        written: PEFT loads what we write.
        extracted: `extract` writes it.
        laws: its entries in `tests/laws/kinds.py`.
    """

    name: str
    read: str
    merged: str
    taken_out: str
    written: str
    extracted: str
    laws: tuple[str, ...]

    def can(self, verb: str) -> str:
        """Whether an operation of `OPERATIONS` is there; law 4 holds either answer."""
        kinds = [EVERY_KIND[name] for name in self.laws]
        said = {kind.sums if verb == "sums" or kind.halves is None else kind.halves for kind in kinds}
        if verb in REFUSED_BY:
            said = {name not in REFUSED_BY[verb] for name in self.laws}
        return {(True,): "yes", (False,): "refused"}.get(tuple(said), "some")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kind that is refused, by which name, and the test of that."""

    name: str
    why: str
    test: str


def all_in(test: str, name: str, extracted: str, *laws: str) -> Kind:
    """A kind of which one test shows all but the extraction."""
    return Kind(name, test, test, test, test, extracted, laws)


WHOLE_MODEL = f"{EXTRACT}test_full_rank_is_the_tuned_model_in_peft"
KINDS = (
    all_in(f"{LORA}test_layers", "LoRA, Linear", WHOLE_MODEL, "linear", "sum"),
    all_in(f"{LORA}test_layers", "LoRA, HF Conv1D", WHOLE_MODEL, "conv1d"),
    all_in(f"{LORA}test_layers", "LoRA, Embedding", WHOLE_MODEL, "embedding"),
    all_in(f"{LORA}test_layers", "LoRA, Conv1d, Conv2d, Conv3d", f"{CONV}test_full_rank_is_the_tuned_network", "conv"),
    all_in(f"{LORA}test_layers", "rsLoRA, rank and alpha patterns", "written with alpha = r", "rslora"),
    all_in(f"{LORA}test_dora", "DoRA", AS_LORA, "dora", "dora-conv1d", "dora-embedding", "dora-conv"),
    all_in(f"{LORA}test_lora_bias", "lora_bias", "biases are stored whole", "lora-bias"),
    all_in(f"{LORA}test_trained_biases", "bias=all, bias=lora_only; modules_to_save", WHOLE_MODEL, "whole"),
    all_in(f"{LORA}test_trained_tokens_beside_lora", "trained tokens (trainable_token_indices)", NO_MATRIX, "tokens",
           "tokens-beside"),
    all_in(f"{LORA}test_trained_tokens_alone", "TRAINABLE_TOKENS", NO_MATRIX, "trained-tokens"),
    Kind("rows that the base's vocabulary lacks (a file of our own)", f"{SHAPES}test_added_rows",
         f"{SHAPES}test_added_rows", f"{SHAPES}test_added_rows", f"{SHAPES}test_added_rows",
         f"{SHAPES}test_added_rows", ("grown",)),
    all_in(f"{TOKENS}test_a_resized_vocabulary", "a vocabulary resized after the base",
           "new rows are a file of their own"),
    all_in(f"{LORA}test_attention", "nn.MultiheadAttention", "in_proj_weight is stored whole"),
    all_in(f"{EXPERTS}test_stacked_parameters", "target_parameters, stacked experts",
           f"{EXPERTS}test_extracted_from_stacked_parameters", "stacked"),
    Kind("target_parameters, a matrix an expert in the file", *[f"{EXPERTS}test_a_matrix_an_expert"] * 3,
         f"{EXPERTS}test_stacked_parameters", f"{EXPERTS}test_extracted_from_a_matrix_an_expert", ()),
    Kind("target_parameters as PEFT 0.17 to 0.19.0 laid them out", f"{EXPERTS}test_layout_of_older_versions",
         f"{EXPERTS}test_square_experts_by_version", "as today's", "as it was read", "in today's layout", ()),
    Kind("QALoRA", *[f"{LORA}test_grouped_inputs"] * 3, "as it was read; PEFT wraps GPTQ layers alone", AS_LORA,
         ("grouped",)),
    all_in(f"{LORA}test_blocks", "BD-LoRA (block-diagonal)", AS_LORA, "block-diagonal"),
    *(Kind(name, f"{TUNERS}test_delta_weight", f"{TUNERS}test_merge_and_the_way_back",
           f"{TUNERS}test_merge_and_the_way_back", f"{TUNERS}test_what_we_write_peft_loads", AS_LORA, laws)
      for name, laws in {
          "AdaLoRA": ("adalora",), "MiSS, its variants bat and mini": ("miss", "miss-bat", "miss-mini"),
          "LoHa, its CP form": ("loha", "loha-core"), "LoKr, its Tucker form": ("lokr", "lokr-kernels"),
          "VeRA": ("vera",)}.items()),
    *(Kind(name, f"{OTHERS}test_merge_and_way_back", f"{OTHERS}test_against_peft", f"{OTHERS}test_merge_and_way_back",
           f"{OTHERS}test_round_trip", "parameters are stored whole" if name == "LN tuning" else AS_LORA, laws)
      for name, laws in {
          "IA3": ("ia3", "ia3-conv"), "OFT": ("oft", "oft-exact", "oft-shared", "oft-constrained"), "BOFT": ("boft",),
          "HRA": ("hra", "hra-orthogonal"), "FourierFT": ("fourierft",), "SHiRA": ("shira",), "C3A": ("c3a",),
          "LN tuning": ("ln-tuning",)}.items()),
)  # fmt: skip

WHY = (
    "How, or why not:", "",
    "- LoRA and its variants, AdaLoRA, QALoRA, BD-LoRA: products of their factors. MiSS and VeRA too, once they are",
    "  told the weight's shape (`stack --base`, `update.of_shape`).",
    "- LoHa, LoKr: [exact products](../maths.md#other-kinds-as-products) of a higher rank; a LoKr is truncated through",
    "  the decompositions of its two matrices.",
    "- Stacked experts: expert by expert; sums among those of one layout. Truncated, all have the rank of the one that",
    "  needs most.",
    "- SHiRA: entries side by side, r adds up. C3A of one block size, FourierFT of one seed: the kernels, the spectra",
    "  add up. Norms through the entries, or by row tiles of ΔW. As a rule ΔW has the full rank, so that factors would",
    "  be larger than itself: merge it, and `extract` the change.",
    "- DoRA, IA3, OFT, BOFT, HRA, MiSS bat: ΔW is another one for another base. Merge one adapter at a time; compare",
    "  merged checkpoints with `diff`.",
    "- Parameters and rows given whole (biases, heads, norms, tokens): half of one, and a difference between two,",
    "  depend on the base. One that a single adapter has is kept, with weight 1.",
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
    cells = [cell for kind in KINDS for cell in cells_of(kind)] + [each.test for each in REFUSED] + LAWS
    return {cell for cell in cells if "::" in cell}


def cells_of(kind: Kind) -> list[str]:
    """What a row says, in the order of its columns."""
    return [kind.read, kind.merged, kind.taken_out, kind.written, kind.extracted]


def told_once(cells: list[str]) -> list[str]:
    """Shortened; a test that the cell before names already is `same`."""
    pairs = zip(["", *cells], cells, strict=False)
    return ["same" if cell == before and "::" in cell else short(cell) for before, cell in pairs]


def missing(test: str) -> bool:
    """Whether a test that is named does not exist."""
    file, name = test.split("::")
    source = ROOT / file
    return not source.is_file() or not re.search(rf"^ *def {name}\(", source.read_text(encoding="utf-8"), re.MULTILINE)


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
        "| " + " | ".join(COLUMNS) + " |", "| :--- " * len(COLUMNS) + "|",
        *("| " + " | ".join([kind.name, *told_once(cells_of(kind))]) + " |" for kind in KINDS), "",
        "The laws (`tests/laws`) are held of every kind too, in float32, bfloat16 and float16: the way back to the",
        "byte, the same bits whatever the threads and tiles, every field read as it was written, no tensor that does",
        "not count, none without a place.", "",
        "Algebra is that of the dense ΔW in float64, or is refused by name. *Multiples*: `rescale --by`, `w * a`.",
        "*Sums*: `stack`, `a + b` of two of a kind. *With LoRA*: `a + b` with plain LoRA. *Norms*: `norm`, `inner`,",
        "`cosine`.",
        "*Truncated*: `truncate`; modules given whole stay as they are. *Angles*: `principal_angles`.", "",
        "| kind | " + " | ".join(OPERATIONS) + " | entries in `tests/laws/kinds.py` |",
        "| :--- " * (len(OPERATIONS) + 2) + "|",
        *(f"| {kind.name} | {' | '.join(map(kind.can, OPERATIONS))} | {', '.join(kind.laws)} |"
          for kind in KINDS if kind.laws), "",
        *WHY, "",
        "Refused, by name and with exit code 65:", "",
        "| kind | why | test |", "| :--- | :--- | :--- |",
        *(f"| {each.name} | {each.why} | {short(each.test)} |" for each in REFUSED), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

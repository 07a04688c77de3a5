"""The sizes on the page of the receipt's format are the stored ones, and these are still what comes out."""

import json

import pytest

from tests.benchmarks import receipts


def stored():
    return json.loads(receipts.RESULT.read_text(encoding="utf-8"))


def test_the_page_is_what_the_result_gives():
    assert receipts.PAGE.read_text(encoding="utf-8") == receipts.page(stored())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_hundredth_takes_at_most_a_fifth_of_a_bit(kind, dtype):
    """Measured again: within a tenth of what is stored, and small."""
    bits = receipts.measured(dtype, 1e-2, dora=kind == "DoRA")
    assert bits <= 0.2
    assert bits == pytest.approx(stored()["bits"][f"{kind}, {dtype}"][receipts.RATIOS.index(1e-2)], rel=0.1)

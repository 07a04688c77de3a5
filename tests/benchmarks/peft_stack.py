"""What PEFT offers for combining adapters at a rank: load both, `add_weighted_adapter(combination_type="svd")`, save.

python peft_stack.py BASE FIRST SECOND RANK OUT
"""

from __future__ import annotations

import json
import sys
import time

from peft import PeftModel
from transformers import AutoModelForCausalLM


def stack(base: str, first: str, second: str, rank: str, out: str) -> float:
    """Seconds of the operation alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    begun = time.perf_counter()
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="svd", svd_rank=int(rank))
    took = time.perf_counter() - begun
    model.save_pretrained(out, selected_adapters=["both"])
    return took


if __name__ == "__main__":
    print(json.dumps({"operation_s": round(stack(*sys.argv[1:6]), 2)}))

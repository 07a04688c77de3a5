"""What PEFT's documentation tells people to do: load, `merge_and_unload`, `save_pretrained`.

python peft_merge.py BASE ADAPTER OUT
"""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def merge(base: str, adapter: str, out: str) -> None:
    """Merge in the checkpoint's own dtype."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    merge(*sys.argv[1:4])

import time

from loratools.checkpoints.experts import stacks_of


def test_stacks_are_told_by_their_first_experts():
    """gate above up, w1 above w3; a block's name in memory and on disk; numbers without a gap; halves do not count."""
    qwen = [f"model.layers.0.mlp.experts.{at}.{name}.weight" for at in range(3) for name in ("gate_proj", "up_proj")]
    mixtral = [f"block_sparse_moe.experts.{at}.{name}.weight" for at in (0, 1, 3) for name in ("w1", "w2", "w3")]
    found = stacks_of([*qwen, *mixtral, "other.experts.0.gate_proj.weight", "x.experts.0.a.w1.weight", "w1.weight"])
    assert {path: (stack.experts, stack.names) for path, stack in found.items()} == {
        "model.layers.0.mlp.experts.gate_up_proj": (3, ("gate_proj", "up_proj")),
        "mlp.experts.gate_up_proj": (2, ("w1", "w3")),
        "block_sparse_moe.experts.gate_up_proj": (2, ("w1", "w3")),
        "mlp.experts.down_proj": (2, ("w2",)),
        "block_sparse_moe.experts.down_proj": (2, ("w2",)),
    }
    assert found["model.layers.0.mlp.experts.gate_up_proj"].tensors(2) == qwen[-2:]


def test_a_name_of_a_megabyte_takes_no_time():
    """A stranger's name is cut once, not searched."""
    begun = time.process_time()
    assert stacks_of(["a" * 2**20, "a" * 2**20 + ".experts.0.w2.weightx", ".experts" * 2**17]) == {}
    assert time.process_time() - begun < 0.5

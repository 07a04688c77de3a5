import torch

from loratools.adapters import Adapter, Full, LowRank, facts
from loratools.tensors import in_memory


def low_rank(rank, alpha, dtype=torch.float32, **rest):
    lora_A, lora_B = in_memory("a", torch.zeros(rank, 6, dtype=dtype)), in_memory("b", torch.zeros(4, rank))
    return LowRank(lora_A=lora_A, lora_B=lora_B, alpha=alpha, **rest)


def test_a_low_rank_row():
    row = facts.row_of(
        "m", low_rank(4, 8, torch.bfloat16, use_rslora=True, replaced={"bias": in_memory("c", torch.zeros(4))})
    )
    assert row.to_json() == {
        "name": "m",
        "kind": "low-rank",
        "shape": [4, 6],
        "dtype": "BF16+F32",
        "parameters": 4 * 6 + 4 * 4 + 4,
        "rank": 4,
        "alpha": 8,
        "scaling": 4.0,
        "whole": ["bias"],
        "added_rows": [],
    }


def test_a_row_of_what_is_replaced_whole():
    both = {"bias": in_memory("b", torch.zeros(4)), "weight": in_memory("w", torch.zeros(4, 6))}
    assert facts.row_of("m", Full(replaced=both)).shape == (4, 6)
    assert facts.row_of("m", Full(replaced={"A_log": in_memory("a", torch.zeros(9))})).shape == (9,)
    row = facts.row_of("m", Full(added_rows={"weight": in_memory("w", torch.zeros(2, 6))}))
    assert (row.shape, row.rank, row.scaling, row.added_rows) == ((2, 6), None, None, ("weight",))


def test_a_sum_has_a_rank_and_a_scaling_where_there_is_one():
    one = Adapter({"m": low_rank(2, 4)})
    assert (facts.row_of("m", (one + one)["m"]).rank, facts.row_of("m", (one + one)["m"]).scaling) == (4, 2.0)
    assert facts.row_of("m", (one - one)["m"]).scaling is None


def test_the_summary_tallies():
    adapter = Adapter({"a.q": low_rank(2, 4), "b.q": low_rank(2, 2), "b.v": low_rank(1, 4)}, base_model="me/base")
    found = facts.summary(adapter, [facts.row_of(path, update) for path, update in adapter.items()])
    assert found.ranks == (facts.Tally(1, 1), facts.Tally(2, 2))
    assert found.alphas == (facts.Tally(2, 1), facts.Tally(4, 2))
    assert found.scalings == (facts.Tally(1.0, 1), facts.Tally(2.0, 1), facts.Tally(4.0, 1))
    assert (found.targets, found.whole, found.base_model) == ({"q": 2, "v": 1}, {}, "me/base")

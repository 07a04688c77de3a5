"""The buffers of a tile outlive a call: getting them anew costs page faults."""

import torch

from loratools.linalg import LowRankSum
from loratools.linalg import _addition as addition


def test_the_buffers_of_a_full_tile_are_kept():
    prepared = LowRankSum.of([(torch.ones(2, 512), torch.ones(1024, 2), 1.0)], pieces=1)
    prepared.add_to(torch.zeros(1024, 512))
    held = addition._KEPT.buffer
    prepared.add_to(torch.zeros(1024, 512))
    assert addition._KEPT.buffer is held
    assert held.numel() >= 5 * 2**17

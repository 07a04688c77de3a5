"""These tests judge files by running stock PEFT and transformers on them, without a network."""

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The Hub client knows that there is no network, so that no loader tries it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """BLAS on one thread: the models are tiny, and a busy second core slows it tenfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases, made once each."""
    from tests import models

    made = {}

    def get(family, dtype="fp32", **changes):
        key = (family, dtype, tuple(changes.items()))
        if key not in made:
            made[key] = models.save_family(
                family, models.build(family, dtype, **changes), tmp_path_factory.mktemp("base") / f"{family}-{dtype}"
            )
        return made[key]

    return get

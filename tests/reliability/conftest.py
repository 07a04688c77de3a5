"""Shared by the sweeps: small inputs, a warm process to fork from, a bench that puts both under strace."""

import pytest

from tests.reliability.injection import Bench, Warm, require_strace
from tests.reliability.scenes import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs") / "home")


@pytest.fixture(scope="session")
def warm(inputs, tmp_path_factory):
    with Warm(inputs.home, tmp_path_factory.mktemp("warm")) as started:
        yield started


@pytest.fixture(scope="session")
def bench(warm, inputs, tmp_path_factory):
    require_strace()
    return Bench(warm, inputs, tmp_path_factory.mktemp("bench"))

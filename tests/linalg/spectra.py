"""Matrices with known spectra, and reference quantities in float64."""

from __future__ import annotations

import torch

KINDS = ("lora", "lora_bf16", "power", "geometric", "gaussian", "outlier")


def matrix(kind: str, m: int, n: int, *, seed: int = 0) -> torch.Tensor:
    """Float32, m × n."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "gaussian":
        return normal(m, n).float()
    if kind == "lora":
        return (normal(m, 6) @ normal(6, n) * 1e-3).float()
    if kind == "lora_bf16":
        base = (normal(m, n) * 0.02).bfloat16().float()
        return (base + (normal(m, 6) @ normal(6, n) * 1e-3).float()).bfloat16().float() - base
    k = min(m, n)
    index = torch.arange(1, k + 1, dtype=torch.float64)
    sigma = {"power": index**-0.75, "geometric": 0.5 ** (index / 4), "outlier": 1 + 999 * (index == 1)}[kind]
    left, right = torch.linalg.qr(normal(m, k))[0], torch.linalg.qr(normal(n, k))[0]
    return (left * sigma @ right.T).float()


def squares(M: torch.Tensor) -> torch.Tensor:
    """Squared singular values in float64, descending."""
    return torch.linalg.svdvals(M.double()).square()


def distance(M: torch.Tensor, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> float:
    """‖M − U·S·Vh‖_F in float64."""
    return float(torch.linalg.vector_norm(M.double() - (U.double() * S.double()) @ Vh.double()))


def lost_orthogonality(rows: torch.Tensor) -> float:
    """Largest entry of |rows·rowsᵀ − I|."""
    wide = rows.double()
    return float((wide @ wide.T - torch.eye(len(wide))).abs().max()) if len(wide) else 0.0

"""What the methods of combination are, on dense float64 matrices, from the papers."""

import math

import torch


def factors(m, n, ranks, *, seed=0, sizes=None):
    """(A, B) of random products; float32 numbers, so that both sides begin with the same matrices."""
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes or [1.0 + index for index in range(len(ranks))]
    return [
        (torch.randn(rank, n, generator=generator), size * torch.randn(m, rank, generator=generator))
        for rank, size in zip(ranks, sizes, strict=True)
    ]


def dense(products):
    return [B.double() @ A.double() for A, B in products]


def top(matrix, density):
    """Zeros but for the largest ⌊density·numel⌋ entries."""
    count = max(1, int(density * matrix.numel()))
    chosen = matrix.abs().flatten().argsort(descending=True)[:count]
    out = torch.zeros_like(matrix).flatten()
    out[chosen] = matrix.flatten()[chosen]
    return out.view_as(matrix)


def elected(parts):
    """Entry by entry in Python: the mean of those that agree with the sign of the sum."""
    stacked = torch.stack(parts)
    flat = stacked.reshape(len(parts), -1)
    out = torch.zeros(flat.shape[1], dtype=torch.float64)
    for place in range(flat.shape[1]):
        column = flat[:, place].tolist()
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [each for each in column if each * sign > 0]
        out[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out.view_as(parts[0])


def ties(parts, density):
    return elected([top(part, density) for part in parts])


def slerp(one, other, t):
    theta = math.acos(float((one * other).sum() / one.norm() / other.norm()))
    return (math.sin((1 - t) * theta) * one + math.sin(t * theta) * other) / math.sin(theta)


def karcher(parts, weights, steps=500):
    """Gradient descent on Σ α θ², in the space of matrices."""
    alphas = [weight / sum(weights) for weight in weights]
    units = [part / part.norm() for part in parts]
    mean = sum(alpha * unit for alpha, unit in zip(alphas, units, strict=True))
    mean = mean / mean.norm()
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for alpha, unit in zip(alphas, units, strict=True):
            cosine = float((mean * unit).sum().clamp(-1, 1))
            away = unit - cosine * mean
            if away.norm() > 1e-12:
                step = step + alpha * math.acos(cosine) * away / away.norm()
        mean = mean + 0.5 * step
        mean = mean / mean.norm()
    return mean * sum(alpha * float(part.norm()) for alpha, part in zip(alphas, parts, strict=True))


def model_stock(parts):
    count = len(parts)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosine = sum(float((parts[i] * parts[j]).sum() / parts[i].norm() / parts[j].norm()) for i, j in pairs) / len(pairs)
    return count * cosine / (1 + (count - 1) * cosine) * sum(parts) / count


def knots(parts, density):
    n = parts[0].shape[1]
    U, S, Vt = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    keep = 1e-9 * S[0] < S
    U, S, Vt = U[:, keep], S[keep], Vt[keep]
    merged = elected([S[:, None] * top(Vt[:, i * n : (i + 1) * n], density) for i in range(len(parts))])
    return U @ merged


def core_space(products, density):
    U = torch.linalg.svd(torch.cat([B.double() for _, B in products], 1), full_matrices=False)[0]
    V = torch.linalg.svd(torch.cat([A.double() for A, _ in products], 0), full_matrices=False)[2]
    return U @ ties([U.T @ each @ V.T for each in dense(products)], density) @ V


def tsv(parts):
    most = min(parts[0].shape) // len(parts)
    triples = [torch.linalg.svd(part, full_matrices=False) for part in parts]
    U = torch.cat([u[:, :most] for u, _, _ in triples], 1)
    S = torch.cat([s[:most] for _, s, _ in triples])
    Vt = torch.cat([v[:most] for _, _, v in triples])
    kept = 1e-9 * S.max() < S
    p, _, q = torch.linalg.svd(U[:, kept], full_matrices=False)
    a, _, b = torch.linalg.svd(Vt[kept], full_matrices=False)
    return p @ q @ torch.diag(S[kept]) @ a @ b


def iso_c(parts, rank):
    U, S, Vt = torch.linalg.svd(sum(parts), full_matrices=False)
    return U[:, :rank] @ Vt[:rank] * S[:rank].mean()


def splitmix(key, index):
    """One number of the sequence, with Python's integers."""
    word = (1 << 64) - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return ((z ^ (z >> 31)) >> 11) / 2**53


def drawn(key, shape):
    return torch.tensor([splitmix(key, i) for i in range(shape[0] * shape[1])], dtype=torch.float64).view(shape)


def dare(parts, density, keys):
    kept = [torch.where(drawn(key, part.shape) < density, part / density, 0.0)
            for part, key in zip(parts, keys, strict=True)]  # fmt: skip
    return sum(kept)


def della(parts, density, epsilon, keys):
    kept = []
    for part, key in zip(parts, keys, strict=True):
        ranks = part.abs().argsort(1).argsort(1).double()
        chance = density - epsilon / 2 + epsilon * ranks / (part.shape[1] - 1)
        kept.append(torch.where(drawn(key, part.shape) < chance, part / chance, 0.0))
    return elected(kept)

"""A process of its own that merges, takes out again and stacks, and prints one hash per kind of adapter.

    python -m tests.laws.elsewhere ROOT OUT [name=value ...]

ROOT holds a directory per kind, with `base` and `adapter*`. Every file of the outputs goes into the hash. The settings:
`threads`, `tile` (bytes), `flush` (small numbers are taken for zero), `products`: `openblas` leaves all products of
matrices to numpy, `shuffled` adds in another order and in two halves, as another machine might; `tf32` allows products
of low precision wherever torch knows how.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from loratools.cli.main import main
from loratools.engine import planning
from loratools.engine.context import Settings

WEIGHTS = ("0.7", "-1.5")


def openblas(one, other):
    return torch.from_numpy(np.matmul(one.numpy(), other.numpy()))


def shuffled(one, other):
    """Backwards, the last third apart from the rest."""
    inner = one.shape[-1]
    order = torch.arange(inner - 1, -1, -1)
    one, other = one[..., order].contiguous(), other[..., order, :].contiguous()
    cut = inner // 3
    return PLAIN(one[..., cut:], other[..., cut:, :]) + PLAIN(one[..., :cut], other[..., :cut, :])


PLAIN = torch.matmul
SUM = torch.Tensor.sum


def computed_by(multiply):
    """Let `multiply` form every product of matrices; sums go backwards along."""

    def product(one, other, *, out=None):
        result = multiply(one, other)
        return result if out is None else out.copy_(result)

    def backwards(tensor, *axes, **how):
        flipped = tensor.flip(tuple(range(tensor.dim()))) if tensor.is_floating_point() and tensor.dim() else tensor
        result = SUM(flipped, *axes, **how)
        return result.flip(tuple(range(result.dim()))) if flipped is not tensor and result.dim() else result

    for name in ("mm", "bmm", "matmul"):
        setattr(torch, name, product)
    for name in ("mm", "bmm", "matmul", "__matmul__"):
        setattr(torch.Tensor, name, product)
    torch.Tensor.sum = backwards


def use(threads="2", tile=None, flush=None, products=None, tf32=None):
    """Apply the settings; the arguments of every command."""
    if tile:
        planning.Settings = functools.partial(Settings, tile_bytes=int(tile))
    if flush:
        torch.set_flush_denormal(True)
    if tf32:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.matmul.allow_tf32 = True
    if products:
        computed_by({"openblas": openblas, "shuffled": shuffled}[products])
    return ["--threads", threads]


def run(*arguments):
    """The exit code of a command."""
    try:
        main([*map(str, arguments), "-q"])
    except SystemExit as done:
        return done.code
    return 0


def hash_of(directory):
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def outputs(root, out, how):
    """Merge, restore, subtract, and add up what is in one kind's directory; codes of the last two, which may refuse."""
    out.mkdir()
    adapters = sorted(root.glob("adapter*"))
    weights = [word for weight in WEIGHTS[: len(adapters)] for word in ("-w", weight)]
    merged, base = out / "merged", root / "base"
    assert not run("merge", base, *adapters, "-o", merged, *weights, *how)
    assert not run("unmerge", merged, *adapters, "--base", base, "-o", out / "back", *how)
    refused = [
        run("unmerge", merged, *adapters, "-o", out / "less", *how),
        run("stack", *adapters, "-o", out / "sum", *weights, *how),
    ]
    return f"{hash_of(out)} {refused}"


def everything(root, out, *settings):
    how = use(**dict(setting.split("=", 1) for setting in settings))
    return {each.name: outputs(each, Path(out) / each.name, how) for each in sorted(Path(root).iterdir())}


if __name__ == "__main__":
    print(json.dumps(everything(*sys.argv[1:])))

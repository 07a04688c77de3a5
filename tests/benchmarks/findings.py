"""How often `diff` says what was done, says nothing, and is wrong.

python -m tests.benchmarks.findings -o tests/benchmarks/results/findings.json
python -m tests.benchmarks.findings_page

Small checkpoints and adapters are made in many known ways, near misses among them, and compared with `--spectrum`. A
case names the findings that are true of it; everything else that is said is wrong.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loratools.adapters import Adapter, LowRank
from loratools.tensors import in_memory
from loratools.verbs.diff import diff
from tests.tiny import CONFIG, rounded, write_checkpoint

LAYERS, WIDTH, HIDDEN, WORDS, CAP = 3, 128, 192, 300, 24
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


class Random:
    """Normal numbers, float64."""

    def __init__(self, seed):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def model(random):
    """A Llama in float64: rows of unlike size, a few large columns, norms around one."""
    shapes = {"model.embed_tokens": (WORDS, WIDTH), "lm_head": (WORDS, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{path}.mlp.{name}_proj": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{path}.mlp.down_proj": (WIDTH, HIDDEN), f"{path}.input_layernorm": (WIDTH,)}
    found = {}
    for path, shape in shapes.items():
        if len(shape) > 1:
            weight = 0.03 * random(*shape) * torch.exp(0.3 * random(shape[0], 1))
            weight[:, :: WIDTH // 3] *= 8
        found[f"{path}.weight"] = weight if len(shape) > 1 else 1 + 0.1 * random(*shape)
    return found


def to(tensors, dtype):
    return {name: rounded(tensor.double(), dtype) for name, tensor in tensors.items()}


def names(tensors, *kinds):
    return [name for name in tensors if name.split(".")[-2] in kinds]


QV = ("q_proj", "v_proj")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sized(change, weight, relative):
    return change * (relative * weight.double().norm() / change.norm())


def low_rank(random, weight, rank, relative, falling=0.0):
    m, n = weight.shape
    values = torch.arange(1, rank + 1).double() ** -falling
    return sized((random(m, rank) * values) @ random(rank, n), weight, relative)


def merged(base, dtype, change, *, chosen):
    """round(W + ΔW) of the chosen ones."""
    return base | {name: rounded(base[name].double() + change(base[name]), dtype) for name in chosen}


Case = tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor], list[set[Any]]]
"""What it is called; both sides; the sets of findings that are true, the first one all that could be found."""


def merges(random, seed) -> Iterator[Case]:
    """Low-rank updates: of several ranks and sizes, in three dtypes, to some modules and to all."""
    exact = model(random)
    for dtype_name, dtype in DTYPES.items():
        base = to(exact, dtype)
        for relative in (0.003, 0.01, 0.1):
            for rank in (1, 4, 16):
                tuned = merged(
                    base, dtype, lambda W, r=rank, s=relative: low_rank(random, W, r, s), chosen=names(base, *QV)
                )
                yield (
                    f"merge of low rank, {dtype_name}, {relative:.1%} of ‖W‖",
                    base,
                    tuned,
                    [{f"low rank {rank}", "only modules"}],
                )
        tuned = merged(base, dtype, lambda W: low_rank(random, W, 8, 0.05), chosen=names(base, *LINEAR))
        yield f"merge into all linear layers, {dtype_name}", base, tuned, [{"low rank 8"}]
    chosen = names(exact, *QV)
    wide = to(exact, FP32)
    tuned = to(wide, BF16) | {
        name: rounded(wide[name].double() + low_rank(random, wide[name], 8, 0.05), BF16) for name in chosen
    }
    yield "merge into fp32, written as bf16", wide, tuned, [{"low rank 8"}]
    base = to(exact, BF16)
    once = merged(base, BF16, lambda W: low_rank(random, W, 4, 0.05), chosen=chosen)
    yield (
        "two merges, one after the other",
        base,
        merged(once, BF16, lambda W: low_rank(random, W, 4, 0.05), chosen=chosen),
        [{"low rank 8", "only modules"}],
    )
    for relative in (0.001, 0.01, 0.05):
        tuned = merged(base, BF16, lambda W, s=relative: low_rank(random, W, 8, s, 1.0), chosen=chosen)
        true = [{"low rank 8", "only modules"}, {"only modules"}]
        yield "merge of rank 8, falling like i^-1, or all but hidden", base, tuned, true
    ranks = iter(range(2, 100))
    tuned = merged(base, BF16, lambda W: low_rank(random, W, next(ranks), 0.05), chosen=chosen)
    yield "merge of mixed ranks", base, tuned, [{"low rank mixed", "only modules"}]


def dense(random, seed) -> Iterator[Case]:
    """Changes in every direction, flat and falling, from far below a rounding to as large as W."""
    exact = model(random)
    for dtype_name, dtype in DTYPES.items():
        base = to(exact, dtype)
        for relative in (1e-4, 1e-3, 1e-2, 1e-1):
            tuned = merged(base, dtype, lambda W, s=relative: sized(random(*W.shape), W, s), chosen=list(base))
            yield f"all tensors, flat, {dtype_name}", base, tuned, [{"every direction"}]
        for power in (0.3, 0.7, 1.0, 1.5):

            def falling(W, p=power):
                return low_rank(random, W, min(W.shape), 0.02, p) if W.dim() > 1 else 0.01 * random(*W.shape)

            yield (
                f"all tensors, falling like i^-{power}, {dtype_name}",
                base,
                merged(base, dtype, falling, chosen=list(base)),
                [{"every direction"}],
            )
            tuned = merged(base, dtype, falling, chosen=names(base, *LINEAR))
            yield f"all linear layers, falling like i^-{power}, {dtype_name}", base, tuned, [set()]
        tuned = merged(base, dtype, lambda W: sized(random(*W.shape), W, 0.02), chosen=names(base, *QV))
        yield f"q and v, flat, {dtype_name}", base, tuned, [{"only modules"}]
    base = to(exact, BF16)
    half = [merged(base, BF16, lambda W: sized(random(*W.shape), W, 0.05), chosen=list(base)) for _ in "ab"]
    yield (
        "average of two fine-tunes",
        base,
        to({name: (half[0][name].double() + half[1][name].double()) / 2 for name in base}, BF16),
        [{"every direction"}],
    )


def near_misses(random, seed) -> Iterator[Case]:
    """Almost of low rank: with a dense part, through DoRA, rescaled rows, quantised, pruned."""
    exact = model(random)
    base = to(exact, BF16)
    chosen = names(base, *LINEAR)
    for share in (0.03, 0.1, 0.3):

        def both(W, s=share):
            update = low_rank(random, W, 8, 0.05)
            return update + sized(random(*W.shape), update, s)

        yield f"low rank and {share:.0%} of it dense", base, merged(base, BF16, both, chosen=chosen), [set()]

    def dora(W):
        moved = W.double() + low_rank(random, W, 8, 0.05)
        magnitude = W.double().norm(dim=1, keepdim=True) * (1 + 0.02 * random(W.shape[0], 1))
        return magnitude * moved / moved.norm(dim=1, keepdim=True) - W.double()

    yield "merge of DoRA", base, merged(base, BF16, dora, chosen=chosen), [set()]
    yield (
        "rows rescaled",
        base,
        merged(base, BF16, lambda W: W.double() * 0.05 * random(W.shape[0], 1), chosen=chosen),
        [set()],
    )

    def quantised(W, bits=4):
        step = W.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (W.double() / step).round() * step - W.double()

    yield "quantised to 4 bits and back", base, merged(base, BF16, quantised, chosen=chosen), [set()]
    yield "quantised to 8 bits and back", base, merged(base, BF16, lambda W: quantised(W, 8), chosen=chosen), [set()]
    yield (
        "a tenth pruned",
        base,
        merged(base, BF16, lambda W: -W.double() * (W.double().abs() < W.double().abs().quantile(0.1)), chosen=chosen),
        [set()],
    )
    yield "rows permuted", base, base | {name: base[name][torch.randperm(len(base[name]))] for name in chosen}, [set()]
    yield "rank above the cap", base, merged(base, BF16, lambda W: low_rank(random, W, 48, 0.1), chosen=chosen), [set()]
    for power in (2.0, 3.0):
        yield (
            f"rank 32, falling like i^-{power:g}",
            base,
            merged(base, BF16, lambda W, p=power: low_rank(random, W, 32, 0.02, p), chosen=chosen),
            [set()],
        )
    flips = merged(base, BF16, lambda W: 2.0**-8 * W.double() * random(*W.shape).sign(), chosen=list(base))
    yield "last bits flipped", base, flips, [{"every direction"}]


def casts(random, seed) -> Iterator[Case]:
    """Roundings, one after another too; and trainings so small that rounding hides them."""
    exact = model(random)
    wide = to(exact, FP32)
    for name, dtype in (("bf16", BF16), ("fp16", FP16)):
        narrow = to(wide, dtype)
        yield f"cast to {name}", wide, narrow, [{"cast"}]
        yield f"cast to {name}, the wrong way round", narrow, wide, [{"cast"}]
        yield f"cast to {name} and written as fp32", wide, to(narrow, FP32), [{"cast"}]
        yield f"{name} widened to fp32", narrow, to(narrow, FP32), [{"rewritten"}]
        yield "copied", narrow, dict(narrow), [{"identical"}]
        for size in (1e-4, 1e-3):
            near = {
                key: (tensor.double() * (1 + size * random(*tensor.shape))).float() for key, tensor in narrow.items()
            }
            yield f"fp32 trained from {name}", narrow, near, [{"every direction"}]
        changed = dict(narrow)
        changed["model.layers.0.mlp.up_proj.weight"] = rounded(
            1.01 * narrow["model.layers.0.mlp.up_proj.weight"].double(), dtype
        )
        yield f"cast to {name}, one matrix times 1.01", wide, changed, [set()]
        changed = {key: tensor.clone() for key, tensor in narrow.items()}
        changed["model.layers.1.self_attn.k_proj.weight"][5, 7] += 0.5
        yield f"cast to {name} and one entry changed", wide, changed, [set()]
    yield (
        "bf16 cast to fp16",
        to(wide, BF16),
        to(to(wide, BF16), FP16),
        [{"cast", "rewritten"}, {"cast"}, {"rewritten"}],
    )
    yield "fp16 cast to bf16", to(wide, FP16), to(to(wide, FP16), BF16), [{"cast"}]
    yield "fp32 cast to fp16, then to bf16", wide, to(to(wide, FP16), BF16), [{"cast"}]


def parts(random, seed) -> Iterator[Case]:
    """A tensor times a number, rows for new words, some modules or layers alone; and each of these not quite."""
    exact = model(random)
    for name, dtype in DTYPES.items():
        base = to(exact, dtype)
        for factor in (0.5, 0.9, -1.0, 1.02):
            which = "model.norm.weight" if factor == 0.5 else "model.layers.1.mlp.up_proj.weight"
            tuned = base | {which: rounded(base[which].double() * factor, dtype)}
            yield f"one tensor times a number, {name}", base, tuned, [{"scaled"}]
            almost = {key: tensor.clone() for key, tensor in tuned.items()}
            almost[which].view(-1)[3] *= 1.5
            yield f"times a number, but one entry, {name}", base, almost, [set()]
        new = rounded(0.03 * random(20, WIDTH), dtype)
        grown = base | {key: torch.cat([base[key], new]) for key in ("model.embed_tokens.weight", "lm_head.weight")}
        yield f"new words, {name}", base, grown, [{"rows added"}]
        almost = {key: tensor.clone() for key, tensor in grown.items()}
        almost["model.embed_tokens.weight"][7, 3] += 0.5
        almost["lm_head.weight"][7, 3] += 0.5
        yield f"new words and one old one changed, {name}", base, almost, [set()]
        edited = base | {"model.embed_tokens.weight": base["model.embed_tokens.weight"].clone()}
        edited["model.embed_tokens.weight"][[3, 50, 299]] = rounded(0.03 * random(3, WIDTH), dtype)
        yield f"three words trained, {name}", base, edited, [{"few rows"}]
        edited = {key: tensor.clone() for key, tensor in base.items()}
        for key in names(base, "down_proj"):
            edited[key][:20] = rounded(0.03 * random(20, HIDDEN), dtype)
        yield f"a sixth of the rows edited, {name}", base, edited, [{"only modules"}]
        steps = merged(
            base,
            dtype,
            lambda W, d=dtype: W.double() * torch.finfo(d).eps * random(*W.shape).round(),
            chosen=[key for key in base if "norm" in key],
        )
        yield f"norms moved by single units in the last place, {name}", base, steps, [{"only modules"}]
        largest = base["model.norm.weight"].clone()
        largest[largest.argmax()] *= 1 + torch.finfo(dtype).eps
        yield f"the largest entry of a norm moved, {name}", base, base | {"model.norm.weight": largest}, [set()]
        dense_change = lambda W: sized(random(*W.shape), W, 0.05)
        layer = [key for key in base if ".layers.1." in key]
        yield f"one layer, {name}", base, merged(base, dtype, dense_change, chosen=layer), [{"only layers"}]
        yield (
            f"one layer but for one module, {name}",
            base,
            merged(base, dtype, dense_change, chosen=layer[1:]),
            [set()],
        )
        some = names(base, *QV)
        yield f"q and v but for one layer, {name}", base, merged(base, dtype, dense_change, chosen=some[:-1]), [set()]
        norms = [key for key in base if "norm" in key]
        yield f"all norms, {name}", base, merged(base, dtype, dense_change, chosen=norms), [{"only modules"}]


def adapters(random, seed) -> Iterator[Case]:
    """An adapter beside itself at another weight, in other factors, truncated, trained on, and almost these."""
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qkvo"]
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        pairs = {
            path: (
                rounded(random(16, 48), dtype),
                rounded(random(64, 16) * torch.arange(1, 17).double() ** -0.5, dtype),
            )
            for path in paths
        }
        first = adapter(pairs)
        yield f"an adapter and its copy, {name}", first, adapter(pairs), [{"identical"}]
        yield (
            f"an adapter, alpha restated, {name}",
            first,
            adapter({path: (A, 2 * B) for path, (A, B) in pairs.items()}, 8.0),
            [{"refactored"}],
        )
        for alpha in (8.0, 24.0, -16.0):
            yield f"at another weight, {name}", first, adapter(pairs, alpha), [{"scaled"}]
        near = {
            path: (A, rounded(1.5 * B.double() * (1 + 1e-3 * random(*B.shape)), dtype))
            for path, (A, B) in pairs.items()
        }
        yield f"at another weight, and trained on a little, {name}", first, adapter(near), [set()]
        mixed = {path: (A, B * (2 if at else 4)) for at, (path, (A, B)) in enumerate(pairs.items())}
        yield f"at another weight, one module at a third, {name}", first, adapter(mixed), [set()]
        for rank in (4, 12):
            short = {path: truncated(A, B, rank, dtype) for path, (A, B) in pairs.items()}
            yield f"truncated, {name}", first, adapter(short, float(rank)), [{"truncated"}]
            cut = {path: (A[:rank].clone(), B[:, :rank].clone()) for path, (A, B) in pairs.items()}
            yield f"cut off, {name}", first, adapter(cut, float(rank)), [set()]
            off = {
                path: (A, rounded(B.double() * (1 + 0.1 * random(*B.shape)), dtype)) for path, (A, B) in short.items()
            }
            yield f"truncated and trained on, {name}", first, adapter(off, float(rank)), [set()]
        other = {path: (rounded(random(4, 48), dtype), rounded(random(64, 4), dtype)) for path in paths}
        yield f"of a smaller rank and nothing in common, {name}", first, adapter(other, 4.0), [set()]
        part = {
            path: pair if path.endswith(("k_proj", "o_proj")) else (pair[0], rounded(random(64, 16), dtype))
            for path, pair in pairs.items()
        }
        yield f"q and v trained on, {name}", first, adapter(part), [{"only modules"}]
        part[paths[0]] = pairs[paths[0]]
        yield f"q and v trained on but for one layer, {name}", first, adapter(part), [set()]


def adapter(pairs, alpha=16.0):
    """Of PEFT's format, in memory."""
    updates = {
        path: LowRank(lora_A=in_memory("A", A), lora_B=in_memory("B", B), alpha=alpha) for path, (A, B) in pairs.items()
    }
    return Adapter(updates)


def truncated(A, B, rank, dtype):
    U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    return rounded(S[:rank].sqrt()[:, None] * Vh[:rank], dtype), rounded(U[:, :rank] * S[:rank].sqrt(), dtype)


def said(base, tuned, folder):
    """What `diff --spectrum` finds: names, of low ranks with the rank."""
    sides = [base, tuned]
    if not isinstance(base, Adapter):
        config = CONFIG | {"vocab_size": WORDS, "hidden_size": WIDTH}
        sides = [write_checkpoint(Path(folder) / side, each, config) for side, each in (("a", base), ("b", tuned))]
    found = set()
    for finding in diff(*sides, spectrum=True, max_rank=CAP, device="cpu").findings:
        ranks = finding["evidence"].get("ranks", {}) if finding["name"] == "low rank" else {}
        rank = f" {next(iter(ranks))}" if len(ranks) == 1 else " mixed" if ranks else ""
        found.add(finding["name"] + rank)
    return found


def sweep(groups, seeds):
    """Of every sort of case: cases, those of which all was said, findings, and what was said wrongly."""
    counts: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in seeds:
        for group in groups:
            for name, base, tuned, true in GROUPS[group](Random(1000 * seed + 7), seed):
                with tempfile.TemporaryDirectory() as folder:
                    found = said(base, tuned, folder)
                false = found - set().union(*true)
                row = counts.setdefault(group, {}).setdefault(name, {"cases": 0, "full": 0, "findings": 0, "wrong": []})
                row["cases"] += 1
                row["full"] += found in true
                row["findings"] += len(found)
                row["wrong"] += [f"{each} (seed {seed})" for each in sorted(false)]
    return counts


GROUPS = {
    "merges": merges,
    "dense": dense,
    "near misses": near_misses,
    "casts": casts,
    "parts": parts,
    "adapters": adapters,
}


def main():
    """Write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    options = parser.parse_args()
    counts = sweep(options.groups, range(options.seeds))
    options.output.write_text(json.dumps({"seeds": options.seeds, "counts": counts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

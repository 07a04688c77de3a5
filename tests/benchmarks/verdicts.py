"""What `verify` and deltalint say of the same merged checkpoints, whole ones and broken ones.

python -m tests.benchmarks.verdicts DELTALINT MERGEKIT [DTYPE...]   the pythons that have the two; measures (ten
                                                                    minutes), keeps it, writes docs/verify-table.md
python -m tests.benchmarks.verdicts                                 writes the page from the stored result
"""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import measure
from tests.benchmarks.cases import HERE, REPOSITORY

RESULT = HERE / "results" / "verdicts.json"
PAGE = REPOSITORY / "docs" / "verify-table.md"
DTYPES = ("bf16", "fp16", "fp32")
RATIOS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SKIPPED = "model.layers.1.mlp.up_proj.weight"
WRITERS = ("loratools", "PEFT", "PEFT, safe_merge", "PEFT, factors in 16 bits", "mergekit")
FAULTS = ("a module missing", "half the scale", "2 % too weak", "merged twice", "another adapter", "the sign turned",
          "one bit flipped", "a norm changed")  # fmt: skip
BROKEN_BY = ("loratools", "PEFT", "PEFT, safe_merge")
ANSWERS = {0: "holds", 1: "does not hold", 3: "cannot tell"}
Cell = dict[str, Any]

_DELTALINT = """
import contextlib, io, json, sys
from deltalint.cli import main
for base, adapter, merged in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(["check", "--base", base, "--adapter", adapter, "--merged", merged])
        except SystemExit as leaving:
            code = leaving.code
    print(code, flush=True)
"""
_MERGEKIT = """
import json, sys, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for base, adapter, merged, dtype in json.load(sys.stdin):
    config = {"models": [{"model": f"{base}+{adapter}"}], "merge_method": "passthrough", "dtype": dtype}
    options = MergeOptions(lora_merge_cache=merged + "-cache", write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), merged, options)
"""


def write_adapter(base: Path, directory: Path, ratio: float, seed: int, factors: str = "fp32") -> Path:
    """By PEFT: rank 8, alpha 16, every ‖ΔW‖ so large a part of ‖W‖."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests import models
    from tests.interop.merging import write_by_peft

    write_by_peft(base, directory, seed=seed, r=8, lora_alpha=16, target_modules=TARGETS)
    weights, file = models.tensors_of(base), directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if ".lora_A." in key]:
        up = key.replace(".lora_A.", ".lora_B.")
        weight = weights[f"{key.split('base_model.model.')[1].split('.lora_A.')[0]}.weight"].double()
        size = 2.0 * torch.linalg.matrix_norm(tensors[up].double() @ tensors[key].double())
        tensors[up] = (tensors[up].double() * (ratio * weight.norm() / size)).float()
    save_file({key: each.to(models.DTYPES[factors]) for key, each in tensors.items()}, file, {"format": "pt"})
    return directory


def by_peft(base: Path, adapter: Path, output: Path, *, weight: float = 1.0, safe: bool = False, **how: bool) -> Path:
    """PEFT's merge, saved by transformers; with `narrow`, factors stay in their dtype."""
    from tests import models
    from tests.interop.merging import unmerged

    model = unmerged(base, adapter, weights=[weight])
    for name, parameter in model.named_parameters() if how.get("narrow") else ():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    with models.quiet():
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    return models.save(merged, output)


def by(writer: str, base: Path, adapter: Path, output: Path, weight: float = 1.0) -> Path:
    """A merge by one of the writers that faults are made with."""
    if writer == "loratools":
        import loratools as lt

        lt.merge(base, [adapter], output, weights=[weight])
        return output
    return by_peft(base, adapter, output, weight=weight, safe="safe" in writer)


def broken(fault: str, writer: str, world: Mapping[str, Path], output: Path) -> Path:
    """A merge with one fault."""
    from tests import models

    base, adapter = world["base"], world["adapter"]
    weights = {"half the scale": 0.5, "2 % too weak": 0.98, "the sign turned": -1.0}
    if fault in weights:
        return by(writer, base, adapter, output, weights[fault])
    if fault == "another adapter":
        return by(writer, base, world["other"], output)
    once = by(writer, base, adapter, output.with_name(f"{output.name}-once"))
    if fault == "merged twice":
        return by(writer, once, adapter, output)
    tensors = models.tensors_of(once)
    if fault == "a module missing":
        tensors[SKIPPED] = models.tensors_of(base)[SKIPPED]
    elif fault == "a norm changed":
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.25
    else:
        _flip(tensors[SKIPPED])
    return models.write_checkpoint(output, tensors, models.config_of(base, "config.json"))


def _flip(tensor: Any) -> None:
    """Turn the highest bit of the fraction of one entry."""
    import torch

    bits, top = (torch.int32, 22) if tensor.dtype == torch.float32 else (
        torch.int16, 6 if tensor.dtype == torch.bfloat16 else 9
    )  # fmt: skip
    tensor.view(bits)[7, 11] ^= 1 << top


def world_of(root: Path, dtype: str, ratio: float) -> dict[str, Path]:
    """A base, an adapter, the same in 16 bits, and another one of the same sizes."""
    from tests import models

    base = models.save(models.build("llama", dtype, hidden_size=128, intermediate_size=192), root / "base")
    return {
        "base": base,
        "adapter": write_adapter(base, root / "adapter", ratio, 1),
        "narrow": write_adapter(base, root / "narrow", ratio, 1, "bf16"),
        "other": write_adapter(base, root / "other", ratio, 2),
    }


def files_of(root: Path, dtype: str, ratio: float, mergekit: str) -> Iterator[tuple[Cell, tuple[str, str, str]]]:
    """Every file of a dtype and a size: what it is, and (base, adapter, merged)."""
    world = world_of(root, dtype, ratio)
    base, adapter, narrow = world["base"], world["adapter"], world["narrow"]
    torch_name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    job = [[str(base), str(adapter), str(root / "mergekit"), torch_name]]
    subprocess.run([mergekit, "-c", _MERGEKIT], input=json.dumps(job), text=True, check=True, capture_output=True)
    whole = {
        "loratools": (adapter, by("loratools", base, adapter, root / "ours")),
        "PEFT": (adapter, by("PEFT", base, adapter, root / "peft")),
        "PEFT, safe_merge": (adapter, by("PEFT, safe_merge", base, adapter, root / "safe")),
        "PEFT, factors in 16 bits": (narrow, by_peft(base, narrow, root / "narrow-merged", narrow=True)),
        "mergekit": (adapter, root / "mergekit"),
    }
    common = {"dtype": dtype, "ratio": ratio}
    for writer, (used, merged) in whole.items():
        yield {**common, "fault": None, "writer": writer}, (str(base), str(used), str(merged))
    yield {**common, "fault": "not merged", "writer": "nobody"}, (str(base), str(adapter), str(base))
    for fault in FAULTS:
        for writer in BROKEN_BY:
            name = f"{FAULTS.index(fault)}-{BROKEN_BY.index(writer)}"
            merged = broken(fault, writer, world, root / name)
            yield {**common, "fault": fault, "writer": writer}, (str(base), str(adapter), str(merged))


def judged(files: Sequence[tuple[Cell, tuple[str, str, str]]], deltalint: str) -> list[Cell]:
    """Both verdicts on every file; a broken file that has a whole one's very numbers is not broken, and is marked."""
    import loratools as lt
    from tests import models

    jobs = json.dumps([paths for _, paths in files])
    done = subprocess.run([deltalint, "-c", _DELTALINT], input=jobs, text=True, check=True, capture_output=True)
    whole = {cell["writer"]: models.tensors_of(paths[2]) for cell, paths in files if cell["fault"] is None}
    cells = []
    for (cell, (base, adapter, merged)), code in zip(files, done.stdout.split(), strict=True):
        report = lt.verify(merged, base=base, adapters=[adapter])
        cells.append(
            cell
            | {"ours": report.answer, "deltalint": ANSWERS.get(int(code), f"exit {code}")}
            | {"verdicts": report.totals["verdicts"], "policies": dict(report.policies)}
            | {"same": cell["fault"] is not None and _is_one_of(models.tensors_of(merged), whole)}
        )
    return cells


def _is_one_of(tensors: Mapping[str, Any], whole: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(all(bool((each == tensors[name]).all()) for name, each in kept.items()) for kept in whole.values())


def measured(deltalint: str, mergekit: str, *dtypes: str) -> dict[str, Any]:
    """The grid, or these dtypes of it; the others are kept as they were measured."""
    known = json.loads(RESULT.read_text(encoding="utf-8"))["cells"] if RESULT.exists() else []
    cells = [cell for cell in known if dtypes and cell["dtype"] not in dtypes]
    for dtype in dtypes or DTYPES:
        for ratio in RATIOS:
            with tempfile.TemporaryDirectory() as folder:
                cells += judged(list(files_of(Path(folder), dtype, ratio, mergekit)), deltalint)
            print(dtype, ratio, len(cells), flush=True)
    version = "import importlib.metadata as m; print(m.version('{}'))"
    peers = {"deltalint": deltalint, "mergekit": mergekit, "peft": sys.executable, "torch": sys.executable}
    return {
        "schema": "loratools/benchmark-verdicts/1",
        "machine": platform.machine(),
        "commit": measure.commit(HERE),
        "date": measure.now(),
        "versions": {
            name: subprocess.check_output([python, "-c", version.format(name)], text=True).strip()
            for name, python in peers.items()
        },
        "cells": cells,
    }


SIGNS = {"holds": "yes", "cannot tell": "open", "does not hold": "no"}


def page(result: Path = RESULT) -> str:
    """The page, from the stored result."""
    record = json.loads(result.read_text(encoding="utf-8"))
    cells = record["cells"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    whole, bad = ([cell for cell in cells if (cell["fault"] is None) == sort] for sort in (True, False))
    faulty = [cell for cell in bad if not cell["same"]]
    head = (
        "Generated by `python -m tests.benchmarks.verdicts`. A Llama of two layers, 128 wide, and a rank-8 adapter of "
        "all its matrices whose ‖ΔW‖ is 10⁻⁴ to 1 of ‖W‖, merged by three programs in five ways, and broken in nine. "
        f"{len(cells)} files, each shown to `loratools verify --base --adapter` and to `deltalint check` ({versions})."
    )
    signs = (
        "*Yes*, *open*, *no*: exit codes 0, 3 and 1 of either. A broken file that has the very numbers of a whole one, "
        f"since the dtype hides the fault, is not counted: {len(bad) - len(faulty)} of {len(bad)}."
    )
    found = (
        f"How many of {len(BROKEN_BY)} were found, ours / deltalint; each fault was made by {', by '.join(BROKEN_BY)}, "
        "but for the base itself, which nobody merged."
    )
    lines = ["# Verdicts, side by side", "", head, "", "| files | number | tool | yes | open | no |"]
    lines += ["|:---|---:|:---|---:|---:|---:|", *_summary("whole", whole), *_summary("broken", faulty), "", signs, ""]
    lines += ["## Whole files", "", "ours / deltalint", "", *_table(whole, "writer", WRITERS, _said), ""]
    lines += ["## Broken files", "", found, "", *_table(faulty, "fault", ("not merged", *FAULTS), _found), ""]
    return "\n".join(lines)


def _summary(name: str, cells: Sequence[Cell]) -> Iterator[str]:
    for tool in ("ours", "deltalint"):
        counts = [sum(cell[tool] == answer for cell in cells) for answer in SIGNS]
        label = "`loratools verify`" if tool == "ours" else "deltalint"
        yield f"| {name} | {len(cells)} | {label} | {counts[0]} | {counts[1]} | {counts[2]} |"


def _said(group: Sequence[Cell]) -> str:
    return " ".join(" / ".join(SIGNS.get(cell[tool], cell[tool]) for tool in ("ours", "deltalint")) for cell in group)


def _found(group: Sequence[Cell]) -> str:
    if not group:
        return "–"
    counts = [sum(cell[tool] == "does not hold" for cell in group) for tool in ("ours", "deltalint")]
    return f"{counts[0]} / {counts[1]}" + (f" of {len(group)}" if len(group) != len(BROKEN_BY) else "")


def _table(cells: Sequence[Cell], by_: str, rows: Sequence[str], said: Any) -> Iterator[str]:
    sizes = " | ".join(f"{ratio:g}" for ratio in RATIOS)
    yield f"| {by_} | dtype | {sizes} |"
    yield f"|:---|:---|{':---|' * len(RATIOS)}"
    for row in rows:
        for dtype in DTYPES:
            found = [said([cell for cell in cells if (cell[by_], cell["dtype"], cell["ratio"]) == (row, dtype, ratio)])
                     for ratio in RATIOS]  # fmt: skip
            yield f"| {row} | {dtype} | {' | '.join(found)} |"


def main(arguments: Sequence[str]) -> None:
    if arguments:
        RESULT.write_text(json.dumps(measured(*arguments), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

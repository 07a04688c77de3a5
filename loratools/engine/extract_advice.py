"""What to do with an extracted adapter, where something does not go the usual way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.adapters import Adapter, LowRank
from loratools.adapters.experts import Stacked
from loratools.adapters.selection import matches_any
from loratools.checkpoints import Checkpoint
from loratools.checkpoints.renamed import is_renamed
from loratools.engine import low_rank_forms
from loratools.engine.context import Outcome
from loratools.engine.pairing import Pairing

_ALL: Final = 1 - 1e-9
_FAINT: Final = 0.5


def beforehand(tuned: Checkpoint, format: str) -> tuple[str, ...]:
    """What can be said of the adapter before it is made."""
    family = tuned.config.get("model_type")
    if format != "peft" or not is_renamed(family):
        return ()
    note = (
        f"transformers 5 calls modules of {family} otherwise than the file when it loads it. The adapter has the "
        "file's names: PEFT on transformers 5 does not find all of them, and may not say so. `loratools merge` takes "
        "the adapter as it is."
    )
    return (note,)


def without_effect(options: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """Which options have changed nothing, and why."""
    notes = []
    rank, cap = options.get("rank"), options.get("max_rank")
    if isinstance(rank, int) and isinstance(cap, int) and rank > cap:
        notes.append(f"The rank is {rank} as asked for: --max-rank ({cap}) caps only ranks that a rule chooses.")
    for pattern in options["save_full"]:
        held = [outcome for outcome in outcomes if matches_any((pattern,), outcome.target)]
        fates = [fate for each in held for facts in ("fates", "tensors") for fate in each.facts.get(facts, {}).values()]
        if fates and set(fates) <= {"identical", "equal in value"}:
            notes.append(f"--save-full {pattern} matches only what has not changed: nothing is stored for it.")
    return notes


def advice(pairing: Pairing, adapter: Adapter | None) -> list[str]:
    """What the user should do next, where something does not go the usual way."""
    notes = []
    updates = dict(adapter or {})
    known = {path: update for path, update in updates.items() if path in pairing.modules}
    rows = {name: ref for update in updates.values() for name, ref in update.added_rows.items()}
    if rows:
        count = max(ref.shape[0] for ref in rows.values())
        notes.append(
            f"The tuned vocabulary has {count} more rows. The adapter loads on the base as it is, without them; "
            "they are in added_rows.safetensors. `loratools merge` puts them back; in Python, merge, call "
            "resize_token_embeddings, and copy them in."
        )
    whole = sum(bool(update.replaced) for update in updates.values())
    if whole:
        notes.append(
            f"Parameters of {whole} module{'s' if whole != 1 else ''} are stored whole. PEFT loads them; servers "
            "such as vLLM refuse such adapters: --only-low-rank leaves them out."
        )
    if any(isinstance(update, Stacked) for update in updates.values()):
        notes.append(
            "Experts are stored as updates of the stacked parameters that the model class has (target_parameters), "
            "gate and up by one SVD, at the largest rank that any expert needs: PEFT 0.19.1 and later loads them with "
            "transformers 5."
        )
    dense = [path for path, update in updates.items() if isinstance(update, LowRank) and not update.parameter]
    if dense:
        notes.append(
            f"{len(dense)} dense layers ({dense[0]}, …) are stored as updates of their weights (target_parameters): as "
            "layers, PEFT would take them for experts by their names."
        )
    notes += low_rank_forms.advice(known, pairing.tuned_module, pairing.tuned.config)
    if any(pairing.is_tied_embedding(path) for path in updates):
        notes.append(
            "The tied embedding is stored once and whole: no low-rank form of PEFT merges it right. PEFT sets both "
            "uses; after transformers' own load_adapter call model.tie_weights()."
        )
    return notes


def findings(modules: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> list[str]:
    """What the numbers say that a user should hear."""
    notes = []
    clipped = [module["name"] for module in modules if module["clipped"]]
    if clipped:
        notes.append(f"The rank is lower than asked for where no more exists: {_some(clipped)}.")
    short = [module for module in modules if not module["reached"]]
    if short:
        worst = min(short, key=lambda module: module["captured"])
        names = [module["name"] for module in short]
        captured = f"{worst['name']} captures {worst['captured']:.4f}"
        notes.append(f"The goal is not reached within the cap and float32: {_some(names)}; {captured}.")
    notes += _by_auto(modules, totals.get("recognised", {}))
    notes += _of_budget(totals.get("budget", {}))
    large = [module for module in modules if (module["relative"] or 0) > 1]
    if modules and len(large) > len(modules) // 2:
        notes.append("ΔW is larger than the weights in most modules: is this really the base of the tuned checkpoint?")
    return notes


def _by_auto(modules: Sequence[Mapping[str, Any]], recognised: Mapping[str, Any]) -> list[str]:
    """Where `--rank auto` did not decide, and where what it left out may be more than noise."""
    notes = []
    if recognised.get("what") == "unknown" and recognised["of"] > 1:
        notes.append(
            f"Rank auto found {recognised['said']}: each keeps what stands out of the rounding noise. Of a merged "
            "adapter that may be less than its rank, as what is weaker than the noise is lost."
        )
    dense = [module for module in modules if module.get("rank_rule", "").startswith("energy")]
    if dense:
        reasons = Counter(module["rank_rule"] for module in dense)
        said = "; ".join(f"{count} by {rule}" for rule, count in reasons.items())
        names = _some([module["name"] for module in dense])
        notes.append(f"Not of low rank and rounding noise, so the rank is chosen otherwise: {names} ({said}).")
    faint = [module["name"] for module in modules if module.get("noise_share", 0) > _FAINT and module not in dense]
    if faint:
        notes.append(
            f"Most of the difference is no larger than the tuned checkpoint's rounding, and was left out as noise: "
            f"{_some(faint)}. If this is no merged adapter but a full fine-tune, choose the rank by --energy."
        )
    return notes


def _of_budget(budget: Mapping[str, Any]) -> list[str]:
    """Where the budget was not what decided."""
    notes = []
    capped = budget.get("at_max_rank", ())
    if capped:
        notes.append(f"Ranks are held back by --max-rank, not by the budget: {_some(capped)}.")
    elif budget and budget["density"] is None and budget["uniform_rank"] is None and budget["captured"] > _ALL:
        notes.append("The budget does not decide: it holds all that the differences have.")
    return notes


def _some(names: Sequence[str]) -> str:
    """One name, or the first of several with their number."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

"""ΔW of whatever kind, as matrices that algebra is held against."""


def changes(adapter, base):
    """(Module path, expert) → ΔW in float64 of every update, experts one by one; modules without a weight left out.

    Args:
        adapter: the updates.
        base: stored tensors by name.
    """
    found = {}
    for path, update in adapter.items():
        parts = [update.part(expert) for expert in range(update.experts)] if hasattr(update, "experts") else [update]
        for index, part in enumerate(parts):
            weight = base.get(f"{path}.weight")
            if weight is not None:
                weight = weight.double().flatten(1)
                out = (part.shape or (weight.shape[0],))[0]
                weight = weight if part.fits(tuple(weight.shape)) or out == weight.shape[0] else weight.T
            found[path, index] = part.delta_weight(weight).double()
    return found

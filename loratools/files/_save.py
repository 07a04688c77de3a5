"""Save an adapter: weights and configuration, nothing else. Reports and cards are the engine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters import AbstractUpdate, Adapter, LowRank, Sum
from loratools.adapters.algebra import as_products, finite, without_products
from loratools.errors import NonFiniteError, UsageError
from loratools.files import locate
from loratools.formats import Encoded, codec_named
from loratools.storage.files import ReadOnlyFile
from loratools.storage.outputs import OutputDirectory
from loratools.storage.writer import SafetensorsWriter, ScratchFile, WrittenFile, write_bytes_durably
from loratools.tensors import ComputedBytes, TensorRef, TensorSpec, bytes_of, dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch

Keeper = Callable[[str, "torch.Tensor"], TensorRef]
"""Takes a named tensor out of memory and gives a reference to it."""


def save(adapter: Adapter, output: locate.Source, format: str = "peft", *, overwrite: bool = False) -> None:
    """Write `adapter` to the directory `output`: atomically, weights and configuration only.

    Sums are concatenated with their scaling baked in (alpha = r); everything else stays as it was read. Where the
    format cannot hold different kinds of updates in one adapter, those that are products become plain LoRA too.
    A base that the adapter names by a local path is left out of the configuration.

    Raises:
        UnsupportedError: the format cannot hold it, not even so.
        OutputExistsError: something is there, and `overwrite` is false.
        NonFiniteError: a sum would be taken over NaN or infinity.
    """
    path = Path(output)
    locate.require_directory_name(path)
    if not adapter:
        raise UsageError("The adapter has no module: there is nothing to save.")
    needed = sum(ref.nbytes for update in adapter.values() for ref in update.tensors)
    OutputDirectory.check(path, overwrite, files_behind(adapter), 2 * needed)
    with OutputDirectory(path, overwrite=overwrite) as out:
        scratch = ScratchFile(out.path)
        keep = partial(to_scratch, scratch)
        summed = any(isinstance(update, Sum) for update in adapter.values())
        products = summed or _needs_products(adapter, format)
        alike = {name: as_products(update) if products else update for name, update in adapter.items()}
        held = {name: without_products(name, update) if isinstance(update, Sum) and not update.rank else update
                for name, update in alike.items()}  # fmt: skip
        whole = adapter.with_updates({name: settled(name, each, keep) for name, each in held.items() if each})
        write_weights(encode_adapter(whole, format=format), out.path)
        out.publish()


def _needs_products(adapter: Adapter, format: str) -> bool:
    """Whether the format cannot hold the kinds of an adapter together, and could if they were plain products."""
    changing = [update for update in adapter.values() if update.changes_weight]
    mixed = len({type(update) for update in changing}) > 1
    return all(update.products if mixed else update.terms for update in changing) and bool(
        codec_named(format).cannot_hold(adapter)
    )


def files_behind(adapter: Adapter) -> list[Path]:
    """Every file and directory that an adapter in memory still reads from."""
    refs = [ref for update in adapter.values() for ref in update.tensors]
    files = dict.fromkeys(ref.source.path for ref in refs if isinstance(ref.source, ReadOnlyFile))
    return list(dict.fromkeys((*adapter.files, *files, *(file.parent for file in files))))


def encode_adapter(adapter: Adapter, *, format: str, siblings: Collection[str] = ()) -> Encoded:
    """Keys and configuration of a settled adapter in a dialect."""
    return codec_named(format).encode(adapter, siblings=siblings)


def write_weights(encoded: Encoded, directory: Path) -> list[WrittenFile]:
    """Write everything of an encoded adapter into an existing directory; tensors are copied in the kernel."""
    written = [_write(directory / encoded.weights_name, encoded.tensors, encoded.metadata)]
    written += [_write(directory / name, tensors, {}) for name, tensors in encoded.side_tensors.items()]
    for name, text in encoded.texts.items():
        write_bytes_durably(directory / name, text.encode())
    return written


def _write(path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> WrittenFile:
    writer = SafetensorsWriter(path, [ref.spec for ref in tensors.values()], metadata)
    for name, ref in tensors.items():
        if isinstance(ref.source, ReadOnlyFile):
            writer.copy(name, ref)
        else:
            writer.write(name, memoryview(ref.read()))
    return writer.finish()


def settled(path: str, update: AbstractUpdate, keep: Keeper) -> AbstractUpdate:
    """`update` as a file can hold it: sums are concatenated (see `concatenated`), computed tensors are computed."""
    if isinstance(update, Sum):
        return concatenated(path, update, keep)
    fresh: dict[str, Any] = {
        field.name: keep(f"{path}.{field.name}", scaled_exactly(ref, 1.0))
        for field in dataclasses.fields(update)
        if isinstance(ref := getattr(update, field.name), TensorRef) and isinstance(ref.source, ComputedBytes)
    }
    return dataclasses.replace(update, **fresh) if fresh else update


def concatenated(path: str, update: Sum, keep: Keeper) -> LowRank:
    """A sum as one product; `keep` takes its factors out of memory.

    Law: ΔW is unchanged to 1e-6. Where all scales agree, factors keep their bytes and alpha says the scale;
    otherwise the scale goes into B and alpha = r (see `concatenated_factors` for the dtype).
    """
    lora_A, lora_B, alpha = concatenated_factors(update)
    bias = None if update.bias is None else keep(f"{path}.bias", finite(update.bias).float())
    return LowRank(
        lora_A=keep(f"{path}.lora_A", lora_A),
        lora_B=keep(f"{path}.lora_B", lora_B),
        alpha=alpha,
        of=update.layer,
        parameter=update.parameter,
        kernel=update.kernel,
        bias=bias,
        replaced=update.replaced,
        added_rows=update.added_rows,
        patches=update.patches,
    )


def concatenated_factors(update: Sum) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`(A, B, alpha)` with `alpha / R · B A = Σ scale_i B_i A_i`.

    One dtype for both: the inputs' where all agree and nothing has to be multiplied (or only by a
    power of two, which is exact), else float32.
    """
    import torch

    terms = update.terms
    rank = sum(term.rank for term in terms)
    scales = {term.scale for term in terms}
    if len(scales) == 1 and update.bias is None:  # a bias holds its scale already: that of the product must be 1
        shared = scales.pop()
        downs, ups = [_read(term.lora_A) for term in terms], [_read(term.lora_B) for term in terms]
        return *_of_one_dtype(downs, ups), shared * rank
    downs = [_read(term.lora_A) for term in terms]
    ups = [scaled_exactly(term.lora_B, term.scale) for term in terms]
    lora_A, lora_B = _of_one_dtype(downs, ups)
    assert isinstance(lora_A, torch.Tensor)
    return lora_A, lora_B, float(rank)


def _read(ref: TensorRef) -> torch.Tensor:
    return scaled_exactly(ref, 1.0)


def scaled_exactly(ref: TensorRef, scale: float) -> torch.Tensor:
    """`scale · tensor` in its own dtype where that is exact (a power of two, mostly), else in float32.

    A computed tensor's own dtype is that of what it is made of first.

    Raises:
        NonFiniteError: the tensor holds NaN or infinity, or the product does.
    """
    import torch

    from loratools.linalg import non_finite_count

    tensor = finite(ref)
    if scale == 1 and not isinstance(ref.source, ComputedBytes):
        return tensor
    dtype, wide = torch_dtype(_stored(ref).dtype), tensor.double().mul_(scale)
    del tensor  # a factor may be the largest thing in memory
    exact = wide.to(dtype)
    if torch.equal(exact.double(), wide):
        return exact
    product = wide.float()
    if non_finite_count(product):
        raise NonFiniteError(f"Multiplied by {scale:g}, the factor overflows float32.", tensor=ref.name)
    return product


def _stored(ref: TensorRef) -> TensorRef:
    """What a computed tensor is made of first."""
    while isinstance(ref.source, ComputedBytes):
        ref = ref.source.inputs[0]
    return ref


def _of_one_dtype(downs: list[torch.Tensor], ups: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    dtypes = {tensor.dtype for tensor in (*downs, *ups)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.cat([down.to(dtype) for down in downs]), torch.cat([up.to(dtype) for up in ups], dim=1)


def to_scratch(scratch: ScratchFile, name: str, tensor: torch.Tensor) -> TensorRef:
    """Move a tensor out of memory; the reference reads it back."""
    held = tensor.detach().cpu().contiguous()
    return scratch.append(name, bytes_of(held), TensorSpec(name, dtype_name(held.dtype), tuple(held.shape)))

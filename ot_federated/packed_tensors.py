"""How the emulator's frozen weights are packed on the wire and on disk: fewer bits, or only what is not zero.

int8 and int4 are symmetric, one bfloat16 scale for each group of 64 numbers along the last dimension (as in Tim
Dettmers, Luke Zettlemoyer, "The case for 4-bit precision", ICML 2023, https://arxiv.org/abs/2212.09720, section 2). A
group's scale is the one of eight with the least squared error. Packed weights are unpacked when the emulated model is
loaded: this saves bytes, not memory. They protect the model owner less than fewer blocks do, because the emulator
stays close to the middle.

Of the libraries that quantise, torchao and optimum-quanto keep their weights in tensor subclasses that are made to
compute, and save them by pickle or by formats still marked as prototypes; here plain arrays in safetensors are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ot_federated.bundle import PackedTensor
from ot_federated.errors import BundleError

group_size = 64
largest_code = {"int8": 127, "int4": 7}
# Clipping the largest numbers of a group makes the others finer.
scale_factors = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
# Below this share of zeros a mask costs more than it saves.
sparse_fraction = 0.2


def pack(
    tensors: Mapping[str, torch.Tensor], *, transport: str
) -> tuple[dict[str, torch.Tensor], tuple[PackedTensor, ...]]:
    """Return the arrays to store and how they are read back, in the order in which they were packed.

    Matrices are packed; vectors (norms, biases) stay exact. A matrix with many zeros is first stored without them.

    Args:
        tensors: Weights by name.
        transport: ``as-is``, ``bfloat16``, ``float16``, ``int8`` or ``int4``.
    """
    arrays = dict(tensors)
    packed: list[PackedTensor] = []
    for name in [name for name, tensor in tensors.items() if tensor.dim() > 1]:
        tensor = arrays[name]
        if 1 - int(tensor.count_nonzero()) / max(1, tensor.numel()) >= sparse_fraction:
            packed.append(PackedTensor(name, "sparse", tuple(tensor.shape)))
            _replace(arrays, name, _drop_zeros(tensor))
            name = f"{name}.values"  # noqa: PLW2901  (what is left of it is packed next)
            tensor = arrays[name]
            if not tensor.numel():
                continue
        if transport in largest_code:
            packed.append(PackedTensor(name, transport, tuple(tensor.shape)))
            _replace(arrays, name, _quantise(tensor, transport))
        elif transport != "as-is" and tensor.dtype != getattr(torch, transport):
            packed.append(PackedTensor(name, transport, tuple(tensor.shape)))
            _replace(arrays, name, {"values": tensor.to(getattr(torch, transport))})
    return arrays, tuple(packed)


def unpack(
    arrays: Mapping[str, torch.Tensor], packed: Sequence[PackedTensor], *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the weights in ``dtype``: the inverse of :func:`pack`. What was not packed is passed on as it is.

    Raises:
        BundleError: If an array is missing, or of another type or size than its entry needs.
    """
    tensors = dict(arrays)
    for entry in reversed(packed):
        parts = {part: tensors.pop(f"{entry.name}.{part}", None) for part in _parts(entry.form)}
        missing = [part for part, tensor in parts.items() if tensor is None]
        if missing:
            raise BundleError(f"The bundle lacks {entry.name}.{missing[0]}, a part of a packed tensor.")
        found = {part: tensor for part, tensor in parts.items() if tensor is not None}
        try:
            tensors[entry.name] = _restore(entry, found).to(dtype)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise BundleError(
                f"The packed tensor {entry.name} does not fit its shape {list(entry.shape)} as {entry.form}."
            ) from error
    return tensors


def _replace(arrays: dict[str, torch.Tensor], name: str, parts: Mapping[str, torch.Tensor]) -> None:
    del arrays[name]
    arrays.update({f"{name}.{part}": tensor for part, tensor in parts.items()})


def _parts(form: str) -> tuple[str, ...]:
    if form in largest_code:
        return ("codes", "scales")
    return ("mask", "values") if form == "sparse" else ("values",)


def _restore(entry: PackedTensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if entry.form in largest_code:
        return _dequantise(parts["codes"], parts["scales"], entry.form, entry.shape)
    if entry.form == "sparse":
        return _put_zeros(parts["mask"], parts["values"], entry.shape)
    return parts["values"].view(entry.shape)


def _quantise(tensor: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """Return codes, ``int8`` or two 4-bit ones in a ``uint8``, and scales ``(rows, groups)`` in bfloat16."""
    rows = tensor.detach().float().cpu().reshape(-1, tensor.shape[-1])
    padding = -rows.shape[1] % group_size
    groups = torch.nn.functional.pad(rows, (0, padding)).view(len(rows), -1, group_size)
    limit = largest_code[form]
    largest = groups.abs().amax(-1, keepdim=True)
    best_error = torch.full_like(largest, math.inf)
    scales = torch.zeros_like(largest)
    for factor in scale_factors:
        scale = (factor * largest / limit).to(torch.bfloat16).float()
        error = (_codes(groups, scale, limit) * scale - groups).square().sum(-1, keepdim=True)
        scales = torch.where(error < best_error, scale, scales)
        best_error = torch.minimum(error, best_error)
    codes = _codes(groups, scales, limit).to(torch.int8).view(len(rows), -1)[:, : rows.shape[1]]
    if form == "int4":
        shifted = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, codes.shape[1] % 2))
        codes = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return {"codes": codes.contiguous(), "scales": scales.squeeze(-1).to(torch.bfloat16)}


def _codes(groups: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    # A group of zeros has scale 0; any divisor gives codes 0.
    return torch.round(groups / torch.where(scale > 0, scale, 1.0)).clamp(-limit, limit)


def _dequantise(codes: torch.Tensor, scales: torch.Tensor, form: str, shape: Sequence[int]) -> torch.Tensor:
    if codes.dtype != (torch.int8 if form == "int8" else torch.uint8) or scales.dtype != torch.bfloat16:
        raise ValueError("codes or scales of another type")
    if form == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8) - 8
    codes = codes[:, : shape[-1]]
    if codes.shape[1] != shape[-1] or scales.shape != (len(codes), -(-shape[-1] // group_size)):
        raise ValueError("another number of codes or scales than of weights")
    rows = codes.float() * scales.float().repeat_interleave(group_size, dim=1)[:, : shape[-1]]
    return rows.reshape(tuple(shape))


def _drop_zeros(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = (tensor != 0).cpu()
    bits = torch.from_numpy(np.packbits(mask.flatten().numpy()))
    return {"mask": bits, "values": tensor.detach().cpu()[mask]}


def _put_zeros(mask: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if mask.shape != (-(-math.prod(shape) // 8),):
        raise ValueError("another number of bits than of weights")
    where = torch.from_numpy(np.unpackbits(mask.numpy(), count=math.prod(shape)).astype(bool))
    if int(where.sum()) != len(values):
        raise ValueError("more or fewer values than the mask has")
    dense = torch.zeros(math.prod(shape), dtype=values.dtype)
    dense[where] = values
    return dense.view(tuple(shape))

"""The device and the number type of a run, chosen at run time."""

from __future__ import annotations

import torch

from ot_federated.errors import ConfigError

dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> str:
    """Return a torch device name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: If torch cannot use the named device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={name!r} cannot be used here ({error}). Use auto, cpu, cuda, cuda:N or mps."
        ) from error
    return name


def choose_dtype(name: str, *, device: str) -> torch.dtype:
    """Return the weights' type; ``auto`` takes bfloat16 where the device computes in it natively, else float32."""
    if name != "auto":
        return dtypes[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    # torch offers these tests under private names only; without them float32 is always right, only slower.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test is not None)

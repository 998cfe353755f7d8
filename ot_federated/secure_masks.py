"""The masks of secure aggregation: AES-256 in counter mode in place of Flower's generator.

Flower 1.41 draws the masks of SecAgg+ (Bell et al. 2020, https://eprint.iacr.org/2020/704) from numpy's Mersenne
Twister under a seed of 32 bits, to which it folds the 256 bits of the key. A server can try four billion seeds: it
would see every update. The protocol needs a pseudorandom generator at full strength; both sides must use the same one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


def draw_masks(seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """Return uniform integers in [0, num_range) for each shape; the same seed gives the same.

    Args:
        seed: The key: a shared secret, or a client's own random bytes.
        num_range: A power of two, at most 2^32.
        dimensions_list: Shapes.

    Raises:
        ValueError: If ``num_range`` is no power of two up to 2^32.
    """
    if num_range & (num_range - 1) or not 0 < num_range <= 2**32:
        raise ValueError(f"{num_range} is not a power of two up to 2^32.")
    key = hashlib.sha256(b"ot-federated secure aggregation mask" + seed).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    masks = []
    for shape in dimensions_list:
        drawn = np.frombuffer(stream.update(bytes(4 * math.prod(shape))), dtype="<u4")
        masks.append((drawn & np.uint32(num_range - 1)).astype(np.int64).reshape(shape))
    return masks


def strengthen(*modules: Any) -> None:
    """Make Flower's modules draw their masks here.

    Raises:
        AttributeError: If a module draws them by another name: this release of Flower is not known.
    """
    for module in modules:
        if not callable(getattr(module, "pseudo_rand_gen", None)):
            raise AttributeError(f"{module.__name__} has no pseudo_rand_gen: use the Flower release of pyproject.toml.")
        module.pseudo_rand_gen = draw_masks

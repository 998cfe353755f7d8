"""Random numbers for privacy: AES-256 in counter mode, keyed by the operating system.

Differential privacy is void for whoever can guess the noise or the sampling, so neither may come from a seeded
generator: two clients with one configured seed would draw equal noise, and torch's Mersenne Twister can be
reconstructed from its output. The key stream here is that of NIST SP 800-38A (counter mode); nobody without the
32 key bytes, which stay in this process, tells it from random.

Floating point, honestly. Normals are Box and Muller's (Annals of Mathematical Statistics 29, 1958) in float64 from
64-bit integers: the tails end at 9.42 standard deviations (mass 5e-21), and between them the values form a grid of
relative width near 2^-53, not a continuum. Mironov ("On significance of the least significant bits for
differential privacy", CCS 2012) showed that such gaps can betray the hidden sum when an attacker reads every bit of
the result. Callers therefore add the noise in float64 and round the result once to float32, which drops the 29 bits
where the gaps lie; what leaves a client has gone through AdamW and the update's own rounding besides. That closes
the attack as published. It is not a proof: a proof needs discrete noise, which this module does not offer.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from typing import final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

# 8 MB of float64 a piece: the temporary arrays stay in the processor's cache or near it.
_piece = 1 << 20


@final
class SecureRandom:
    """A cryptographic stream of random numbers; it cannot be copied, pickled, or carried through a fork.

    Args:
        test_seed: Makes the stream repeatable. For tests alone: whoever knows it can subtract the noise.
    """

    def __init__(self, test_seed: bytes | None = None) -> None:
        if test_seed is None:
            key = os.urandom(32)
        else:
            warnings.warn(
                "SecureRandom was given a test_seed: its noise can be regenerated, so nothing trained with it is "
                "private. Leave the seed out everywhere but in tests.",
                stacklevel=2,
            )
            key = hashlib.sha256(b"ot-federated test stream " + test_seed).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def draw_integers(self, num: int) -> NDArray[np.uint64]:
        """Return ``num`` independent uniform 64-bit integers.

        Raises:
            RuntimeError: If the process has forked since: parent and child would draw the same numbers.
        """
        if os.getpid() != self._process:
            raise RuntimeError("SecureRandom was made before a fork; make a new one in this process.")
        return np.frombuffer(self._stream.update(bytes(8 * num)), dtype="<u8")

    def sample_indices(self, num_examples: int, *, sample_rate: float) -> list[int]:
        """Return a Poisson sample: each index below ``num_examples`` is in, alone, with chance ``sample_rate``.

        The chance is exact to 2^-53.
        """
        uniforms = (self.draw_integers(num_examples) >> np.uint64(11)) * 2.0**-53
        return [int(index) for index in np.flatnonzero(uniforms < sample_rate)]

    def draw_normals(self, num: int) -> NDArray[np.float64]:
        """Return ``num`` independent standard normals."""
        normals = np.empty(num)
        for start in range(0, num, _piece):
            part = normals[start : start + _piece]
            part[:] = self._box_muller(-(-len(part) // 2))[: len(part)]
        return normals

    def _box_muller(self, num_pairs: int) -> NDArray[np.float64]:
        integers = self.draw_integers(2 * num_pairs)
        # In (0, 1]: the logarithm must exist. All 64 bits count near 0, which is where the tails come from.
        radii = np.sqrt(-2.0 * np.log((integers[:num_pairs].astype(np.float64) + 1.0) * 2.0**-64))
        angles = integers[num_pairs:] * (2.0 * math.pi * 2.0**-64)
        return np.concatenate([radii * np.cos(angles), radii * np.sin(angles)])

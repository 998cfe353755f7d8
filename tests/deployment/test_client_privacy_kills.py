"""A server that releases noised sums is killed at random instants; its books never hold fewer than it released.

The accountant is replaced by a count, which takes no time, so that the kills land in the writing: at a random fsync
or rename, which the process deals itself.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ot_federated.model_owner.client_privacy import ClientPrivacyBooks

num_kills = 60
# A line on the unbuffered pipe stands for the noised sum. A restart begins with the round before the last: as if its
# checkpoint had been lost.
worker = """
import os, signal, sys
from pathlib import Path
from ot_federated.model_owner import client_privacy
from ot_federated.model_owner.client_privacy import ClientPrivacyBooks, ClientRelease
client_privacy.epsilon_of = lambda history, *, delta: float(len(history))
books = ClientPrivacyBooks(Path(sys.argv[1]), delta=1e-5)
server_round, calls_left = max(1, int(sys.argv[2]) - 1), int(sys.argv[3])

def deadly(call):
    def counted(*arguments, **keywords):
        global calls_left
        calls_left -= 1
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return counted

os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
while True:
    books.pay(ClientRelease(server_round=server_round, noise_multiplier=1.0, clipping_norm=0.1, clients_per_round=100))
    os.write(1, b"%d\\n" % server_round)
    server_round += 1
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_kills_never_count_too_little(tmp_path: Path) -> None:
    dice = random.Random(20250211)
    released: Counter[int] = Counter()
    for _ in range(num_kills):
        last, calls = max(released, default=1), dice.randint(1, 12)
        process = subprocess.run(
            [sys.executable, "-c", worker, str(tmp_path), str(last), str(calls)],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == -9, process.stderr.decode()
        released.update(int(line) for line in process.stdout.split())
        paid = Counter(release.server_round for release in ClientPrivacyBooks(tmp_path, delta=1e-5).releases)
        assert all(paid[server_round] >= count for server_round, count in released.items())
    assert sum(released.values()) <= sum(paid.values()) <= sum(released.values()) + num_kills
    assert sum(released.values()) > num_kills / 2
    assert max(released.values()) > 1  # rounds were repeated, and counted again
    # Some kills came between the rename and the return: a line too many, never one too few.
    assert sum(paid.values()) > sum(released.values())

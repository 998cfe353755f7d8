"""A process that spends is killed at 200 random instants; what it trained is never more than what its ledger counts.

The accountant is replaced by a sum of steps, which takes no time: so the kills land in the writing, where they
could hurt, and not in mathematics. Every second kill comes from outside after a random time; the others the process
deals itself at a random fsync or rename, because how often a random time hits the gap between two renames depends on
the disk.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ot_federated.data_owner.privacy_ledger import PrivacyLedger

num_kills = 200
# Spends, "trains" (one line on an unbuffered pipe says that the round was trained), saves its reply; on a restart
# it begins with the round before the last, as a server would ask again.
worker = """
import os, signal, sys
from pathlib import Path
from ot_federated.data_owner import privacy_ledger
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, Release
privacy_ledger.epsilon_of = lambda history, *, delta: float(sum(item.num_steps for item in history))
ledger = PrivacyLedger.open(Path(sys.argv[1]), dataset_id="ward-7")
server_round = max(1, int(sys.argv[2]) - 1)
calls_left = int(sys.argv[3])  # negative: only the parent kills

def deadly(call):
    def counted(*arguments, **keywords):
        global calls_left
        calls_left -= 1
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return counted

os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
os.write(1, b"ready 0\\n")
while True:
    release = Release(run="run", server_round=server_round, client="c", noise_multiplier=1.0, sample_rate=0.1,
        num_steps=1, max_grad_norm=1.0, num_examples=100)
    receipt = ledger.spend(release, budget_epsilon=float("inf"), delta=1e-5)
    if receipt.already_spent:
        assert receipt.reply == b"update %d" % server_round
        os.write(1, b"repeated %d\\n" % server_round)
    else:
        os.write(1, b"trained %d\\n" % server_round)
        ledger.save_reply(b"update %d" % server_round, run="run", server_round=server_round, client="c")
    server_round += 1
"""


def run_and_kill(root: Path, server_round: int, *, seconds: float = 0.0, calls: int = -1) -> list[list[str]]:
    """Let a worker run for ``seconds``, or up to its ``calls``-th fsync or rename; return its lines."""
    process = subprocess.Popen(
        [sys.executable, "-c", worker, str(root), str(server_round), str(calls)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.readline()
    if calls < 0:
        time.sleep(seconds)
        process.kill()
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == -9, errors.decode()
    return [line.split() for line in (first + rest).decode().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_200_kills_never_count_too_little(tmp_path):
    dice = random.Random(20240705)
    trained: Counter[int] = Counter()
    num_repeated = num_ahead = num_left_over = 0
    for kill in range(num_kills):
        last = max(trained, default=1)
        if kill % 2:
            lines = run_and_kill(tmp_path, last, calls=dice.randint(1, 24))
        else:
            lines = run_and_kill(tmp_path, last, seconds=dice.uniform(0, 0.1))
        for what, server_round in lines:
            trained[int(server_round)] += what == "trained"
            num_repeated += what == "repeated"
        trained += Counter()  # drops zeros
        ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
        paid = Counter(entry.release.server_round for entry in ledger.entries)
        # Each training has its own entry, and a kill leaves at most one entry without a training.
        assert all(paid[server_round] >= count for server_round, count in trained.items())
        num_ahead += not (tmp_path / "ward-7" / "anchor.json").exists() or ledger._read()[1] != ledger.head
        num_left_over += bool(list((tmp_path / "ward-7").glob(".*.partial")))
    assert 0 <= sum(paid.values()) - sum(trained.values()) <= num_kills
    # The kills did hit what they should: between the two files, in the middle of a write, before and after a reply.
    assert num_ahead > 0
    assert num_left_over > 0
    assert num_repeated > 0
    assert sum(trained.values()) > num_kills / 4
    sys.stderr.write(
        f"{num_kills} kills: {sum(trained.values())} trainings, {sum(paid.values())} entries, {num_repeated} free "
        f"repeats; {num_ahead} kills between ledger and anchor, {num_left_over} inside a write ({os.name})\n"
    )
